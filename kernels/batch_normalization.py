"""Batch norm in training (Ioffe & Szegedy, arXiv 1502.03167) with the ReLU after it, and the block epilogue that
begins with one.

On the CPU each is a few passes over memory in C (``native``): what PyTorch does in many operators, each of which reads
and writes whole maps. Passes over a map, read or written:

    batch norm + ReLU   forward 3 (x twice, y), backward 5 (dy and x twice, dx); PyTorch's 5 and 8
    block epilogue      forward 4 (x twice, shortcut, y), backward 8 (dy, y, x twice, dx, dshortcut); PyTorch's 9 and 14
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .dispatch import choose_native
from .squeeze_excitation import check_residual, squeeze_excite_residual

SEGMENT_ROWS = 64


def batch_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    momentum: float = 0.1,
    eps: float = 1e-5,
    relu: bool = False,
    *,
    impl: str = "auto",
) -> Tensor:
    """Normalise each channel by the mean and variance of the batch, scale and shift it; with ``relu``, rectify it.

    ``y = (x - mean) / sqrt(variance + eps) * weight + bias``, sums over images and pixels.

    Args:
        x: (N, C, H, W) floating point; native copies what is not channels_last.
        weight, bias: (C,) floating point; native takes contiguous float32.
        running_mean, running_var: (C,) as the weights, moved in place by ``momentum`` towards the mean and the unbiased
            variance of the batch.
        impl: ``"auto"``, ``"native"`` or ``"eager"``; :func:`rsengine.kernels.explain` says what ``"auto"`` chooses.

    Returns:
        (N, C, H, W) in the dtype of ``x``.

    Raises:
        ValueError: a shape or ``impl`` does not fit, or a channel has a single value.
        RuntimeError: ``impl="native"`` where it cannot run.
    """
    vectors = {"weight": weight, "bias": bias, "running_mean": running_mean, "running_var": running_var}
    _check(x, vectors)
    if choose_native("batch_norm", impl, {"x": x}, vectors) == "native":
        return _BatchNorm.apply(x, weight, bias, running_mean, running_var, momentum, eps, relu)
    # As vectors, the gradient of a map of one pixel is fourteen times faster on the CPU.
    vectors = x.device.type == "cpu" and x.shape[2:] == (1, 1)
    y = F.batch_norm(x.flatten(1) if vectors else x, running_mean, running_var, weight, bias, True, momentum, eps)
    y = y[:, :, None, None] if vectors else y
    return F.relu(y) if relu else y


def batch_norm_squeeze_excite_residual(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    shortcut: Tensor,
    keep_scale: Tensor | None = None,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    impl: str = "auto",
) -> Tensor:
    """The block epilogue of a bottleneck from its last batch norm on:
    ``relu(shortcut + keep_scale[n] * squeeze_excite(batch_norm(x)))``.

    Args:
        x, weight, bias, running_mean, running_var, momentum, eps: as in :func:`batch_norm`.
        w1, b1, w2, b2, shortcut, keep_scale: as in :func:`rsengine.kernels.squeeze_excite_residual`, which, after
            :func:`batch_norm`, is what runs where this is not native.

    Returns:
        (N, C, H, W). Native: in the dtype of ``x``; the products of squeeze-and-excite are in autocast's.

    Raises:
        ValueError, RuntimeError: as the two functions do.
    """
    vectors = {"weight": weight, "bias": bias, "running_mean": running_mean, "running_var": running_var}
    _check(x, vectors)
    check_residual(x, w1, b1, w2, b2, shortcut, keep_scale)
    maps = {"x": x, "shortcut": shortcut}
    if choose_native("batch_norm_squeeze_excite_residual", impl, maps, vectors) == "native":
        buffers = running_mean, running_var, momentum, eps
        return _Tail.apply(x, shortcut, weight, bias, w1, b1, w2, b2, keep_scale, buffers)
    # Native batch norm still takes a map whose shortcut has another dtype.
    x = batch_norm(x, weight, bias, running_mean, running_var, momentum, eps, impl=impl)
    return squeeze_excite_residual(x, w1, b1, w2, b2, shortcut, keep_scale)


class _BatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, running_mean, running_var, momentum, eps, relu):
        x = x.contiguous(memory_format=torch.channels_last)
        mean, variance, _ = _statistics(x, running_mean, running_var, momentum, SEGMENT_ROWS)
        deviation = torch.rsqrt(variance + eps)  # its inverse
        scale = weight * deviation
        shift = bias - mean * scale
        y = torch.empty_like(x)
        _run("affine", x, *_rows(x), scale, shift, int(relu), y, torch.get_num_threads())
        ctx.save_for_backward(x, mean, deviation, scale, shift)
        ctx.relu = int(relu)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, mean, deviation, scale, shift = ctx.saved_tensors
        dy = dy.to(x.dtype).contiguous(memory_format=torch.channels_last)
        rows, channels = _rows(x)
        total, product = torch.empty_like(mean), torch.empty_like(mean)
        threads = torch.get_num_threads()
        scratch = mean.new_empty(threads * 2 * channels)
        _run("affine_sums", dy, x, rows, channels, scale, shift, mean, ctx.relu, total, product, scratch, threads)
        constant, slope = -scale * total / rows, -scale * deviation.square() * product / rows
        dx = torch.empty_like(x)
        _run("affine_gradient", dy, x, rows, channels, scale, shift, mean, constant, slope, ctx.relu, dx, threads)
        return dx, product * deviation, total, None, None, None, None, None


class _Tail(torch.autograd.Function):
    """Batch norm is affine once its statistics are known, so squeeze-and-excite and it are one affine map for each
    image and channel, and all its gradients' sums follow from two sums of each image. Nothing between x and y is a
    map."""

    @staticmethod
    def forward(ctx, x, shortcut, weight, bias, w1, b1, w2, b2, keep_scale, buffers):
        x = x.contiguous(memory_format=torch.channels_last)
        shortcut = shortcut.contiguous(memory_format=torch.channels_last)
        images, pixels = x.shape[0], x.shape[2] * x.shape[3]
        running_mean, running_var, momentum, eps = buffers
        mean, variance, sums = _statistics(x, running_mean, running_var, momentum, pixels)
        deviation = torch.rsqrt(variance + eps)
        scale = weight * deviation
        centred = sums.div_(pixels).sub_(mean)
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else w1.dtype
        first, second = w1.to(dtype), w2.to(dtype)
        squeezed = torch.addcmul(bias, centred, scale).to(dtype)
        hidden = F.relu(F.linear(squeezed, first, b1.to(dtype)))
        gate = torch.sigmoid(F.linear(hidden, second, b2.to(dtype)).float())
        kept = gate if keep_scale is None else gate * keep_scale.float()[:, None]
        y = torch.empty_like(x)
        shape, shift = (images, pixels, x.shape[1]), kept * (bias - mean * scale)
        _run("tail", x, shortcut, *shape, kept * scale, shift, y, torch.get_num_threads())
        ctx.save_for_backward(
            x, y, mean, deviation, scale, bias, centred, squeezed, hidden, gate, first, second, keep_scale
        )
        ctx.dtypes = [t.dtype for t in (w1, b1, w2, b2)]
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        saved = ctx.saved_tensors
        x, y, mean, deviation, scale, bias, centred, squeezed, hidden, gate, first, second, keep_scale = saved
        w1_dtype, b1_dtype, w2_dtype, b2_dtype = ctx.dtypes
        dy = dy.to(x.dtype).contiguous(memory_format=torch.channels_last)
        images, channels, pixels = x.shape[0], x.shape[1], x.shape[2] * x.shape[3]
        rows, shape, threads = images * pixels, (images, pixels, channels), torch.get_num_threads()
        # Of g, the gradient past the ReLU: its sum over the pixels of each image, and that of g * (x - mean).
        total, product = torch.empty_like(gate), torch.empty_like(gate)
        _run("tail_sums", dy, y, x, *shape, mean, total, product, threads)
        dgate = torch.addcmul(bias * total, scale, product)
        kept = gate
        if keep_scale is not None:
            keep = keep_scale.float()[:, None]
            dgate, kept = dgate * keep, gate * keep
        dsecond = (dgate * gate * (1 - gate)).to(second.dtype)
        dfirst = torch.ops.aten.threshold_backward(dsecond @ second, hidden, 0)
        dsqueezed = (dfirst @ first).float()
        # The gradient of batch norm's output is kept * g + dsqueezed / pixels.
        sums = torch.addcmul(dsqueezed, kept, total).sum(0)
        products = torch.addcmul(dsqueezed * centred, kept, product).sum(0)
        constant = (dsqueezed / pixels - sums / rows) * scale
        slope = -scale * deviation.square() * products / rows
        dx, dshortcut = torch.empty_like(x), torch.empty_like(x)
        _run("tail_gradient", dy, y, x, *shape, mean, kept * scale, constant, slope, dx, dshortcut, threads)
        return (
            dx,
            dshortcut,
            products * deviation,
            sums,
            (dfirst.T @ squeezed).to(w1_dtype),
            dfirst.sum(0).to(b1_dtype),
            (dsecond.T @ hidden).to(w2_dtype),
            dsecond.sum(0).to(b2_dtype),
            None,
            None,
        )


def _statistics(
    x: Tensor, running_mean: Tensor, running_var: Tensor, momentum: float, segment: int
) -> tuple[Tensor, ...]:
    """Mean and biased variance, (C,); sums of each segment of rows, (segments, C). Moves the buffers."""
    rows, channels = _rows(x)
    threads = torch.get_num_threads()
    shapes = (channels,), (channels,), (-(-rows // segment), channels), (threads, 4, channels)
    mean, variance, sums, scratch = (x.new_empty(shape, dtype=torch.float32) for shape in shapes)
    _run("statistics", x, rows, channels, segment, sums, mean, variance, scratch, threads)
    running_mean.lerp_(mean, momentum)
    running_var.lerp_(variance * (rows / (rows - 1)), momentum)
    return mean, variance, sums


def _rows(x: Tensor) -> tuple[int, int]:
    """Rows and channels of a channels_last map as a matrix."""
    return x.shape[0] * x.shape[2] * x.shape[3], x.shape[1]


def _run(name: str, x: Tensor, *arguments: Tensor | int) -> None:
    from .native.library import call

    call(name, x, *arguments)


def _check(x: Tensor, vectors: dict[str, Tensor]) -> None:
    if x.dim() != 4 or not x.is_floating_point():
        raise ValueError(f"x: expected floating point (N, C, H, W); got {x.dtype} {tuple(x.shape)}")
    for name, tensor in vectors.items():
        if tuple(tensor.shape) != (x.shape[1],):
            raise ValueError(f"{name}: expected ({x.shape[1]},); got {tuple(tensor.shape)}")
    if x.shape[0] * x.shape[2] * x.shape[3] == 1:
        raise ValueError(f"x: expected more than one value a channel, to take a variance of; got {tuple(x.shape)}")
