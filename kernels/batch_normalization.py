"""Batch norm in training (Ioffe & Szegedy, arXiv 1502.03167) with the ReLU after it.

On the CPU it is a few passes over memory in C (``native``): what PyTorch does in many operators, each of which reads
and writes whole maps. Maps read or written: forward 3 (x twice, y), backward 5 (dy and x twice, dx); PyTorch's 5 and 8.

On the GPU it is Triton: the same passes in two kernels each way, or, where all rows of a few channels fit on chip, one
kernel that reads x, and backward x and dy, once.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .dispatch import check_memory, choose_native

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
        x: (N, C, H, W) floating point; native and Triton copy what is not channels_last.
        weight, bias: (C,) in the dtype of ``x``, or in float32 beside 16 bits; native and Triton take contiguous
            float32.
        running_mean, running_var: (C,) as the weights, moved in place by ``momentum`` towards the mean and the unbiased
            variance of the batch.
        momentum: in [0, 1].
        eps: finite, at least 0.
        impl: ``"auto"``, ``"native"``, ``"triton"`` or ``"eager"``; :func:`rsengine.kernels.explain` says what
            ``"auto"`` chooses.

    Returns:
        (N, C, H, W) in the dtype of ``x``; native and Triton in channels_last.

    Raises:
        ValueError: a shape, dtype, number or ``impl`` does not fit, a channel has a single value, or memory was freed.
        RuntimeError: ``impl="native"`` or ``"triton"`` where it cannot run.
    """
    vectors = {"weight": weight, "bias": bias, "running_mean": running_mean, "running_var": running_var}
    check_batch_norm(x, vectors, momentum, eps)
    chosen = choose_native("batch_norm", impl, {"x": x}, vectors)
    if chosen != "eager":
        function = _NativeBatchNorm if chosen == "native" else _TritonBatchNorm
        return function.apply(x, weight, bias, running_mean, running_var, momentum, eps, relu)
    _check_dtypes(x, vectors)
    # As vectors, the gradient of a map of one pixel is fourteen times faster on the CPU.
    flat = x.device.type == "cpu" and x.shape[2:] == (1, 1)
    y = F.batch_norm(x.flatten(1) if flat else x, running_mean, running_var, weight, bias, True, momentum, eps)
    y = y[:, :, None, None] if flat else y
    return F.relu(y) if relu else y


class _NativeBatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, running_mean, running_var, momentum, eps, relu):
        x = x.contiguous(memory_format=torch.channels_last)
        mean, variance, _ = statistics(x, running_mean, running_var, momentum, SEGMENT_ROWS)
        deviation = torch.rsqrt(variance + eps)  # its inverse
        scale = weight * deviation
        shift = bias - mean * scale
        ctx.save_for_backward(x, mean, deviation, scale, shift)
        ctx.relu = relu
        return affine(x, scale, shift, relu)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, mean, deviation, scale, shift = ctx.saved_tensors
        dy = dy.to(x.dtype).contiguous(memory_format=torch.channels_last)
        rows, _ = rows_and_channels(x)
        total, product = affine_sums(dy, x, scale, shift, mean, ctx.relu)
        constant, slope = -scale * total / rows, -scale * deviation.square() * product / rows
        dx = affine_gradient(dy, x, scale, shift, mean, constant, slope, ctx.relu)
        return dx, product * deviation, total, None, None, None, None, None


class _TritonBatchNorm(torch.autograd.Function):
    """The operators below: PyTorch takes no gradient formula for one that changes its arguments."""

    @staticmethod
    def forward(ctx, x, weight, bias, running_mean, running_var, momentum, eps, relu):
        y, mean, deviation = torch.ops.rsengine.batch_norm(
            x, weight, bias, running_mean, running_var, momentum, eps, relu
        )
        ctx.save_for_backward(x, weight, bias, mean, deviation)
        ctx.relu = relu
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        dx, dweight, dbias = torch.ops.rsengine.batch_norm_backward(dy, *ctx.saved_tensors, ctx.relu)
        return dx, dweight, dbias, None, None, None, None, None


@torch.library.custom_op("rsengine::batch_norm", mutates_args={"running_mean", "running_var"})
def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    momentum: float,
    eps: float,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The Triton kernels: y, and for the backward pass the mean and the inverse deviation of each channel."""
    from .jit import batch_norm

    return batch_norm.forward(x, weight, bias, running_mean, running_var, momentum, eps, relu)


@_forward.register_fake
def _(x, weight, bias, running_mean, running_var, momentum, eps, relu):
    y = torch.empty_like(x, memory_format=torch.channels_last)
    return y, torch.empty_like(weight), torch.empty_like(weight)


@torch.library.custom_op("rsengine::batch_norm_backward", mutates_args=())
def _backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, deviation: Tensor, relu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias."""
    from .jit import batch_norm

    return batch_norm.backward(dy, x, weight, bias, mean, deviation, relu)


@_backward.register_fake
def _(dy, x, weight, bias, mean, deviation, relu):
    dx = torch.empty_like(x, memory_format=torch.channels_last)
    return dx, torch.empty_like(weight), torch.empty_like(weight)


