"""The block epilogue of a bottleneck from its last batch norm on: batch norm, squeeze-and-excite, stochastic depth, the
sum with the shortcut, ReLU.

On the CPU it is a few passes over memory in C (``native``), on a GPU a few Triton kernels, by the same algebra. Maps
read or written: forward 4 (x twice, shortcut, y), backward 8 (dy, y and x twice, dx, dshortcut); PyTorch's operators 9
and 14.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .batch_normalization import batch_norm, check_batch_norm, run_pass, statistics
from .dispatch import choose_native
from .squeeze_excitation import check_residual, squeeze_excite_residual


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
            :func:`batch_norm`, is what runs where ``impl`` is ``"eager"``.

    Returns:
        (N, C, H, W) in the dtype of ``x``, which is that of ``shortcut``; eager: in the wider of the two. The products
        of squeeze-and-excite are in autocast's dtype; Triton's in that of ``w1``, whether there is autocast or not.

    Raises:
        ValueError, RuntimeError: as the two functions do.
    """
    vectors = {"weight": weight, "bias": bias, "running_mean": running_mean, "running_var": running_var}
    check_batch_norm(x, vectors, momentum, eps)
    check_residual(x, w1, b1, w2, b2, shortcut, keep_scale)
    maps = {"x": x, "shortcut": shortcut}
    chosen = choose_native("batch_norm_squeeze_excite_residual", impl, maps, vectors)
    if chosen != "eager":
        epilogue = _NativeEpilogue if chosen == "native" else _TritonEpilogue
        buffers = running_mean, running_var, momentum, eps
        return epilogue.apply(x, shortcut, weight, bias, w1, b1, w2, b2, keep_scale, buffers)
    # Native batch norm still takes a map whose shortcut has another dtype.
    x = batch_norm(x, weight, bias, running_mean, running_var, momentum, eps, impl=impl)
    return squeeze_excite_residual(x, w1, b1, w2, b2, shortcut, keep_scale)


class _NativeEpilogue(torch.autograd.Function):
    """Batch norm is affine once its statistics are known, so squeeze-and-excite and it are one affine map for each
    image and channel, and all its gradients' sums follow from two sums of each image. Nothing between x and y is a
    map."""

    @staticmethod
    def forward(ctx, x, shortcut, weight, bias, w1, b1, w2, b2, keep_scale, buffers):
        x = x.contiguous(memory_format=torch.channels_last)
        shortcut = shortcut.contiguous(memory_format=torch.channels_last)
        images, pixels = x.shape[0], x.shape[2] * x.shape[3]
        running_mean, running_var, momentum, eps = buffers
        mean, variance, sums = statistics(x, running_mean, running_var, momentum, pixels)
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
        run_pass("epilogue", x, shortcut, *shape, kept * scale, shift, y, torch.get_num_threads())
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
        run_pass("epilogue_sums", dy, y, x, *shape, mean, total, product, threads)
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
        run_pass("epilogue_gradient", dy, y, x, *shape, mean, kept * scale, constant, slope, dx, dshortcut, threads)
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


class _TritonEpilogue(torch.autograd.Function):
    """The two operators below: one that moves buffers cannot have its gradient registered with it."""

    @staticmethod
    def forward(ctx, x, shortcut, weight, bias, w1, b1, w2, b2, keep_scale, buffers):
        running_mean, running_var, momentum, eps = buffers
        y, *saved = torch.ops.rsengine.batch_norm_squeeze_excite_residual(
            x, shortcut, weight, bias, running_mean, running_var, w1, b1, w2, b2, keep_scale, momentum, eps
        )
        ctx.save_for_backward(x, y, weight, bias, w1, w2, keep_scale, *saved)
        ctx.bias_dtypes = b1.dtype, b2.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        gradients = torch.ops.rsengine.batch_norm_squeeze_excite_residual_backward(
            dy, *ctx.saved_tensors, *ctx.bias_dtypes
        )
        return *gradients, None, None


@torch.library.custom_op("rsengine::batch_norm_squeeze_excite_residual", mutates_args=("running_mean", "running_var"))
def _forward(
    x: Tensor,
    shortcut: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    keep_scale: Tensor | None,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The Triton kernels: y, and for the backward pass the batch's mean and inverse deviation, the centred means of the
    images, and what goes into and comes out of the two products."""
    from .jit import block_epilogue

    return block_epilogue.forward(
        x, shortcut, weight, bias, running_mean, running_var, w1, b1, w2, b2, keep_scale, momentum, eps
    )


@_forward.register_fake
def _(x, shortcut, weight, bias, running_mean, running_var, w1, b1, w2, b2, keep_scale, momentum, eps):
    centred = x.new_empty(x.shape[:2], dtype=torch.float32)
    squeezed, hidden = torch.empty_like(centred, dtype=w1.dtype), w1.new_empty(x.shape[0], w1.shape[0])
    y = torch.empty_like(x, memory_format=torch.channels_last)
    return y, torch.empty_like(weight), torch.empty_like(bias), centred, squeezed, hidden, torch.empty_like(squeezed)


@torch.library.custom_op("rsengine::batch_norm_squeeze_excite_residual_backward", mutates_args=())
def _backward(
    dy: Tensor,
    x: Tensor,
    y: Tensor,
    weight: Tensor,
    bias: Tensor,
    w1: Tensor,
    w2: Tensor,
    keep_scale: Tensor | None,
    mean: Tensor,
    deviation: Tensor,
    centred: Tensor,
    squeezed: Tensor,
    hidden: Tensor,
    logit: Tensor,
    b1_dtype: torch.dtype,
    b2_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, shortcut, weight, bias, w1, b1, w2, b2."""
    from .jit import block_epilogue

    saved = mean, deviation, centred, squeezed, hidden, logit
    return block_epilogue.backward(dy, x, y, weight, bias, w1, w2, keep_scale, *saved, b1_dtype, b2_dtype)


@_backward.register_fake
def _(
    dy, x, y, weight, bias, w1, w2, keep_scale, mean, deviation, centred, squeezed, hidden, logit, b1_dtype, b2_dtype
):
    dx = torch.empty_like(x, memory_format=torch.channels_last)
    dw1, dw2 = (torch.empty_like(w, memory_format=torch.contiguous_format) for w in (w1, w2))
    db1, db2 = w1.new_empty(w1.shape[0], dtype=b1_dtype), w2.new_empty(w2.shape[0], dtype=b2_dtype)
    return dx, torch.empty_like(dx), torch.empty_like(weight), torch.empty_like(bias), dw1, db1, dw2, db2
