"""Convolutions with batch norm at both ends, in C, for bfloat16 on processors that multiply matrices of it.

Maps are (N, C, H, W) bfloat16 in channels_last; vectors (C,) float32. Nothing here checks what the callers
(:mod:`rsengine.kernels.bottleneck`) have made, beyond what :func:`rsengine.kernels.native.library.run` does.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from .library import call, load, number, run
from .plans import Plan, plan

BLOCK = 32  # channels


@functools.lru_cache(maxsize=1)
def available() -> tuple[bool, bool, str]:
    """Whether these functions are faster here than layer by layer, whether they can run, and a sentence on why."""
    library, reason = load()
    if library is None:
        return False, False, reason
    if not hasattr(library, "convolution_forward"):
        return False, False, "the processor, or the compiler, has no AVX512_BF16, which they are written for"
    if not number("convolution_prepare"):
        return False, False, "the system does not let this process use AMX"
    if not number("convolution_has_tiles"):
        return False, True, "the processor has AVX512_BF16 and no AMX, and layer by layer is about as fast there"
    return True, True, f"the processor has AMX; {reason}"


class Packed(NamedTuple):
    """A weight, (outputs, inputs, kernel, kernel) float32, as products take it."""

    outputs: int
    inputs: int
    kernel: int
    tiles: Tensor | None  # for the convolution
    back: Tensor | None  # for the gradient of its input

    @property
    def taps(self) -> int:
        return self.kernel**2


def pack(weight: Tensor, back: bool) -> Packed:
    """Round a weight to bfloat16 and lay it out as tiles."""
    outputs, inputs, kernel, _ = weight.shape
    weight = weight.detach().contiguous(memory_format=torch.channels_last)
    size = _padded(outputs) * _padded(inputs) * kernel**2
    tiles, turned = (torch.empty(size, dtype=torch.bfloat16) if wanted else None for wanted in (True, back))
    packed = Packed(outputs, inputs, kernel, tiles, turned)
    run("convolution_pack", weight=weight, outputs=outputs, taps=packed.taps, inputs=inputs, packed=tiles, back=turned)
    return packed


class Affine(NamedTuple):
    """Batch norm of a batch as ``x * scale + shift``, with what its gradient asks for."""

    scale: Tensor
    shift: Tensor
    mean: Tensor
    deviation: Tensor  # its inverse
    rows: int

    def gradient(self, total: Tensor, product: Tensor) -> Gradient:
        """Of x, from the sums of g, the gradient of what it makes, and of ``g * (x - mean)``."""
        slope = -self.scale * self.deviation.square() * product / self.rows
        return Gradient(self.scale, -self.scale * total / self.rows - slope * self.mean, slope)


class Gradient(NamedTuple):
    """The gradient of a map, ``g * gain + offset + map * slope``; gain and offset are (C,) or (N, C)."""

    gain: Tensor
    offset: Tensor
    slope: Tensor


class Sums(NamedTuple):
    """Of a map: mean and biased variance of each channel; and of each image and channel the sum, if it was wanted."""

    mean: Tensor
    variance: Tensor
    images: Tensor | None


def forward(
    x: Tensor, packed: Packed, stride: int, before: Affine | None, image_sums: bool = False
) -> tuple[Tensor, Sums]:
    """The convolution of x, or of ``relu(x * before.scale + before.shift)``, with padding ``kernel // 2``."""
    images, how = len(x), plan(*x.shape[2:], packed.kernel, stride)
    shape = images, packed.outputs, how.height, how.width
    y = torch.empty(shape, dtype=torch.bfloat16, memory_format=torch.channels_last)
    mean, variance = (torch.empty(packed.outputs) for _ in range(2))
    sums = torch.empty(images, packed.outputs) if image_sums else None
    run(
        "convolution_forward",
        **_arguments(x, packed, before, how),
        packed=packed.tiles,
        y=y,
        mean=mean,
        variance=variance,
        sums=sums,
    )
    return y, Sums(mean, variance, sums)


