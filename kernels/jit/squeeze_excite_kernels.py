"""The Triton kernels of squeeze-and-excite; :mod:`.squeeze_excite` launches them and says which form is for what.

Maps are channels_last: (N, P, C) in memory, P = H * W pixels. C, P and the hidden width are compile-time constants, so
that the compiler knows how rows are aligned; a model has a handful of such shapes. All arithmetic is in float32.
"""

from __future__ import annotations

import triton
import triton.language as tl

RELU, SIGMOID, RELU_GRADIENT, LINEAR, BIAS = (tl.constexpr(i) for i in range(5))  # what a product does to its result


@triton.jit
def _relu(x):
    """max(x, 0) that keeps NaN, as ``torch.relu`` does: ``tl.maximum`` alone would hide a diverged run."""
    return tl.where(x < 0.0, 0.0, x)


@triton.jit
def _relu_gradient(g, y_ptrs, mask):
    """``g`` where the activation passed it on; like PyTorch's, it passes where the activation is NaN."""
    return tl.where(tl.load(y_ptrs, mask=mask, other=0.0).to(tl.float32) <= 0.0, 0.0, g)


@triton.jit
def _product(
    a_ptr, w_ptr, b_ptr, out_ptr,
    m_start, m_end, o_start,
    DEPTH: tl.constexpr, OUT: tl.constexpr,
    STRIDE_WO: tl.constexpr, STRIDE_WK: tl.constexpr,
    EPILOGUE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Rows m_start..m_end of ``out = epilogue(a @ w.T)``, outputs o_start..+BLOCK_O. a: (n, DEPTH), out: (n, OUT).

    ``b_ptr`` is the bias of RELU, SIGMOID and BIAS, and the forward's activations, (n, OUT), of RELU_GRADIENT. The
    product is of operands in the dtype of ``a``.
    """
    offs_m = m_start + tl.arange(0, BLOCK_M)
    offs_o = o_start + tl.arange(0, BLOCK_O)
    mask_m = offs_m < m_end
    mask_o = offs_o < OUT
    acc = tl.zeros((BLOCK_M, BLOCK_O), dtype=tl.float32)
    for k in range(0, DEPTH, BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K)
        mask_k = offs_k < DEPTH
        a = tl.load(
            a_ptr + offs_m[:, None] * DEPTH + offs_k[None, :], mask=mask_m[:, None] & mask_k[None, :], other=0.0
        )
        w = tl.load(
            w_ptr + offs_k[:, None] * STRIDE_WK + offs_o[None, :] * STRIDE_WO,
            mask=mask_k[:, None] & mask_o[None, :],
            other=0.0,
        ).to(a.dtype)
        acc = tl.dot(a, w, acc, input_precision=PRECISION)
    offs = offs_m[:, None] * OUT + offs_o[None, :]
    mask = mask_m[:, None] & mask_o[None, :]
    if EPILOGUE == RELU or EPILOGUE == SIGMOID or EPILOGUE == BIAS:  # noqa: SIM109  Triton has no `in`
        acc += tl.load(b_ptr + offs_o, mask=mask_o, other=0.0).to(tl.float32)[None, :]
    if EPILOGUE == RELU:
        acc = _relu(acc)
    if EPILOGUE == SIGMOID:
        acc = tl.sigmoid(acc)
    if EPILOGUE == RELU_GRADIENT:
        acc = _relu_gradient(acc, b_ptr + offs, mask)
    tl.store(out_ptr + offs, acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _product_rows(
    a_ptr, w_ptr, b_ptr, out_ptr,
    m_start, m_end,
    DEPTH: tl.constexpr, OUT: tl.constexpr,
    STRIDE_WO: tl.constexpr, STRIDE_WK: tl.constexpr,
    EPILOGUE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """All outputs of :func:`_product` for one program's samples, between barriers: it reads what the program wrote."""
    tl.debug_barrier()
    for o_start in range(0, OUT, BLOCK_O):
        _product(
            a_ptr, w_ptr, b_ptr, out_ptr, m_start, m_end, o_start, DEPTH, OUT, STRIDE_WO, STRIDE_WK,
            EPILOGUE, PRECISION, BLOCK_M, BLOCK_O, BLOCK_K,
        )  # fmt: skip
    tl.debug_barrier()


@triton.jit
def _single_pass_forward(
    x_ptr, w1_ptr, b1_ptr, w2_ptr, b2_ptr, shortcut_ptr, keep_ptr, y_ptr, mean_ptr, hidden_ptr, gate_ptr,
    n,
    PIXELS: tl.constexpr, CHANNELS: tl.constexpr, HIDDEN: tl.constexpr,
    HAS_SHORTCUT: tl.constexpr, HAS_KEEP: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    n_start = tl.program_id(0) * BLOCK_N
    n_end = tl.minimum(n_start + BLOCK_N, n)
    offs_n = n_start + tl.arange(0, BLOCK_N)
    offs_p = tl.arange(0, BLOCK_P)
    offs_c = tl.arange(0, BLOCK_C)
    mask_nc = (offs_n < n)[:, None] & (offs_c < CHANNELS)[None, :]
    offs_nc = offs_n[:, None] * CHANNELS + offs_c[None, :]
    mask = mask_nc[:, None, :] & (offs_p < PIXELS)[None, :, None]
    offs = (offs_n.to(tl.int64)[:, None, None] * PIXELS + offs_p[None, :, None]) * CHANNELS + offs_c[None, None, :]

    x = tl.load(x_ptr + offs, mask=mask, other=0.0)
    tl.store(mean_ptr + offs_nc, tl.sum(x.to(tl.float32), axis=1) / PIXELS, mask=mask_nc)
    _product_rows(
        mean_ptr, w1_ptr, b1_ptr, hidden_ptr, n_start, n_end, CHANNELS, HIDDEN, CHANNELS, 1,
        RELU, PRECISION, BLOCK_M, BLOCK_O, BLOCK_K,
    )  # fmt: skip
    _product_rows(
        hidden_ptr, w2_ptr, b2_ptr, gate_ptr, n_start, n_end, HIDDEN, CHANNELS, HIDDEN, 1,
        SIGMOID, PRECISION, BLOCK_M, BLOCK_O, BLOCK_K,
    )  # fmt: skip
    gate = tl.load(gate_ptr + offs_nc, mask=mask_nc, other=0.0)
    if HAS_KEEP:
        gate *= tl.load(keep_ptr + offs_n, mask=offs_n < n, other=0.0).to(tl.float32)[:, None]
    y = x.to(tl.float32) * gate[:, None, :]
    if HAS_SHORTCUT:
        y = _relu(y + tl.load(shortcut_ptr + offs, mask=mask, other=0.0).to(tl.float32))
    tl.store(y_ptr + offs, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _single_pass_backward(
    dy_ptr, x_ptr, y_ptr, w1_ptr, w2_ptr, keep_ptr, hidden_ptr, gate_ptr,
    dx_ptr, dshortcut_ptr, dz2_ptr, dz1_ptr, dmean_ptr,
    n,
    PIXELS: tl.constexpr, CHANNELS: tl.constexpr, HIDDEN: tl.constexpr,
    HAS_SHORTCUT: tl.constexpr, HAS_KEEP: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    n_start = tl.program_id(0) * BLOCK_N
    n_end = tl.minimum(n_start + BLOCK_N, n)
    offs_n = n_start + tl.arange(0, BLOCK_N)
    offs_p = tl.arange(0, BLOCK_P)
    offs_c = tl.arange(0, BLOCK_C)
    mask_nc = (offs_n < n)[:, None] & (offs_c < CHANNELS)[None, :]
    offs_nc = offs_n[:, None] * CHANNELS + offs_c[None, :]
    mask = mask_nc[:, None, :] & (offs_p < PIXELS)[None, :, None]
    offs = (offs_n.to(tl.int64)[:, None, None] * PIXELS + offs_p[None, :, None]) * CHANNELS + offs_c[None, None, :]

    g = tl.load(dy_ptr + offs, mask=mask, other=0.0)
    if HAS_SHORTCUT:
        g = _relu_gradient(g, y_ptr + offs, mask)
        tl.store(dshortcut_ptr + offs, g.to(dshortcut_ptr.dtype.element_ty), mask=mask)
    x = tl.load(x_ptr + offs, mask=mask, other=0.0)
    dgate = tl.sum(g.to(tl.float32) * x.to(tl.float32), axis=1)
    gate = tl.load(gate_ptr + offs_nc, mask=mask_nc, other=0.0)
    dz2 = dgate * gate * (1.0 - gate)
    if HAS_KEEP:
        dz2 *= tl.load(keep_ptr + offs_n, mask=offs_n < n, other=0.0).to(tl.float32)[:, None]
    tl.store(dz2_ptr + offs_nc, dz2, mask=mask_nc)
    _product_rows(
        dz2_ptr, w2_ptr, hidden_ptr, dz1_ptr, n_start, n_end, CHANNELS, HIDDEN, 1, HIDDEN,
        RELU_GRADIENT, PRECISION, BLOCK_M, BLOCK_O, BLOCK_K,
    )  # fmt: skip
    _product_rows(
        dz1_ptr, w1_ptr, hidden_ptr, dmean_ptr, n_start, n_end, HIDDEN, CHANNELS, 1, CHANNELS,
        LINEAR, PRECISION, BLOCK_M, BLOCK_O, BLOCK_K,
    )  # fmt: skip
    dmean = tl.load(dmean_ptr + offs_nc, mask=mask_nc, other=0.0) / PIXELS
    scale = tl.load(gate_ptr + offs_nc, mask=mask_nc, other=0.0)
    if HAS_KEEP:
        scale *= tl.load(keep_ptr + offs_n, mask=offs_n < n, other=0.0).to(tl.float32)[:, None]
    dx = g.to(tl.float32) * scale[:, None, :] + dmean[:, None, :]
    tl.store(dx_ptr + offs, dx.to(dx_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _squeeze(
    x_ptr, dy_ptr, y_ptr, gate_ptr, keep_ptr, dshortcut_ptr, out_ptr,
    PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
    IS_BACKWARD: tl.constexpr, HAS_SHORTCUT: tl.constexpr, HAS_KEEP: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Forward: the channel means of a sample. Backward: the gradient before the sigmoid, and that of the shortcut."""
    n = tl.program_id(0)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < CHANNELS
    acc = tl.zeros((BLOCK_P, BLOCK_C), dtype=tl.float32)
    for p in range(0, PIXELS, BLOCK_P):
        offs_p = p + tl.arange(0, BLOCK_P)
        offs = (n.to(tl.int64) * PIXELS + offs_p[:, None]) * CHANNELS + offs_c[None, :]
        mask = (offs_p < PIXELS)[:, None] & mask_c[None, :]
        x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        if IS_BACKWARD:
            g = tl.load(dy_ptr + offs, mask=mask, other=0.0)
            if HAS_SHORTCUT:
                g = _relu_gradient(g, y_ptr + offs, mask)
                tl.store(dshortcut_ptr + offs, g.to(dshortcut_ptr.dtype.element_ty), mask=mask)
            x *= g.to(tl.float32)
        acc += x
    total = tl.sum(acc, axis=0)
    offs_nc = n * CHANNELS + offs_c
    if IS_BACKWARD:
        gate = tl.load(gate_ptr + offs_nc, mask=mask_c, other=0.0)
        total *= gate * (1.0 - gate)
        if HAS_KEEP:
            total *= tl.load(keep_ptr + n).to(tl.float32)
    else:
        total /= PIXELS
    tl.store(out_ptr + offs_nc, total, mask=mask_c)


@triton.jit
def _batch_product(
    a_ptr, w_ptr, b_ptr, out_ptr,
    n,
    DEPTH: tl.constexpr, OUT: tl.constexpr,
    STRIDE_WO: tl.constexpr, STRIDE_WK: tl.constexpr,
    EPILOGUE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    _product(
        a_ptr, w_ptr, b_ptr, out_ptr, tl.program_id(0) * BLOCK_M, n, tl.program_id(1) * BLOCK_O,
        DEPTH, OUT, STRIDE_WO, STRIDE_WK, EPILOGUE, PRECISION, BLOCK_M, BLOCK_O, BLOCK_K,
    )  # fmt: skip


@triton.jit
def _excite(
    x_ptr, gate_ptr, keep_ptr, add_ptr, out_ptr,
    PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
    IS_BACKWARD: tl.constexpr, HAS_SHORTCUT: tl.constexpr, HAS_KEEP: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """``relu(shortcut + keep * x * gate)``; backward, with g as x and dmean to add: ``keep * g * gate + dmean / P``."""
    n = tl.program_id(0)
    offs_p = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    offs_c = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < CHANNELS
    mask = (offs_p < PIXELS)[:, None] & mask_c[None, :]
    offs = (n.to(tl.int64) * PIXELS + offs_p[:, None]) * CHANNELS + offs_c[None, :]
    scale = tl.load(gate_ptr + n * CHANNELS + offs_c, mask=mask_c, other=0.0)
    if HAS_KEEP:
        scale *= tl.load(keep_ptr + n).to(tl.float32)
    y = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32) * scale[None, :]
    if IS_BACKWARD:
        y += (tl.load(add_ptr + n * CHANNELS + offs_c, mask=mask_c, other=0.0) / PIXELS)[None, :]
    elif HAS_SHORTCUT:
        y = _relu(y + tl.load(add_ptr + offs, mask=mask, other=0.0).to(tl.float32))
    tl.store(out_ptr + offs, y.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _weight_gradients(
    dz2_ptr, hidden_ptr, dz1_ptr, mean_ptr, dw1_ptr, db1_ptr, dw2_ptr, db2_ptr,
    n,
    CHANNELS: tl.constexpr, HIDDEN: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """``dw2 = dz2.T @ hidden``, ``dw1 = dz1.T @ mean``, the biases'; programs: (channels, hidden, which of the two)."""
    is_first = tl.program_id(2) == 0
    offs_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    offs_r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_c = offs_c < CHANNELS
    mask_r = offs_r < HIDDEN
    c_ptr = tl.where(is_first, mean_ptr, dz2_ptr)
    r_ptr = tl.where(is_first, dz1_ptr, hidden_ptr)
    acc = tl.zeros((BLOCK_C, BLOCK_R), dtype=tl.float32)
    sum_c = tl.zeros((BLOCK_C,), dtype=tl.float32)
    sum_r = tl.zeros((BLOCK_R,), dtype=tl.float32)
    for start in range(0, n, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        mask_n = offs_n < n
        c = tl.load(
            c_ptr + offs_n[:, None] * CHANNELS + offs_c[None, :], mask=mask_n[:, None] & mask_c[None, :], other=0.0
        )
        r = tl.load(
            r_ptr + offs_n[:, None] * HIDDEN + offs_r[None, :], mask=mask_n[:, None] & mask_r[None, :], other=0.0
        )
        acc = tl.dot(tl.trans(c), r, acc, input_precision=PRECISION)
        sum_c += tl.sum(c.to(tl.float32), axis=0)
        sum_r += tl.sum(r.to(tl.float32), axis=0)
    mask = mask_c[:, None] & mask_r[None, :]
    if is_first:
        tl.store(dw1_ptr + offs_r[None, :] * CHANNELS + offs_c[:, None], acc.to(dw1_ptr.dtype.element_ty), mask=mask)
        if tl.program_id(0) == 0:
            tl.store(db1_ptr + offs_r, sum_r.to(db1_ptr.dtype.element_ty), mask=mask_r)
    else:
        tl.store(dw2_ptr + offs_c[:, None] * HIDDEN + offs_r[None, :], acc.to(dw2_ptr.dtype.element_ty), mask=mask)
        if tl.program_id(1) == 0:
            tl.store(db2_ptr + offs_c, sum_c.to(db2_ptr.dtype.element_ty), mask=mask_c)
