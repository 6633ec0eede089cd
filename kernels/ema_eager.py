"""The updates of :mod:`rsengine.kernels.ema`, which checks their arguments, in PyTorch's operators."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from .dispatch import may_read
from .strides import is_dense, same_order


def sgd_ema_step(
    params: list[Tensor],
    grads: list[Tensor],
    momentum_buffers: list[Tensor],
    shadow: list[Tensor],
    lr: Tensor,
    momentum: float,
    weight_decay: list[float],
    decay: Tensor | None,
    nesterov: bool,
) -> None:
    # A gradient in fewer bits than its parameter loses nothing in the parameter's, which the fused operator asks for.
    grads = [
        g if torch.promote_types(g.dtype, p.dtype) != p.dtype else g.to(p.dtype)
        for g, p in zip(grads, params, strict=True)
    ]
    groups: dict[float, list[int]] = {}  # in practice two: decayed weights, and BN parameters and biases
    for i, (p, g, m) in enumerate(zip(params, grads, momentum_buffers if momentum else grads, strict=True)):
        if _fits_fused_operator(p, g, m):
            groups.setdefault(weight_decay[i], []).append(i)
        else:
            _sgd(p, g, m, lr, momentum, weight_decay[i], nesterov)
    for value, group in groups.items():
        torch._fused_sgd_(
            [params[i] for i in group],
            [grads[i] for i in group],
            [momentum_buffers[i] for i in group] if momentum else [],  # none is what the operator asks for then
            weight_decay=value,
            momentum=momentum,
            lr=lr,
            dampening=0.0,
            nesterov=nesterov,
            maximize=False,
            is_first_step=False,  # zeroed momentum gives the same first step, and no step is then a special case
        )
        for written in (params, momentum_buffers) if momentum else (params,):
            increment_version([written[i] for i in group])  # for autograd; the fused operator does not
    if decay is not None:
        ema_update(shadow, params, decay)


def _sgd(p: Tensor, g: Tensor, m: Tensor, lr: Tensor, momentum: float, weight_decay: float, nesterov: bool) -> None:
    """One tensor of any dtypes and strides."""
    value = p.to(torch.promote_types(p.dtype, torch.float32))
    g = g.to(value.dtype) + weight_decay * value
    if momentum:
        m.copy_(momentum * m.to(value.dtype) + g)
        g = g + momentum * m if nesterov else m
    p.copy_(value - lr * g)


def ema_update(shadow: list[Tensor], params: list[Tensor], decay: Tensor) -> None:
    if not shadow:
        return
    params = [p if p.dtype == s.dtype else p.to(s.dtype) for p, s in zip(params, shadow, strict=True)]
    if may_read(decay):
        # A host scalar reads memory once; on the CPU taking it off the tensor is no synchronisation.
        torch._foreach_lerp_(shadow, params, 1.0 - float(decay))
        return
    difference = torch._foreach_sub(params, shadow)
    torch._foreach_mul_(difference, 1.0 - decay)
    torch._foreach_add_(shadow, difference)


def _fits_fused_operator(p: Tensor, g: Tensor, m: Tensor) -> bool:
    """Whether the fused operator may have them: it walks the three storages in order, whatever the strides say."""
    if not (p.dtype == g.dtype == m.dtype and is_dense(p)):
        return False
    if p.device.type == "cpu" and p.dtype.itemsize < 4:
        return False  # before PyTorch 2.14 it left most of such elements as they were (pytorch/pytorch#191763)
    return same_order(p, g, m)