class Spread(NamedTuple):
    """How pixels of a smaller map are spread over a larger one: for each pixel there, which here, and times what."""

    source: Tensor
    factor: Tensor


class InputGradient(NamedTuple):
    """Of a convolution's input: the gradient; and past a batch norm and ReLU before it, its sums as
    :meth:`Affine.gradient` takes them."""

    map: Tensor | None
    total: Tensor | None
    product: Tensor | None


def backward(
    x: Tensor,
    packed: Packed,
    stride: int,
    before: Affine | None,
    g: Tensor,
    y: Tensor,
    of_y: Gradient,
    *,
    bits: Tensor | None = None,
    past: Affine | None = None,
    add: Tensor | None = None,
    add_bits: Tensor | None = None,
    spread: Spread | None = None,
    wants_input: bool = True,
    wants_weight: bool = True,
) -> tuple[InputGradient, Tensor | None]:
    """The gradients of :func:`forward`'s x and weight.

    Args:
        g, y, of_y: the gradient of the output y, as :class:`Gradient` says.
        bits: where g counts; as :func:`rsengine.kernels.native.epilogue.join` makes them.
        past: or where ``y * past.scale + past.shift`` is positive.
        add: what is added to the gradient of x where there is no batch norm before it, where it has ``add_bits``; a
            smaller map with ``spread``.
    """
    how = plan(*x.shape[2:], packed.kernel, stride)
    dx = torch.empty_like(x) if wants_input else None
    total, product = (torch.empty(packed.inputs) if wants_input and before else None for _ in range(2))
    shape = packed.outputs, packed.inputs, packed.kernel, packed.kernel
    dweight = torch.empty(shape, memory_format=torch.channels_last) if wants_weight else None
    run(
        "convolution_backward",
        **_arguments(x, packed, before, how),
        mean=before.mean if before else None,
        g=g,
        a=y,
        bits=bits,
        past_scale=past.scale if past else None,
        past_shift=past.shift if past else None,
        gain=of_y.gain,
        offset=of_y.offset,
        slope=of_y.slope,
        by_image=int(of_y.gain.dim() == 2),
        packed=packed.back,
        back=how.back,
        dx=dx,
        add=add,
        add_bits=add_bits,
        add_source=spread.source if spread else None,
        add_factor=spread.factor if spread else None,
        add_pixels=add.shape[2] * add.shape[3] if add is not None else 0,
        total=total,
        product=product,
        dweight=dweight,
    )
    return InputGradient(dx, total, product), dweight


def _arguments(x: Tensor, packed: Packed, before: Affine | None, how: Plan) -> dict[str, Tensor | int | None]:
    """What both ways are told of a convolution."""
    return {
        "x": x,
        "images": len(x),
        "sources": x.shape[2] * x.shape[3],
        "inputs": packed.inputs,
        "scale": before.scale if before else None,
        "shift": before.shift if before else None,
        "taps": packed.taps,
        "plan": how.forward,
        "pixels": how.height * how.width,
        "outputs": packed.outputs,
    }


def rectified(x: Tensor, affine: Affine) -> Tensor:
    """``relu(x * affine.scale + affine.shift)``."""
    images, channels, height, width = x.shape
    y = torch.empty_like(x)
    rows, threads = images * height * width, torch.get_num_threads()
    call("affine", x, rows, channels, affine.scale, affine.shift, 1, y, threads)
    return y


def rectified_sums(dy: Tensor, x: Tensor, affine: Affine) -> tuple[Tensor, Tensor]:
    """Of g, which is dy where :func:`rectified` is positive: the sums of g and of ``g * (x - affine.mean)``, (C,)."""
    images, channels, height, width = x.shape
    total, product = torch.empty(channels), torch.empty(channels)
    rows, threads = images * height * width, torch.get_num_threads()
    scratch = torch.empty(threads * 2 * channels)
    vectors = affine.scale, affine.shift, affine.mean
    call("affine_sums", dy, x, rows, channels, *vectors, 1, total, product, scratch, threads)
    return total, product


def _padded(channels: int) -> int:
    return -(-channels // BLOCK) * BLOCK
