"""Quick checks that each thing works on this card at all, the smallest first."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rsengine.augment import DeviceAugment
from rsengine.checks.gpu import equality
from rsengine.checks.gpu.device import DRY_RUN, Setup
from rsengine.data import find_dataset
from rsengine.kernels import (
    augment_batch,
    batch_norm,
    batch_norm_squeeze_excite_residual,
    label_smoothed_cross_entropy,
    sgd_ema_step,
)

TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2}  # relative, of a tensor's length
STAGES = ((256, 8), (512, 4), (1024, 2), (2048, 1))  # channels, side: ResNet-RS-50 at 32x32


def measure(row: str, setup: Setup) -> dict[str, Any]:
    checks: dict[str, Callable[[Setup], dict[str, Any]]] = {
        "cross-entropy": cross_entropy,
        "batch norm": normalisation,
        "block epilogue": block_epilogue,
        "update": update,
        "augmentation": augmentation,
        "captured step": captured_step,
        "profiler": profiler,
        "feeder": feeder,
    }
    return {"wrong": []} | checks[row](setup)


def cross_entropy(setup: Setup) -> dict[str, Any]:
    logits = torch.randn(128, 10, device=setup.device.device, requires_grad=True)
    target = torch.randint(0, 10, (128,), device=setup.device.device)

    def run(impl: str) -> list[Tensor]:
        loss, correct = label_smoothed_cross_entropy(logits, target, 0.1, impl=impl)
        return [loss, correct.float(), *torch.autograd.grad(loss, logits)]

    return compare(run("triton"), run("eager"), torch.float32)


def normalisation(setup: Setup) -> dict[str, Any]:
    device, results = setup.device.device, []
    for channels, side in STAGES:
        maps = (torch.randn(128, channels, side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
        x, dy = (t.contiguous(memory_format=torch.channels_last) for t in maps)
        leaves = [t.requires_grad_() for t in (x, *torch.randn(2, channels, device=device))]

        def run(impl: str, leaves=leaves, dy=dy) -> list[Tensor]:
            moved = [torch.ones(len(leaves[1]), device=device) for _ in range(2)]
            y = batch_norm(*leaves, *moved, impl=impl)
            return [y.detach(), *moved, *torch.autograd.grad(y, leaves, dy)]

        results.append(compare(run("triton"), run("eager"), torch.bfloat16))
    return max(results, key=lambda result: result["difference"])


def block_epilogue(setup: Setup) -> dict[str, Any]:
    device, results = setup.device.device, []
    for channels, side in STAGES:
        maps = (torch.randn(128, channels, side, side, device=device, dtype=torch.bfloat16) for _ in range(3))
        x, shortcut, dy = (t.contiguous(memory_format=torch.channels_last) for t in maps)
        shapes = (channels // 16, channels), (channels // 16,), (channels, channels // 16), (channels,)
        weights = [torch.randn(*shape, device=device).mul_(0.05).bfloat16() for shape in shapes]
        # Near 0 rounding decides which side of a ReLU a number is on, and gradients would differ by all of it: hidden
        # channels are open or closed for every image, and pixels on which the two do not agree have no gradient.
        weights[1] = 8 * weights[1].sign()
        scale, shift, mean = (torch.randn(channels, device=device) for _ in range(3))
        leaves = [t.requires_grad_() for t in (x, scale, shift, *weights, shortcut)]
        keep_scale = (torch.rand(128, device=device) < 0.8).float() / 0.8

        outputs = []
        for impl in ("triton", "eager"):
            buffers = mean.clone(), mean.abs()
            with torch.autocast(device.type, torch.bfloat16):
                y = batch_norm_squeeze_excite_residual(*leaves[:3], *buffers, *leaves[3:], keep_scale, impl=impl)
            outputs.append((y, *buffers))
        dy = dy * ((outputs[0][0] > 0) == (outputs[1][0] > 0))
        ours, eager = ([*each, *torch.autograd.grad(each[0], leaves, dy)] for each in outputs)
        results.append(compare([t.detach() for t in ours], [t.detach() for t in eager], torch.bfloat16))
    return max(results, key=lambda result: result["difference"])


def update(setup: Setup) -> dict[str, Any]:
    device = setup.device.device
    shapes = [(64, 3, 3, 3), (64,), (2048, 512, 1, 1), (10, 2048), (10,)]
    lists = [[torch.randn(shape, device=device) for shape in shapes] for _ in range(4)]
    twins = [[tensor.clone() for tensor in part] for part in lists]
    lr, decay = torch.tensor(0.1, device=device), torch.tensor(0.99, device=device)
    for part, impl in ((lists, "triton"), (twins, "eager")):
        sgd_ema_step(*part, lr, 0.9, [1e-2, 0.0, 1e-2, 1e-2, 0.0], decay, impl=impl)
    return compare([t for part in lists for t in part], [t for part in twins for t in part], torch.float32)


def augmentation(setup: Setup) -> dict[str, Any]:
    device = setup.device.device
    images = torch.randint(0, 256, (512, 32, 32, 3), dtype=torch.uint8, device=device)
    augment = DeviceAugment(setup.recipe().augment, (32, 32), (0.5, 0.5, 0.5), device=device)
    given = images, torch.arange(512, device=device), torch.tensor(3, device=device), 7
    ours, eager = (
        augment_batch(*given, policy=augment.policy, **augment.options, impl=impl) for impl in ("triton", "eager")
    )
    equal = torch.equal(ours, eager)
    return {"equal_bytes": equal, "wrong": [] if equal else ["Triton's pixels are not eager's"]}


def captured_step(setup: Setup) -> dict[str, Any]:
    """A short run of the equality check, on a tiny network."""
    return equality.measure("float32", dataclasses.replace(setup, settings=DRY_RUN, steps=20))


def profiler(setup: Setup) -> dict[str, Any]:
    x = torch.randn(1024, 1024, device=setup.device.device)
    seen = len(setup.device.profile(lambda: [x @ x for _ in range(5)]))
    return {"kernels": seen, "wrong": [] if seen >= 5 else [f"the profiler saw {seen} kernels of 5 products"]}


def feeder(setup: Setup) -> dict[str, Any]:
    """The digits through FFCV and pinned memory."""
    if importlib.util.find_spec("ffcv") is None:
        return {"left_out": "FFCV is not installed"}
    from rsengine.input.ffcv_loader import FfcvLoader

    dataset = find_dataset("digits", log=setup.log)
    loader = FfcvLoader(dataset.train_beton, 100)
    feeder = setup.device.feeder(100)
    batches, sums = loader.epoch(0), []
    for images, labels in feeder.feed(batches) if feeder is not None else batches:
        sums.append(images.sum(dtype=torch.int64) + labels.sum())
    expected = [images.sum(dtype=torch.int64) + labels.sum() for images, labels in loader.epoch(0)]
    equal = [int(a) for a in sums] == [int(b) for b in expected]
    return {"batches": len(sums), "wrong": [] if equal else ["batches arrived that are not the loader's"]}


def compare(ours: Sequence[Tensor], eager: Sequence[Tensor], dtype: torch.dtype) -> dict[str, Any]:
    worst = max(equality.difference([t.double() for t in eager], [t.double() for t in ours]))
    wrong = [f"Triton and eager differ by {worst:.2g}, relative"] if worst > TOLERANCES[dtype] else []
    return {"difference": worst, "tolerance": TOLERANCES[dtype], "wrong": wrong}
