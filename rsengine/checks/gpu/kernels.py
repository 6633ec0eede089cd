"""Device time of every compile case of an op: against the bytes that must move, and against eager PyTorch."""

from __future__ import annotations

import statistics
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import torch

import rsengine.kernels
from rsengine.checks.gpu.device import Setup, Work, copy_rate

ROUNDS = 10  # and one before them that does not count
FLUSH_BYTES = 2**28  # written before each timing, so that operands come from memory and not from the cache
FLUSH_DTYPE, FLUSH_KERNEL = torch.int16, "FillFunctor<short>"  # the kernel that does so; no case fills int16


def measure(row: str, setup: Setup) -> dict[str, Any]:
    """``row``: an op of :data:`rsengine.kernels.proof.compile_report.OPS`."""
    from rsengine.kernels.proof.compile_report import all_cases

    rate, rows = copy_rate(setup.device), []
    for case in all_cases()[row]:
        found: dict[str, Any] = {"case": case.name}
        try:
            with torch.device(setup.device.device):  # at each call: a case makes its operands in it
                streams = case.launch(case.size)
                found["bytes"] = sum(stream.bytes for stream in streams.values())
                del streams
                runs = {
                    "ours": lambda case=case: case.launch(case.size),
                    "eager": case.eager(rsengine.kernels, case.size),
                }
                counted = {} if case.uses_library else {"ours": set(case.budgets)}
                times = microseconds(setup, runs, counted)
            found |= {f"{name}_us": value for name, value in times.items()}
            found["bound_us"] = found["bytes"] / rate * 1e6
            setup.log(
                f"{case.name}: {found['ours_us']:.1f} µs, eager {found['eager_us']:.1f}, bytes {found['bound_us']:.1f}"
            )
        except Exception as error:  # one case that fails must not hide the others: it is reported
            traceback.print_exc()
            found["error"] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
        rows.append(found)
    wrong = [f"{found['case']}: {found['error']}" for found in rows if "error" in found]
    return {"copy_gb_per_s": rate / 1e9, "rounds": ROUNDS, "cases": rows, "wrong": wrong}


def microseconds(setup: Setup, runs: dict[str, Callable[[], object]], counted: dict[str, set[str]]) -> dict[str, float]:
    """Device time of one call of each after a flush of the cache: medians of rounds in which they take turns.

    ``counted``: for some of them, the kernels that count; for the others every kernel counts.
    """
    flush = torch.empty(FLUSH_BYTES // 2, dtype=FLUSH_DTYPE, device=setup.device.device)
    for run in runs.values():
        run()

    def rounds() -> None:
        for _ in range(ROUNDS + 1):
            for run in runs.values():
                flush.fill_(1)
                run()

    calls = split_at_flushes(setup.device.profile(rounds))
    expected = ROUNDS * len(runs)
    if len(calls) < expected:
        raise RuntimeError(f"expected at least {expected} flushes of the cache; the profiler saw {len(calls)}")
    calls = calls[-expected:]
    found = {}
    for place, name in enumerate(runs):
        wanted = counted.get(name)
        kept = [[work for work in call if not wanted or work.name in wanted] for call in calls[place :: len(runs)]]
        if len({len(call) for call in kept}) != 1 or not kept[0]:
            numbers = sorted({len(call) for call in kept})
            raise RuntimeError(f"{name}: expected the same kernels in each call; the profiler saw {numbers} of them")
        found[name] = statistics.median(sum(work.microseconds for work in call) for call in kept)
    return found


def split_at_flushes(work: Sequence[Work]) -> list[list[Work]]:
    """What ran after each flush of the cache, up to the next."""
    calls: list[list[Work]] = []
    for each in work:
        if FLUSH_KERNEL in each.name:
            calls.append([])
        elif calls:
            calls[-1].append(each)
    return calls
