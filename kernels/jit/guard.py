"""Launches go to the device that their operands are on."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P, R = ParamSpec("P"), TypeVar("R")


def on_operands_device(launcher: Callable[P, R]) -> Callable[P, R]:
    """Run a launcher with the device of its first argument that is a tensor as PyTorch's current one.

    Triton launches on the current device and stream, whatever device the addresses that it is given belong to.
    """

    @functools.wraps(launcher)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> R:
        device = next(argument.device for argument in args if isinstance(argument, Tensor))
        if device.type != "cuda":  # the interpreter and the offline compiler, which have no devices
            return launcher(*args, **kwargs)
        with torch.cuda.device(device):
            return launcher(*args, **kwargs)

    return guarded
