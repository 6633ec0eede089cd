"""The layers of the family, as the CPU runs them fastest: exact rewrites of what ``torch.nn`` computes.

Measured on two Zen 4 cores in bfloat16 at batch 128 (``docs/performance.md``): the library's 1x1 convolutions and the
weight gradients of its 3x3 convolutions on small maps run at a tenth to a half of the rate of its matrix product, which
does the same sums. On other devices every layer is that of ``torch.nn``, unless :func:`use_products` says otherwise.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from rsengine.kernels import ConvNorm, batch_norm, joins
from rsengine.parallel.batch_norm import sync_batch_norm
from rsengine.parallel.ranks import Ranks

# Output pixels up to which the weight gradient of a 3x3 convolution is one matrix product over copied patches. Above,
# copying the patches, nine times the map, costs more than it saves; with a stride there are fewer patches to copy.
PATCH_PIXELS = {1: 16, 2: 64}
# What train.convolutions may be, and whether a layer is a product then; None: on the CPU.
PRODUCTS = {"auto": None, "products": True, "library": False}


def use_products(model: nn.Module, choice: str) -> None:
    """Say where 1x1 convolutions, and 3x3 ones of maps of up to 2x2 pixels, run as matrix products.

    Args:
        choice: ``"products"``: everywhere; ``"library"``: nowhere; ``"auto"``: on the CPU.
    """
    for module in model.modules():
        if isinstance(module, PointwiseConv | Conv3x3):
            module.as_product = PRODUCTS[choice]


def use_sync_batch_norm(model: nn.Module, ranks: Ranks) -> None:
    """Have every batch norm that trains take its statistics over the batches of all processes of ``ranks``.

    Raises:
        ValueError: a batch norm has no momentum. The weight of a batch in its averages is a number of the host.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, BatchNorm)}
    for name, module in layers.items():
        if module.momentum is None:
            raise ValueError(f"{name}.momentum: expected a number in [0, 1], for statistics of all processes; got None")
    for module in layers.values():
        module.ranks = ranks


def use_ranks(model: nn.Module, ranks: Ranks) -> None:
    """Share each batch among the processes ``ranks``: what a module draws for images, it draws for the whole batch."""
    for module in model.modules():
        if isinstance(getattr(module, "ranks", None), Ranks):
            module.ranks = ranks


def draw_keeps(count: int, rate: float, ranks: Ranks, device: torch.device) -> Tensor:
    """Of each of ``count`` images whether its branch stays, with probability 1 - ``rate``, and the scale that keeps the
    mean: (count,) float32, 1 / (1 - rate) or 0."""
    keep = 1 - rate
    return (ranks.part(torch.rand(count * ranks.size, device=device)) < keep).to(torch.float32) / keep


def dropout(x: Tensor, rate: float, training: bool, ranks: Ranks) -> Tensor:
    """:func:`torch.nn.functional.dropout` of (N, C), drawn for the whole batch of all processes."""
    if ranks.size == 1 or not training or rate == 0:
        return F.dropout(x, rate, training)
    whole = torch.ones(len(x) * ranks.size, x.shape[1], dtype=x.dtype, device=x.device)
    return x * ranks.part(F.dropout(whole, rate))


class PointwiseConv(nn.Conv2d):
    """A 1x1 convolution: on the CPU a matrix product over pixels."""

    as_product: bool | None = None  # None: on the CPU

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, kernel_size=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if not _is_product(self.as_product, x):
            return super().forward(x)
        return F.linear(x.permute(0, 2, 3, 1), self.weight.flatten(1)).permute(0, 3, 1, 2)