def statistics(
    x: Tensor, running_mean: Tensor, running_var: Tensor, momentum: float, segment: int
) -> tuple[Tensor, ...]:
    """As :func:`moments`. Moves the buffers."""
    rows, _ = rows_and_channels(x)
    mean, variance, sums = moments(x, segment)
    running_mean.lerp_(mean, momentum)
    running_var.lerp_(variance * (rows / (rows - 1)), momentum)
    return mean, variance, sums


# --- the passes in C: x, dy (N, C, H, W), channels_last, float32 or bfloat16; vectors (C,), float32 -------------------


def moments(x: Tensor, segment: int = SEGMENT_ROWS) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and biased variance, (C,); sums of each segment of rows, (segments, C)."""
    rows, channels = rows_and_channels(x)
    threads = torch.get_num_threads()
    shapes = (channels,), (channels,), (-(-rows // segment), channels), (threads, 4, channels)
    mean, variance, sums, scratch = (x.new_empty(shape, dtype=torch.float32) for shape in shapes)
    run_pass("statistics", x, rows, channels, segment, sums, mean, variance, scratch, threads)
    return mean, variance, sums


def affine(x: Tensor, scale: Tensor, shift: Tensor, relu: bool) -> Tensor:
    """``y = x * scale + shift``, with ``relu`` rectified."""
    y = torch.empty_like(x)
    run_pass("affine", x, *rows_and_channels(x), scale, shift, int(relu), y, torch.get_num_threads())
    return y


def affine_sums(dy: Tensor, x: Tensor, scale: Tensor, shift: Tensor, mean: Tensor, relu: bool) -> tuple[Tensor, Tensor]:
    """Of g, which is ``dy`` where y of :func:`affine` was not rectified, else 0: its sums and those of
    ``g * (x - mean)``."""
    rows, channels = rows_and_channels(x)
    total, product = torch.empty_like(mean), torch.empty_like(mean)
    threads = torch.get_num_threads()
    scratch = mean.new_empty(threads * 2 * channels)
    run_pass("affine_sums", dy, x, rows, channels, scale, shift, mean, int(relu), total, product, scratch, threads)
    return total, product


def affine_gradient(
    dy: Tensor, x: Tensor, scale: Tensor, shift: Tensor, mean: Tensor, constant: Tensor, slope: Tensor, relu: bool
) -> Tensor:
    """``dx = g * scale + (x - mean) * slope + constant``, g as in :func:`affine_sums`."""
    dx, threads = torch.empty_like(x), torch.get_num_threads()
    vectors = scale, shift, mean, constant, slope
    run_pass("affine_gradient", dy, x, *rows_and_channels(x), *vectors, int(relu), dx, threads)
    return dx


def rows_and_channels(x: Tensor) -> tuple[int, int]:
    """Rows and channels of a channels_last map as a matrix."""
    return x.shape[0] * x.shape[2] * x.shape[3], x.shape[1]


def run_pass(name: str, x: Tensor, *arguments: Tensor | int) -> None:
    from .native.library import call

    call(name, x, *arguments)


def check_batch_norm(x: Tensor, vectors: dict[str, Tensor], momentum: float, eps: float, parts: int = 1) -> None:
    """Refuse what batch norm has no meaning for. ``x`` is one of so many parts of a batch, all of the same shape."""
    if x.dim() != 4 or not x.is_floating_point():
        raise ValueError(f"x: expected floating point (N, C, H, W); got {x.dtype} {tuple(x.shape)}")
    for name, tensor in vectors.items():
        if not isinstance(tensor, Tensor) or tuple(tensor.shape) != (x.shape[1],):
            got = tuple(tensor.shape) if isinstance(tensor, Tensor) else tensor
            raise ValueError(f"{name}: expected ({x.shape[1]},); got {got}")
    if x.shape[0] * x.shape[2] * x.shape[3] * parts == 1:
        raise ValueError(f"x: expected more than one value a channel, to take a variance of; got {tuple(x.shape)}")
    if not 0.0 <= momentum <= 1.0:
        raise ValueError(f"momentum: expected a number in [0, 1]; got {momentum}")
    if not 0.0 <= eps < float("inf"):
        raise ValueError(f"eps: expected a finite number of at least 0; got {eps}")
    check_memory(x=x, **vectors)


def _check_dtypes(x: Tensor, vectors: dict[str, Tensor]) -> None:
    """Refuse what PyTorch's batch norm does not take, whose own errors name no argument."""
    allowed = {x.dtype, torch.float32} if x.dtype.itemsize == 2 else {x.dtype}
    dtype = vectors["weight"].dtype if vectors["weight"].dtype in allowed else x.dtype
    for name, tensor in vectors.items():
        if tensor.dtype != dtype or tensor.device != x.device:
            raise ValueError(
                f"{name}: expected {dtype} on {x.device} beside x in {x.dtype}; got {tensor.dtype} on {tensor.device}"
            )
