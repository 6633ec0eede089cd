"""Kill runs at random moments, resume them, and compare their ends: `scripts/kill_check.sh [N [SEED]]`

A small network trains on the digits, saving about every step. `kill -9` ends it at a moment drawn from its start, its
training, its saving or its last records; then it is resumed, until N kills are done and the run has come to its end. A
run that ends before is compared, and the next one begins. Compared with a run that nobody killed are the tensors and
numbers of `weights.safetensors`, `checkpoint.pt` and `best.pt`, `recipe.toml`, and `metrics.jsonl` without its times:
each must have the same bits. No temporary file and no process may be left.

Most processes are forked from this one, which has imported PyTorch: a kill takes two seconds then, not ten. One in
eight is the command itself. Exits 1 if anything is found, and says in which folder it is kept.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib.pyplot  # noqa: F401 (here and not in each process that is forked)
import numba  # noqa: F401
import torch
import torch._dynamo
from safetensors.torch import load_file

from rsengine import train
from rsengine.data import find_dataset
from rsengine.input.choose import ffcv_problem
from rsengine.run.checkpoint import load_checkpoint
from rsengine.run.files import BEST_FILE, CHECKPOINT_FILE, RECIPE_FILE, REPORT_FILE, WEIGHTS_FILE
from rsengine.run.log import EPOCH, START, RunLog

ROOT = Path(__file__).resolve().parent.parent
ffcv_problem()  # imports FFCV where it can be

EPOCHS, STEPS = 8, 8
SETTINGS = [
    "model.blocks=[1]",
    "schedule.learning_rate=0.05",
    "train.batch_size=32",
    "train.log_interval=1",
    "train.checkpoint_minutes=0.0005",
]
TIMES = {"seconds", "epoch_seconds", "eval_seconds", "images_per_second", "loader_seconds", "checkpoint_seconds"}
MOMENTS = {"start": 2, "training": 4, "saving": 4, "records": 1}  # how often a kill aims at each
COMMAND_EVERY = 8
LONGEST = 120.0  # seconds for one process


class Fault(Exception):
    """Something that a kill must not do."""


class Run:
    """A process that works on the run in ``out``, resuming it where there is a checkpoint. Its words go to ``log``."""

    def __init__(self, out: Path, log: Path, *, forked: bool) -> None:
        arguments = ["--recipe", "digits", "--data", "digits", "--device", "cpu", "--out", str(out)]
        arguments += [f"--epochs={EPOCHS}", f"--limit-train-batches={STEPS}", *(f"--set={each}" for each in SETTINGS)]
        arguments += ["--resume"] * (out / CHECKPOINT_FILE).exists()
        self.out, self.log, self.status = out, log, None
        self.before = _records(out, START)[-1:]
        self.deadline = time.monotonic() + LONGEST
        with log.open("wb") as file:
            if not forked:
                command = [sys.executable, "-m", "rsengine.train", *arguments]
                self.pid = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=file, start_new_session=True).pid
            elif not (pid := os.fork()):
                _work(arguments, file.fileno())
            else:
                self.pid = pid

    def ended(self) -> bool:
        """Whether it has ended by itself. Raises :class:`Fault` if not well, or not in time."""
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.status = os.waitstatus_to_exitcode(status) if pid else None
        if self.status:
            raise Fault(f"exit status {self.status}: {self.log.read_text(errors='replace')[-2000:]}")
        if self.status is None and time.monotonic() > self.deadline:
            self.kill()
            raise Fault(f"did not end within {LONGEST:g} seconds: {self.log.read_text(errors='replace')[-2000:]}")
        return self.status is not None

    def wait_until(self, condition: Any, pause: float = 0.0) -> bool:
        """Wait for ``condition()``. Returns False if the process ended before."""
        while not condition():
            if self.ended():
                return False
            time.sleep(pause)
        return True

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)

    def began(self) -> bool:
        """Whether its first step is recorded."""
        return _records(self.out, START)[-1:] not in ([], self.before)

    def writes(self) -> bool:
        """Whether a temporary file of it is there."""
        return any(f".{self.pid}.tmp" in name for name in os.listdir(self.out)) if self.out.exists() else False


def _work(arguments: list[str], output: int) -> None:
    """In a forked process: the command."""
    try:
        os.setsid()
        os.dup2(output, 1)
        os.dup2(output, 2)
        status = train.main(arguments)
        sys.stdout.flush()
    except BaseException:
        traceback.print_exc()
        status = 70
    finally:
        sys.stderr.flush()
        os._exit(status)


def kill_at(run: Run, moment: str, rng: random.Random, start_seconds: float) -> str | None:
    """Kill a run at a random moment of the kind. Returns in what the kill fell, or None if the run ended before."""
    if moment == "start":
        end = time.monotonic() + rng.uniform(0, start_seconds)
        there = run.wait_until(lambda: time.monotonic() >= end, 0.001)
    elif moment == "records":
        there = run.wait_until(lambda: len(_records(run.out, EPOCH)) == EPOCHS, 0.005) and _later(run, rng, 1.0)
    else:
        there = run.wait_until(run.began, 0.005) and _later(run, rng, 0.7)
        if moment == "saving":
            there = there and run.wait_until(run.writes) and _later(run, rng, 0.01)
    if not there or run.ended():
        return None
    run.kill()
    if run.writes():
        return "saving"
    if not run.began():
        return "start"
    return "records" if len(_records(run.out, EPOCH)) == EPOCHS else "training"


def _later(run: Run, rng: random.Random, most: float) -> bool:
    end = time.monotonic() + rng.uniform(0, most)
    return run.wait_until(lambda: time.monotonic() >= end)


def _records(out: Path, kind: str) -> list[dict[str, Any]]:
    return RunLog(out).records(kind)


def refuse_remains(run: Run, temporary: Path) -> None:
    """Raise :class:`Fault` if a process or a temporary file of a run that has ended is there."""
    deadline = time.monotonic() + 10
    while members := _members(run.pid):
        if time.monotonic() > deadline:
            raise Fault(f"processes {members} are left")
        time.sleep(0.02)
    if run.status == 0:
        hidden = [path for path in run.out.iterdir() if path.name.startswith(".")]  # the lock too
        if left := hidden + list(temporary.iterdir()):
            raise Fault(f"left: {', '.join(map(str, left))}")


def _members(session: int) -> list[int]:
    """Living processes of a session."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            found.append(int(entry.name))
    return found


