"""Real commands in several processes on the digits: started, watched through their output, and ended by signals."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

REPOSITORY = Path(__file__).resolve().parents[2]
LIMIT = 300.0  # seconds, on a machine that is busy with other things
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
LAUNCHER, GROUP = "launcher", "group"  # whom a signal is sent to, beside a rank
# Small, and with everything that draws random numbers. It saves at nearly every step.
RECIPE = """
name = "tiny"
[model]
blocks = [1, 1]
width_multiplier = 0.25
stem_width = 8
drop_path = 0.1
dropout = 0.1
[schedule]
name = "one_cycle"
learning_rate = 0.1
[ema]
decay = 0.9
[augment]
cutout_holes = 1
mixup_alpha = 0.2
[train]
epochs = 3
batch_size = 64
log_interval = 1
checkpoint_minutes = 0.002
"""
STEPS = 22  # in an epoch: 1,438 images by 64
FILES = {
    "recipe.toml", "metrics.jsonl", "checkpoint.pt", "best.pt", "weights.safetensors",
    "curves.png", "augmented.png", "confusion.png", "report.md", "report.html",
}  # fmt: skip


def processes(*options: object, count: int | str = 2) -> list[str]:
    """The command that starts its processes itself."""
    return [sys.executable, "-m", "rsengine.train", "--processes", str(count), *map(str, options)]


def torchrun(*options: object, agent: tuple[str, ...] = (), program: tuple[str, ...] = ("-m", "rsengine.train")):
    """The same under torchrun, with the options ``agent`` of it."""
    return [*TORCHRUN, *agent, *program, *map(str, options)]


@dataclass(frozen=True)
class Ended:
    """How a command ended: its exit status, its two outputs, and the seconds since the last signal."""

    status: int
    out: str
    err: str
    seconds: float

    def errors(self) -> list[str]:
        """The lines for the user about errors, without those of torchrun."""
        return [line for line in self.err.splitlines() if line.startswith("error: ")]


class Command:
    """A command that runs in a session of its own, as one in a terminal is a process group of its own."""

    def __init__(self, words: list[str], folder: Path, **environment: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self._temporary = folder, folder / "temporary"
        self._temporary.mkdir(exist_ok=True)
        self._outputs = [folder / "out.txt", folder / "err.txt"]
        variables = {key: value for key, value in os.environ.items() if not key.startswith(("RANK", "WORLD", "LOCAL"))}
        variables |= {
            "PYTHONPATH": str(REPOSITORY),
            "OMP_NUM_THREADS": "1",
            "TMPDIR": str(self._temporary),
        } | environment
        with self._outputs[0].open("w") as out, self._outputs[1].open("w") as err:
            self.process = subprocess.Popen(
                words, stdout=out, stderr=err, cwd=folder, env=variables, start_new_session=True
            )
        self._shared: set[str] = set()
        self.members: dict[int, psutil.Process] = {}  # by rank, when the last signal was sent
        self._signalled = time.monotonic()

    def wait_for(self, happened: Callable[[], Any]) -> Any:
        """Wait until ``happened()`` is true, and return what it is. The command must not end before."""
        deadline = time.monotonic() + LIMIT
        while not (found := happened()):
            assert self.process.poll() is None and time.monotonic() < deadline, self._said()
            time.sleep(0.02)
        return found

    def wait_for_step(self, run: Path, step: int) -> None:
        """Wait until the log of ``run`` has a record of ``step`` or a later one."""
        self.wait_for(lambda: steps_logged(run) >= step)

    def send(self, number: int, target: int | str) -> None:
        """Send a signal to a rank, to the launcher (or torchrun), or to its group, as Ctrl-C in a terminal does."""
        self.members = self.found()
        for member in self.members.values():
            with contextlib.suppress(psutil.NoSuchProcess):
                self._shared |= {each.path for each in member.memory_maps() if each.path.startswith("/dev/shm/")}
        self._signalled = time.monotonic()
        if target == GROUP:
            os.killpg(self.process.pid, number)
        elif target == LAUNCHER:
            self.process.send_signal(number)
        else:
            self.members[target].send_signal(number)

    def end(self) -> Ended:
        """Wait for the end. Nothing may be left then: no process, shared memory, temporary file or lock."""
        status = self.process.wait(LIMIT)
        seconds = time.monotonic() - self._signalled
        said = [path.read_text() for path in self._outputs]
        psutil.wait_procs(self.members.values(), timeout=1)
        assert not [each for each in self.members.values() if each.is_running()], self._said()
        left = [path for path in self._temporary.iterdir() if not path.name.startswith("torchelastic_")]  # torchrun's
        left += [path for path in self._shared if Path(path).exists()]
        assert not left, (left, self._said())
        return Ended(status, *said, seconds)

    def found(self) -> dict[int, psutil.Process]:
        """The processes that train, by rank."""
        found = {}
        for process in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
                variables = process.environ()
                if "RANK" in variables and process.ppid() == self.process.pid:
                    found[int(variables["RANK"])] = process
        return found

    def _said(self) -> str:
        return "".join(path.read_text() for path in self._outputs)


def steps_logged(run: Path) -> int:
    """The last step in the log of ``run``, which may be written meanwhile."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("\n")), default=0)


@contextlib.contextmanager
def started(words: list[str], folder: Path, **environment: str) -> Iterator[Command]:
    """Start ``words`` in ``folder``; whatever happens in the block, no process is left after it."""
    command = Command(words, folder, **environment)
    try:
        yield command
    finally:
        alive = command.found() if command.process.poll() is None else {}
        for process in [*command.members.values(), *alive.values()]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        command.process.kill()
        command.process.wait()


def ended(words: list[str], folder: Path, **environment: str) -> Ended:
    """Run ``words`` in ``folder`` to their end."""
    with started(words, folder, **environment) as command:
        return command.end()


def interrupted_at(words: list[str], folder: Path, run: Path, step: int, number: int, target: int | str) -> Ended:
    """Run ``words`` in ``folder``, and send a signal when the log of ``run`` has come to ``step``."""
    with started(words, folder) as command:
        command.wait_for_step(run, step)
        command.send(number, target)
        return command.end()
