"""The device code of the multi-tensor updates."""

from __future__ import annotations

import triton
import triton.language as tl

from . import ema_table

COUNT, FIRST, LAYOUT, WORDS, ALIGNED, LINEAR, DIMS = (
    tl.constexpr(value)
    for value in (
        *(ema_table.COUNT, ema_table.FIRST, ema_table.LAYOUT, ema_table.WORDS),
        *(ema_table.ALIGNED, ema_table.LINEAR, ema_table.MAX_DIMS),
    )
)


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
                row_ptr = strides_ptr + layout * (6 * DIMS)
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
    c_ptrs,
    mask,
    # scalars
    lr,
    momentum,
    weight_decay,
    decay,
    # constants
    HAS_MOMENTUM: tl.constexpr,
    HAS_SHADOW: tl.constexpr,
    HAS_COPIES: tl.constexpr,
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
    if HAS_COPIES:
        tl.store(c_ptrs, p.to(c_ptrs.dtype.element_ty), mask=mask)
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
    C_DTYPE: tl.constexpr,
    HAS_MOMENTUM: tl.constexpr,
    HAS_SHADOW: tl.constexpr,
    HAS_COPIES: tl.constexpr,
    IS_NESTEROV: tl.constexpr,
    BLOCK: tl.constexpr,
    PIECE: tl.constexpr,
):
    P_TYPE: tl.constexpr = tl.pointer_type(P_DTYPE)
    G_TYPE: tl.constexpr = tl.pointer_type(G_DTYPE)
    C_TYPE: tl.constexpr = tl.pointer_type(C_DTYPE)
    F_TYPE: tl.constexpr = tl.pointer_type(tl.float32)
    pid = tl.program_id(0)
    record_ptr = table_ptr + pid * WORDS
    p = tl.load(record_ptr)
    g = tl.load(record_ptr + 1)
    m = tl.load(record_ptr + 2)
    s = tl.load(record_ptr + 3)
    c = tl.load(record_ptr + 4)
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
        c_ptrs = tl.multiple_of(c.to(C_TYPE), 16) + offs
        mask = offs < count // 16 * 16
        _sgd_ema_chunk(
            *(p_ptrs, g_ptrs, m_ptrs, s_ptrs, c_ptrs, mask),
            *(lr, momentum, weight_decay, decay),
            *(HAS_MOMENTUM, HAS_SHADOW, HAS_COPIES, IS_NESTEROV),
        )
    else:  # small pieces: 64-bit offsets of a whole chunk would take the registers of the fast path
        for start in range(0, count, PIECE):
            offs_piece = start + tl.arange(0, PIECE)
            offsets = offs_piece.to(tl.int64)
            p_offs, g_offs, m_offs, s_offs, c_offs = offsets, offsets, offsets, offsets, offsets
            if layout != LINEAR:
                row_ptr = strides_ptr + layout * (6 * DIMS)
                index = tl.load(record_ptr + FIRST).to(tl.int32) + offs_piece
                p_offs = _strided(index, row_ptr, 0)
                g_offs = _strided(index, row_ptr, 1)
                m_offs = _strided(index, row_ptr, 2)
                s_offs = _strided(index, row_ptr, 3)
                c_offs = _strided(index, row_ptr, 4)
            p_ptrs = p.to(P_TYPE) + p_offs
            g_ptrs = g.to(G_TYPE) + g_offs
            m_ptrs = m.to(F_TYPE) + m_offs
            s_ptrs = s.to(F_TYPE) + s_offs
            c_ptrs = c.to(C_TYPE) + c_offs
            _sgd_ema_chunk(
                *(p_ptrs, g_ptrs, m_ptrs, s_ptrs, c_ptrs, offs_piece < count),
                *(lr, momentum, weight_decay, decay),
                *(HAS_MOMENTUM, HAS_SHADOW, HAS_COPIES, IS_NESTEROV),
            )
