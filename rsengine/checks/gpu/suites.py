"""The kernel tests natively, and the op benchmarks: pytest, in processes of its own."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rsengine.checks.gpu.device import Setup
from rsengine.checks.gpu.share import OUTCOMES_VARIABLE, SHARE_VARIABLE

ROOT = Path(__file__).resolve().parents[3]
TESTS = ROOT / "tests" / "kernels" / "jit"
SHOWN_FAILURES = 40


def measure(row: str, setup: Setup) -> dict[str, Any]:
    """``row``: ``"kernel tests"``, or a function of ``bench/test_kernels.py``."""
    return kernel_tests(TESTS, setup.seconds) if row == "kernel tests" else benchmark(row, setup.seconds)


def kernel_tests(tests: Path, seconds: float, processes: int | None = None) -> dict[str, Any]:
    """Run the tests below ``tests``, dealt out to as many processes as there are cores, for at most ``seconds``.

    Each process collects all of them and runs every n-th, so that neighbours in the list, which take alike long, are
    spread. A process that dies or is ended leaves the outcomes that it had.
    """
    if not tests.is_dir():
        return {"left_out": f"{tests} is not here; run it in a copy of the whole repository"}
    count = processes or os.cpu_count() or 1
    deadline = time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        files = [Path(folder) / f"{i}.jsonl" for i in range(count)]
        command = [sys.executable, "-m", "pytest", str(tests), "-q", "-p", "no:cacheprovider"]
        running = [
            subprocess.Popen(
                [*command, "-p", "rsengine.checks.gpu.share"],
                cwd=ROOT,
                env=os.environ | {SHARE_VARIABLE: f"{i}/{count}", OUTCOMES_VARIABLE: str(file)},
                stdout=stack.enter_context(open(file.with_suffix(".log"), "wb")),
                stderr=subprocess.STDOUT,
            )
            for i, file in enumerate(files)
        ]
        ends = [_wait(process, deadline) for process in running]
        found = outcomes(files)
        for end, file in zip(ends, files, strict=True):
            if end:
                tail = file.with_suffix(".log").read_text(errors="replace").strip().splitlines()[-1:]
                found["wrong"].append(f"process {file.stem} of {count} {end}: {' '.join(tail)[:200]}")
    if not found["passed"]:
        found["wrong"].append("no test passed")
    return found | {"processes": count}


def _wait(process: subprocess.Popen, deadline: float) -> str:
    """How a process of pytest ended, where it did not end well."""
    try:
        status = process.wait(max(0.1, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return "was not finished in its time"
    return "" if status in (0, 1, 5) else f"ended with status {status}"  # 1: some failed; 5: none to run


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
    """One function of ``bench/test_kernels.py``, without the rows that ``torch.compile`` holds up."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "benchmarks.json"
        command = [sys.executable, "-m", "pytest", f"bench/test_kernels.py::{function}", "--benchmark-only", "-q"]
        options = ["-m", "not slow", "-p", "no:cacheprovider", f"--benchmark-json={out}"]
        status: int | str
        try:
            status = subprocess.run([*command, *options], cwd=ROOT, timeout=seconds).returncode
        except subprocess.TimeoutExpired:
            status = "timeout"
        rows = json.loads(out.read_text())["benchmarks"] if out.exists() and out.stat().st_size else []
    return {
        "rows": [
            {"name": row["name"], "median_us": row["stats"]["median"] * 1e6, "rounds": row["stats"]["rounds"]}
            | row["extra_info"]
            for row in rows
        ],
        "wrong": [f"pytest ended with status {status}"] if status else [],
    }
