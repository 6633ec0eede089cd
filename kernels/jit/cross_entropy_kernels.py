"""The kernels of label-smoothed cross-entropy: loss, count of correct rows and gradient from the logits.

A row that fits one tile (``_rows_kernel``) is read once and its gradient written once. A longer row
(``_columns_kernel``) is swept twice, the second time only for the gradient. Nothing is atomic and every sum has a fixed
order, so two runs give the same bits.

With ``z = x - max(x)``, ``logsum = log(sum(exp(z)))`` and q the smoothed target, a row's loss is
``sum(q) * logsum - sum(q * z)``: neither term is negative, so nothing cancels however large the logits are. Its
gradient is ``sum(q) * softmax(x) - q``.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _load(ptrs, mask, is_inside, other):
    """Load a block. One that is wholly inside needs no mask, and so can be read in full vectors wherever it begins."""
    values = tl.load(ptrs) if is_inside else tl.load(ptrs, mask=mask, other=other)
    return values.to(tl.float32)


@triton.jit
def _store(ptrs, values, mask, is_inside):
    values = values.to(ptrs.dtype.element_ty)
    if is_inside:
        tl.store(ptrs, values)
    else:
        tl.store(ptrs, values, mask=mask)


@triton.jit
def _nan_as_inf(x):
    """A NaN becomes +inf: either makes its whole row NaN, and the comparisons of the maximum stay well defined."""
    return tl.where(x == x, x, float("inf"))


@triton.jit
def _smooth(target, z, confidence, uniform, IS_SOFT: tl.constexpr, IS_SMOOTHED: tl.constexpr):
    """The smoothed target q, and q * z. target: class probabilities, or True at the label."""
    if IS_SOFT:
        q = confidence * target + uniform
        qz = q * z
    else:
        q = tl.where(target, confidence, 0.0) + uniform
        qz = tl.where(target, confidence * z, 0.0)  # never 0 * inf at the other classes
        if IS_SMOOTHED:
            qz += uniform * z
    return q, qz


@triton.jit
def _rows_kernel(
    logits_ptr,
    target_ptr,
    loss_ptr,
    correct_ptr,
    gradient_ptr,
    n_rows,
    confidence,
    uniform,
    loss_scale,
    gradient_scale,
    CLASSES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    IS_SOFT: tl.constexpr,
    IS_SMOOTHED: tl.constexpr,
    IS_REDUCED: tl.constexpr,
    HAS_GRADIENT: tl.constexpr,
):
    pid = tl.program_id(0)
    offs_m = tl.arange(0, BLOCK_M)
    offs_c = tl.arange(0, BLOCK_C)[None, :]
    row = pid.to(tl.int64) * BLOCK_M
    mask_m = offs_m < n_rows - row
    mask_c = offs_c < CLASSES
    mask = mask_m[:, None] & mask_c
    offs = offs_m[:, None] * CLASSES + offs_c

    x = _nan_as_inf(tl.load(logits_ptr + row * CLASSES + offs, mask=mask, other=float("-inf")).to(tl.float32))
    row_max = tl.max(x, axis=1)
    predicted = tl.min(tl.where(x == row_max[:, None], offs_c, CLASSES), axis=1)
    z = x - row_max[:, None]
    exp_z = tl.exp(z)
    total = tl.sum(exp_z, axis=1)

    if IS_SOFT:
        target = tl.load(target_ptr + row * CLASSES + offs, mask=mask, other=0.0).to(tl.float32)
        ranked = tl.where(mask_c, target, float("-inf"))
        label = tl.min(tl.where(ranked == tl.max(ranked, axis=1)[:, None], offs_c, CLASSES), axis=1)
        is_valid = mask_m
    else:
        index = tl.load(target_ptr + row + offs_m, mask=mask_m, other=0)
        is_valid = (index >= 0) & (index < CLASSES)
        label = index.to(tl.int32)
        target = offs_c == label[:, None]
    q, qz = _smooth(target, z, confidence, uniform, IS_SOFT, IS_SMOOTHED)
    q_sum = tl.sum(tl.where(mask_c, q, 0.0), axis=1) if IS_SOFT else 1.0
    row_loss = q_sum * tl.log(total) - tl.sum(tl.where(mask_c, qz, 0.0), axis=1)
    row_loss = tl.where(is_valid, row_loss, float("nan")) * loss_scale
    if IS_REDUCED:
        tl.store(loss_ptr + pid, tl.sum(tl.where(mask_m, row_loss, 0.0), axis=0))
    else:
        tl.store(loss_ptr + row + offs_m, row_loss, mask=mask_m)
    hits = (predicted == label) & is_valid & mask_m
    tl.store(correct_ptr + pid, tl.sum(hits.to(tl.int32), axis=0).to(tl.int64))

    if HAS_GRADIENT:
        row_scale = tl.where(is_valid, gradient_scale, float("nan"))
        gradient = (exp_z * (q_sum / total)[:, None] - q) * row_scale[:, None]
        tl.store(gradient_ptr + row * CLASSES + offs, gradient.to(gradient_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _columns_kernel(
    logits_ptr,
    target_ptr,
    loss_ptr,
    correct_ptr,
    gradient_ptr,
    confidence,
    uniform,
    loss_scale,
    gradient_scale,
    CLASSES: tl.constexpr,
    BLOCK_C: tl.constexpr,
    IS_SOFT: tl.constexpr,
    IS_SMOOTHED: tl.constexpr,
    HAS_GRADIENT: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    # Rows of an odd number of classes begin anywhere. The sweep starts at the last multiple of 8 elements (16 bytes of
    # bfloat16) before its row, so that every block but the first and the last is read and written in full vectors.
    if CLASSES % 8 == 0:
        base = row * CLASSES
        lead = 0
    else:
        base = row * CLASSES // 8 * 8
        lead = (row * CLASSES - base).to(tl.int32)
    offs_b = tl.arange(0, BLOCK_C)
    if IS_SOFT:
        is_valid = True
        label = 0
    else:
        index = tl.load(target_ptr + row)
        is_valid = (index >= 0) & (index < CLASSES)
        label = index.to(tl.int32)

    # Sweep 1. The sums are kept a lane, and reduced once at the end; the maximum is the whole row's so far, and when
    # it grows, what was summed relative to the old one moves to the new one. `shift` is the maximum, or 0 while every
    # logit has been -inf: -inf - -inf would be NaN and stay.
    predicted = 0
    label_max = float("-inf")
    row_max = float("-inf")
    shift = 0.0
    total = tl.zeros((BLOCK_C,), tl.float32)
    q_sum = tl.zeros((BLOCK_C,), tl.float32)
    qz_sum = tl.zeros((BLOCK_C,), tl.float32)
    for start in range(0, lead + CLASSES, BLOCK_C):
        offs_c = start + offs_b - lead
        mask = (offs_c >= 0) & (offs_c < CLASSES)
        is_inside = (start >= lead) & (start + BLOCK_C <= lead + CLASSES)
        x = _nan_as_inf(_load(logits_ptr + base + start + offs_b, mask, is_inside, float("-inf")))
        block_max = tl.max(x, axis=0)
        if block_max > row_max:
            predicted = tl.min(tl.where(x == block_max, offs_c, CLASSES), axis=0)
        new_max = tl.maximum(row_max, block_max)
        new_shift = tl.where(new_max == float("-inf"), 0.0, new_max)
        z = x - new_shift
        total = total * tl.exp(row_max - new_shift) + tl.exp(z)
        if IS_SOFT:
            target = _load(target_ptr + base + start + offs_b, mask, is_inside, 0.0)
            ranked = tl.where(mask, target, float("-inf"))
            block_label_max = tl.max(ranked, axis=0)
            if block_label_max > label_max:
                label = tl.min(tl.where(ranked == block_label_max, offs_c, CLASSES), axis=0)
            label_max = tl.maximum(label_max, block_label_max)
        else:
            target = offs_c == label
        q, qz = _smooth(target, z, confidence, uniform, IS_SOFT, IS_SMOOTHED)
        qz_sum += q_sum * (shift - new_shift) + tl.where(mask, qz, 0.0)
        q_sum += tl.where(mask, q, 0.0)
        row_max = new_max
        shift = new_shift

    row_total = tl.sum(total, axis=0)
    row_q = tl.sum(q_sum, axis=0) if IS_SOFT else 1.0
    row_loss = row_q * tl.log(row_total) - tl.sum(qz_sum, axis=0)
    tl.store(loss_ptr + row, tl.where(is_valid, row_loss, float("nan")) * loss_scale)
    tl.store(correct_ptr + row, ((predicted == label) & is_valid).to(tl.int64))

    if HAS_GRADIENT:
        row_scale = tl.where(is_valid, gradient_scale, float("nan"))
        for start in range(0, lead + CLASSES, BLOCK_C):
            offs_c = start + offs_b - lead
            mask = (offs_c >= 0) & (offs_c < CLASSES)
            is_inside = (start >= lead) & (start + BLOCK_C <= lead + CLASSES)
            z = _nan_as_inf(_load(logits_ptr + base + start + offs_b, mask, is_inside, float("-inf"))) - row_max
            target = _load(target_ptr + base + start + offs_b, mask, is_inside, 0.0) if IS_SOFT else offs_c == label
            q, _ = _smooth(target, z, confidence, uniform, IS_SOFT, IS_SMOOTHED)
            gradient = (tl.exp(z) * (row_q / row_total) - q) * row_scale
            _store(gradient_ptr + base + start + offs_b, gradient, mask, is_inside)


@triton.jit
def _finish_kernel(
    part_loss_ptr,
    part_correct_ptr,
    loss_ptr,
    correct_ptr,
    n_parts,
    BLOCK: tl.constexpr,
    IS_REDUCED: tl.constexpr,
):
    """One program adds up what the others left."""
    loss = tl.zeros((BLOCK,), tl.float32)
    correct = tl.zeros((BLOCK,), tl.int64)
    for start in range(0, n_parts, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        mask = offs < n_parts
        correct += tl.load(part_correct_ptr + offs, mask=mask, other=0)
        if IS_REDUCED:
            loss += tl.load(part_loss_ptr + offs, mask=mask, other=0.0)
    tl.store(correct_ptr, tl.sum(correct, axis=0))
    if IS_REDUCED:
        tl.store(loss_ptr, tl.sum(loss, axis=0))


@triton.jit
def _scale_kernel(
    gradient_ptr,
    factor_ptr,
    n_elements,
    stride_factor,
    remaining,
    CLASSES: tl.constexpr,
    BLOCK: tl.constexpr,
    IS_PER_ROW: tl.constexpr,
):
    """gradient *= factor * remaining, over the flat gradient; a factor of exactly 1 leaves it untouched."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    offs = tl.arange(0, BLOCK)
    mask = offs < n_elements - start
    if IS_PER_ROW:
        row = start // CLASSES
        offs_m = ((start - row * CLASSES).to(tl.int32) + offs) // CLASSES
        factor = tl.load(factor_ptr + (row + offs_m) * stride_factor, mask=mask, other=1.0).to(tl.float32) * remaining
        is_needed = tl.max((factor != 1.0).to(tl.int32), axis=0) != 0
    else:
        factor = tl.load(factor_ptr).to(tl.float32) * remaining
        is_needed = factor != 1.0
    if is_needed:
        is_inside = start + BLOCK <= n_elements
        ptrs = gradient_ptr + start + offs
        _store(ptrs, _load(ptrs, mask, is_inside, 0.0) * factor, mask, is_inside)
