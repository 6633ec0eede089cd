"""The Triton kernels of batch norm; :mod:`.batch_norm` launches them and says which form is for what.

Maps are channels_last: a matrix of rows (N * H * W) x CHANNELS. The number of channels is a compile-time constant, so
that the compiler knows how rows are aligned; the number of rows changes with the batch. All arithmetic is in float32.
Where a ReLU follows, the backward pass computes its input again from x: a read of y would be a third map.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .statistics_kernels import _merge, _merge_parts, _move_buffers, _row_statistics, _sum_parts


@triton.jit
def _affine(x, mean, scale, bias):
    """``(x - mean) * scale + bias``: beside a large mean the difference is nearly exact, and a product is not."""
    return (x - mean[None, :]) * scale[None, :] + bias[None, :]


@triton.jit
def _gradient(dy_ptrs, x, mask, mean, scale, bias, HAS_RELU: tl.constexpr):
    """What of dy passes the ReLU; like PyTorch's, one that got NaN passes it."""
    g = tl.load(dy_ptrs, mask=mask, other=0.0)
    if HAS_RELU:
        g = tl.where(_affine(x, mean, scale, bias) <= 0.0, 0.0, g)
    return g.to(tl.float32)


@triton.jit
def _store_normalised(y_ptrs, x, mask, mean, scale, bias, HAS_RELU: tl.constexpr):
    y = _affine(x, mean, scale, bias)
    if HAS_RELU:
        y = tl.where(y < 0.0, 0.0, y)  # keeps NaN, which tl.maximum would hide
    tl.store(y_ptrs, y.to(y_ptrs.dtype.element_ty), mask=mask)


@triton.jit
def _normalise_on_chip(
    x_ptr, weight_ptr, bias_ptr, running_mean_ptr, running_var_ptr, y_ptr, mean_ptr, deviation_ptr,
    rows,
    momentum, eps,
    CHANNELS: tl.constexpr, HAS_RELU: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """All rows of BLOCK_C channels."""
    offs_m = tl.arange(0, BLOCK_M)
    offs_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_m = offs_m < rows
    mask_c = offs_c < CHANNELS
    mask = mask_m[:, None] & mask_c[None, :]
    offs = offs_m.to(tl.int64)[:, None] * CHANNELS + offs_c[None, :]
    x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    mean, squares = _merge(mask_m.to(tl.float32)[:, None], x, tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float32))
    deviation = tl.rsqrt(squares / rows + eps)  # its inverse
    tl.store(mean_ptr + offs_c, mean, mask=mask_c)
    tl.store(deviation_ptr + offs_c, deviation, mask=mask_c)
    _move_buffers(running_mean_ptr, running_var_ptr, offs_c, mask_c, mean, squares, rows, momentum)
    scale = tl.load(weight_ptr + offs_c, mask=mask_c, other=0.0) * deviation
    bias = tl.load(bias_ptr + offs_c, mask=mask_c, other=0.0)
    _store_normalised(y_ptr + offs, x, mask, mean, scale, bias, HAS_RELU)


