"""Where the time of a captured step goes: by kernel, and by part of the step.

The kernels of a replay have only names and times. So the same step runs once more without a graph, each operator under
a profiler label, which tells the names of an operator's kernels; the two sequences are then aligned. An operator's
bytes (each operand and result once) and FLOPs are shared among its kernels in proportion to their times.
"""

from __future__ import annotations

import difflib
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rsengine.checks.costs import kernels_of
from rsengine.checks.gpu.device import LABEL, Setup, Work, copy_rate, idle_share, product_rate, split_rounds
from rsengine.checks.gpu.steps import capture, device_batches, make_step
from rsengine.checks.launches import part_of
from rsengine.checks.trace import Operation, Trace
from rsengine.config import load_recipe

SHOWN = 20
UNPLACED = "not placed"


@dataclass(frozen=True)
class Kernel:
    """A kernel of a replay. ``bytes`` and ``flops``: its share of its operator's."""

    name: str
    microseconds: float
    part: str
    bytes: float
    flops: float


def measure(row: str, setup: Setup) -> dict[str, Any]:
    """``row``: ``"RECIPE, batch N"``."""
    name, _, batch = row.partition(", batch ")
    device = setup.device
    recipe = load_recipe(name).with_settings([f"train.batch_size={batch}", *setup.settings])
    step = make_step(recipe, device, bf16=True)
    (inputs,) = device_batches(recipe, device, 1)
    replay = capture(step, device, recipe)
    for _ in range(3):
        replay(*inputs)
    work = device.profile(lambda: [replay(*inputs) for _ in range(setup.profiled_steps + 1)])
    split = split_rounds(work, setup.profiled_steps)

    trace = LabellingTrace(device.device.type)

    def labelled() -> None:
        trace.begin()
        with trace:
            step(*inputs)

    for _ in range(2):  # the first allocates; the second is the one that the profiler sees
        launches = device.launches(labelled)
    operations = trace.steps[-1]
    kernels = place(split, launches, operations, [part_of(operation) for operation in operations])
    copy, product = copy_rate(device), product_rate(device)
    return summary(kernels) | {
        "batch_size": recipe.train.batch_size,
        "step_ms": (work[-1].end - work[0].start) / (setup.profiled_steps + 1) / 1e3,
        "idle_share": idle_share([each for part in split for each in part]),
        "operators": sum(operation.launches for operation in operations),
        "kernels_expected": sum(kernels_of(operation) for operation in operations),
        "other_than_expected": differences(operations, launches),
        "copy_gb_per_s": copy / 1e9,
        "product_tflop_per_s": product / 1e12,
        "wrong": [],
    }


class LabellingTrace(Trace):
    """Runs every operator under a profiler label with its number in its step."""

    def refuse_wait(self, *_: Any) -> None:
        """A real tensor has a value, and this run may wait for it."""

    def call(self, func: Any, args: Any, kwargs: Any) -> Any:
        with torch.profiler.record_function(f"{LABEL}{len(self.steps[-1])}"):
            return func(*args, **kwargs)


def differences(operations: Sequence[Operation], launches: Sequence[tuple[int, Sequence[str]]]) -> list[dict[str, Any]]:
    """The operators that launch another number of kernels than :func:`kernels_of` has for them, and how often."""
    found = Counter()
    for number, names in launches:
        operation = operations[number]
        if len(names) != kernels_of(operation):
            found[operation.name, kernels_of(operation), len(names)] += 1
    return [
        {"operator": name, "expected": expected, "kernels": kernels, "count": count}
        for (name, expected, kernels), count in found.most_common()
    ]


def place(
    rounds: Sequence[Sequence[Work]],
    launches: Sequence[tuple[int, Sequence[str]]],
    operations: Sequence[Operation],
    parts: Sequence[str],
) -> list[Kernel]:
    """The kernels of a replay, each with the part of the step that its operator belongs to.

    Args:
        rounds: those of several replays; times are medians over them.
        launches: of the plain step, by operator: its number and its kernels' names.
        operations, parts: of the operators, by number.
    """
    names = [work.name for work in rounds[0]]
    times = [statistics.median(work.microseconds for work in column) for column in zip(*rounds, strict=True)]
    plain = [(operator, name) for operator, kernels in launches for name in kernels]
    matcher = difflib.SequenceMatcher(None, names, [name for _, name in plain], autojunk=False)
    operators: list[int | None] = [None] * len(names)
    for start, other, length in matcher.get_matching_blocks():
        for i in range(length):
            operators[start + i] = plain[other + i][0]
    totals: defaultdict[int | None, float] = defaultdict(float)
    for operator, time in zip(operators, times, strict=True):
        totals[operator] += time
    kernels = []
    for name, time, operator in zip(names, times, operators, strict=True):
        if operator is None:
            kernels.append(Kernel(name, time, UNPLACED, 0, 0))
            continue
        share = time / totals[operator] if totals[operator] else 0.0
        own = operations[operator]
        kernels.append(Kernel(name, time, parts[operator], own.bytes * share, own.flops * share))
    return kernels


def summary(kernels: Sequence[Kernel]) -> dict[str, Any]:
    """The largest kernels by name, and the time of each part and of what no operator was found for."""
    total = sum(kernel.microseconds for kernel in kernels)
    by_name: defaultdict[str, list[Kernel]] = defaultdict(list)
    for kernel in kernels:
        by_name[kernel.name].append(kernel)
    largest = sorted(by_name.values(), key=lambda group: -_time(group))[:SHOWN]
    part_times: Counter[str] = Counter()
    part_counts: Counter[str] = Counter()
    for kernel in kernels:
        part_times[kernel.part] += kernel.microseconds
        part_counts[kernel.part] += 1
    return {
        "kernels": len(kernels),
        "kernel_us": total,
        "largest": [
            {
                "name": group[0].name,
                "count": len(group),
                "us": _time(group),
                "share": _time(group) / total,
                "gb_per_s": sum(kernel.bytes for kernel in group) / _time(group) / 1e3,
                "tflop_per_s": sum(kernel.flops for kernel in group) / _time(group) / 1e6,
                "parts": sorted({kernel.part for kernel in group}),
            }
            for group in largest
        ],
        "parts": [
            {"part": part, "us": time, "share": time / total, "kernels": part_counts[part]}
            for part, time in part_times.most_common()
        ],
    }


def _time(kernels: Iterable[Kernel]) -> float:
    return sum(kernel.microseconds for kernel in kernels) or 1e-9  # so that a rate is a number
