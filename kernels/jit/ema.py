"""The multi-tensor updates: one launch for all tensors of a combination of dtypes, whatever their number and sizes.

A program finds its chunk of a tensor in a table of addresses (``ema_table``) and works on it at full width if it lies
evenly in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import ema_table
from .case import Budget, CompileCase, Stream

BLOCK = 2048  # 16 elements a thread: four 128-bit loads of each operand in flight, in 64 registers
NUM_WARPS = 4

COUNT, FIRST, LAYOUT, WORDS, ALIGNED, LINEAR, DIMS = (
    tl.constexpr(value)
    for value in (
        *(ema_table.COUNT, ema_table.FIRST, ema_table.LAYOUT, ema_table.WORDS),
        *(ema_table.ALIGNED, ema_table.LINEAR, ema_table.MAX_DIMS),
    )
)
DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def _strided(index, row_ptr, ROLE: tl.constexpr):
    """Offsets of the elements with these indices, counted in the order of the row's dimensions."""
    offs = tl.zeros_like(index).to(tl.int64)
    for step in tl.static_range(DIMS):
        dim = DIMS - 1 - step
        size = tl.load(row_ptr + dim).to(tl.int32)
        offs += (index % size).to(tl.int64) * tl.load(row_ptr + DIMS * (1 + ROLE) + dim)
        index //= size
    return offs


@triton.jit
def _average(s_ptrs, p, mask, decay):
    # As torch.lerp does it: from the nearer end, so that decay 0 and decay 1 are exact, and an average that has arrived
    # stays where it is. decay * s + (1 - decay) * p rounds s itself once more.
    s = tl.load(s_ptrs, mask=mask)
    weight = 1.0 - decay
    near = weight < 0.5
    s = tl.where(near, s, p) + tl.where(near, weight, -decay) * (p - s)
    tl.store(s_ptrs, s, mask=mask)


@triton.jit
def _ema_chunk(p_ptrs, s_ptrs, mask, decay):
    _average(s_ptrs, tl.load(p_ptrs, mask=mask).to(tl.float32), mask, decay)


