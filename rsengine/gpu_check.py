"""``python -m rsengine.gpu_check``: everything that only a GPU can tell, in one command of a few minutes.

Runs the kernel tests natively, times every compile case against its predicted floor, runs the op benchmarks, holds the
captured training step against the plain one and measures both, and writes one JSON and one Markdown file to
``bench/results/``. Without a CUDA GPU it says so and changes nothing.
"""

from __future__ import annotations

import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path

import torch

from rsengine.gpu_step_check import Gpu, check_step, render_step, step_failures

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
# The limit of each part, with the kernels' own timing within ten minutes in all.
TEST_SECONDS, BENCH_SECONDS, COMPILE_SECONDS, STEP_SECONDS = 120, 100, 120, 180
FLUSH_BYTES = 2**28  # written between two timings, so that operands come from memory and not from the cache
ROUNDS = 20


def main() -> int:
    """Run every part; 0 where all went well or there is no GPU, 1 where a test failed or a part broke off."""
    if not torch.cuda.is_available():
        print("gpu check: this machine has no usable CUDA GPU; nothing was run and nothing was written")
        return 0
    if not (ROOT / "tests" / "kernels" / "jit").is_dir():
        print("gpu check: the tests and benchmarks are not here; run it in a clone of the repository", file=sys.stderr)
        return 2
    start = time.monotonic()
    results = {"machine": machine(), "copy_gb_per_s": copy_bandwidth() / 1e9}
    for name, part in (("cases", time_cases), ("tests", run_tests), ("benchmarks", run_benchmarks), ("step", run_step)):
        print(f"gpu check: {name} ...", flush=True)
        results[name] = part()
        print(f"gpu check: {name} done, {time.monotonic() - start:.0f} s since the start", flush=True)
    results["seconds"] = round(time.monotonic() - start)
    stem = RESULTS / f"gpu-{re.sub(r'[^a-z0-9]+', '-', results['machine']['gpu'].lower()).strip('-')}"
    RESULTS.mkdir(parents=True, exist_ok=True)
    stem.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
    text = render(results)
    stem.with_suffix(".md").write_text(text)
    print(text)
    print(f"gpu check: wrote {stem}.json and {stem}.md")
    return 0 if all_well(results) else 1


def machine() -> dict[str, str]:
    import triton

    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_gib": f"{properties.total_memory / 2**30:.0f}",
        "multiprocessors": str(properties.multi_processor_count),
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        "triton": triton.__version__,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
    }


