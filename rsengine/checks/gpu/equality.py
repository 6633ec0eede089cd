"""Compares plain and captured steps, from the same weights on the same batches."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from rsengine.checks.gpu.device import Setup
from rsengine.checks.gpu.steps import capture, device_batches, make_step
from rsengine.engine.step import TrainStep

# Plain and captured steps run the same kernels in the same order, so in float32, without TF32 and with cuDNN's
# deterministic algorithms, they should be equal to the bit. But cuBLAS may split a sum differently, because a capture
# gives it another workspace, and 200 steps let a difference in the last bit grow.
LOSS_TOLERANCE, WEIGHT_TOLERANCE = 1e-3, 1e-2  # relative; of a step's loss, and of a tensor's length
BF16_TOLERANCE = 0.05  # relative, of the mean loss of the last quarter: the same curve, not the same bits


def measure(row: str, setup: Setup) -> dict[str, Any]:
    """``row``: ``"float32"`` or ``"bfloat16"``."""
    device, recipe, bf16 = setup.device, setup.recipe(), row == "bfloat16"
    batches = device_batches(recipe, device)
    steps = [make_step(recipe, device, bf16=bf16) for _ in range(2)]
    curves: list[list[float]] = [[], []]
    first: dict[str, Any] | None = None
    with exact_convolutions():
        runs = [steps[0], capture(steps[1], device, recipe)]
        for number in range(setup.steps):
            for step, run, curve in zip(steps, runs, curves, strict=True):
                run(*batches[number % len(batches)])
                totals = step.read_totals()
                if not totals.images:
                    raise RuntimeError(f"step {number} ({'plain' if run is step else 'captured'}) counted no image")
                curve.append(totals.loss / totals.images)
            if first is None:
                first = first_difference(number, *steps, *(curve[-1] for curve in curves))
                if first is not None:
                    setup.log(f"{row}: {first}")
    found = {
        "steps": setup.steps,
        "first_difference": first,
        "loss_difference": loss_difference(*curves),
        "weight_difference": max(relative for _, relative in tensor_differences(*steps)),
        "late_loss_difference": loss_difference(*([statistics.mean(c[-max(setup.steps // 4, 1) :])] for c in curves)),
        "learned": curves[0][-1] < curves[0][0],
    }
    if bf16:
        equal = found["late_loss_difference"] <= BF16_TOLERANCE
    else:
        equal = found["loss_difference"] <= LOSS_TOLERANCE and found["weight_difference"] <= WEIGHT_TOLERANCE
    wrong = [] if equal else ["captured and plain steps differ by more than the tolerance"]
    wrong += [] if found["learned"] else ["the loss did not fall"]
    return found | {"wrong": wrong}


def exact_convolutions() -> AbstractContextManager[None]:
    """In the block, cuDNN is deterministic and computes float32 without TF32."""
    return torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)


def first_difference(number: int, plain: TrainStep, captured: TrainStep, *losses: float) -> dict[str, Any] | None:
    """What differs after step ``number``, to the bit: the tensor that differs most, and how many do."""
    different = [(name, relative) for name, relative in tensor_differences(plain, captured) if relative > 0]
    if not different and losses[0] == losses[1]:
        return None
    name, relative = max(different, key=lambda pair: pair[1], default=("the loss alone", 0.0))
    return {"step": number, "tensors": len(different), "largest": name, "relative": relative, "losses": list(losses)}


def tensor_differences(plain: TrainStep, captured: TrainStep) -> list[tuple[str, float]]:
    """Name and :func:`difference` of each weight and buffer of two steps, and of their EMA."""
    named, other = dict(_named(plain)), dict(_named(captured))
    return list(zip(named, difference(list(named.values()), list(other.values())), strict=True))


def _named(step: TrainStep) -> Iterator[tuple[str, Tensor]]:
    for kind, model in (("model", step.model), ("ema", step.ema_model)):
        for name, tensor in model.state_dict().items() if model is not None else ():
            if tensor.is_floating_point():
                yield f"{kind}.{name}", tensor


@torch.no_grad()
def difference(one: Sequence[Tensor], other: Sequence[Tensor]) -> list[float]:
    """For each pair, the norm of the difference over that of the first; infinite where a number is not finite."""
    distances = torch.stack(torch._foreach_norm(torch._foreach_sub(list(one), list(other))))
    lengths = torch.stack(torch._foreach_norm(list(one)))
    return (distances / lengths.clamp(min=1e-30)).nan_to_num(nan=float("inf")).tolist()


def loss_difference(one: Sequence[float], other: Sequence[float]) -> float:
    """The largest relative difference of two equally long curves."""
    pairs = [abs(a - b) / max(abs(a), 1e-30) for a, b in zip(one, other, strict=True)]
    return max(pair if pair == pair else float("inf") for pair in pairs)
