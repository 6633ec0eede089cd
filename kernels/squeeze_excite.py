"""Squeeze-and-excite (Hu et al., arXiv 1709.01507) and the tail of a ResNet-RS bottleneck that ends in it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import choose


def squeeze_excite(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, *, impl: str = "auto") -> Tensor:
    """Scale each channel of ``x`` by a gate computed from the channel means.

    ``y = x * sigmoid(relu(mean_hw(x) @ w1.T + b1) @ w2.T + b2)``

    Args:
        x: (N, C, H, W) floating point.
        w1: (R, C), b1: (R,): reduction to the R hidden channels.
        w2: (C, R), b2: (C,): expansion back to C channels.
        impl: ``"auto"`` or ``"eager"``; :func:`rsengine.kernels.explain` says what ``"auto"`` chooses.

    Returns:
        (N, C, H, W), in the dtype and memory format of ``x``.

    Raises:
        ValueError: a shape does not fit; the message names the argument.
    """
    _check(x, w1, b1, w2, b2)
    choose("squeeze_excite", impl)
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
    """The whole tail of a bottleneck: ``relu(shortcut + keep_scale[n] * squeeze_excite(x))``.

    Args:
        x, w1, b1, w2, b2: as in :func:`squeeze_excite`.
        shortcut: (N, C, H, W), the shape of ``x``.
        keep_scale: (N,) the factor of stochastic depth (Huang et al., arXiv 1603.09382) for each sample: 0 where the
            branch is dropped, 1 / keep probability where it is kept. ``None`` keeps every branch unscaled.

    Returns:
        (N, C, H, W), in the wider dtype of ``x`` and ``shortcut``.

    Raises:
        ValueError: a shape does not fit; the message names the argument.
    """
    _check(x, w1, b1, w2, b2)
    if shortcut.shape != x.shape:
        raise ValueError(f"shortcut: expected the shape of x, {tuple(x.shape)}; got {tuple(shortcut.shape)}")
    if keep_scale is not None and keep_scale.shape != x.shape[:1]:
        raise ValueError(f"keep_scale: expected ({x.shape[0]},); got {tuple(keep_scale.shape)}")
    choose("squeeze_excite_residual", impl)
    gate = _gate(x, w1, b1, w2, b2)
    if keep_scale is not None:
        gate = gate * keep_scale.to(gate.dtype).view(-1, 1, 1, 1)
    return F.relu(torch.addcmul(shortcut, x, gate))


def _gate(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    """(N, C, 1, 1) gate in the dtype of ``x``. The mean accumulates in float32 whatever the dtype of ``x``."""
    hidden = F.relu(F.linear(x.mean(dim=(2, 3)).to(w1.dtype), w1, b1))
    return torch.sigmoid(F.linear(hidden, w2, b2)).to(x.dtype)[:, :, None, None]


def _check(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> None:
    if x.dim() != 4 or not x.is_floating_point():
        raise ValueError(f"x: expected floating point (N, C, H, W); got {x.dtype} {tuple(x.shape)}")
    channels = x.shape[1]
    if w1.dim() != 2 or w1.shape[1] != channels:
        raise ValueError(f"w1: expected (R, {channels}); got {tuple(w1.shape)}")
    hidden = w1.shape[0]
    for name, tensor, shape in (("b1", b1, (hidden,)), ("w2", w2, (channels, hidden)), ("b2", b2, (channels,))):
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name}: expected {shape}; got {tuple(tensor.shape)}")
