"""The multi-tensor updates: one launch for all tensors of a combination of dtypes, whatever their number and sizes.

A program finds its chunk of a tensor in a table of addresses (``ema_table``) and works on it at full width if it lies
evenly in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from types import ModuleType

import torch
import triton.language as tl
from torch import Tensor

from . import ema_table
from .case import Budget, CompileCase, Stream
from .ema_kernels import _ema_kernel, _sgd_ema_kernel
from .guard import on_operands_device

BLOCK = 2048  # 16 elements a thread: four 128-bit loads of each operand in flight, in 64 registers
NUM_WARPS = 4
DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@on_operands_device
def ema_update(shadow: Sequence[Tensor], params: Sequence[Tensor], decay: Tensor, block: int = BLOCK) -> None:
    """Launch the average. ``block``: the most elements a program has, a power of two from 4."""
    layouts = ema_table.layouts_of(params, (), (), shadow, ())
    for table in ema_table.tables(decay.device, block, layouts, (0.0,) * len(params)):
        _ema_kernel[(len(table.records),)](
            table.records, decay, table.strides,
            P_DTYPE=DTYPES[table.dtypes[0]],
            BLOCK=block, PIECE=block // 4,
            num_warps=NUM_WARPS,
        )  # fmt: skip


@on_operands_device
def sgd_ema_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    shadow: Sequence[Tensor],
    lr: Tensor,
    momentum: float,
    weight_decay: Sequence[float],
    decay: Tensor | None,
    nesterov: bool,
    copies: Sequence[Tensor] = (),
    block: int = BLOCK,
) -> None:
    """Launch the step. ``shadow``, ``copies``: empty for none. ``block``: as in :func:`ema_update`."""
    layouts = ema_table.layouts_of(params, grads, momentum_buffers if momentum else (), shadow, copies)
    for table in ema_table.tables(lr.device, block, layouts, tuple(weight_decay)):
        _sgd_ema_kernel[(len(table.records),)](
            table.records, table.weight_decay, lr, lr if decay is None else decay, table.strides,
            momentum,
            P_DTYPE=DTYPES[table.dtypes[0]], G_DTYPE=DTYPES[table.dtypes[1]], C_DTYPE=DTYPES[table.dtypes[2]],
            HAS_MOMENTUM=momentum != 0, HAS_SHADOW=decay is not None, HAS_COPIES=len(copies) > 0, IS_NESTEROV=nesterov,
            BLOCK=block, PIECE=block // 4,
            num_warps=NUM_WARPS,
        )  # fmt: skip


# ResNet-RS-50's sizes, each once: BN parameters, the bias and the weight of the last layer, the squeeze-and-excite, the
# pointwise and the 3x3 convolutions. The first is for an odd tail.
_SIZES = (1009, 64, 2048, 10, 20480, 16384, 65536, 524288, 1048576, 589824, 2359296)


def _tensors(numel: int, dtype: torch.dtype) -> list[Tensor]:
    sizes = []
    while numel > 0:
        sizes.append(min(numel, _SIZES[len(sizes) % len(_SIZES)]))
        numel -= sizes[-1]
    return [torch.empty(size, dtype=dtype) for size in sizes]


def _launch_ema(size: int, dtype: torch.dtype) -> dict[str, Stream]:
    shadow, params = _tensors(size, torch.float32), _tensors(size, dtype)
    ema_update(shadow, params, torch.ones(()))
    return {"params": Stream(params, 1, 0), "shadow": Stream(shadow, 1, 1)}


def _eager_ema(kernels: ModuleType, size: int, dtype: torch.dtype) -> Callable[[], object]:
    shadow, params, decay = _tensors(size, torch.float32), _tensors(size, dtype), torch.ones(())
    return lambda: kernels.ema_update(shadow, params, decay, impl="eager")


def _step_lists(
    size: int, dtype: torch.dtype, has_shadow: bool, copy_dtype: torch.dtype | None
) -> tuple[list[Tensor], ...]:
    """Parameters, gradients, momentum, EMA and copies; the last two empty for none."""
    dtypes = (dtype, copy_dtype or dtype, torch.float32, torch.float32 if has_shadow else None, copy_dtype)
    return tuple([] if each is None else _tensors(size, each) for each in dtypes)


def _eager_step(
    kernels: ModuleType, size: int, dtype: torch.dtype, has_shadow: bool, copy_dtype: torch.dtype | None
) -> Callable[[], object]:
    params, grads, momentum, shadow, copies = _step_lists(size, dtype, has_shadow, copy_dtype)
    lr, decay = torch.zeros(()), torch.ones(()) if has_shadow else None
    lists = params, grads, momentum, shadow if has_shadow else None
    return lambda: kernels.sgd_ema_step(*lists, lr, 0.9, 4e-5, decay, True, copies=copies or None, impl="eager")


def _launch_step(size: int, dtype: torch.dtype, has_shadow: bool, copy_dtype: torch.dtype | None) -> dict[str, Stream]:
    params, grads, momentum, shadow, copies = _step_lists(size, dtype, has_shadow, copy_dtype)
    decay = torch.ones(()) if has_shadow else None
    sgd_ema_step(params, grads, momentum, shadow, torch.ones(()), 0.9, [4e-5] * len(params), decay, True, copies)
    streams = {"params": Stream(params, 1, 1), "grads": Stream(grads, 1, 0), "momentum": Stream(momentum, 1, 1)}
    streams |= {"shadow": Stream(shadow, 1, 1)} if has_shadow else {}
    return streams | ({"copies": Stream(copies, 0, 1)} if copies else {})


def compile_cases() -> list[CompileCase]:
    size, small = 33_663_402, 10_007  # ResNet-RS-50; a prime
    cases = []
    for dtype in (torch.float32, torch.bfloat16):
        name = f"{str(dtype).removeprefix('torch.')} parameters, {size:,}"
        launch = partial(_launch_ema, dtype=dtype)
        budgets = {"_ema_kernel": Budget(registers=64, shared=4096, vector_bytes=16)}
        eager = partial(_eager_ema, dtype=dtype)
        cases.append(CompileCase(f"ema_update, {name}", launch, size, small, budgets, eager))
        for label, has_shadow, copy_dtype in (
            ("sgd_ema_step", True, None),
            ("sgd_ema_step without an EMA", False, None),
            ("sgd_ema_step with bfloat16 copies", True, torch.bfloat16),
        ):
            if copy_dtype == dtype:
                continue
            options = {"dtype": dtype, "has_shadow": has_shadow, "copy_dtype": copy_dtype}
            launch, eager = partial(_launch_step, **options), partial(_eager_step, **options)
            # 104 registers let four programs share a multiprocessor, with 100 KB of loads in flight: enough.
            registers = 80 if copy_dtype is None else 104
            budgets = {"_sgd_ema_kernel": Budget(registers=registers, shared=4096, vector_bytes=16)}
            cases.append(CompileCase(f"{label}, {name}", launch, size, small, budgets, eager))
    return cases
