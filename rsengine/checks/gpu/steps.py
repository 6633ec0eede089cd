"""Training steps for the measurements: the network of the report's first recipe on made-up images."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

from rsengine.checks.gpu.device import SIZE, Device
from rsengine.config import Recipe
from rsengine.device import Execution
from rsengine.engine.build import build_step
from rsengine.engine.graph import CapturedStep, compile_forward, static_batch
from rsengine.engine.step import TrainStep
from rsengine.input.resident import ResidentData
from rsengine.input.transfer import Batch

MEAN, STD, CLASSES = (0.5,) * 3, (0.25,) * 3, 10
STEPS_PER_EPOCH, KEPT_BATCHES = 200, 8


def make_step(recipe: Recipe, device: Device, *, bf16: bool) -> TrainStep:
    """A step of ``recipe``, with weights drawn from its seed."""
    torch.manual_seed(recipe.train.seed)
    execution = execution_on(device, bf16)
    if recipe.train.loader != "resident":
        return build_step(recipe, CLASSES, MEAN, STD, execution, STEPS_PER_EPOCH)
    data = resident_batches(recipe, device, bf16)
    return build_step(recipe, CLASSES, MEAN, STD, execution, data.steps_per_epoch, resident=data)


def execution_on(device: Device, bf16: bool) -> Execution:
    return Execution(device.device, torch.bfloat16 if bf16 else None, 1, "gpu check")


def resident_batches(recipe: Recipe, device: Device, bf16: bool) -> ResidentData:
    images, labels = (torch.cat(parts) for parts in zip(*host_batches(recipe, KEPT_BATCHES), strict=True))
    return ResidentData(recipe, images, labels, MEAN, STD, execution_on(device, bf16), KEPT_BATCHES)


def host_batches(recipe: Recipe, count: int = KEPT_BATCHES) -> list[Batch]:
    """Batches that can be learned: the class is a brightness, with noise."""
    generator, size = torch.Generator().manual_seed(1), recipe.train.batch_size
    batches = []
    for _ in range(count):
        labels = torch.randint(0, CLASSES, (size,), generator=generator)
        noise = torch.randint(0, 100, (size, *SIZE, 3), generator=generator)
        batches.append(((noise + 15 * labels.view(-1, 1, 1, 1)).to(torch.uint8), labels))
    return batches


def device_batches(recipe: Recipe, device: Device, count: int = KEPT_BATCHES) -> list[Batch]:
    return [tuple(tensor.to(device.device) for tensor in batch) for batch in host_batches(recipe, count)]


def capture(step: TrainStep, device: Device, recipe: Recipe) -> CapturedStep:
    inputs = () if step.resident is not None else static_batch(recipe.train.batch_size, SIZE, device.device)
    return CapturedStep(step, inputs, device.recorder())


@dataclass(frozen=True)
class Way:
    """A way to run a step.

    Attributes:
        benchmark: with ``torch.backends.cudnn.benchmark``, which picks each convolution's algorithm by trying them.
        products: with ``train.convolutions = "products"``.
    """

    name: str
    graph: bool = False
    compile: bool = False
    resident: bool = False
    benchmark: bool = False
    products: bool = False

    def prepare(self, recipe: Recipe, device: Device) -> Callable[[], None]:
        """A callable that does one step on a batch already on the device, after three calls to warm up."""
        loader, convolutions = "resident" if self.resident else "auto", "products" if self.products else "auto"
        recipe = recipe.with_settings([f"train.loader={loader}", f"train.convolutions={convolutions}"])
        step = make_step(recipe, device, bf16=True)
        if self.compile:
            compile_forward(step.model)
        inputs = () if self.resident else device_batches(recipe, device, 1)[0]
        with benchmark_flag(self.benchmark):
            call = capture(step, device, recipe) if self.graph else step

        def run() -> None:
            call(*inputs)

        # A captured step has chosen its algorithms in its warm-up; a plain one chooses at each call.
        ready = with_benchmark_flag(run) if self.benchmark and not self.graph else run
        for _ in range(3):
            ready()
        return ready


def benchmark_flag(on: bool) -> AbstractContextManager[None]:
    return torch.backends.cudnn.flags(enabled=True, benchmark=True) if on else contextlib.nullcontext()


def with_benchmark_flag(run: Callable[[], object]) -> Callable[[], None]:
    def flagged() -> None:
        with benchmark_flag(True):
            run()

    return flagged