class Conv3x3(nn.Conv2d):
    """A 3x3 convolution with padding 1. On the CPU maps of up to 2x2 pixels, whose padding is most of what the kernel
    sees, are one matrix product of whole maps; the weight gradient of other small maps is one too."""

    as_product: bool | None = None  # None: on the CPU

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__(in_channels, out_channels, kernel_size=3, stride=stride, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if not _is_product(self.as_product, x):
            return super().forward(x)
        stride, device = self.stride[0], x.device.type
        height, width = x.shape[2:]
        autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else x.dtype
        if height <= 2 and width <= 2:
            return _WholeMap.apply(x.to(dtype), self.weight, stride)
        if device == "cpu" and _outputs(height, stride) * _outputs(width, stride) <= PATCH_PIXELS[stride]:
            return _PatchGradient.apply(x.to(dtype), self.weight, stride)
        return super().forward(x)


class BatchNorm(nn.BatchNorm2d):
    """Batch norm, followed by a ReLU if ``relu``; in training both are one operation of :mod:`rsengine.kernels`.

    Attributes:
        counts: whether a batch is counted in ``num_batches_tracked`` here. A network of many layers counts for all of
            them at once (:func:`count_batch`), in one operation.
        ranks: the processes over whose batches the statistics are taken; None: each process takes its own.
    """

    counts = True
    ranks: Ranks | None = None

    @property
    def is_synchronised(self) -> bool:
        """Whether a batch is normalised by statistics of more than this process's part of it."""
        return self.training and self.ranks is not None and self.ranks.size > 1

    def forward(self, x: Tensor, relu: bool = False) -> Tensor:
        if not self.training or self.momentum is None:
            y = super().forward(x)
            return F.relu(y) if relu else y
        if self.is_synchronised:
            return sync_batch_norm(x, *self.tensors(), self.momentum, self.eps, relu, self.ranks)
        return batch_norm(x, *self.tensors(), self.momentum, self.eps, relu)

    def tensors(self) -> tuple[Tensor, ...]:
        """Count a batch; return what the operations of :mod:`rsengine.kernels` take from here."""
        self.count()
        return self.parameters_and_averages()

    def count(self) -> None:
        """Count a batch if :attr:`counts`."""
        if self.counts:
            self.num_batches_tracked.add_(1)

    def parameters_and_averages(self) -> tuple[Tensor, ...]:
        return self.weight, self.bias, self.running_mean, self.running_var


def joined(x: Tensor, pairs: Sequence[tuple[nn.Conv2d, BatchNorm]]) -> list[ConvNorm] | None:
    """Convolutions, each with the batch norm after it, as the operations on whole parts of the network take them;
    ``None`` where these do not run, or would not do what the layers do."""
    first = pairs[0][1]
    for conv, bn in pairs:
        if not isinstance(conv, PointwiseConv | Conv3x3):  # somebody has put another one in its place
            return None
        alike = bn.momentum == first.momentum and bn.eps == first.eps
        if conv.as_product is not None or not bn.training or bn.momentum is None or bn.is_synchronised or not alike:
            return None
    layers = [ConvNorm(conv.weight, *bn.parameters_and_averages(), conv.stride[0]) for conv, bn in pairs]
    if not joins(x, layers):
        return None
    for _, bn in pairs:
        bn.count()
    return layers


def count_batch(layers: Iterable[BatchNorm]) -> None:
    """Count a batch in every layer that trains and does not count for itself: one operation."""
    counters = [bn.num_batches_tracked for bn in layers if bn.training and bn.momentum is not None]
    if counters:  # a layer without a momentum counts in any case, because its average depends on the count
        torch._foreach_add_(counters, 1)


class _WholeMap(torch.autograd.Function):
    """Maps of up to 2x2 pixels as vectors: ``y = x M'``, M the (out pixels * out, in pixels * in) matrix of the taps
    that meet the map. The weight, of any dtype, is read in the dtype of ``x``; its gradient is in its own."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, stride: int) -> Tensor:
        count, channels, height, width = x.shape
        rows, columns = _outputs(height, stride), _outputs(width, stride)
        out = weight.shape[0]
        matrix = x.new_empty(rows, columns, out, height, width, channels)
        for i, j, taps in _taps(rows, columns, height, width, stride):
            matrix[i, j].copy_(weight[taps].permute(0, 2, 3, 1))
        matrix = matrix.view(rows * columns * out, height * width * channels)
        x = x.permute(0, 2, 3, 1).flatten(1)
        ctx.save_for_backward(x, matrix, weight)
        ctx.geometry = rows, columns, height, width, stride
        return (x @ matrix.T).view(count, rows, columns, out).permute(0, 3, 1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, matrix, weight = ctx.saved_tensors
        rows, columns, height, width, stride = ctx.geometry
        count, out, channels = len(x), weight.shape[0], weight.shape[1]
        dy = dy.permute(0, 2, 3, 1).flatten(1)
        dx = dweight = None
        if ctx.needs_input_grad[0]:
            dx = (dy @ matrix).view(count, height, width, channels).permute(0, 3, 1, 2)
        if ctx.needs_input_grad[1]:
            blocks = (dy.T @ x).view(rows, columns, out, height, width, channels)
            dweight = torch.zeros_like(weight, memory_format=torch.channels_last)
            for i, j, taps in _taps(rows, columns, height, width, stride):
                dweight[taps].add_(blocks[i, j].permute(0, 3, 1, 2))
        return dx, dweight, None


class _PatchGradient(torch.autograd.Function):
    """The library's convolution and input gradient, and the weight gradient as a product over patches."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, stride: int) -> Tensor:
        cast = weight.to(x.dtype)
        ctx.save_for_backward(x, cast)
        ctx.stride, ctx.weight_dtype = stride, weight.dtype
        return F.conv2d(x, cast, stride=stride, padding=1)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        stride, out = ctx.stride, weight.shape[0]
        dx = dweight = None
        if ctx.needs_input_grad[0]:
            geometry = (None, [stride] * 2, [1] * 2, [1] * 2, False, [0, 0], 1, [True, False, False])
            dx = torch.ops.aten.convolution_backward(dy, x, weight, *geometry)[0]
        if ctx.needs_input_grad[1]:
            product = dy.permute(0, 2, 3, 1).reshape(-1, out).T @ _patches(x, stride)
            dweight = product.view(out, 3, 3, -1).permute(0, 3, 1, 2).to(ctx.weight_dtype)
        return dx, dweight, None


def _is_product(choice: bool | None, x: Tensor) -> bool:
    return x.device.type == "cpu" if choice is None else choice


def _outputs(pixels: int, stride: int) -> int:
    return (pixels - 1) // stride + 1


def _taps(rows: int, columns: int, height: int, width: int, stride: int):
    """The position of each output pixel, and the index of the weight's taps that meet the map there. In maps of up to
    2x2 pixels every output pixel sees every input pixel."""
    for i in range(rows):
        for j in range(columns):
            top, left = 1 - i * stride, 1 - j * stride
            yield i, j, (slice(None), slice(None), slice(top, top + height), slice(left, left + width))


def _patches(x: Tensor, stride: int) -> Tensor:
    """(N, C, H, W) to (N * output pixels, 9 * C): what a 3x3 kernel sees at each place, channels innermost."""
    count, channels, height, width = x.shape
    padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))
    n, h, w, c = padded.stride()
    shape = (count, _outputs(height, stride), _outputs(width, stride), 3, 3 * channels)
    return padded.as_strided(shape, (n, h * stride, w * stride, h, c)).reshape(-1, 9 * channels)
