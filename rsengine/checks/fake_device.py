"""An accelerator that does not exist, so that a step can be traced as on a GPU where there is none.

Tensors on it are fake tensors (:class:`torch._subclasses.fake_tensor.FakeTensorMode`): shapes, dtypes, strides, devices
and storages, but no memory and no values. Unlike fake ``cuda`` tensors they run backward, foreach operators and
autocast on a machine without a GPU.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

NAME = "fakegpu"

# What CUDA's autocast does with the operators that a training step meets (PyTorch's "Autocast Op Reference"): products
# run in the lower precision, sums and losses in float32, and these elementwise ones in the widest dtype given.
LOWER_PRECISION = (
    *("conv1d", "conv2d", "conv2d.padding", "conv3d", "linear", "matmul", "prelu"),
    *("mm", "mv", "bmm", "addmm", "addmv", "addbmm", "baddbmm"),
)
FLOAT32 = (
    *("exp", "log", "pow.Tensor_Scalar", "pow.Tensor_Tensor", "pow.Scalar", "rsqrt", "reciprocal", "layer_norm"),
    *("norm.Scalar", "cross_entropy_loss", "nll_loss", "mse_loss", "binary_cross_entropy_with_logits"),
    *("softmax.int", "log_softmax.int", "sum", "sum.dim_IntList", "prod", "cumsum"),
)
WIDEST = ("addcmul", "addcdiv", "atan2", "dot", "cat", "stack", "index_put", "scatter_add")


class _Backend(_DummyBackendModule):
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


@functools.cache
def fake_device() -> torch.device:
    """Register the device with PyTorch and return it.

    This happens once per process and cannot be undone: PyTorch has one slot for such a device (``PrivateUse1``) and no
    way to release it. Nothing else about the process changes.

    Raises:
        RuntimeError: another package has taken the slot.
    """
    taken = torch._C._get_privateuse1_backend_name()
    if taken not in ("privateuseone", NAME):
        raise RuntimeError(f"fake device: PyTorch's slot for one is taken by {taken!r}; run the check without it")
    _setup_privateuseone_for_python_backend(NAME, backend_module=_Backend())
    everything = _library("_")
    everything.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    aten = _library("aten")
    for names, choose in ((LOWER_PRECISION, _lower), (FLOAT32, _float32), (WIDEST, _widest)):
        for name in names:
            packet, _, overload = name.partition(".")
            operator = getattr(getattr(torch.ops.aten, packet), overload or "default")
            aten.impl(operator, _cast_before(operator, choose), "AutocastPrivateUse1")
    return torch.device(NAME)


@contextlib.contextmanager
def fake_tensors() -> Iterator[torch.device]:
    """In this block every new tensor is a fake one, on any device. Yields the fake device.

    Backward passes run in the calling thread, so that what they do has this thread's call stack.
    """
    device = fake_device()
    with _FakeMode(allow_non_fake_inputs=True), torch.autograd.set_multithreading_enabled(False):
        FakeTensor.__deepcopy__ = _deepcopy
        try:
            yield device
        finally:
            del FakeTensor.__deepcopy__


class _FakeMode(FakeTensorMode):
    """A mode for a device that claims to exist and does not: constants stay on the host and are not moved to it."""

    @property
    def avoid_device_init(self) -> bool:
        return True


def _deepcopy(tensor: FakeTensor, memo: dict[int, Any]) -> Tensor:
    """``copy.deepcopy`` of a leaf. The default would copy the fake mode too, and the copy would belong to no mode."""
    if id(tensor) not in memo:
        copied = tensor.detach().clone()
        is_parameter = isinstance(tensor, torch.nn.Parameter)
        memo[id(tensor)] = torch.nn.Parameter(copied, tensor.requires_grad) if is_parameter else copied
    return memo[id(tensor)]


@functools.cache
def _library(namespace: str) -> torch.library.Library:
    return torch.library.Library(namespace, "IMPL")  # its kernels live as long as it does, and the cache keeps it


def _cast_before(operator: Callable, choose: Callable[[list[torch.dtype]], torch.dtype]) -> Callable:
    """``operator`` with its floating-point tensors on the device cast to the dtype ``choose`` gives for theirs."""
    rest = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)

    def castable(value: object) -> bool:
        return isinstance(value, Tensor) and value.device.type == NAME and value.dtype in _CASTABLE

    def call(*args: object, **kwargs: object) -> object:
        leaves, spec = torch.utils._pytree.tree_flatten((args, kwargs))
        found = [leaf.dtype for leaf in leaves if castable(leaf)]
        with torch._C._ExcludeDispatchKeyGuard(rest):
            if found:
                dtype = choose(found)
                leaves = [leaf.to(dtype) if castable(leaf) else leaf for leaf in leaves]
                args, kwargs = torch.utils._pytree.tree_unflatten(leaves, spec)
            return operator(*args, **kwargs)

    return call


_CASTABLE = (torch.float32, torch.bfloat16, torch.float16)  # autocast leaves float64 alone


def _lower(_found: list[torch.dtype]) -> torch.dtype:
    return torch.get_autocast_dtype(NAME)


def _float32(_found: list[torch.dtype]) -> torch.dtype:
    return torch.float32


def _widest(found: list[torch.dtype]) -> torch.dtype:
    return functools.reduce(torch.promote_types, found)
