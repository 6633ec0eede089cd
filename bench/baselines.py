"""Baselines, each a callable that does one step: timm in a plain loop, and the report's loop.

All take the same network, batch, optimiser, label smoothing and EMA as rsengine's step beside them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import timm
import torch
from PIL import Image
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torchvision import transforms

from bench.measure import seconds
from rsengine.config import Recipe
from rsengine.device import choose_execution, keep_freed_memory
from rsengine.engine.build import build_step
from rsengine.engine.step import TrainStep
from rsengine.kernels.dispatch import eager_only
from rsengine.model import DEPTHS, resnet_rs

CLASSES = 10
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
SGD = {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 4e-5}
SMOOTHING = 0.1


@dataclass(frozen=True)
class Case:
    """A network, an image size in pixels a side and a batch."""

    depth: int
    stem_width: int
    stem_stride: int
    size: int
    batch: int

    def __str__(self) -> str:
        stem = f"stem {self.stem_width} stride {self.stem_stride}"
        return f"RS-{self.depth}, {stem}, {self.size}x{self.size}, batch {self.batch}"

    def pixels(self) -> Tensor:
        """(N, H, W, 3) uint8."""
        generator = torch.Generator().manual_seed(0)
        shape = (self.batch, self.size, self.size, 3)
        return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)

    def labels(self) -> Tensor:
        return torch.arange(self.batch) % CLASSES


def recipe_of(case: Case) -> Recipe:
    """The network of :func:`timm_network`, which is the family's own."""
    settings = [
        f"model.depth={case.depth}",
        f"model.stem_width={case.stem_width}",
        f"model.stem_stride={case.stem_stride}",
        "model.dropout=0.0",  # timm's default
        f"train.batch_size={case.batch}",
    ]
    return Recipe().with_settings(settings)


def rsengine_step(case: Case, *settings: str) -> tuple[Callable[[], None], TrainStep]:
    """rsengine as a user gets it by default, but for ``settings``: uint8 pixels in, precision and layout chosen by the
    engine."""
    recipe = recipe_of(case).with_settings(settings)
    keep_freed_memory()  # as the training command does
    step = build_step(recipe, CLASSES, MEAN, STD, choose_execution("cpu", recipe.train.precision), 1000)
    images, labels = case.pixels(), case.labels()
    return lambda: step(images, labels), step


def layer_by_layer(case: Case) -> Callable[[], None]:
    """rsengine's step without whole parts of the network in C, which shows what these gain."""
    return rsengine_step(case, "train.convolutions=products")[0]


def without_native(case: Case) -> Callable[[], None]:
    """rsengine's step with PyTorch's operators for batch norm, which shows what the passes in C gain."""
    return eager_only()(rsengine_step(case)[0])


class PlainLoop:
    """Forward, loss, backward, SGD, EMA: a loop as in a tutorial. Images come as normalised float32.

    Args:
        update_ema: called after each step of the optimiser.
        autocast: bfloat16 autocast of the forward pass and the loss.
    """

    def __init__(self, model: nn.Module, update_ema: Callable[[], None], *, autocast: bool = False) -> None:
        self.model, self.update_ema, self.autocast = model, update_ema, autocast
        self.optimizer = torch.optim.SGD(model.parameters(), **SGD)
        self.criterion = nn.CrossEntropyLoss(label_smoothing=SMOOTHING)

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """One step. Returns its loss, (), and its logits, (N, classes), detached."""
        self.optimizer.zero_grad()
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.autocast):
            logits = self.model(images)
            loss = self.criterion(logits, labels)
        loss.backward()
        self.optimizer.step()
        self.update_ema()
        return loss.detach(), logits.detach()


def timm_network(case: Case) -> nn.Module:
    model = timm.create_model(
        "resnetrs50", num_classes=CLASSES, layers=list(DEPTHS[case.depth]), stem_width=case.stem_width
    )
    model.conv1[0].stride = (case.stem_stride, case.stem_stride)
    return model.train()


