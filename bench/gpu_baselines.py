"""Baselines on a GPU, each in turn with rsengine's captured step: a part of ``python -m rsengine.gpu_check``.

The same network, optimiser, label smoothing and EMA on both sides, batches of 32x32 pixels already on the device (the
baselines' are normalised float32, ours uint8). The baselines have ``torch.backends.cudnn.benchmark`` on.
"""

from __future__ import annotations

import importlib.util
import statistics
from typing import Any

from rsengine.checks.gpu.device import Setup, time_in_turn
from rsengine.checks.gpu.steps import Way, with_benchmark_flag

LOW = {"channels_last": True, "autocast": True}
OPTIONS: dict[str, dict[str, Any]] = {
    "float32, NCHW": {},
    "bfloat16, channels_last": LOW,
    "torch.compile": LOW | {"compile": "default"},
    "torch.compile reduce-overhead": LOW | {"compile": "reduce-overhead"},
    "torch.compile max-autotune": LOW | {"compile": "max-autotune"},
}


def measure(row: str, setup: Setup) -> dict[str, Any]:
    """``row``: ``"BASELINE, batch N"``. Ratios are medians of rounds in turn, A B A B."""
    if importlib.util.find_spec("timm") is None:
        return {"left_out": "timm is not installed"}
    from bench.baselines import Case, recipe_of, timm_loop

    name, _, batch = row.rpartition(", batch ")
    device, case = setup.device, Case(50, stem_width=32, stem_stride=2, size=32, batch=int(batch))
    if not device.is_gpu:  # a dry run
        case = Case(26, stem_width=8, stem_stride=2, size=32, batch=4)
    baseline = with_benchmark_flag(timm_loop(case, **OPTIONS[name], device=device.device))
    for _ in range(11):  # torch.compile's CUDA graphs are recorded in the second and third call
        baseline()
        if not device.is_gpu:
            break
    device.synchronize()
    ours = Way("rsengine", graph=device.is_gpu).prepare(recipe_of(case), device)
    times = time_in_turn(device, {"baseline": baseline, "rsengine": ours}, setup.rounds, setup.round_steps)
    seconds = {which: [total for total, _ in measured] for which, measured in times.items()}
    ratios = [a / b for a, b in zip(seconds["baseline"], seconds["rsengine"], strict=True)]
    return {
        "baseline": f"timm resnetrs50, {name}" if device.is_gpu else f"a dry run of timm resnetrs50, {name}",
        "batch_size": case.batch,
        "rounds": setup.rounds,
        "round_steps": setup.round_steps,
        "images_per_second": case.batch / statistics.median(seconds["baseline"]),
        "rsengine_images_per_second": case.batch / statistics.median(seconds["rsengine"]),
        "times_faster": statistics.median(ratios),
        "times_faster_range": [min(ratios), max(ratios)],
        "wrong": [],
    }
