"""Updates of every tensor of a model at once: exponential moving average, and SGD with Nesterov momentum plus EMA."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .dispatch import choose


@torch.no_grad()
def ema_update(shadow: Sequence[Tensor], params: Sequence[Tensor], decay: Tensor, *, impl: str = "auto") -> None:
    """In place, for each pair: ``shadow = decay * shadow + (1 - decay) * param``.

    Args:
        shadow: floating-point tensors, any shapes.
        params: as many tensors, of the same shapes.
        decay: () floating-point tensor on the same device, in [0, 1]. A tensor, so that a captured step sees it change.

    Raises:
        ValueError: lengths, shapes or ``decay`` do not fit.
    """
    _check_lists("shadow", shadow, params=params)
    _check_scalar("decay", decay)
    choose("ema_update", impl)
    _lerp(shadow, params, decay)


@torch.no_grad()
def sgd_ema_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    shadow: Sequence[Tensor] | None,
    lr: Tensor,
    momentum: float,
    weight_decay: float | Sequence[float],
    decay: Tensor | None,
    nesterov: bool = True,
    *,
    impl: str = "auto",
) -> None:
    """One step of SGD as ``torch.optim.SGD`` defines it, then the EMA of the new weights, all in place.

    ``g += weight_decay * p; m = momentum * m + g; p -= lr * (g + momentum * m if nesterov else m)``
    ``s = decay * s + (1 - decay) * p``

    Args:
        params, grads, momentum_buffers: equally long lists of tensors of the same shapes. Momentum starts at
            zero; with ``momentum`` 0 the buffers are left alone.
        shadow: the EMA of ``params``, or ``None`` for none.
        lr: () float32 tensor on the same device.
        momentum: in [0, 1).
        weight_decay: one number, or one for each tensor (0 for the ones that do not decay).
        decay: () tensor, as in :func:`ema_update`; ``None`` exactly when ``shadow`` is.

    Raises:
        ValueError: lengths, shapes or scalars do not fit.
    """
    _check_lists("params", params, grads=grads, momentum_buffers=momentum_buffers)
    _check_scalar("lr", lr)
    if (shadow is None) != (decay is None):
        raise ValueError("shadow, decay: expected both or neither")
    if shadow is not None and decay is not None:
        _check_lists("shadow", shadow, params=params)
        _check_scalar("decay", decay)
    decays = [float(weight_decay)] * len(params) if isinstance(weight_decay, int | float) else list(weight_decay)
    if len(decays) != len(params):
        raise ValueError(f"weight_decay: expected one number or {len(params)}; got {len(decays)}")
    choose("sgd_ema_step", impl)

    for value in dict.fromkeys(decays):  # in practice two groups: decayed weights, and BN parameters and biases
        group = [i for i, d in enumerate(decays) if d == value]
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
    if shadow is not None and decay is not None:
        _lerp(shadow, params, decay)


def _lerp(shadow: Sequence[Tensor], params: Sequence[Tensor], decay: Tensor) -> None:
    if not shadow:
        return
    if decay.device.type == "cpu":
        # A host scalar reads memory once; on the CPU taking it off the tensor is no synchronisation.
        torch._foreach_lerp_(list(shadow), list(params), 1.0 - float(decay))
        return
    difference = torch._foreach_sub(list(params), list(shadow))
    torch._foreach_mul_(difference, 1.0 - decay)
    torch._foreach_add_(list(shadow), difference)


def _check_lists(name: str, tensors: Sequence[Tensor], **others: Sequence[Tensor]) -> None:
    for other, values in others.items():
        if len(values) != len(tensors):
            raise ValueError(f"{other}: expected {len(tensors)} tensors, as many as {name}; got {len(values)}")
        for i, (a, b) in enumerate(zip(tensors, values, strict=True)):
            if a.shape != b.shape:
                raise ValueError(
                    f"{other}[{i}]: expected the shape of {name}[{i}], {tuple(a.shape)}; got {tuple(b.shape)}"
                )


def _check_scalar(name: str, value: Tensor) -> None:
    if not isinstance(value, Tensor) or value.dim() != 0 or not value.is_floating_point():
        raise ValueError(f"{name}: expected a floating-point tensor of shape (); got {value!r}")