def copy_bandwidth() -> float:
    """Bytes a second, read and written together, of a 1 GiB copy: the median of ``ROUNDS``."""
    source = torch.zeros(2**28, device="cuda")
    target = torch.empty_like(source)
    times = []
    for _ in range(ROUNDS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        target.copy_(source)
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return 2 * source.numel() * source.element_size() / statistics.median(times)


def time_cases() -> list[dict]:
    """Kernel time of every compile case, from the profiler, beside the floor at the measured copy bandwidth."""
    from rsengine.kernels.compile_report import all_cases

    bandwidth = copy_bandwidth()
    rows = []
    for op, cases in all_cases().items():
        for case in cases:
            row = {"op": op, "case": case.name}
            try:
                with torch.device("cuda"):
                    streams = case.launch(case.size)
                    row["floor_bytes"] = sum(stream.bytes for stream in streams.values())
                    del streams
                    row["measured_us"] = kernel_microseconds(lambda: case.launch(case.size), set(case.budgets))  # noqa: B023
                row["predicted_us"] = row["floor_bytes"] / bandwidth * 1e6
            except Exception as error:  # one case that fails must not hide the others: it is reported
                row["error"] = f"{type(error).__name__}: {error}"[:300]
            rows.append(row)
    return rows


def kernel_microseconds(launch: Callable[[], object], kernels: set[str]) -> float:
    """Device time of the named kernels in one launch: the median over ``ROUNDS``, the cache flushed before each."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    launch()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for _ in range(ROUNDS):
            flush.zero_()
            launch()
        torch.cuda.synchronize()
    events = [e for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA and e.name in kernels]
    each = len(events) // ROUNDS
    if not each or len(events) % ROUNDS:
        raise RuntimeError(f"expected the same kernels in each of {ROUNDS} launches; the profiler saw {len(events)}")
    events.sort(key=lambda e: e.time_range.start)
    times = [e.time_range.elapsed_us() for e in events]
    return statistics.median(sum(times[i : i + each]) for i in range(0, len(times), each))


def run_tests() -> dict:
    """The Triton tests on the GPU itself, one process a file."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    files = sorted((ROOT / "tests" / "kernels" / "jit").glob("test_*.py"))
    found = {"passed": 0, "failed": 0, "skipped": 0, "failures": []}
    with tempfile.TemporaryDirectory() as folder:
        reports = [Path(folder) / f"{file.stem}.xml" for file in files]
        running = [
            subprocess.Popen(
                [sys.executable, "-m", "pytest", str(file), "-q", "-p", "no:cacheprovider", f"--junitxml={report}"],
                cwd=ROOT,
                env=environment,
                stdout=subprocess.DEVNULL,
            )
            for file, report in zip(files, reports, strict=True)
        ]
        deadline = time.monotonic() + TEST_SECONDS
        for file, report, process in zip(files, reports, running, strict=True):
            try:
                process.wait(max(1.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                found["failures"].append(f"{file.name}: not finished after {TEST_SECONDS} s")
                continue
            if not report.exists():
                found["failures"].append(f"{file.name}: pytest ended with status {process.returncode} and no report")
                continue
            read_report(report, found)
    return found


def read_report(report: Path, found: dict) -> None:
    """Add the outcomes in a JUnit XML file to ``found``."""
    for case in ElementTree.parse(report).iter("testcase"):
        wrong = [child for child in case if child.tag in ("failure", "error")]
        if wrong:
            found["failed"] += 1
            message = wrong[0].get("message", "").splitlines() or [""]
            found["failures"].append(f"{case.get('name')}: {message[0][:200]}")
        else:
            found["skipped" if case.find("skipped") is not None else "passed"] += 1


def run_benchmarks() -> dict:
    """``bench/test_kernels.py`` at full size, one row a benchmark; those that ``torch.compile`` holds up come last."""
    found: dict = {"rows": []}
    for marker, limit in (("not slow", BENCH_SECONDS), ("slow", COMPILE_SECONDS)):
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "benchmarks.json"
            command = [sys.executable, "-m", "pytest", "bench/test_kernels.py", "--benchmark-only", "-q", "-m", marker]
            try:
                status = subprocess.run([*command, f"--benchmark-json={out}"], cwd=ROOT, timeout=limit).returncode
            except subprocess.TimeoutExpired:
                found["error"] = f"the benchmarks marked {marker!r} were not finished after {limit} s"
                continue
            if status:
                found["error"] = f"pytest ended with status {status} on the benchmarks marked {marker!r}"
            if out.exists():
                found["rows"] += [
                    {"name": b["name"], "median_us": b["stats"]["median"] * 1e6, "rounds": b["stats"]["rounds"]}
                    | b["extra_info"]
                    for b in json.loads(out.read_text())["benchmarks"]
                ]
    return found


def run_step() -> dict:
    """The training step: see :mod:`rsengine.gpu_step_check`."""
    return check_step(Gpu(), STEP_SECONDS)


def all_well(results: dict) -> bool:
    return not (
        step_failures(results["step"])
        or results["tests"]["failures"]
        or results["benchmarks"].get("error")
        or any("error" in row for row in results["cases"])
    )


def render(results: dict) -> str:
    """The Markdown of a check: measured on the GPU it names."""
    about, tests = results["machine"], results["tests"]
    lines = [
        f"# Measured on {about['gpu']}",
        "",
        f"`make gpu-check` on {about['date']}, {results['seconds']} s. Compute capability {about['capability']}, "
        f"{about['multiprocessors']} multiprocessors, {about['memory_gib']} GiB; torch {about['torch']} (CUDA "
        f"{about['cuda']}), triton {about['triton']}, Python {about['python']}. A 1 GiB copy moves "
        f"{results['copy_gb_per_s']:,.0f} GB/s (read and written, median of {ROUNDS}).",
        "",
        "## Kernel tests, run natively",
        "",
        f"{tests['passed']} passed, {tests['failed']} failed, {tests['skipped']} skipped.",
        *(f"- {line}" for line in tests["failures"]),
        "",
        "## Kernels against their predicted floor",
        "",
        f"Measured: device time of the kernels of one launch, median of {ROUNDS}, caches flushed before each. "
        "Predicted: the bytes that must move, at the copy bandwidth above.",
        "",
        "| case | bytes | predicted, µs | measured, µs | measured / predicted |",
        "|---|---:|---:|---:|---:|",
    ]
    for row in results["cases"]:
        if "error" in row:
            lines.append(f"| {row['case']} | | | failed: {row['error']} | |")
        else:
            lines.append(
                f"| {row['case']} | {row['floor_bytes']:,} | {row['predicted_us']:.1f} | {row['measured_us']:.1f} "
                f"| {row['measured_us'] / row['predicted_us']:.2f} |"
            )
    lines += [
        "",
        "## Benchmarks",
        "",
        "Wall-clock time as a caller sees it, launches included; ratios are medians of pairs run in turn.",
        "",
        "| benchmark | median, µs | rounds | GB/s | of copy bandwidth | times faster than |",
        "|---|---:|---:|---:|---:|---|",
    ]
    for row in results["benchmarks"]["rows"]:
        faster = [
            f"{name.removeprefix('times_faster_than_')} {value}"
            for name, value in row.items()
            if name.startswith("times_faster_than_")
        ]
        lines.append(
            f"| `{row['name']}` | {row['median_us']:.1f} | {row['rounds']} | {row['GB/s']} "
            f"| {row['of_copy_bandwidth']} | {', '.join(faster)} |"
        )
    if "error" in results["benchmarks"]:
        lines.append(f"\nThe benchmarks broke off: {results['benchmarks']['error']}.")
    return "\n".join([*lines, "", *render_step(results["step"])])


if __name__ == "__main__":
    sys.exit(main())
