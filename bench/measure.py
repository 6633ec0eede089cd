"""How the op benchmarks measure: fresh inputs, bytes against a copy's bandwidth, ratios from interleaved runs."""

from __future__ import annotations

import functools
import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence

import pytest
import torch

from rsengine.kernels import explain

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
IMPLEMENTATIONS = ("reference", "eager", pytest.param("compile", marks=pytest.mark.slow), "triton")
ROTATED_BYTES = 256 * 2**20  # inputs in turn, several times any last-level cache, so that each run reads from memory
PAIRS = 7


def implementation(name: str, op: Callable, reference: Callable, compiled: Callable | None = None) -> Callable:
    """The callable a row measures; skips the triton and native rows, with the reason, where they cannot run or would
    run in the interpreter.

    ``compiled``: what the compile row gives to ``torch.compile``; the eager implementation unless another is named.
    """
    if name == "reference":
        return reference
    if name in ("triton", "native"):
        reason = explain(op.__name__)
        if f": {name} on" not in reason:
            pytest.skip(reason)
        return functools.partial(op, impl=name)
    eager = functools.partial(op, impl="eager")
    if name != "compile":
        return eager
    torch.compiler.reset()  # every row is a function and shape of its own; together they pass the recompile limit
    return torch.compile(compiled or eager, fullgraph=True, dynamic=False)


def rotation(make: Callable[[], Sequence[torch.Tensor]]) -> Callable[[], Sequence[torch.Tensor]]:
    """A function that hands out sets of inputs in turn, as many as fill ``ROTATED_BYTES``."""
    first = make()
    size = sum(t.numel() * t.element_size() for t in first)
    sets = [first, *(make() for _ in range(math.ceil(ROTATED_BYTES / size) - 1))]
    return itertools.cycle(sets).__next__


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def ratio(slow: Callable[[], object], fast: Callable[[], object], pairs: int = PAIRS) -> float:
    """How many times faster ``fast`` is: the median over pairs run in turn, A B A B."""
    seconds(slow), seconds(fast)
    return statistics.median(seconds(slow) / seconds(fast) for _ in range(pairs))


@functools.lru_cache(maxsize=1)
def copy_bandwidth() -> float:
    """Bytes a second, read and written together, of a copy far larger than any cache: the median of nine."""
    source = torch.zeros(2**26 if DEVICE.type == "cpu" else 2**28, device=DEVICE)
    target = torch.zeros_like(source)
    times = [seconds(lambda: target.copy_(source)) for _ in range(9)]
    return 2 * source.numel() * source.element_size() / statistics.median(times)


def measure(benchmark, run: Callable[[], object], bytes_moved: int, **compared: Callable[[], object]) -> None:
    """Time ``run``; note GB/s of the bytes that must move, its fraction of a copy's rate, and ratios of times.

    ``compared``: named callables that do the same work, each timed in turn with ``run``.
    """
    about = min(seconds(run) for _ in range(3))

    def once():
        run()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(once, rounds=int(min(200, max(7, 0.5 / about))), warmup_rounds=1)
    info = benchmark.extra_info
    info |= {"bytes_moved": bytes_moved, "device": str(DEVICE)}
    for name, other in compared.items():
        info[f"times_faster_than_{name}"] = round(ratio(other, run), 2)
        info["pairs"] = PAIRS
    if benchmark.stats is not None:  # None under --benchmark-disable
        rate = bytes_moved / benchmark.stats.stats.median
        info |= {"GB/s": round(rate / 1e9, 2), "of_copy_bandwidth": round(rate / copy_bandwidth(), 3)}
