"""The progress of a study in one line: trials done, those under way, and the time left."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence

from rsengine.run.progress import QUIET_SECONDS, duration
from rsengine.study.trials import Trial

_EVERY = 1.0  # seconds between two looks at the trials


class Progress:
    """One line, redrawn on a terminal and printed now and then elsewhere.

    Args:
        trials: all of them.
        workers: how many run at a time.
        say: prints a line.
    """

    def __init__(self, trials: Sequence[Trial], workers: int, say: Callable[[str], None], *, quiet: bool) -> None:
        self.trials, self.workers, self.say = trials, workers, say
        self.is_live = not quiet and sys.stderr.isatty()
        self.spoken = self.looked = time.monotonic()

    def line(self, words: str) -> None:
        """Print ``words`` as a line that stays."""
        self._clear()
        self.say(words)
        self.spoken, self.looked = time.monotonic(), 0.0

    def show(self, running: Sequence[Trial], ended: Sequence[Trial]) -> None:
        """Show where the study is, if it is time to."""
        now = time.monotonic()
        if now - self.looked < _EVERY or not (self.is_live or now - self.spoken >= QUIET_SECONDS):
            return
        self.looked = now
        words = self.words(running, ended)
        if self.is_live:
            sys.stderr.write(f"\r\x1b[2K{words}")
            sys.stderr.flush()
        else:
            self.spoken = now
            self.say(words)

    def words(self, running: Sequence[Trial], ended: Sequence[Trial]) -> str:
        """The line. The time left is counted from what the epochs of each variant have taken so far."""
        done = {trial.name: trial.progress() for trial in self.trials}
        under_way = ", ".join(
            f"{trial.name} at epoch {done[trial.name][0]:.1f}/{trial.recipe.train.epochs}" for trial in running
        )
        left = self._seconds_left(done, {trial.name for trial in ended})
        time_left = f"about {duration(left)} left" if left is not None else "time left known after the first epoch"
        return f"{len(ended)} of {len(self.trials)} trials ended; {under_way or 'none under way'}; {time_left}"

    def _seconds_left(self, done: dict[str, tuple[float, float]], ended: set[str]) -> float | None:
        spent: dict[str, tuple[float, float]] = {}
        for trial in self.trials:
            epochs, seconds = done[trial.name]
            before = spent.get(trial.variant, (0.0, 0.0))
            spent[trial.variant] = before[0] + epochs, before[1] + seconds
        total = [sum(values) for values in zip(*spent.values(), strict=True)]
        if not total[0]:
            return None
        left = 0.0
        for trial in self.trials:
            if trial.name not in ended:
                epochs, seconds = spent[trial.variant] if spent[trial.variant][0] else total
                left += max(0.0, trial.recipe.train.epochs - done[trial.name][0]) * seconds / epochs
        return left / self.workers

    def _clear(self) -> None:
        if self.is_live:
            sys.stderr.write("\r\x1b[2K")
            sys.stderr.flush()

    close = _clear