def timm_loop(
    case: Case,
    *,
    channels_last: bool = False,
    autocast: bool = False,
    compile: str | None = None,
    device: torch.device | str = "cpu",
) -> Callable[[], object]:
    """timm's resnetrs50 in a plain loop, with timm's EMA of the weights, on a batch that is on ``device``.

    ``compile``: a mode of ``torch.compile``.
    """
    layout = torch.channels_last if channels_last else torch.contiguous_format
    model = timm_network(case).to(device, memory_format=layout)
    ema = ModelEmaV3(model, decay=0.9999)
    run = torch.compile(model, mode=compile) if compile else model
    loop = PlainLoop(run, lambda: ema.update(model), autocast=autocast)
    images = normalised(case.pixels()).contiguous(memory_format=layout).to(device)
    labels = case.labels().to(device)
    return lambda: loop(images, labels)


def report_loop(case: Case) -> Callable[[], object]:
    """The report's loop with its settings: PIL augmentation an image at a time, float32, an EMA kept by name. The
    network is rsengine's, because most of the report's own got no gradient; its arithmetic is by PyTorch's operators,
    as the report has it. No workers: they would share the cores."""
    network = resnet_rs(
        case.depth,
        CLASSES,
        stem_width=case.stem_width,
        stem_stride=case.stem_stride,
        se_ratio=1 / 16,
    )
    for module in network.train().modules():
        if isinstance(module, nn.Conv2d):
            module.__class__ = nn.Conv2d
    shadow = {name: p.detach().clone() for name, p in network.named_parameters()}

    @torch.no_grad()
    def update_ema() -> None:
        for name, p in network.named_parameters():
            shadow[name] = 0.995 * shadow[name] + (1 - 0.995) * p

    pipeline = transforms.Compose(
        [
            transforms.RandomCrop(case.size, padding=4),
            transforms.RandomHorizontalFlip(),
            transforms.AutoAugment(transforms.AutoAugmentPolicy.CIFAR10),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
            cutout,
        ]
    )
    pictures = [Image.fromarray(image) for image in case.pixels().numpy()]
    labels, loop = case.labels(), PlainLoop(network, update_ema)
    return eager_only()(lambda: loop(torch.stack([pipeline(picture) for picture in pictures]), labels))


def cutout(image: Tensor, holes: int = 4, length: int = 4) -> Tensor:
    """Blank some squares of a (3, H, W) image, clipped at its border (DeVries & Taylor, 1708.04552)."""
    height, width = image.shape[1:]
    mask = np.ones((height, width), np.float32)
    for _ in range(holes):
        y, x = np.random.randint(height), np.random.randint(width)
        mask[max(y - length // 2, 0) : y + length // 2, max(x - length // 2, 0) : x + length // 2] = 0
    return image * torch.from_numpy(mask)


def normalised(pixels: Tensor) -> Tensor:
    """(N, H, W, 3) uint8 to (N, 3, H, W) float32."""
    mean, std = torch.tensor(MEAN), torch.tensor(STD)
    return ((pixels / 255 - mean) / std).permute(0, 3, 1, 2)


def matmul_rate(side: int = 2048, dtype: torch.dtype = torch.bfloat16) -> Callable[[], float]:
    """A function that multiplies two square matrices and returns floating-point operations a second."""
    a, b = torch.randn(side, side).to(dtype), torch.randn(side, side).to(dtype)
    out = torch.empty_like(a)

    def run() -> float:
        # In a row: after a pause AMX takes some products to reach its rate, which is the best one.
        return 2 * side**3 / min(seconds(lambda: torch.mm(a, b, out=out)) for _ in range(10))

    return run


BASELINES: dict[str, Callable[[Case], Callable[[], object]]] = {
    "timm, defaults (float32, NCHW)": timm_loop,
    "timm, channels_last": lambda case: timm_loop(case, channels_last=True),
    "timm, channels_last, bfloat16": lambda case: timm_loop(case, channels_last=True, autocast=True),
    "timm, channels_last, bfloat16, torch.compile": lambda case: timm_loop(
        case, channels_last=True, autocast=True, compile="default"
    ),
    "the report's loop": report_loop,
    "rsengine, layer by layer": layer_by_layer,
    "rsengine without its C code": without_native,
    "rsengine, float32": lambda case: rsengine_step(case, "train.precision=fp32")[0],
}
# The same on processors with AVX2 alone, as most laptops are: the variables that say so are read when a process starts.
AVX2 = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
ON_AVX2 = {f"{name}, AVX2 alone": name for name in ("rsengine, float32", "timm, defaults (float32, NCHW)")}
