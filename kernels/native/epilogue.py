"""The end of a bottleneck in C, from its last batch norm on: squeeze-and-excite, stochastic depth, shortcut and ReLU.

As in :mod:`rsengine.kernels.native.convolutions`, maps are (N, C, H, W) bfloat16 in channels_last, all else float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .convolutions import BLOCK, Affine, Gradient
from .library import run


def squeezed(sums: Tensor, pixels: int, affine: Affine, beta: Tensor) -> Tensor:
    """The means of each image past the batch norm, (N, C, 1, 1), from the sums of the map before it, (N, C). This
    overwrites ``sums`` with the means before the batch norm minus those of the batch."""
    images, channels = sums.shape
    to = _pixel(images, channels)
    run(
        "gate_squeeze",
        sums=sums,
        images=images,
        channels=channels,
        pixels=pixels,
        mean=affine.mean,
        scale=affine.scale,
        beta=beta,
        squeezed=to,
    )
    return to


def opened(
    excited: Tensor | None, bias: Tensor | None, keep: Tensor | None, affine: Affine, images: int
) -> tuple[Tensor | None, Tensor, Tensor]:
    """The gate ``sigmoid(excited + bias)``, or ``None`` without squeeze-and-excite; and the gain and the offset of each
    image, (N, C), by which the batch norm, the gate and stochastic depth's ``keep``, (N,), are one affine map."""
    channels = len(affine.scale)
    gate = None if excited is None else torch.empty(images, channels)
    gain, offset = torch.empty(images, channels), torch.empty(images, channels)
    run(
        "gate_open",
        excited=excited,
        bias=bias,
        keep=keep,
        images=images,
        channels=channels,
        scale=affine.scale,
        shift=affine.shift,
        gate=gate,
        gain=gain,
        offset=offset,
    )
    return gate, gain, offset


def excited_gradient(
    total: Tensor, product: Tensor, gate: Tensor, keep: Tensor | None, affine: Affine, beta: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients of :func:`opened`'s excited, (N, C, 1, 1), and bias, from :func:`join_sums`."""
    images, channels = total.shape
    excited, bias = _pixel(images, channels), torch.empty(channels)
    run(
        "gate_excited_gradient",
        total=total,
        product=product,
        gate=gate,
        keep=keep,
        images=images,
        channels=channels,
        scale=affine.scale,
        beta=beta,
        excited=excited,
        bias=bias,
    )
    return excited, bias


def gate_gradient(
    total: Tensor,
    product: Tensor,
    gate: Tensor | None,
    keep: Tensor | None,
    spread: Tensor | None,
    centred: Tensor | None,
    pixels: int,
    affine: Affine,
) -> tuple[Gradient, Tensor, Tensor]:
    """The gradient of the map whose batch norm is ``affine``, and the sums of that, (C,): from :func:`join_sums`, and
    with squeeze-and-excite the gradient of :func:`squeezed`, ``spread``, and the means that it left, ``centred``."""
    images, channels = total.shape
    of_x = Gradient(torch.empty(images, channels), torch.empty(images, channels), torch.empty(channels))
    sums, products = torch.empty(channels), torch.empty(channels)
    run(
        "gate_gradient",
        total=total,
        product=product,
        gate=gate,
        keep=keep,
        spread=spread,
        centred=centred,
        images=images,
        channels=channels,
        pixels=pixels,
        mean=affine.mean,
        deviation=affine.deviation,
        scale=affine.scale,
        sums=sums,
        products=products,
        gain=of_x.gain,
        offset=of_x.offset,
        slope=of_x.slope,
    )
    return of_x, sums, products


def join(x: Tensor, gain: Tensor, offset: Tensor, shortcut: Tensor, affine: Affine | None) -> tuple[Tensor, Tensor]:
    """``relu(x * gain + offset + shortcut)``, gain and offset (N, C), where the shortcut may have a batch norm; and the
    bits of where it is positive, (N * H * W, ceil(C / 32)) int32."""
    images, channels, height, width = x.shape
    y, bits = torch.empty_like(x), torch.empty(images * height * width, -(-channels // BLOCK), dtype=torch.int32)
    run(
        "residual_join",
        a=x,
        gain=gain,
        offset=offset,
        shortcut=shortcut,
        scale=affine.scale if affine else None,
        shift=affine.shift if affine else None,
        images=images,
        pixels=height * width,
        channels=channels,
        y=y,
        bits=bits,
    )
    return y, bits


def join_sums(
    dy: Tensor, bits: Tensor, x: Tensor, mean: Tensor, shortcut: Tensor | None, affine: Affine | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Of g, which is dy where it has bits: the sums of g and of ``g * (x - mean)`` over each image, (N, C); and that of
    ``g * (shortcut - affine.mean)`` over all, (C,), where the shortcut has a batch norm."""
    images, channels, height, width = x.shape
    total, product = torch.empty(images, channels), torch.empty(images, channels)
    shortcut_product = torch.empty(channels) if affine else None
    run(
        "residual_sums",
        dy=dy,
        bits=bits,
        a=x,
        mean=mean,
        shortcut=shortcut if affine else None,
        shortcut_mean=affine.mean if affine else None,
        images=images,
        pixels=height * width,
        channels=channels,
        total=total,
        product=product,
        shortcut_product=shortcut_product,
    )
    return total, product, shortcut_product


def _pixel(images: int, channels: int) -> Tensor:
    return torch.empty(images, channels, 1, 1, dtype=torch.bfloat16, memory_format=torch.channels_last)
