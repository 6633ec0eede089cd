"""Whether replays draw new random numbers, and resident batches are those that a plain step gets."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rsengine.checks.gpu.device import Setup
from rsengine.checks.gpu.steps import capture, device_batches, make_step
from rsengine.checks.gpu.steps import resident_batches as resident_set
from rsengine.engine.graph import CapturedStep
from rsengine.input.resident import ResidentData


def measure(row: str, setup: Setup) -> dict[str, Any]:
    """``row``: ``"masks"`` or ``"resident batches"``."""
    found = masks(setup) if row == "masks" else resident_batches(setup)
    return found | {"wrong": [f"not so: {name.replace('_', ' ')}" for name, so in found.items() if not so]}


def masks(setup: Setup) -> dict[str, Any]:
    """Dropout and stochastic depth differ between two replays from one state."""
    device, recipe = setup.device, setup.recipe("model.dropout=0.25", "model.drop_path=0.2")
    step = make_step(recipe, device, bf16=False)
    run, (batch,) = capture(step, device, recipe), device_batches(recipe, device, 1)
    state, results = [t.clone() for t in step.state_tensors()], []
    for _ in range(2):
        with torch.no_grad():
            for tensor, value in zip(step.state_tensors(), state, strict=True):
                tensor.copy_(value)
        run(*batch)
        results.append([p.detach().clone() for p in step.update.params])
    return {"masks_differ": any(not torch.equal(a, b) for a, b in zip(*results, strict=True))}


def resident_batches(setup: Setup) -> dict[str, Any]:
    settings = "train.loader=resident", "augment.policy=autoaugment", "augment.cutout_holes=4"
    device, recipe = setup.device, setup.recipe(*settings)
    keep = _Keep(resident_set(recipe, device, bf16=False), device.device)
    replay, seen = CapturedStep(keep, (), device.recorder()), []
    for _ in range(4):
        replay()
        seen.append(keep.images.clone())
    expected = [keep.data(torch.tensor(i, device=device.device))[0] for i in range(4)]
    return {
        "batches_differ": all(not torch.equal(a, b) for a, b in zip(seen, seen[1:], strict=False)),
        "batches_are_the_plain_ones": all(torch.equal(a, b) for a, b in zip(seen, expected, strict=True)),
    }


class _Keep:
    """A step that only makes a resident batch and keeps it."""

    def __init__(self, data: ResidentData, device: torch.device) -> None:
        self.data, self.counter = data, torch.zeros((), dtype=torch.int64, device=device)
        self.images = torch.zeros_like(data(self.counter)[0])

    def __call__(self) -> None:
        self.images.copy_(self.data(self.counter)[0])
        self.counter.add_(1)

    def state_tensors(self) -> list[Tensor]:
        return [self.images, self.counter]
