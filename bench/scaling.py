"""`python -m bench.scaling`: write into docs/performance.md how images/s and peak memory of a training step grow.

Every row is a process of its own, so that its peak memory and its threads are its own. Rows that would need more memory
than is free, or more seconds than ``--limit``, say so in their place. About four minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from bench.markdown import write_section
from rsengine.run import plots

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DOCUMENT = Path(__file__).parent.parent / "docs" / "performance.md"
PICTURE = DOCUMENT.parent / "growth.png"
HEADING = "## Growth"
STEPS = 5


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
LOGARITHMIC = ("batch", "depth", "size", "classes")
LABELS = {
    "batch": "Batch",
    "depth": "Depth (batch 32)",
    "size": "Image size (batch 16)",
    "classes": "Classes (batch 128)",
    "threads": "Threads (batch 128)",
    "processes": "Processes (1 thread each)",
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
        f"`python -m bench.scaling`: {about}; {packages}. ResNet-RS, stem 32, stride 2, the default step at batch "
        f"{START.batch}, but of {AXES['depth'][0].batch} for depth and {AXES['size'][0].batch} for size; medians of "
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
    return "\n".join(lines) + "\n"


def rows_of(document: str) -> dict[str, list[tuple[int, float, float]]]:
    """The rows that :func:`text` wrote into a document: (value, images/s, peak GiB) for each axis, without failures."""
    rows: dict[str, list[tuple[int, float, float]]] = {}
    for section in document.split(HEADING)[-1].split("\n### ")[1:]:
        axis = section.split("\n")[0]
        if axis in AXES:
            found = re.findall(r"^\| (\d+) \| ([\d.]+) \| \d+ \| ([\d.]+) \|", section, re.MULTILINE)
            rows[axis] = [(int(value), float(rate), float(memory)) for value, rate, memory in found]
    return {axis: found for axis, found in rows.items() if found}


def draw(rows: dict[str, list[tuple[int, float, float]]], path: Path) -> None:
    """Draw images/s above peak memory, a pair of panels for each axis."""
    with plots.new_figure(plots.WIDTH, 1400 if len(rows) > 3 else 720) as figure:
        grids = 2 * math.ceil(len(rows) / 3)
        panels = figure.subplots(grids, 3, squeeze=False, gridspec_kw={"hspace": 0.32, "wspace": 0.27})
        figure.subplots_adjust(left=0.08, right=0.985, top=0.98, bottom=0.055 if grids > 2 else 0.1)
        for number, (upper, lower) in enumerate(zip(panels[0::2].flat, panels[1::2].flat, strict=True)):
            if number >= len(rows):
                upper.remove()
                lower.remove()
                continue
            axis = list(rows)[number]
            _draw_axis(axis, rows[axis], upper, lower)
            if number % 3 == 0:
                upper.set_ylabel("Images/s")
                lower.set_ylabel("Peak memory (GiB)")
        plots.save_figure(figure, path)


def _draw_axis(axis: str, rows: list[tuple[int, float, float]], upper: Axes, lower: Axes) -> None:
    values, rates, memory = (list(column) for column in zip(*rows, strict=True))
    upper.set_ylim(0, 1.15 * max(rates))
    lower.set_ylim(0, 1.15 * max(memory))
    lower.set_xlabel(LABELS[axis])
    ticks = values[:1]
    for value in values[1:]:
        if value >= 1.4 * ticks[-1]:  # closer ones would be written over each other
            ticks.append(value)
    for panel, heights in ((upper, rates), (lower, memory)):
        panel.plot(values, heights, color=plots.BLUE, linewidth=1.8, marker="o", markersize=5, zorder=3)
        panel.grid(True)
        if axis in LOGARITHMIC:
            panel.set_xscale("log")
            panel.minorticks_off()
        panel.set_xticks(ticks, [str(tick) for tick in ticks], fontsize=8.5)
        panel.margins(x=0.08)
    if axis in ("threads", "processes"):
        linear = [rates[0] * value / values[0] for value in values]
        upper.plot(values, linear, color=plots.GREY, linestyle="--", linewidth=1.2)
        upper.set_ylim(0, 1.15 * max(rates + linear))
        middle = (values[0] + values[-1]) / 2
        above = {"xytext": (0, 16), "textcoords": "offset points", "ha": "right", "color": plots.GREY}
        upper.annotate("linear scaling", (middle, rates[0] * middle / values[0]), **above)
    if axis in ("depth", "size"):  # a rate that falls as a power of the axis is a straight line here
        low, high = min(rates) / 1.4, max(rates) * 1.4
        shown = [digit * 10**power for power in range(7) for digit in (1, 2, 5)]
        shown = [tick for tick in shown if low < tick < high]
        upper.set_yscale("log")
        upper.set_yticks(shown, [str(tick) for tick in shown])
        upper.minorticks_off()
        upper.set_ylim(low, high)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.scaling", description=__doc__.splitlines()[0])
    parser.add_argument("--axis", choices=AXES, action="append", help="only this axis; may be given again")
    parser.add_argument("--limit", type=float, default=600, metavar="SECONDS", help="longest row (default 600)")
    parser.add_argument("--redraw", action="store_true", help="draw the picture from the tables, and measure nothing")
    parser.add_argument("--print", action="store_true", help="print the section; write nothing")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure_here(Point(**json.loads(options.one)))))
        return 0
    if options.redraw:
        draw(rows_of(DOCUMENT.read_text(encoding="utf-8")), PICTURE)
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
    draw(rows_of(section), PICTURE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
