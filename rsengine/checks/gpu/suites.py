"""The kernel tests on the GPU, and the op benchmarks: pytest in its own processes."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from rsengine.checks.gpu.device import Setup
from rsengine.checks.gpu.parent import die_with
from rsengine.processor import usable_cpus
from rsengine.temporaries import temporary_folder

ROOT = Path(__file__).resolve().parents[3]
TESTS = ROOT / "tests" / "kernels" / "jit"
SHOWN_FAILURES = 40
MOST_PROCESSES = 32  # each opens the GPU itself, which takes half a gigabyte of its memory


def measure(row: str, setup: Setup) -> dict[str, Any]:
    """``row``: ``"kernel tests"``, or a function of ``bench/test_kernels.py``."""
    return kernel_tests(TESTS, setup.seconds) if row == "kernel tests" else benchmark(row, setup.seconds)


def kernel_tests(tests: Path, seconds: float, processes: int | None = None) -> dict[str, Any]:
    """Run the tests below ``tests``, distributed over as many processes as there are cores, for at most ``seconds``.

    Each process collects all of them and runs every n-th, because neighbours in the list take similar times. A process
    that dies or is ended leaves the outcomes that it had.
    """
    if not tests.is_dir():
        return {"left_out": f"{tests.name}/ is not here; run it in a copy of the whole repository"}
    if missing := [name for name in ("pytest", "hypothesis") if importlib.util.find_spec(name) is None]:
        return {"left_out": f"{' and '.join(missing)} not installed"}
    from rsengine.checks.gpu.share import OUTCOMES_VARIABLE, SHARE_VARIABLE  # it imports pytest

    count = processes or min(len(usable_cpus()), MOST_PROCESSES)
    deadline = time.monotonic() + seconds
    with temporary_folder("check") as folder, contextlib.ExitStack() as stack:
        files = [folder / f"{i}.jsonl" for i in range(count)]
        command = [sys.executable, "-m", "pytest", str(tests), "-q", "-p", "no:cacheprovider"]
        running = [
            subprocess.Popen(
                [*command, "-p", "rsengine.checks.gpu.share"],
                cwd=ROOT,
                env=os.environ | {SHARE_VARIABLE: f"{i}/{count}", OUTCOMES_VARIABLE: str(file)},
                stdout=stack.enter_context(open(file.with_suffix(".log"), "wb")),
                stderr=subprocess.STDOUT,
                preexec_fn=die_with_this_process(),
            )
            for i, file in enumerate(files)
        ]
        ends = [end_of(process, deadline, well=(0, 1, 5)) for process in running]  # 1: some failed; 5: none to run
        found = outcomes(files)
        for end, file in zip(ends, files, strict=True):
            if end:
                said = last_words(file.with_suffix(".log").read_text(errors="replace"))
                found["wrong"].append(f"process {file.stem} of {count} {end}: {said}")
    if not found["passed"]:
        found["wrong"].append("no test passed")
    return found | {"processes": count}


def die_with_this_process() -> Callable[[], None]:
    """For ``preexec_fn``: a ``kill -9`` of this process must leave nothing running on the GPU."""
    return functools.partial(die_with, os.getpid())


def last_words(text: str) -> str:
    """The line of a log that says most: the last error that pytest or Python names, else the last line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith(("E  ", "error:")) or re.match(r"\w+(Error|Exception):", line)]
    return (errors or lines or ["nothing"])[-1].removeprefix("E").strip()[:300]


def end_of(process: subprocess.Popen, deadline: float, well: Sequence[int] = (0,)) -> str:
    """Wait for a process, and end it at ``deadline``. Returns how it ended, or "" if its status is one of ``well``."""
    try:
        status = process.wait(max(0.1, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return "was not finished in its time"
    return "" if status in well else f"ended with status {status}"


def outcomes(files: Iterable[Path]) -> dict[str, Any]:
    """The sum of what :mod:`rsengine.checks.gpu.share` wrote."""
    found: dict[str, Any] = {"passed": 0, "failed": 0, "skipped": 0, "slowest": [], "wrong": []}
    for file in files:
        for line in file.read_text().splitlines() if file.exists() else ():
            test = json.loads(line)
            found[test["outcome"]] += 1
            found["slowest"].append([round(test["seconds"], 1), test["name"]])
            if test["outcome"] == "failed":
                found["wrong"].append(f"{test['name']}: {test['message']}")
    found["slowest"] = sorted(found["slowest"], reverse=True)[:5]
    if len(found["wrong"]) > SHOWN_FAILURES:
        found["wrong"] = [*found["wrong"][:SHOWN_FAILURES], f"and {len(found['wrong']) - SHOWN_FAILURES} more"]
    return found


def benchmark(function: str, seconds: float) -> dict[str, Any]:
    """One function of ``bench/test_kernels.py``, without the slow rows of ``torch.compile``."""
    if importlib.util.find_spec("pytest_benchmark") is None:
        return {"left_out": "pytest-benchmark is not installed"}
    with temporary_folder("check") as folder:
        out = folder / "benchmarks.json"
        command = [sys.executable, "-m", "pytest", f"bench/test_kernels.py::{function}", "--benchmark-only", "-q"]
        options = ["-m", "not slow", "-p", "no:cacheprovider", f"--benchmark-json={out}"]
        process = subprocess.Popen([*command, *options], cwd=ROOT, preexec_fn=die_with_this_process())
        end = end_of(process, time.monotonic() + seconds)
        rows = json.loads(out.read_text())["benchmarks"] if out.exists() and out.stat().st_size else []
    return {
        "rows": [
            {"name": row["name"], "median_us": row["stats"]["median"] * 1e6, "rounds": row["stats"]["rounds"]}
            | row["extra_info"]
            for row in rows
        ],
        "wrong": [f"pytest {end}"] if end else [],
    }
