"""A chain of convolutions with batch norm and ReLU, and a bottleneck, as one autograd function each, in C.

:mod:`rsengine.kernels.bottleneck` calls them.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..batch_normalization import check_batch_norm
from ..conv_norm import ConvNorm, pooled
from . import convolutions, epilogue
from .convolutions import Affine, Gradient, Packed, Spread, Sums


class _Made(NamedTuple):
    """A convolution's output, and what its gradient asks for."""

    x: Tensor
    packed: Packed
    y: Tensor
    affine: Affine
    stride: int


class Chain(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, layers, momentum, eps, *_):
        x = x.to(torch.bfloat16).contiguous(memory_format=torch.channels_last)
        made = []
        for i, layer in enumerate(layers):
            before = made[-1].affine if made else None
            wants_input = i > 0 or ctx.needs_input_grad[0]
            made.append(_convolve(made[-1].y if made else x, layer, before, momentum, eps, wants_input)[0])
        _save(ctx, made)
        return convolutions.rectified(made[-1].y, made[-1].affine)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        made = _saved(ctx)
        g = dy.to(torch.bfloat16).contiguous(memory_format=torch.channels_last)
        past = made[-1].affine
        total, product = convolutions.rectified_sums(g, made[-1].y, past)
        gradients = []
        for i in range(len(made) - 1, -1, -1):
            of_y = made[i].affine.gradient(total, product)
            vectors = product * made[i].affine.deviation, total
            before = made[i - 1].affine if i else None
            wants_input = i > 0 or ctx.needs_input_grad[0]
            wants = {"wants_input": wants_input, "wants_weight": ctx.needs_input_grad[4 + 3 * i]}
            of_x, dweight = _backward(made[i], before, g, of_y, past=past, **wants)
            gradients[:0] = [dweight, *vectors]
            g, total, product, past = of_x.map, of_x.total, of_x.product, None
        return g, None, None, None, *gradients


class Bottleneck(torch.autograd.Function):
    """Batch norm is affine once its statistics are known, so the last one, squeeze-and-excite and stochastic depth are
    one affine map of each image, as in :mod:`rsengine.kernels.block_epilogue`."""

    @staticmethod
    def forward(ctx, x, layers, squeeze_excite, pool, keep_scale, momentum, eps, *_):
        x = x.to(torch.bfloat16).contiguous(memory_format=torch.channels_last)
        made, sums = [], None
        for i, layer in enumerate(layers[:3]):
            before = made[-1].affine if made else None
            one, sums = _convolve(made[-1].y if made else x, layer, before, momentum, eps, True, image_sums=i == 2)
            made.append(one)
        other, affine = x, None
        if len(layers) == 4:
            read = pooled(x, pool).contiguous(memory_format=torch.channels_last)
            made.append(_convolve(read, layers[3], None, momentum, eps, True)[0])
            other, affine = made[3].y, made[3].affine
        last = made[2]
        gate, gain, offset = _gate(last, sums.images, layers[2].beta.detach(), squeeze_excite, keep_scale)
        y, bits = epilogue.join(last.y, gain, offset, other, affine)
        _save(ctx, [made, gate, bits, x])
        ctx.pool = pool
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        made, gate, bits, x = _saved(ctx)
        wants = ctx.needs_input_grad
        dy = dy.to(torch.bfloat16).contiguous(memory_format=torch.channels_last)
        last, side = made[2], made[3] if len(made) == 4 else None
        total, product, side_product = epilogue.join_sums(
            dy, bits, last.y, last.affine.mean, side.y if side else None, side.affine if side else None
        )
        of_last, sums, products, excite = _gate_backward(gate, last, total, product)
        gradients = [None, products * last.affine.deviation, sums]
        of_x, gradients[0] = _backward(last, made[1].affine, dy, of_last, bits=bits, wants_weight=wants[13])
        for i in (1, 0):
            of_y = made[i].affine.gradient(of_x.total, of_x.product)
            vectors = of_x.product * made[i].affine.deviation, of_x.total
            others = {"wants_weight": wants[7 + 3 * i]}
            if i == 0:
                side_gradients, shared = _shortcut(ctx, side, x, dy, bits, total, side_product)
                others |= shared | {"wants_input": wants[0]}
            before = made[i - 1].affine if i else None
            of_x, dweight = _backward(made[i], before, of_x.map, of_y, **others)
            gradients[:0] = [dweight, *vectors]
        return of_x.map, *[None] * 6, *gradients, *side_gradients, *excite


def _shortcut(ctx, side, x, dy, bits, total, product):
    """The gradients of the shortcut's parameters, and what of x's gradient comes through it: for
    :func:`convolutions.backward`."""
    if side is None:
        return [], {"add": dy, "add_bits": bits}
    wants = ctx.needs_input_grad
    total = total.sum(0)
    of_y = side.affine.gradient(total, product)
    of_x, dweight = _backward(side, None, dy, of_y, bits=bits, wants_input=wants[0], wants_weight=wants[16])
    others = {"add": of_x.map, "spread": _spread(*x.shape[2:], ctx.pool) if ctx.pool > 1 else None}
    return [dweight, product * side.affine.deviation, total], others


class _Gate(NamedTuple):
    """Squeeze-and-excite and stochastic depth. Without the former all but ``keep`` is ``None``."""

    keep: Tensor | None  # (N,)
    beta: Tensor | None = None
    centred: Tensor | None = None  # (N, C), as all below
    gate: Tensor | None = None
    first: _Made | None = None
    second: _Made | None = None