def differences(a: Path, b: Path) -> Iterator[str]:
    """What two run folders differ in, apart from times."""
    for name in (CHECKPOINT_FILE, BEST_FILE):
        yield from _differ(load_checkpoint(a / name), load_checkpoint(b / name), name)
    yield from _differ(load_file(a / WEIGHTS_FILE), load_file(b / WEIGHTS_FILE), WEIGHTS_FILE)
    if (a / RECIPE_FILE).read_bytes() != (b / RECIPE_FILE).read_bytes():
        yield RECIPE_FILE
    logs = [[each for each in RunLog(folder).records() if each["kind"] != START] for folder in (a, b)]
    yield from _differ(*logs, "metrics.jsonl")
    names = [{path.name for path in folder.iterdir()} for folder in (a, b)]
    yield from sorted(names[0] ^ names[1])
    if "Unfinished" in (b / REPORT_FILE).read_text():
        yield REPORT_FILE


def _differ(a: Any, b: Any, name: str) -> Iterator[str]:
    """The names of values that differ in a bit."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        if a.dtype != b.dtype or a.shape != b.shape or not torch.equal(_bits(a), _bits(b)):
            yield name
    elif isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        for key in a.keys() - TIMES:
            yield from _differ(a[key], b[key], f"{name}: {key}")
    elif isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b):
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            yield from _differ(x, y, f"{name}: {i}")
    elif type(a) is not type(b) or a != b:
        yield f"{name} ({a!r}, {b!r})"


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


def main(argv: list[str]) -> int:
    wanted, seed = (int(value) for value in (*argv, *("100", "0")[len(argv) :]))
    rng = random.Random(seed)
    work = Path(tempfile.mkdtemp(prefix="kill-check-"))
    temporary = work / "tmp"
    temporary.mkdir()
    os.environ["TMPDIR"] = str(temporary)  # all that is left there was left by a run
    tempfile.tempdir = None
    find_dataset("digits", log=lambda line: None)  # converted once
    begun = time.monotonic()

    whole = Run(work / "whole", work / "whole.log", forked=True)
    whole.wait_until(whole.began, 0.01)
    forked_seconds = time.monotonic() - begun
    while not whole.ended():
        time.sleep(0.05)
    print(f"kill check: a run of {EPOCHS} epochs of {STEPS} steps in {time.monotonic() - begun:.1f} s", flush=True)

    aims = rng.choices(list(MOMENTS), MOMENTS.values(), k=wanted)
    fell: Counter[str] = Counter()
    chains = processes = 0
    run = whole
    try:
        while True:
            chains += 1
            out = work / f"run-{chains}"
            while True:
                processes += 1
                forked = processes % COMMAND_EVERY != 0
                run = Run(out, work / "run.log", forked=forked)
                done = sum(fell.values())
                if done < wanted:
                    place = kill_at(run, aims[done], rng, forked_seconds if forked else 3 * forked_seconds)
                else:
                    place = None
                    run.wait_until(run.ended, 0.05)
                refuse_remains(run, temporary)
                if place is None:
                    break
                fell[place] += 1
                if (out / CHECKPOINT_FILE).exists():
                    load_checkpoint(out / CHECKPOINT_FILE)
                if (done + 1) % 10 == 0:
                    print(f"{done + 1} kills, {chains - 1} runs ended, {time.monotonic() - begun:.0f} s", flush=True)
            if wrong := list(differences(work / "whole", out)):
                raise Fault(f"run {chains} ended otherwise: {', '.join(wrong)}")
            if sum(fell.values()) >= wanted:
                break
    except Exception as error:
        kinds = ", ".join(f"{number} in {place}" for place, number in sorted(fell.items()))
        print(f"kill check: FAULT after {sum(fell.values())} kills ({kinds}), seed {seed}: {error}; kept in {work}")
        return 1
    kinds = ", ".join(f"{fell[place]} in {place}" for place in MOMENTS)
    print(
        f"kill check: {wanted} kills ({kinds}), {chains} runs, {processes} processes, seed {seed}, "
        f"{time.monotonic() - begun:.0f} s: every run ended with the bits of the whole one; nothing was left"
    )
    shutil.rmtree(work)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
