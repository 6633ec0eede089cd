"""Squeeze-and-excite (Hu et al., arXiv 1709.01507) and the block epilogue that ends in it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .dispatch import check_memory, choose


def squeeze_excite(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, *, impl: str = "auto") -> Tensor:
    """Scale each channel of ``x`` by a gate computed from the channel means.

    ``y = x * sigmoid(relu(mean_hw(x) @ w1.T + b1) @ w2.T + b2)``

    Args:
        x: (N, C, H, W) floating point. The Triton kernels work on channels_last and copy what is not.
        w1: (R, C), b1: (R,): reduction to the R hidden channels.
        w2: (C, R), b2: (C,): expansion back to C channels.
        impl: ``"auto"``, ``"triton"`` or ``"eager"``; :func:`rsengine.kernels.explain` says what ``"auto"`` chooses.

    Returns:
        (N, C, H, W) in the dtype of ``x``; in its memory format (eager) or channels_last (Triton). Sums, products and
        gates are computed in float32 whatever the dtype of ``x`` (eager under autocast: in autocast's).

    Raises:
        ValueError: a shape, dtype or device does not fit; the message names the argument.
        RuntimeError: ``impl="triton"`` where it cannot run.
    """
    _check(x, w1, b1, w2, b2)
    if choose("squeeze_excite", impl, x) == "triton":
        return torch.ops.rsengine.squeeze_excite(x, w1, b1, w2, b2, None, None)[0]
    return x * _gate(x, w1, b1, w2, b2)


def squeeze_excite_residual(
    x: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    shortcut: Tensor,
    keep_scale: Tensor | None = None,
    *,
    impl: str = "auto",
) -> Tensor:
    """The block epilogue of a bottleneck: ``relu(shortcut + keep_scale[n] * squeeze_excite(x))``.

    Args:
        x, w1, b1, w2, b2: as in :func:`squeeze_excite`.
        shortcut: (N, C, H, W), the shape of ``x``.
        keep_scale: (N,) the factor of stochastic depth (Huang et al., arXiv 1603.09382) for each sample: 0 where the
            branch is dropped, 1 / keep probability where it is kept. ``None`` keeps every branch unscaled. No gradient
            flows to it.

    Returns:
        (N, C, H, W), in the wider dtype of ``x`` and ``shortcut``; memory format as in :func:`squeeze_excite`.

    Raises:
        ValueError: a shape, dtype or device does not fit; the message names the argument.
        RuntimeError: ``impl="triton"`` where it cannot run.
    """
    check_residual(x, w1, b1, w2, b2, shortcut, keep_scale)
    keep_scale = None if keep_scale is None else keep_scale.detach()
    if choose("squeeze_excite_residual", impl, x) == "triton":
        return torch.ops.rsengine.squeeze_excite(x, w1, b1, w2, b2, shortcut, keep_scale)[0]
    if torch.compiler.is_compiling():  # which fuses the passes over x by itself
        gate = _gate(x, w1, b1, w2, b2)
        if keep_scale is not None:
            gate = gate * keep_scale.to(gate.dtype).view(-1, 1, 1, 1)
        return F.relu(torch.addcmul(shortcut, x, gate))
    return _EagerResidual.apply(x, w1, b1, w2, b2, shortcut, keep_scale)


class _EagerResidual(torch.autograd.Function):
    """The formula in as few passes over the maps as PyTorch's operations allow. Autograd of it would write the gradient
    of the mean as a map and add it to that of the product."""

    @staticmethod
    def forward(ctx, x, w1, b1, w2, b2, shortcut, keep_scale):
        device = x.device.type
        autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else w1.dtype
        mean = x.mean(dim=(2, 3)).to(dtype)
        first, second = w1.to(dtype), w2.to(dtype)
        hidden = F.relu(F.linear(mean, first, b1.to(dtype)))
        gate = torch.sigmoid(F.linear(hidden, second, b2.to(dtype)))
        scale = gate.to(x.dtype)
        if keep_scale is not None:
            scale = scale * keep_scale.to(scale.dtype).view(-1, 1)
        scale = scale[:, :, None, None]
        y = torch.addcmul(shortcut, x, scale).relu_()
        ctx.save_for_backward(x, y, mean, hidden, gate, scale, first, second, keep_scale)
        ctx.dtypes = [t.dtype for t in (w1, b1, w2, b2, shortcut)]
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, y, mean, hidden, gate, scale, first, second, keep_scale = ctx.saved_tensors
        w1_dtype, b1_dtype, w2_dtype, b2_dtype, shortcut_dtype = ctx.dtypes
        dz = torch.ops.aten.threshold_backward(dy, y, 0)
        dgate = (dz * x).sum(dim=(2, 3)).to(gate.dtype)
        if keep_scale is not None:
            dgate = dgate * keep_scale.to(gate.dtype).view(-1, 1)
        dsecond = torch.ops.aten.sigmoid_backward(dgate, gate)
        dfirst = torch.ops.aten.threshold_backward(dsecond @ second, hidden, 0)
        pixels = x.shape[2] * x.shape[3]
        dmean = (dfirst @ first).div_(pixels).to(dz.dtype)[:, :, None, None]
        return (
            torch.addcmul(dmean, dz, scale.to(dz.dtype)).to(x.dtype),
            (dfirst.T @ mean).to(w1_dtype),
            dfirst.sum(0).to(b1_dtype),
            (dsecond.T @ hidden).to(w2_dtype),
            dsecond.sum(0).to(b2_dtype),
            dz.to(shortcut_dtype),
            None,
        )


def _gate(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    """(N, C, 1, 1) gate in the dtype of ``x``. The mean accumulates in float32 whatever the dtype of ``x``."""
    hidden = F.relu(F.linear(x.mean(dim=(2, 3)).to(w1.dtype), w1, b1))
    return torch.sigmoid(F.linear(hidden, w2, b2)).to(x.dtype)[:, :, None, None]


def check_residual(
    x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, shortcut: Tensor, keep_scale: Tensor | None
) -> None:
    """Raise what :func:`squeeze_excite_residual` raises where shapes, dtypes or devices do not fit."""
    _check(x, w1, b1, w2, b2)
    if shortcut.shape != x.shape:
        raise ValueError(f"shortcut: expected the shape of x, {tuple(x.shape)}; got {tuple(shortcut.shape)}")
    if keep_scale is not None and keep_scale.shape != x.shape[:1]:
        raise ValueError(f"keep_scale: expected ({x.shape[0]},); got {tuple(keep_scale.shape)}")
    check_kind(x, shortcut=shortcut, keep_scale=keep_scale)


def _check(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> None:
    if x.dim() != 4 or not x.is_floating_point():
        raise ValueError(f"x: expected floating point (N, C, H, W); got {x.dtype} {tuple(x.shape)}")
    check_weights(x, x.shape[1], w1, b1, w2, b2)


def check_weights(x: Tensor, channels: int, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> None:
    """Raise ``ValueError`` for weights that are not those of so many channels, on the device of ``x``."""
    if w1.dim() != 2 or w1.shape[1] != channels:
        raise ValueError(f"w1: expected (R, {channels}); got {tuple(w1.shape)}")
    hidden = w1.shape[0]
    for name, tensor, shape in (("b1", b1, (hidden,)), ("w2", w2, (channels, hidden)), ("b2", b2, (channels,))):
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name}: expected {shape}; got {tuple(tensor.shape)}")
    check_kind(x, w1=w1, b1=b1, w2=w2, b2=b2)


def check_kind(x: Tensor, **others: Tensor | None) -> None:
    """Raise ``ValueError`` for a tensor that is not floating point on the device of ``x``, or has lost its memory."""
    for name, tensor in others.items():
        if tensor is not None and (tensor.device != x.device or not tensor.is_floating_point()):
            raise ValueError(f"{name}: expected floating point on {x.device}; got {tensor.dtype} on {tensor.device}")
    check_memory(x=x, **others)


@torch.library.custom_op("rsengine::squeeze_excite", mutates_args=())
def _forward(
    x: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    shortcut: Tensor | None,
    keep_scale: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The Triton kernels: y, and for the backward pass the channel means, the hidden layer and the gate."""
    from .jit import squeeze_excite

    return squeeze_excite.forward(x, w1, b1, w2, b2, shortcut, keep_scale)


@_forward.register_fake
def _(x, w1, b1, w2, b2, shortcut, keep_scale):
    dtype = x.dtype if shortcut is None else torch.promote_types(x.dtype, shortcut.dtype)
    y = torch.empty_like(x, dtype=dtype, memory_format=torch.channels_last)
    channels, hidden = x.new_empty(x.shape[:2], dtype=torch.float32), (x.shape[0], w1.shape[0])
    return y, channels, x.new_empty(hidden, dtype=torch.float32), torch.empty_like(channels)


@torch.library.custom_op("rsengine::squeeze_excite_backward", mutates_args=())
def _backward(
    dy: Tensor,
    x: Tensor,
    y: Tensor | None,
    w1: Tensor,
    w2: Tensor,
    keep_scale: Tensor | None,
    mean: Tensor,
    hidden: Tensor,
    gate: Tensor,
    shortcut_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, shortcut (empty without one), w1, b1, w2, b2."""
    from .jit import squeeze_excite

    dx, dshortcut, *weights = squeeze_excite.backward(dy, x, y, w1, w2, keep_scale, mean, hidden, gate, shortcut_dtype)
    return dx, x.new_empty(0) if dshortcut is None else dshortcut, *weights


@_backward.register_fake
def _(dy, x, y, w1, w2, keep_scale, mean, hidden, gate, shortcut_dtype):
    dx = torch.empty_like(x, memory_format=torch.channels_last)
    dshortcut = x.new_empty(0) if y is None else torch.empty_like(dx, dtype=shortcut_dtype)
    dw1, dw2 = torch.empty_like(w1), torch.empty_like(w2)
    return dx, dshortcut, dw1, w1.new_empty(w1.shape[0]), dw2, w2.new_empty(w2.shape[0])


def _save(ctx, inputs, output):
    x, w1, _, w2, _, shortcut, keep_scale = inputs
    y, mean, hidden, gate = output
    ctx.shortcut_dtype = None if shortcut is None else shortcut.dtype
    ctx.save_for_backward(x, None if shortcut is None else y, w1, w2, keep_scale, mean, hidden, gate)
    ctx.mark_non_differentiable(mean, hidden, gate)
    ctx.set_materialize_grads(False)


def _gradients(ctx, dy, *_):
    if dy is None:
        return (None,) * 7
    dx, dshortcut, dw1, db1, dw2, db2 = torch.ops.rsengine.squeeze_excite_backward(
        dy, *ctx.saved_tensors, ctx.shortcut_dtype
    )
    return dx, dw1, db1, dw2, db2, None if ctx.shortcut_dtype is None else dshortcut, None


_forward.register_autograd(_gradients, setup_context=_save)