@triton.jit(do_not_specialize_on_alignment=["decay_ptr"])  # an element of a table may lie anywhere
def _ema_kernel(
    # data
    table_ptr,
    decay_ptr,
    # strides
    strides_ptr,
    # constants
    P_DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
    PIECE: tl.constexpr,
):
    P_TYPE: tl.constexpr = tl.pointer_type(P_DTYPE)
    F_TYPE: tl.constexpr = tl.pointer_type(tl.float32)
    record_ptr = table_ptr + tl.program_id(0) * WORDS
    p = tl.load(record_ptr)
    s = tl.load(record_ptr + 3)
    count = tl.load(record_ptr + COUNT).to(tl.int32)
    layout = tl.load(record_ptr + LAYOUT)
    decay = tl.load(decay_ptr)
    offs = tl.arange(0, BLOCK)
    if layout == ALIGNED:
        p_ptrs = tl.multiple_of(p.to(P_TYPE), 16) + offs
        s_ptrs = tl.multiple_of(s.to(F_TYPE), 16) + offs
        _ema_chunk(p_ptrs, s_ptrs, offs < count // 16 * 16, decay)
    else:
        for start in range(0, count, PIECE):
            offs_piece = start + tl.arange(0, PIECE)
            offsets = offs_piece.to(tl.int64)
            p_offs, s_offs = offsets, offsets
            if layout != LINEAR:
                row_ptr = strides_ptr + layout * (5 * DIMS)
                index = tl.load(record_ptr + FIRST).to(tl.int32) + offs_piece
                p_offs = _strided(index, row_ptr, 0)
                s_offs = _strided(index, row_ptr, 3)
            _ema_chunk(p.to(P_TYPE) + p_offs, s.to(F_TYPE) + s_offs, offs_piece < count, decay)


@triton.jit
def _sgd_ema_chunk(
    # data
    p_ptrs,
    g_ptrs,
    m_ptrs,
    s_ptrs,
    mask,
    # scalars
    lr,
    momentum,
    weight_decay,
    decay,
    # constants
    HAS_MOMENTUM: tl.constexpr,
    HAS_SHADOW: tl.constexpr,
    IS_NESTEROV: tl.constexpr,
):
    p = tl.load(p_ptrs, mask=mask).to(tl.float32)
    step = tl.load(g_ptrs, mask=mask).to(tl.float32) + weight_decay * p
    if HAS_MOMENTUM:
        m = momentum * tl.load(m_ptrs, mask=mask) + step
        tl.store(m_ptrs, m, mask=mask)
        step = step + momentum * m if IS_NESTEROV else m
    p = (p - lr * step).to(p_ptrs.dtype.element_ty)
    tl.store(p_ptrs, p, mask=mask)
    if HAS_SHADOW:
        _average(s_ptrs, p.to(tl.float32), mask, decay)  # of the parameter as it is stored


@triton.jit(do_not_specialize_on_alignment=["lr_ptr", "decay_ptr"])
def _sgd_ema_kernel(
    # data
    table_ptr,
    weight_decay_ptr,
    lr_ptr,
    decay_ptr,
    # strides
    strides_ptr,
    # scalars
    momentum,
    # constants
    P_DTYPE: tl.constexpr,
    G_DTYPE: tl.constexpr,
    HAS_MOMENTUM: tl.constexpr,
    HAS_SHADOW: tl.constexpr,
    IS_NESTEROV: tl.constexpr,
    BLOCK: tl.constexpr,
    PIECE: tl.constexpr,
):
    P_TYPE: tl.constexpr = tl.pointer_type(P_DTYPE)
    G_TYPE: tl.constexpr = tl.pointer_type(G_DTYPE)
    F_TYPE: tl.constexpr = tl.pointer_type(tl.float32)
    pid = tl.program_id(0)
    record_ptr = table_ptr + pid * WORDS
    p = tl.load(record_ptr)
    g = tl.load(record_ptr + 1)
    m = tl.load(record_ptr + 2)
    s = tl.load(record_ptr + 3)
    count = tl.load(record_ptr + COUNT).to(tl.int32)
    layout = tl.load(record_ptr + LAYOUT)
    weight_decay = tl.load(weight_decay_ptr + pid)
    lr = tl.load(lr_ptr)
    decay = tl.load(decay_ptr)
    offs = tl.arange(0, BLOCK)
    if layout == ALIGNED:
        # 128-bit accesses: the mask changes every 16 elements only, and the addresses are declared multiples of 16. A
        # declaration holds for its value in every branch that uses it, so each branch casts for itself.
        p_ptrs = tl.multiple_of(p.to(P_TYPE), 16) + offs
        g_ptrs = tl.multiple_of(g.to(G_TYPE), 16) + offs
        m_ptrs = tl.multiple_of(m.to(F_TYPE), 16) + offs
        s_ptrs = tl.multiple_of(s.to(F_TYPE), 16) + offs
        mask = offs < count // 16 * 16
        _sgd_ema_chunk(
            *(p_ptrs, g_ptrs, m_ptrs, s_ptrs, mask),
            *(lr, momentum, weight_decay, decay),
            *(HAS_MOMENTUM, HAS_SHADOW, IS_NESTEROV),
        )
    else:  # small pieces: 64-bit offsets of a whole chunk would take the registers of the fast path
        for start in range(0, count, PIECE):
            offs_piece = start + tl.arange(0, PIECE)
            offsets = offs_piece.to(tl.int64)
            p_offs, g_offs, m_offs, s_offs = offsets, offsets, offsets, offsets
            if layout != LINEAR:
                row_ptr = strides_ptr + layout * (5 * DIMS)
                index = tl.load(record_ptr + FIRST).to(tl.int32) + offs_piece
                p_offs = _strided(index, row_ptr, 0)
                g_offs = _strided(index, row_ptr, 1)
                m_offs = _strided(index, row_ptr, 2)
                s_offs = _strided(index, row_ptr, 3)
            p_ptrs = p.to(P_TYPE) + p_offs
            g_ptrs = g.to(G_TYPE) + g_offs
            m_ptrs = m.to(F_TYPE) + m_offs
            s_ptrs = s.to(F_TYPE) + s_offs
            _sgd_ema_chunk(
                *(p_ptrs, g_ptrs, m_ptrs, s_ptrs, offs_piece < count),
                *(lr, momentum, weight_decay, decay),
                *(HAS_MOMENTUM, HAS_SHADOW, IS_NESTEROV),
            )


def ema_update(shadow: Sequence[Tensor], params: Sequence[Tensor], decay: Tensor, block: int = BLOCK) -> None:
    """Launch the average. ``block``: the most elements a program has, a power of two from 4."""
    layouts = ema_table.layouts_of(params, (), (), shadow)
    for table in ema_table.tables(decay.device, block, layouts, (0.0,) * len(params)):
        _ema_kernel[(len(table.records),)](
            table.records, decay, table.strides,
            P_DTYPE=DTYPES[table.dtypes[0]],
            BLOCK=block, PIECE=block // 4,
            num_warps=NUM_WARPS,
        )  # fmt: skip


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
    block: int = BLOCK,
) -> None:
    """Launch the step. ``shadow``: empty for none. ``block``: as in :func:`ema_update`."""
    layouts = ema_table.layouts_of(params, grads, momentum_buffers if momentum else (), shadow)
    for table in ema_table.tables(lr.device, block, layouts, tuple(weight_decay)):
        _sgd_ema_kernel[(len(table.records),)](
            table.records, table.weight_decay, lr, lr if decay is None else decay, table.strides,
            momentum,
            P_DTYPE=DTYPES[table.dtypes[0]], G_DTYPE=DTYPES[table.dtypes[1]],
            HAS_MOMENTUM=momentum != 0, HAS_SHADOW=decay is not None, IS_NESTEROV=nesterov,
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


def _eager_ema(size: int, dtype: torch.dtype) -> Callable[[], object]:
    from ..ema import ema_update as public

    shadow, params, decay = _tensors(size, torch.float32), _tensors(size, dtype), torch.ones(())
    return lambda: public(shadow, params, decay, impl="eager")


def _step_lists(size: int, dtype: torch.dtype, has_shadow: bool) -> tuple[list[Tensor], ...]:
    dtypes = (dtype, dtype, torch.float32, *([torch.float32] if has_shadow else []))
    params, grads, momentum, *shadow = (_tensors(size, each) for each in dtypes)
    return params, grads, momentum, *(shadow or [[]])


def _eager_step(size: int, dtype: torch.dtype, has_shadow: bool) -> Callable[[], object]:
    from ..ema import sgd_ema_step as public

    params, grads, momentum, shadow = _step_lists(size, dtype, has_shadow)
    lr, decay = torch.zeros(()), torch.ones(()) if has_shadow else None
    lists = params, grads, momentum, shadow if has_shadow else None
    return lambda: public(*lists, lr, 0.9, 4e-5, decay, True, impl="eager")


def _launch_step(size: int, dtype: torch.dtype, has_shadow: bool) -> dict[str, Stream]:
    params, grads, momentum, shadow = _step_lists(size, dtype, has_shadow)
    decay = torch.ones(()) if has_shadow else None
    sgd_ema_step(params, grads, momentum, shadow, torch.ones(()), 0.9, [4e-5] * len(params), decay, True)
    streams = {"params": Stream(params, 1, 1), "grads": Stream(grads, 1, 0), "momentum": Stream(momentum, 1, 1)}
    return streams | ({"shadow": Stream(shadow, 1, 1)} if has_shadow else {})


def compile_cases() -> list[CompileCase]:
    size, small = 33_663_402, 10_007  # ResNet-RS-50; a prime
    cases = []
    for dtype in (torch.float32, torch.bfloat16):
        name = f"{str(dtype).removeprefix('torch.')} parameters, {size:,}"
        launch = partial(_launch_ema, dtype=dtype)
        budgets = {"_ema_kernel": Budget(registers=64, shared=4096, vector_bytes=16)}
        eager = partial(_eager_ema, dtype=dtype)
        cases.append(CompileCase(f"ema_update, {name}", launch, size, small, budgets, eager))
        for has_shadow in (True, False):
            launch = partial(_launch_step, dtype=dtype, has_shadow=has_shadow)
            budgets = {"_sgd_ema_kernel": Budget(registers=80, shared=4096, vector_bytes=16)}
            label = "sgd_ema_step" if has_shadow else "sgd_ema_step without an average"
            eager = partial(_eager_step, dtype=dtype, has_shadow=has_shadow)
            cases.append(CompileCase(f"{label}, {name}", launch, size, small, budgets, eager))
    return cases
