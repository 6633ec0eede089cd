"""One training step: rsengine as a user gets it by default, alone and beside the baselines.

``test_beside_baselines`` is what `make bench-train` runs: each step has a process of its own and runs once in each
round, in turn (A B C ... A B C ...), so that what slows the machine slows them alike. Ratios are taken within a round.
"""

import contextlib
import statistics
import time

import pytest
import torch

from bench.baselines import AVX2, BASELINES, ON_AVX2, Case, matmul_rate, rsengine_step
from bench.own_process import OURS, OwnProcess
from rsengine.config import load_recipe
from rsengine.device import choose_execution, keep_freed_memory
from rsengine.engine.build import build_step
from rsengine.run.machine import versions

CASES = [
    Case(50, stem_width=32, stem_stride=2, size=32, batch=128),
    Case(50, stem_width=32, stem_stride=2, size=32, batch=512),
    Case(50, stem_width=128, stem_stride=2, size=32, batch=128),
    Case(26, stem_width=32, stem_stride=1, size=32, batch=128),
    Case(50, stem_width=32, stem_stride=2, size=224, batch=8),  # all steps at once have to fit 24 GB
]
ROUNDS = 9
WARM_UP_STEPS, WARM_UP_SECONDS = 12, 6.0  # of each process, whichever is less; at first a heap grows in each step


@pytest.mark.parametrize("name", ["quickstart", "report-1"])
def test_step(benchmark, name):
    recipe = load_recipe(name)
    keep_freed_memory()  # as the training command does
    step = build_step(recipe, 10, (0.5,) * 3, (0.25,) * 3, choose_execution("cpu"), 390)
    n = recipe.train.batch_size
    images, labels = torch.randint(0, 256, (n, 32, 32, 3), dtype=torch.uint8), torch.randint(0, 10, (n,))
    benchmark.extra_info["images"] = n
    benchmark.pedantic(step, (images, labels), rounds=7, warmup_rounds=2)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="a comparison of CPU steps; on a GPU: make gpu-check")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_beside_baselines(benchmark, case):
    network = rsengine_step(case)[1].model
    multiply_adds = network.summary((case.size, case.size)).multiply_adds
    peak = matmul_rate()
    peaks: list[float] = []
    with contextlib.ExitStack() as stack:
        processes, warm_up = {}, {}
        started = {name: OwnProcess(name, case) for name in (OURS, *BASELINES)}
        if case == CASES[0]:
            started |= {name: OwnProcess(plain, case, AVX2) for name, plain in ON_AVX2.items()}
        for name, process in started.items():
            processes[name] = stack.enter_context(contextlib.closing(process))
            warm_up[name] = processes[name].step()
            print(f"\n{case}: {name}: first step {warm_up[name]:.1f} s", end="", flush=True)
        for process in processes.values():
            begin = time.perf_counter()
            for _ in range(WARM_UP_STEPS):
                process.step()
                if time.perf_counter() - begin > WARM_UP_SECONDS:
                    break
        times: dict[str, list[float]] = {name: [] for name in processes}

        def ours():
            times[OURS].append(processes[OURS].step())

        def others():
            peaks.append(peak())
            for name in list(processes)[1:]:
                times[name].append(processes[name].step())

        benchmark.pedantic(ours, setup=others, rounds=ROUNDS)
    if benchmark.stats is None:  # --benchmark-disable
        return
    rate = statistics.median(peaks)
    rows = {}
    for name, measured in times.items():
        images = case.batch / statistics.median(measured)
        ratios = [a / b for a, b in zip(measured, times[OURS], strict=True)]
        rows[name] = {
            "images/s": round(images, 1),
            "of_bf16_matmul": round(6 * multiply_adds * images / rate, 3),
            "rsengine_is_times_faster": [round(value, 2) for value in statistics.quantiles(ratios, n=4)],
            "first_step_s": round(warm_up[name], 2),
        }
    benchmark.extra_info |= {
        "case": str(case),
        "multiply_adds": multiply_adds,
        "bf16_matmul_GFLOP/s": round(rate / 1e9, 1),
        "rounds": ROUNDS,
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "rows": rows,
    }
