"""Batch norm in training by the statistics of the whole batch, of which each process has a part.

Forward, the processes gather each other's mean and variance, 2 C numbers of each: one exchange of a few kilobytes,
whose time is that of starting it. Two sums, of the values and then of the squared deviations from their mean, would
start two; one sum of the values and of their squares would lose the variance of a channel whose mean is large. As all
parts have one size, the mean is that of the means, and the variance is the mean of the variances plus the variance of
the means (Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances", 1982).
Backward, they sum 2 C numbers.

A map is passed over as often as without other processes: on the CPU by the passes in C where these can run, else by
PyTorch's operators for each step of batch norm.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from rsengine.kernels.batch_normalization import affine, affine_gradient, affine_sums, check_batch_norm, moments
from rsengine.kernels.dispatch import choose_native
from rsengine.parallel.ranks import Ranks


def sync_batch_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    momentum: float,
    eps: float,
    relu: bool,
    ranks: Ranks,
) -> Tensor:
    """:func:`rsengine.kernels.batch_norm` of the whole batch, of which ``x`` is this process's part.

    The gradients of ``weight`` and ``bias`` are those through this part; over the processes they sum to those of the
    whole batch. That of ``x`` is whole, where the loss is the sum of what the processes differentiate.

    Args:
        x: (N, C, H, W) floating point, of the same shape in every process; copied if it is not channels_last.
        weight, bias: (C,) in the dtype of ``x`` or a wider one.
        running_mean, running_var: (C,), moved in place by ``momentum`` towards the mean and the unbiased variance of
            the whole batch: by the same bits in every process.
        momentum: in [0, 1].
        eps: finite, at least 0.
        relu: rectify the result.
        ranks: more than one process, all of which call this at the same point of their programs.

    Returns:
        (N, C, H, W) in the dtype of ``x``, channels_last. Sums are in float32, of float64 in float64.

    Raises:
        ValueError: a shape or number does not fit, or ``ranks`` is one process.
    """
    vectors = {"weight": weight, "bias": bias, "running_mean": running_mean, "running_var": running_var}
    if ranks.size == 1:
        raise ValueError("ranks: expected more than one process; got one, for which there is batch_norm")
    check_batch_norm(x, vectors, momentum, eps, ranks.size)
    native = choose_native("batch_norm", "auto", {"x": x}, vectors) == "native"
    function = _Native if native else _Library
    return function.apply(x, weight, bias, running_mean, running_var, momentum, eps, relu, ranks)


class _Native(torch.autograd.Function):
    """The passes in C."""

    @staticmethod
    def forward(ctx, x, weight, bias, running_mean, running_var, momentum, eps, relu, ranks):
        x = x.contiguous(memory_format=torch.channels_last)
        mean, variance, _ = moments(x)
        ctx.count = x.numel() // x.shape[1] * ranks.size
        mean, variance = _of_whole_batch(mean, variance, running_mean, running_var, momentum, ctx.count, ranks)
        deviation = torch.rsqrt(variance + eps)  # its inverse
        scale = weight * deviation
        shift = bias - mean * scale
        ctx.save_for_backward(x, mean, deviation, scale, shift)
        ctx.relu, ctx.ranks = relu, ranks
        return affine(x, scale, shift, relu)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, mean, deviation, scale, shift = ctx.saved_tensors
        dy = dy.to(x.dtype).contiguous(memory_format=torch.channels_last)
        dbias, product = affine_sums(dy, x, scale, shift, mean, ctx.relu)
        dweight = product * deviation
        dx = None
        if ctx.needs_input_grad[0]:
            constant, slope = _gradient_terms(dweight, dbias, deviation, scale, ctx.count, ctx.ranks)
            dx = affine_gradient(dy, x, scale, shift, mean, constant, slope, ctx.relu)
        return dx, dweight, dbias, None, None, None, None, None, None


class _Library(torch.autograd.Function):
    """PyTorch's operators, on the map as a matrix (N * H * W, C)."""

    @staticmethod
    def forward(ctx, x, weight, bias, running_mean, running_var, momentum, eps, relu, ranks):
        rows = _as_rows(x)
        mean, variance = _moments(rows)
        ctx.count = rows.shape[0] * ranks.size
        mean, variance = _of_whole_batch(mean, variance, running_mean, running_var, momentum, ctx.count, ranks)
        y = F.batch_norm(rows, mean, variance, weight.to(mean.dtype), bias.to(mean.dtype), eps=eps)
        if relu:
            y.relu_()
        ctx.save_for_backward(rows, weight, mean, variance, y if relu else None)
        ctx.eps, ctx.shape, ctx.ranks = eps, x.shape, ranks
        return _as_map(y, x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        rows, weight, mean, variance, y = ctx.saved_tensors
        g = _as_rows(dy.to(rows.dtype))
        if y is not None:
            g = torch.ops.aten.threshold_backward(g, y, 0)
        whole = weight.to(mean.dtype)
        _, dweight, dbias = torch.ops.aten.native_batch_norm_backward(
            g, rows, whole, mean, variance, None, None, False, ctx.eps, [False, True, True]
        )
        dx = None
        if ctx.needs_input_grad[0]:
            deviation = torch.rsqrt(variance + ctx.eps)
            scale = whole * deviation
            constant, slope = _gradient_terms(dweight, dbias, deviation, scale, ctx.count, ctx.ranks)
            dx = torch.addcmul(constant, rows - mean, slope).addcmul_(g, scale).to(rows.dtype)
            dx = _as_map(dx, ctx.shape)
        return dx, dweight.to(weight.dtype), dbias.to(weight.dtype), None, None, None, None, None, None


@torch.library.custom_op("rsengine::batch_moments", mutates_args=())
def _moments(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each column, (C,), in float32, of float64 in float64. The operator of PyTorch that
    reads 16-bit maps once for this has no fake implementation."""
    # It has averages to move: those of this part, which nobody wants.
    averages = rows.new_zeros(2, rows.shape[1], dtype=torch.promote_types(rows.dtype, torch.float32))
    return torch.batch_norm_update_stats(rows, *averages, 0.0)


@_moments.register_fake
def _(rows):
    mean = rows.new_empty(rows.shape[1], dtype=torch.promote_types(rows.dtype, torch.float32))
    return mean, torch.empty_like(mean)


def _of_whole_batch(
    mean: Tensor,
    variance: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    momentum: float,
    count: int,
    ranks: Ranks,
) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of all processes' parts, from those of each. Moves the buffers. ``count``: of values a
    channel in the whole batch."""
    means, variances = ranks.gathered(torch.stack((mean, variance))).unbind(1)
    between, mean = torch.var_mean(means, 0, correction=0)
    variance = variances.mean(0) + between
    running_mean.lerp_(mean.to(running_mean.dtype), momentum)
    running_var.lerp_((variance * (count / (count - 1))).to(running_var.dtype), momentum)
    return mean, variance


def _gradient_terms(
    dweight: Tensor, dbias: Tensor, deviation: Tensor, scale: Tensor, count: int, ranks: Ranks
) -> tuple[Tensor, Tensor]:
    """constant and slope of ``dx = g * scale + (x - mean) * slope + constant``, from each process's sums."""
    slope, constant = ranks.sum_(torch.stack((dweight, dbias))).mul_(-1 / count).mul_(scale)
    return constant, slope * deviation


def _as_rows(x: Tensor) -> Tensor:
    """(N, C, H, W) to (N * H * W, C), contiguous: a view of a channels_last map."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1]).contiguous()


def _as_map(rows: Tensor, shape: torch.Size) -> Tensor:
    """The inverse: a channels_last view."""
    n, c, h, w = shape
    return rows.view(n, h, w, c).permute(0, 3, 1, 2)
