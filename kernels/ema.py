"""Updates of every tensor of a model at once: exponential moving average, and SGD with Nesterov momentum plus EMA.

The Triton implementation makes one launch for each combination of dtypes in the lists: one for a float32 model, two for
bfloat16 weights beside float32 batch-norm parameters. On the CPU float32 tensors take one pass in C (``native``).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import ema_eager
from .dispatch import TRITON_DTYPES, check_memory, choose_update, choose_update_on_host, has_memory
from .strides import is_dense


@torch.no_grad()
def ema_update(shadow: Sequence[Tensor], params: Sequence[Tensor], decay: Tensor, *, impl: str = "auto") -> None:
    """In place, for each pair: ``shadow = decay * shadow + (1 - decay) * param``.

    Args:
        shadow: floating-point tensors, any shapes and memory formats, on one device. float32 for Triton.
        params: as many tensors, of the same shapes, on the same device.
        decay: () floating-point tensor on the same device, in [0, 1]. A tensor, so that a captured step sees it change.
            float32 for Triton.

    Raises:
        ValueError: lengths, shapes, dtypes, devices, strides or ``decay`` do not fit.
        RuntimeError: ``impl="triton"`` or ``"native"`` where it cannot run, or a first call inside CUDA graph capture.
    """
    shadow, params = list(shadow), list(params)
    _check_lists({"shadow": shadow, "params": params})
    _check_outputs("shadow", shadow)
    _check_scalar("decay", decay, shadow)
    chosen = choose_update("ema_update", impl, params[0] if params else decay)
    if chosen == "triton":
        _check_dtypes(_named("params", params), *TRITON_DTYPES)
        _check_dtypes(_named("shadow", shadow) | {"decay": decay}, torch.float32)
    if chosen != "triton" and not torch.compiler.is_compiling():
        _ema_on_host(shadow, params, decay, chosen)  # not through the op: see sgd_ema_step
    else:
        _ema_update(shadow, params, decay, chosen)


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
    copies: Sequence[Tensor] | None = None,
    impl: str = "auto",
) -> None:
    """One step of SGD as ``torch.optim.SGD`` defines it, then the EMA of the new weights, all in place.

    ``g += weight_decay * p; m = momentum * m + g; p -= lr * (g + momentum * m if nesterov else m)``
    ``s = decay * s + (1 - decay) * p; c = p``

    Args:
        params: floating-point tensors, any shapes and memory formats, on one device.
        grads, momentum_buffers: as many tensors of the same shapes on the same device. Momentum starts at zero; with
            ``momentum`` 0 the buffers are left alone. For Triton: gradients in float32 or in the dtype of their
            parameter or of its copy, momentum in float32.
        shadow: the EMA of ``params``, float32 for Triton, or ``None`` for none. It sees the parameters as they are
            stored, rounded to their dtype.
        lr: () floating-point tensor on the same device, float32 for Triton.
        momentum: in [0, 1).
        weight_decay: one number of at least 0, or one for each tensor (0 for the ones that do not decay).
        decay: () tensor, as in :func:`ema_update`; ``None`` exactly when ``shadow`` is.
        copies: overwritten with the new parameters, rounded to the dtype of the copies: what a mixed-precision forward
            pass reads, so that it casts no weight. bfloat16 or float16 for Triton.

    Raises:
        ValueError: lengths, shapes, dtypes, devices, strides or scalars do not fit.
        RuntimeError: ``impl="triton"`` or ``"native"`` where it cannot run, or a first call inside CUDA graph capture.
    """
    params, grads, momentum_buffers = list(params), list(grads), list(momentum_buffers)
    lists = {"params": params, "grads": grads, "momentum_buffers": momentum_buffers}
    if (shadow is None) != (decay is None):
        raise ValueError("shadow, decay: expected both or neither")
    averages = [] if shadow is None else list(shadow)
    if shadow is not None:
        lists["shadow"] = averages
    copies = [] if copies is None else list(copies)
    if copies:
        lists["copies"] = copies
    _check_lists(lists)
    _check_scalar("lr", lr, params)
    if decay is not None:
        _check_scalar("decay", decay, params)
    for name in lists:
        if name != "grads":
            _check_outputs(name, lists[name])
    decays = (
        [float(weight_decay)] * len(params)
        if isinstance(weight_decay, int | float)
        else [float(value) for value in weight_decay]
    )
    if len(decays) != len(params):
        raise ValueError(f"weight_decay: expected one number or {len(params)}; got {len(decays)}")
    if not 0.0 <= momentum < 1.0:
        raise ValueError(f"momentum: expected a number in [0, 1); got {momentum}")
    if decays and not 0.0 <= min(decays) <= max(decays) < float("inf"):
        raise ValueError(f"weight_decay: expected finite numbers of at least 0; got {min(decays)} to {max(decays)}")
    chosen = choose_update("sgd_ema_step", impl, params[0] if params else lr)
    if chosen == "triton":
        _check_dtypes(_named("params", params), *TRITON_DTYPES)
        _check_dtypes(_named("copies", copies), torch.bfloat16, torch.float16)
        for i, (p, g) in enumerate(zip(params, grads, strict=True)):
            _check_dtypes({f"grads[{i}]": g}, torch.float32, p.dtype, *([copies[i].dtype] if copies else []))
        _check_dtypes(_named("momentum_buffers", momentum_buffers) | _named("shadow", averages), torch.float32)
        _check_dtypes({"lr": lr} if decay is None else {"lr": lr, "decay": decay}, torch.float32)

    # The dispatcher takes 0.4 ms to pass a thousand tensors, 2 % of the update of ResNet-RS-50 on two cores: without
    # Triton it is left out. Under the compiler it is one opaque operation: reading decay on the host would break the
    # graph.
    arguments = (params, grads, momentum_buffers, averages, lr, momentum, decays, decay, nesterov, copies)
    if chosen != "triton" and not torch.compiler.is_compiling():
        _sgd_ema_on_host(*arguments, chosen)
    else:
        _sgd_ema_step(*arguments, chosen)


@torch.library.custom_op("rsengine::ema_update", mutates_args={"shadow"})
def _ema_update(shadow: list[Tensor], params: list[Tensor], decay: Tensor, impl: str) -> None:
    if impl != "triton":
        return _ema_on_host(shadow, params, decay, impl)
    from .jit import ema

    return ema.ema_update(shadow, params, decay)


@torch.library.custom_op("rsengine::sgd_ema_step", mutates_args={"params", "momentum_buffers", "shadow", "copies"})
def _sgd_ema_step(
    params: list[Tensor],
    grads: list[Tensor],
    momentum_buffers: list[Tensor],
    shadow: list[Tensor],  # empty for none
    lr: Tensor,
    momentum: float,
    weight_decay: list[float],
    decay: Tensor | None,
    nesterov: bool,
    copies: list[Tensor],  # empty for none
    impl: str,
) -> None:
    arguments = (params, grads, momentum_buffers, shadow, lr, momentum, weight_decay, decay, nesterov, copies)
    if impl != "triton":
        return _sgd_ema_on_host(*arguments, impl)
    from .jit import ema

    return ema.sgd_ema_step(*arguments)


@_ema_update.register_fake
def _(shadow, params, decay, impl):
    return None


@_sgd_ema_step.register_fake
def _(params, grads, momentum_buffers, shadow, lr, momentum, weight_decay, decay, nesterov, copies, impl):
    return None


def _sgd_ema_on_host(
    params: list[Tensor],
    grads: list[Tensor],
    momentum_buffers: list[Tensor],
    shadow: list[Tensor],
    lr: Tensor,
    momentum: float,
    weight_decay: list[float],
    decay: Tensor | None,
    nesterov: bool,
    copies: list[Tensor],
    impl: str,
) -> None:
    from .native import update

    def unfit() -> str:
        if not momentum:
            return "it is written for SGD with momentum"
        return update.unfit(params, momentum_buffers, *([shadow] if shadow else []), grads=grads)

    chosen = choose_update_on_host("sgd_ema_step", impl, params[0] if params else lr, unfit)
    if chosen == "eager":
        ema_eager.sgd_ema_step(params, grads, momentum_buffers, shadow, lr, momentum, weight_decay, decay, nesterov)
    else:
        update.sgd_step(params, grads, momentum_buffers, shadow, lr, momentum, weight_decay, decay, nesterov)
    if copies:
        torch._foreach_copy_(copies, params)


def _ema_on_host(shadow: list[Tensor], params: list[Tensor], decay: Tensor, impl: str) -> None:
    from .native import update

    tensor = params[0] if params else decay
    if choose_update_on_host("ema_update", impl, tensor, lambda: update.unfit(shadow, params)) == "eager":
        ema_eager.ema_update(shadow, params, decay)
    else:
        update.average_step(shadow, params, decay)


def _check_lists(lists: dict[str, list[Tensor]]) -> None:
    (name, tensors), *_ = lists.items()
    for other, values in lists.items():
        if len(values) != len(tensors):
            raise ValueError(f"{other}: expected {len(tensors)} tensors, as many as {name}; got {len(values)}")
        if not all(isinstance(value, Tensor) for value in values):
            i, value = next((i, value) for i, value in enumerate(values) if not isinstance(value, Tensor))
            raise ValueError(f"{other}[{i}]: expected a tensor; got {value!r}")
    shapes, device = [t.shape for t in tensors], tensors[0].device if tensors else None
    for other, values in lists.items():
        # Whole lists are compared first: a loop over a thousand tensors costs more than the rest of the checks.
        if [t.shape for t in values] != shapes:
            i, shape = next((i, t.shape) for i, t in enumerate(values) if t.shape != shapes[i])
            raise ValueError(f"{other}[{i}]: expected the shape of {name}[{i}], {tuple(shapes[i])}; got {tuple(shape)}")
        if {t.layout for t in values} - {torch.strided}:
            i, wrong = next((i, t.layout) for i, t in enumerate(values) if t.layout != torch.strided)
            raise ValueError(f"{other}[{i}]: expected a dense tensor; got one of layout {wrong}")
        if {t.device for t in values} - {device}:
            i, wrong = next((i, t.device) for i, t in enumerate(values) if t.device != device)
            raise ValueError(f"{other}[{i}]: expected the device of {name}[0], {device}; got {wrong}")
        if not all(dtype.is_floating_point for dtype in {t.dtype for t in values}):
            i, dtype = next((i, t.dtype) for i, t in enumerate(values) if not t.is_floating_point())
            raise ValueError(f"{other}[{i}]: expected a floating-point dtype; got {dtype}")
        if not all(map(has_memory, values)):
            check_memory(**_named(other, values))


def _check_outputs(name: str, tensors: list[Tensor]) -> None:
    for i, tensor in enumerate(tensors):
        if is_dense(tensor):
            continue
        reach = 0  # of the dimensions with smaller strides: how far their last element lies from their first
        for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
            if size > 1 and stride <= reach:
                raise ValueError(
                    f"{name}[{i}]: expected a tensor whose elements do not share memory; got shape "
                    f"{tuple(tensor.shape)} with strides {tensor.stride()}"
                )
            reach += stride * (size - 1)


def _check_dtypes(tensors: dict[str, Tensor], *allowed: torch.dtype) -> None:
    for name, tensor in tensors.items():
        if tensor.dtype not in allowed:
            expected = " or ".join(map(str, dict.fromkeys(allowed)))
            raise ValueError(f"{name}: expected {expected} for impl='triton'; got {tensor.dtype}")


def _check_scalar(name: str, value: Tensor, tensors: list[Tensor]) -> None:
    if not isinstance(value, Tensor) or value.dim() != 0 or not value.is_floating_point():
        raise ValueError(f"{name}: expected a floating-point tensor of shape (); got {_kind(value)}")
    if tensors and value.device != tensors[0].device:
        raise ValueError(f"{name}: expected a tensor on {tensors[0].device}; got one on {value.device}")
    check_memory(**{name: value})


def _named(name: str, tensors: list[Tensor]) -> dict[str, Tensor]:
    return {f"{name}[{i}]": tensor for i, tensor in enumerate(tensors)}


def _kind(value: object) -> str:
    return f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