@triton.jit
def _partial_statistics(
    x_ptr, partial_ptr,
    rows, splits, split_rows,
    CHANNELS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Mean and squares of one split of BLOCK_C channels. partial: (2, splits, CHANNELS)."""
    split = tl.program_id(1)
    offs_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < CHANNELS
    start = split * split_rows
    size = tl.minimum(split_rows, rows - start)
    mean, squares = _row_statistics(
        x_ptr + start.to(tl.int64) * CHANNELS, offs_c, mask_c, size, CHANNELS, BLOCK_M, BLOCK_C, STAGES
    )
    tl.store(partial_ptr + split * CHANNELS + offs_c, mean, mask=mask_c)
    tl.store(partial_ptr + (splits + split) * CHANNELS + offs_c, squares, mask=mask_c)


@triton.jit
def _normalise(
    x_ptr, partial_ptr, weight_ptr, bias_ptr, running_mean_ptr, running_var_ptr, y_ptr, mean_ptr, deviation_ptr,
    rows, splits, split_rows,
    momentum, eps,
    CHANNELS: tl.constexpr, HAS_RELU: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The rows of one split, once the partial statistics are merged; split 0 also stores what belongs to a channel."""
    split = tl.program_id(1)
    offs_m = tl.arange(0, BLOCK_M)
    offs_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < CHANNELS
    mean, squares = _merge_parts(
        partial_ptr, partial_ptr + splits * CHANNELS, offs_c, mask_c, rows, splits, split_rows,
        CHANNELS, BLOCK_S, BLOCK_C,
    )  # fmt: skip
    deviation = tl.rsqrt(squares / rows + eps)  # its inverse
    if split == 0:
        tl.store(mean_ptr + offs_c, mean, mask=mask_c)
        tl.store(deviation_ptr + offs_c, deviation, mask=mask_c)
        _move_buffers(running_mean_ptr, running_var_ptr, offs_c, mask_c, mean, squares, rows, momentum)
    scale = tl.load(weight_ptr + offs_c, mask=mask_c, other=0.0) * deviation
    bias = tl.load(bias_ptr + offs_c, mask=mask_c, other=0.0)
    start = split * split_rows
    size = tl.minimum(split_rows, rows - start)
    offs = offs_m[:, None] * CHANNELS + offs_c[None, :]
    # From the end, which the first pass read last and a cache may still hold.
    last = (size - 1) // BLOCK_M * BLOCK_M
    first = (start + last).to(tl.int64) * CHANNELS
    x_ptr += first
    y_ptr += first
    for i in tl.range(0, size, BLOCK_M, num_stages=STAGES):
        mask = (offs_m < size - last + i)[:, None] & mask_c[None, :]
        x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        _store_normalised(y_ptr + offs, x, mask, mean, scale, bias, HAS_RELU)
        x_ptr -= BLOCK_M * CHANNELS
        y_ptr -= BLOCK_M * CHANNELS


@triton.jit
def _input_gradient_on_chip(
    dy_ptr, x_ptr, weight_ptr, bias_ptr, mean_ptr, deviation_ptr, dx_ptr, dweight_ptr, dbias_ptr,
    rows,
    CHANNELS: tl.constexpr, HAS_RELU: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """All rows of BLOCK_C channels."""
    offs_m = tl.arange(0, BLOCK_M)
    offs_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < CHANNELS
    mask = (offs_m < rows)[:, None] & mask_c[None, :]
    offs = offs_m.to(tl.int64)[:, None] * CHANNELS + offs_c[None, :]
    mean = tl.load(mean_ptr + offs_c, mask=mask_c, other=0.0)
    deviation = tl.load(deviation_ptr + offs_c, mask=mask_c, other=0.0)
    scale = tl.load(weight_ptr + offs_c, mask=mask_c, other=0.0) * deviation
    bias = tl.load(bias_ptr + offs_c, mask=mask_c, other=0.0)
    x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    g = _gradient(dy_ptr + offs, x, mask, mean, scale, bias, HAS_RELU)
    total = tl.sum(g, axis=0)
    product = tl.sum(g * (x - mean[None, :]), axis=0)
    tl.store(dbias_ptr + offs_c, total, mask=mask_c)
    tl.store(dweight_ptr + offs_c, product * deviation, mask=mask_c)
    _store_gradient(dx_ptr + offs, g, x, mask, mean, deviation, scale, total, product, rows)


@triton.jit
def _store_gradient(dx_ptrs, g, x, mask, mean, deviation, scale, total, product, rows):
    """``dx = scale * (g - mean(g) - (x - mean) * mean(g * (x - mean)) / variance)``, the means those of the rows."""
    constant = -scale * total / rows
    slope = -scale * deviation * deviation * product / rows
    dx = g * scale[None, :] + constant[None, :] + (x - mean[None, :]) * slope[None, :]
    tl.store(dx_ptrs, dx.to(dx_ptrs.dtype.element_ty), mask=mask)


@triton.jit
def _partial_sums(
    dy_ptr, x_ptr, weight_ptr, bias_ptr, mean_ptr, deviation_ptr, partial_ptr,
    rows, splits, split_rows,
    CHANNELS: tl.constexpr, HAS_RELU: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Sums of g, and of g * (x - mean), over one split of BLOCK_C channels. partial: (2, splits, CHANNELS)."""
    split = tl.program_id(1)
    offs_m = tl.arange(0, BLOCK_M)
    offs_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < CHANNELS
    mean = tl.load(mean_ptr + offs_c, mask=mask_c, other=0.0)
    scale = tl.load(weight_ptr + offs_c, mask=mask_c, other=0.0)
    scale *= tl.load(deviation_ptr + offs_c, mask=mask_c, other=0.0)
    bias = tl.load(bias_ptr + offs_c, mask=mask_c, other=0.0)
    start = split * split_rows
    size = tl.minimum(split_rows, rows - start)
    offs = offs_m[:, None] * CHANNELS + offs_c[None, :]
    first = start.to(tl.int64) * CHANNELS
    x_ptr += first
    dy_ptr += first
    total = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float32)
    product = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float32)
    for i in tl.range(0, size, BLOCK_M, num_stages=STAGES):
        mask = (offs_m < size - i)[:, None] & mask_c[None, :]
        x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        g = _gradient(dy_ptr + offs, x, mask, mean, scale, bias, HAS_RELU)
        total += g
        product += g * (x - mean[None, :])
        x_ptr += BLOCK_M * CHANNELS
        dy_ptr += BLOCK_M * CHANNELS
    tl.store(partial_ptr + split * CHANNELS + offs_c, tl.sum(total, axis=0), mask=mask_c)
    tl.store(partial_ptr + (splits + split) * CHANNELS + offs_c, tl.sum(product, axis=0), mask=mask_c)


@triton.jit
def _input_gradient(
    dy_ptr, x_ptr, partial_ptr, weight_ptr, bias_ptr, mean_ptr, deviation_ptr, dx_ptr, dweight_ptr, dbias_ptr,
    rows, splits, split_rows,
    CHANNELS: tl.constexpr, HAS_RELU: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dx of one split, once the partial sums are summed; split 0 also stores the gradients of weight and bias."""
    split = tl.program_id(1)
    offs_m = tl.arange(0, BLOCK_M)
    offs_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < CHANNELS
    total = _sum_parts(partial_ptr, offs_c, mask_c, splits, CHANNELS, BLOCK_S, BLOCK_C)
    product = _sum_parts(partial_ptr + splits * CHANNELS, offs_c, mask_c, splits, CHANNELS, BLOCK_S, BLOCK_C)
    mean = tl.load(mean_ptr + offs_c, mask=mask_c, other=0.0)
    deviation = tl.load(deviation_ptr + offs_c, mask=mask_c, other=0.0)
    if split == 0:
        tl.store(dbias_ptr + offs_c, total, mask=mask_c)
        tl.store(dweight_ptr + offs_c, product * deviation, mask=mask_c)
    scale = tl.load(weight_ptr + offs_c, mask=mask_c, other=0.0) * deviation
    bias = tl.load(bias_ptr + offs_c, mask=mask_c, other=0.0)
    start = split * split_rows
    size = tl.minimum(split_rows, rows - start)
    offs = offs_m[:, None] * CHANNELS + offs_c[None, :]
    # From the end, which the first pass read last and a cache may still hold.
    last = (size - 1) // BLOCK_M * BLOCK_M
    first = (start + last).to(tl.int64) * CHANNELS
    x_ptr += first
    dy_ptr += first
    dx_ptr += first
    for i in tl.range(0, size, BLOCK_M, num_stages=STAGES):
        mask = (offs_m < size - last + i)[:, None] & mask_c[None, :]
        x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        g = _gradient(dy_ptr + offs, x, mask, mean, scale, bias, HAS_RELU)
        _store_gradient(dx_ptr + offs, g, x, mask, mean, deviation, scale, total, product, rows)
        x_ptr -= BLOCK_M * CHANNELS
        dy_ptr -= BLOCK_M * CHANNELS
        dx_ptr -= BLOCK_M * CHANNELS
