"""`python -m bench.scaling`: how images/s and peak memory of a training step grow, into docs/performance.md.

Every row is a process of its own, so that its peak memory and its threads are its own. Rows that would need more memory
than is free, or more seconds than ``--limit``, say so in their place. About four minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from tqdm import tqdm

from bench.markdown import write_section

DOCUMENT = Path(__file__).parent.parent / "docs" / "performance.md"
PICTURE = DOCUMENT.parent / "growth.png"
HEADING = "## Growth"
STEPS = 5
# NVIDIA's H100 SXM data sheet: dense bfloat16 operations and bytes of memory traffic a second.
H100_FLOPS, H100_BYTES = 989e12, 3.35e12


@dataclass(frozen=True)
class Point:
    """One training step to measure: ResNet-RS, stem 32, stride 2."""

    depth: int = 50
    size: int = 32
    batch: int = 128
    classes: int = 10
    threads: int = 0  # 0: what torch chooses
    processes: int = 1


START = Point()
AXES: dict[str, list[Point]] = {
    "batch": [replace(START, batch=n) for n in (16, 32, 64, 128, 256, 512, 1024)],
    "depth": [replace(START, depth=n, batch=32) for n in (26, 50, 101, 152, 200, 270, 350, 420)],
    "size": [replace(START, size=n, batch=16) for n in (32, 64, 96, 128, 160, 224)],
    "classes": [replace(START, classes=n) for n in (10, 100, 1000)],
    "threads": [replace(START, threads=n) for n in (1, 2)],
    "processes": [replace(START, processes=n, threads=1) for n in (1, 2)],
}


def measure_here(point: Point) -> dict[str, float]:
    """Build, warm and time a step in this process."""
    import resource

    import psutil
    import torch

    if point.threads:
        torch.set_num_threads(point.threads)
    from rsengine.config import Recipe
    from rsengine.device import choose_execution, keep_freed_memory
    from rsengine.engine.build import build_step

    settings = [f"model.depth={point.depth}", f"train.batch_size={point.batch}", "train.epochs=1"]
    recipe = Recipe().with_settings(settings)
    keep_freed_memory()  # as the training command does
    step = build_step(recipe, point.classes, (0.5,) * 3, (0.25,) * 3, choose_execution("cpu"), 1000)
    images = torch.randint(0, 256, (point.batch, point.size, point.size, 3), dtype=torch.uint8)
    labels = torch.arange(point.batch) % point.classes
    step(images, labels)
    first = time.time() - psutil.Process().create_time()
    times = []
    for _ in range(STEPS):
        began = time.perf_counter()
        step(images, labels)
        times.append(time.perf_counter() - began)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    summary = step.model.summary((point.size, point.size))
    return {
        "images_per_second": point.batch / statistics.median(times),
        "peak_bytes": peak,
        "start_seconds": first,
        "multiply_adds": summary.multiply_adds,
        "activation_bytes": summary.activation_bytes,
        "parameters": summary.parameters,
    }


def measure(point: Point, limit: float) -> dict[str, float | str]:
    """Measure in as many new processes as the point asks for; the sum of their images/s and memory."""
    command = [sys.executable, "-m", "bench.scaling", "--one", json.dumps(asdict(point))]
    running = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(point.processes)
    ]
    results = []
    try:
        for process in running:
            out, errors = process.communicate(timeout=limit)
            if process.returncode:
                ended = f"ended by signal {-process.returncode}" if process.returncode < 0 else errors.strip()[-100:]
                return {"failed": ended}
            results.append(json.loads(out.splitlines()[-1]))
    except subprocess.TimeoutExpired:
        return {"failed": f"more than {limit:.0f} s"}
    finally:
        for process in running:
            process.kill()
            process.wait()
    summed = {key: sum(r[key] for r in results) for key in ("images_per_second", "peak_bytes")}
    return results[0] | summed


def text(results: dict[str, list[tuple[Point, dict]]]) -> str:
    """The section of the document."""
    from rsengine.run.machine import machine, versions

    about = machine()["processor"]
    packages = ", ".join(f"{name} {version}" for name, version in versions().items())
    lines = [
        HEADING,
        "",
        f"`python -m bench.scaling`: {about}; {packages}. ResNet-RS, stem 32, stride 2, the default step; medians of "
        f"{STEPS} steps. Peak memory is that of the whole process, libraries included; start is from the command to "
        "the end of the first step.",
        "",
        "![images/s and peak memory](growth.png)",
    ]
    for axis, rows in results.items():
        lines += [
            "",
            f"### {axis}",
            "",
            f"| {axis} | images/s | GFLOP/s | peak GiB | start, s |",
            "|---:|---:|---:|---:|---:|",
        ]
        for point, found in rows:
            name = getattr(point, axis)
            if "failed" in found:
                lines.append(f"| {name} | {found['failed']} | | | |")
                continue
            rate = found["images_per_second"]
            gflops = 6 * found["multiply_adds"] * rate / 1e9
            memory, start = found["peak_bytes"] / 2**30, found["start_seconds"]
            lines.append(f"| {name} | {rate:.1f} | {gflops:.0f} | {memory:.2f} | {start:.1f} |")
    lines += [
        "",
        "### An H100: predicted, not measured",
        "",
        "The most that the data sheet allows at batch 1,024: the larger of the time of the multiply-adds (forward and "
        "twice that backward, at 989 TFLOP/s of bfloat16) and that of the bytes (activations kept for the backward "
        "pass in bfloat16, written once and read twice; 28 B a parameter; at 3.35 TB/s).",
        "",
        "| depth | images/s at most | bound by |",
        "|---:|---:|---|",
    ]
    for point, found in results.get("depth", []):
        if "failed" not in found:
            rate, bound = predicted(found)
            lines.append(f"| {point.depth} | {rate:,.0f} | {bound} |")
    return "\n".join(lines) + "\n"


def predicted(found: dict[str, float], batch: int = 1024) -> tuple[float, str]:
    """Images/s that an H100 cannot pass, and what forbids more."""
    arithmetic = 6 * found["multiply_adds"] * batch / H100_FLOPS
    memory = (3 * found["activation_bytes"] / 2 * batch + 28 * found["parameters"]) / H100_BYTES
    return batch / max(arithmetic, memory), "arithmetic" if arithmetic > memory else "memory"


def draw(results: dict[str, list[tuple[Point, dict]]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, len(results), figsize=(3 * len(results), 5.5), squeeze=False, layout="constrained")
    for column, (axis, rows) in enumerate(results.items()):
        measured = [(getattr(p, axis), r) for p, r in rows if "failed" not in r]
        x = [value for value, _ in measured]
        panels = (
            ("images/s", [r["images_per_second"] for _, r in measured]),
            ("peak memory, GiB", [r["peak_bytes"] / 2**30 for _, r in measured]),
        )
        for row, (label, y) in enumerate(panels):
            axes[row][column].plot(x, y, marker="o")
            axes[row][column].set(xlabel=axis, ylim=(0, None))
            if column == 0:
                axes[row][column].set_ylabel(label)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.scaling", description=__doc__.splitlines()[0])
    parser.add_argument("--axis", choices=AXES, action="append", help="only this axis; may be given again")
    parser.add_argument("--limit", type=float, default=600, metavar="SECONDS", help="longest row (default 600)")
    parser.add_argument("--print", action="store_true", help="print the section; write nothing")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure_here(Point(**json.loads(options.one)))))
        return 0
    axes = {name: AXES[name] for name in options.axis or AXES}
    results: dict[str, list[tuple[Point, dict]]] = {name: [] for name in axes}
    rows = [(name, point) for name, points in axes.items() for point in points if point.threads <= os.cpu_count()]
    for name, point in tqdm(rows, desc="growth", unit="row"):
        results[name].append((point, measure(point, options.limit)))
    section = text(results)
    if options.print:
        print(section)
        return 0
    write_section(DOCUMENT, HEADING, section)
    draw(results, PICTURE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