def _gate(
    last: _Made, sums: Tensor, beta: Tensor, weights: Sequence[Tensor] | None, keep_scale: Tensor | None
) -> tuple[_Gate, Tensor, Tensor]:
    """The gate, and what it makes of the last batch norm: a gain and an offset of each image, (N, C)."""
    keep = None if keep_scale is None else keep_scale.float().contiguous()
    if weights is None:
        return _Gate(keep), *epilogue.opened(None, None, keep, last.affine, len(sums))[1:]
    w1, b1, w2, b2 = (t.detach() for t in weights)
    squeezed = epilogue.squeezed(sums, last.y.shape[2] * last.y.shape[3], last.affine, beta)
    first = _product(squeezed, w1, None, b1)
    second = _product(first.y, w2, first.affine, b2)
    gate, gain, offset = epilogue.opened(second.y, b2, keep, last.affine, len(sums))
    return _Gate(keep, beta, sums, gate, first, second), gain, offset


def _product(x: Tensor, weight: Tensor, before: Affine | None, bias: Tensor) -> _Made:
    """A fully connected layer, as a convolution of maps of one pixel. Whoever reads it adds the bias."""
    packed = convolutions.pack(weight[:, :, None, None], True)
    y, _ = convolutions.forward(x, packed, 1, before)
    one = torch.ones_like(bias)
    return _Made(x, packed._replace(tiles=None), y, Affine(one, bias, torch.zeros_like(bias), one, len(x)), 1)


def _gate_backward(
    of: _Gate, last: _Made, total: Tensor, product: Tensor
) -> tuple[Gradient, Tensor, Tensor, list[Tensor]]:
    """From the sums over each image of g, the gradient past the ReLU, and of ``g * (x - mean)``: the gradient of the
    last convolution's output, the sums of its batch norm over all images, and the gradients of the weights."""
    spread, parameters = None, []
    if of.gate is not None:
        excited, db2 = epilogue.excited_gradient(total, product, of.gate, of.keep, last.affine, of.beta)
        of_first, dw2 = _backward(of.second, of.first.affine, excited, _as_it_is(db2))
        of_squeezed, dw1 = _backward(of.first, None, of_first.map, _as_it_is(of_first.total))
        spread = of_squeezed.map  # the gradient of the squeezed means
        parameters = [dw1.flatten(1), of_first.total, dw2.flatten(1), db2]
    of_x, sums, products = epilogue.gate_gradient(
        total, product, of.gate, of.keep, spread, of.centred, last.y.shape[2] * last.y.shape[3], last.affine
    )
    return of_x, sums, products, parameters


def _as_it_is(like: Tensor) -> Gradient:
    zero = torch.zeros_like(like)
    return Gradient(torch.ones_like(like), zero, zero)


_SAVED = object()  # stands where a tensor was


def _save(ctx, values: object) -> None:
    """Save the tensors in nested lists and named tuples, as autograd asks for, and where they were."""
    tensors: list[Tensor] = []

    def taken(value: object) -> object:
        if isinstance(value, Tensor):
            tensors.append(value)
            return _SAVED
        if isinstance(value, tuple):
            return value._make(map(taken, value))
        return list(map(taken, value)) if isinstance(value, list) else value

    ctx.values = taken(values)
    ctx.save_for_backward(*tensors)


def _saved(ctx) -> object:
    tensors = iter(ctx.saved_tensors)

    def put(value: object) -> object:
        if value is _SAVED:
            return next(tensors)
        if isinstance(value, tuple):
            return value._make(map(put, value))
        return list(map(put, value)) if isinstance(value, list) else value

    return put(ctx.values)


def _convolve(
    x: Tensor, layer: ConvNorm, before: Affine | None, momentum: float, eps: float, back: bool, image_sums: bool = False
) -> tuple[_Made, Sums]:
    packed = convolutions.pack(layer.weight, back)
    y, sums = convolutions.forward(x, packed, layer.stride, before, image_sums)
    check_batch_norm(y, {}, momentum, eps)
    rows = y.shape[0] * y.shape[2] * y.shape[3]
    layer.running_mean.lerp_(sums.mean, momentum)
    layer.running_var.lerp_(sums.variance * (rows / (rows - 1)), momentum)
    deviation = torch.rsqrt(sums.variance + eps)
    scale = layer.gamma.detach() * deviation
    affine = Affine(scale, layer.beta.detach() - sums.mean * scale, sums.mean, deviation, rows)
    return _Made(x, packed._replace(tiles=None), y, affine, layer.stride), sums  # backward it is the other way round


def _backward(made: _Made, before: Affine | None, g: Tensor, of_y: Gradient, **others):
    return convolutions.backward(made.x, made.packed, made.stride, before, g, made.y, of_y, **others)


@functools.lru_cache(maxsize=64)
def _spread(height: int, width: int, pool: int) -> Spread:
    """The gradient of :func:`rsengine.kernels.conv_norm.pooled`."""
    rows, columns = torch.arange(height), torch.arange(width)
    across = (width - 1) // pool + 1
    source = (rows // pool)[:, None] * across + columns // pool
    tall, wide = ((n - i // pool * pool).clamp(max=pool) for n, i in ((height, rows), (width, columns)))
    return Spread(source.flatten().to(torch.int32), (1 / (tall[:, None] * wide).float()).flatten())
