"""SGD and the EMA of the weights in C, one pass over the memory of every tensor."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from ..strides import is_dense, same_order
from .library import run


def unfit(*lists: Sequence[Tensor], grads: Sequence[Tensor] = ()) -> str:
    """Why C cannot have these lists, or nothing. It takes the elements at equal places in memory together.

    Args:
        grads: gradients, which may be of any dtype and order, because :func:`sgd_step` copies those that do not fit.
    """
    for tensors in zip(*lists, strict=True):
        for tensor in tensors:
            if type(tensor) not in (Tensor, torch.nn.Parameter):
                return f"a tensor is a {type(tensor).__name__}, which has no memory to pass over"
            if tensor.dtype != torch.float32:
                return f"it is written for float32, and a tensor is {tensor.dtype}"
            if tensor.is_inference() and not torch.is_inference_mode_enabled():
                return "a tensor is of inference mode, outside of which nothing may write to it"
        if not same_order(*tensors):
            return "the tensors of a parameter lie in memory in different orders"
        if not is_dense(tensors[0]):
            return "a tensor is neither contiguous nor in channels_last"
    # Threads divide the elements of the lists, so two of them could use the same memory at the same time.
    spans = sorted((t.data_ptr(), t.data_ptr() + t.nbytes) for tensors in (*lists, grads) for t in tensors if t.numel())
    if any(start < end for (_, end), (start, _) in itertools.pairwise(spans)):
        return "two tensors of the lists share memory"
    return ""


def sgd_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    shadow: Sequence[Tensor],
    lr: Tensor,
    momentum: float,
    weight_decay: Sequence[float],
    decay: Tensor | None,
    nesterov: bool,
) -> None:
    """As :func:`rsengine.kernels.sgd_ema_step`, which describes and checks the arguments. ``shadow``: empty for none.

    :func:`unfit` has found nothing against the lists but ``grads``, which are copied where they do not fit.
    """
    grads = [g if _fits(p, g) else torch.empty_like(p).copy_(g) for p, g in zip(params, grads, strict=True)]
    share = 0.0 if decay is None else 1.0 - float(decay)
    run(
        "update_sgd",
        addresses=_addresses(params, grads, momentum_buffers, *([shadow] if shadow else [])),
        sizes=_sizes(params),
        decays=_floats(weight_decay),
        numbers=_floats([float(lr), momentum, share]),
        count=len(params),
        nesterov=int(nesterov),
        has_average=int(bool(shadow)),
    )
    increment_version([*params, *momentum_buffers, *shadow])  # as every operator does that writes in place


def _fits(p: Tensor, g: Tensor) -> bool:
    return type(g) is Tensor and g.dtype == torch.float32 and same_order(p, g)


def average_step(shadow: Sequence[Tensor], params: Sequence[Tensor], decay: Tensor) -> None:
    """As :func:`rsengine.kernels.ema_update`; :func:`unfit` has found nothing against the lists."""
    run(
        "update_average",
        addresses=_addresses(shadow, params),
        sizes=_sizes(params),
        numbers=_floats([1.0 - float(decay)]),
        count=len(params),
    )
    increment_version(shadow)


def _addresses(*lists: Sequence[Tensor]) -> Tensor:
    addresses = [[tensor.data_ptr() for tensor in tensors] for tensors in lists]
    return torch.tensor(addresses, dtype=torch.int64, device="cpu")


def _sizes(tensors: Sequence[Tensor]) -> Tensor:
    return torch.tensor([tensor.numel() for tensor in tensors], dtype=torch.int64, device="cpu")


def _floats(numbers: Sequence[float]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float32, device="cpu")
