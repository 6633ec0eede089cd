"""The share of the batches' transfer that hides under kernels, through the feeder, into captured steps."""

from __future__ import annotations

from typing import Any

from rsengine.checks.gpu import device
from rsengine.checks.gpu.device import Setup
from rsengine.checks.gpu.steps import capture, host_batches, make_step


def measure(row: str, setup: Setup) -> dict[str, Any]:
    recipe = setup.recipe()
    step = make_step(recipe, setup.device, bf16=True)
    run, batches = capture(step, setup.device, recipe), host_batches(recipe) * 3
    feeder = setup.device.feeder(recipe.train.batch_size)

    def steps() -> None:
        for batch in feeder.feed(batches) if feeder is not None else batches:
            run(*batch)

    steps()
    return {"steps": len(batches), "overlap": device.overlap(setup.device.profile(steps))}
