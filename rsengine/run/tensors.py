"""Tensors that were read from a file, compared with those that they are to replace."""

from __future__ import annotations

import torch
from torch import Tensor

from rsengine.checked import Field


def check_like(given: Field, own: object) -> None:
    """Raise :class:`~rsengine.checked.FieldError` unless ``given`` is laid out as ``own``.

    Both are tensors, None, or lists and dictionaries of them. Keys, lengths, shapes and dtypes have to agree. Numbers
    have to be finite, and variances of batch norm not below zero: such weights give no result.
    """
    if isinstance(own, dict):
        values = given.mapping()
        for key in own:
            check_like(given[key], own[key])
        for key in values:
            if key not in own:
                raise given.error("the tensors of the recipe's network", f"{key} too")
    elif isinstance(own, list | tuple):
        for field, each in zip(given.items(len(own)), own, strict=True):
            check_like(field, each)
    elif isinstance(own, Tensor):
        _check_tensor(given, own)
    elif given.value is not None:
        raise given.error("nothing, as the recipe has it", _described(given.value))


def _check_tensor(given: Field, own: Tensor) -> None:
    value = given.value
    if not is_plain(value) or value.dtype != own.dtype or value.shape != own.shape:
        raise given.error(_described(own), _described(value))
    if value.is_floating_point() and not value.isfinite().all():
        raise given.error("finite numbers", "NaN or infinity among them")
    if given.name.endswith("running_var") and value.min() < 0:
        raise given.error("variances of at least 0", f"{value.min():g}")


def is_plain(value: object) -> bool:
    """Whether ``value`` is a dense tensor on the CPU that is part of no graph of gradients."""
    return (
        isinstance(value, Tensor)
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and not value.requires_grad
    )


def _described(value: object) -> str:
    if not isinstance(value, Tensor):
        return "nothing" if value is None else f"a value of type {type(value).__name__}"
    kind = "" if value.layout == torch.strided else f", {value.layout}"
    kind += " that requires a gradient" if value.requires_grad else ""
    return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}{kind}"
