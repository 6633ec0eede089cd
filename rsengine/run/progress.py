"""The progress of a run: a bar on a terminal and in a notebook, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from tqdm import tqdm

QUIET_SECONDS = 30.0


def duration(seconds: float) -> str:
    """Seconds in words: ``42.3 s``, ``7 min 05 s``, ``3 h 00 min 09 s``."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min {rest:02d} s" if hours else f"{minutes} min {rest:02d} s"


def in_notebook() -> bool:
    """Whether this process is the kernel of a notebook, whose cells show a bar though they are no terminal."""
    ipython = sys.modules.get("IPython")  # a kernel has imported it
    return ipython is not None and hasattr(ipython.get_ipython(), "kernel")


class Display:
    """Progress of a run of ``total`` steps of ``batch_size`` images, with the time left.

    Args:
        done: steps done before this process.
        say: prints one line.
        work: the relative cost of a step in each epoch; empty if it is the same in all.
        bar: show a bar; None: on a terminal and in a notebook.
    """

    def __init__(
        self,
        total: int,
        done: int,
        epochs: int,
        batch_size: int,
        say: Callable[[str], None],
        work: Sequence[float] = (),
        bar: bool | None = None,
    ) -> None:
        self.total, self.epochs, self.batch_size, self.say = total, epochs, batch_size, say
        self.work = list(work) or [1.0] * epochs
        self.varied = len(set(self.work)) > 1
        # tqdm's estimate assumes that all steps take the same time.
        form = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}, {rate_fmt}{postfix}]" if self.varied else None
        options = {"unit": "step", "desc": "train", "dynamic_ncols": True, "bar_format": form}
        options["disable"] = None if bar is None else not bar  # None: unless on a terminal
        if bar is None and in_notebook():
            # Standard error has the colour of a failure there, and each refresh is a message to the browser.
            options |= {"disable": False, "file": sys.stdout, "mininterval": 0.5}
        self.bar = tqdm(total=total, initial=done, **options)
        self.spoken = time.perf_counter()

    def close(self) -> None:
        self.bar.close()

    def advance(self) -> None:
        """One step is done."""
        self.bar.update()

    def interval(self, epoch: int, record: dict[str, Any]) -> None:
        """``record``: of kind ``interval``, see :mod:`rsengine.run.log`. ``epoch``: the one under way, from 1."""
        title = f"epoch {epoch}/{self.epochs}"
        numbers = (
            f"loss {record['train_loss']:.3f}, accuracy {record['train_accuracy']:.1%}, "
            f"{record['images_per_second']:.0f} images/s"
        )
        left = duration(self.steps_left(record["step"]) * self.batch_size / record["images_per_second"])
        if not self.bar.disable:
            self.bar.set_description(title, refresh=False)
            self.bar.set_postfix_str(numbers + f", about {left} left" * self.varied, refresh=False)
        elif time.perf_counter() - self.spoken >= QUIET_SECONDS:
            self.spoken = time.perf_counter()
            self.say(f"{title}, step {record['step']}/{self.total}: {numbers}, about {left} of training left")

    def steps_left(self, step: int) -> float:
        """The cost of the rest of the run after ``step`` steps, in steps like the last one."""
        each = self.total // self.epochs
        epoch, within = divmod(step, each)
        rest = sum(self.work[epoch:]) * each - (within * self.work[epoch] if within else 0.0)
        return rest / self.work[(step - 1) // each]

    def epoch(self, record: dict[str, Any]) -> None:
        """``record``: of kind ``epoch``."""
        ema = record["test_accuracy_ema"]
        line = (
            f"epoch {record['epoch']:>{len(str(self.epochs))}}/{self.epochs}: train loss {record['train_loss']:.4f}, "
            f"accuracy {record['train_accuracy']:.2%}; test accuracy {record['test_accuracy']:.2%}"
            + (f", EMA {ema:.2%}" if ema is not None else "")
            + f"; {record['images_per_second']:.0f} images/s, {duration(record['seconds'])} so far"
        )
        self.line(line)
        if record["epoch"] < self.epochs:
            self.bar.set_description(f"epoch {record['epoch'] + 1}/{self.epochs}", refresh=False)

    def line(self, line: str) -> None:
        """Print ``line`` above the progress bar, if there is one."""
        self.spoken = time.perf_counter()
        with self.bar.external_write_mode():
            self.say(line)
