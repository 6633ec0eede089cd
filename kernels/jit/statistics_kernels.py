"""Mean and variance of the channels of a map, computed in parts: how rows are split, and the device code of the parts.

A channels_last map is a matrix of rows (N * H * W) x channels. A *part* is a run of rows, of a length known without
memory (:func:`row_splits`, or the pixels of an image); of each part and channel a kernel stores the mean and the sum of
squared deviations from it ("squares"), and the next kernel merges them (Chan, Golub & LeVeque 1983). Nothing here sums
squares of the values themselves, which would cost the digits that a large mean has in common. All arithmetic is in
float32, and the order of every sum is fixed.
"""

from __future__ import annotations

from math import isqrt

import triton
import triton.language as tl

MOST_PROGRAMS = 256  # two for each multiprocessor of the largest GPUs
PARTS_AT_ONCE = 64  # what a program merges in one step


def row_splits(rows: int, channel_blocks: int, block_m: int) -> tuple[int, int]:
    """``(splits, split_rows)``: every split but the last has ``split_rows`` rows, a multiple of ``block_m``; no split
    is empty.

    Enough splits to occupy the GPU, and so few that what the next kernel reads to merge them (8 bytes a split and
    channel, in each of its programs) is less than half of the 16-bit numbers that one of its programs reads and writes.
    """
    wanted = max(1, min(MOST_PROGRAMS // channel_blocks, isqrt(rows) // 2))
    split_rows = triton.cdiv(triton.cdiv(rows, wanted), block_m) * block_m
    return triton.cdiv(rows, split_rows), split_rows


@triton.jit
def _merge(count, mean, squares):
    """``(mean, squares)``, both (C,), of M parts. count: (M, 1) float32, not all 0; mean, squares: (M, C), finite where
    the count is 0."""
    total = tl.sum(count, axis=0)
    rough = tl.sum(count * mean, axis=0) / total
    d = mean - rough[None, :]
    rest = tl.sum(count * d, axis=0)  # 0 but for the rounding of ``rough``
    squares = tl.sum(squares + count * d * d, axis=0) - rest * rest / total
    return rough + rest / total, squares


@triton.jit
def _row_statistics(
    row_ptr, offs_c, mask_c,
    size,
    CHANNELS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """``(mean, squares)``, both (BLOCK_C,), of ``size`` rows from ``row_ptr`` on, BLOCK_M at a time. size: at least 1.

    Each of BLOCK_M lanes follows its own rows (Welford 1962), so that only the end needs other threads' numbers.
    """
    offs_m = tl.arange(0, BLOCK_M)
    offs = offs_m[:, None] * CHANNELS + offs_c[None, :]
    mean = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float32)
    squares = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float32)
    for i in tl.range(0, size, BLOCK_M, num_stages=STAGES):
        mask = (offs_m < size - i)[:, None] & mask_c[None, :]
        x = tl.load(row_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        d = tl.where(mask, x - mean, 0.0)
        mean += d * (1.0 / (i // BLOCK_M + 1))
        squares += d * (x - mean)
        row_ptr += BLOCK_M * CHANNELS
    count = (tl.maximum(size - offs_m, 0) + (BLOCK_M - 1)) // BLOCK_M
    return _merge(count.to(tl.float32)[:, None], mean, squares)


@triton.jit
def _merge_parts(
    mean_ptr, squares_ptr, offs_c, mask_c,
    rows, parts, part_rows,
    CHANNELS: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """``(mean, squares)``, both (BLOCK_C,), of all ``rows``. mean_ptr, squares_ptr: (parts, CHANNELS) float32.

    Every part has ``part_rows`` rows, but the last, which has what is left; at least 1.
    """
    offs_s = tl.arange(0, BLOCK_S)
    mean = tl.zeros((BLOCK_C,), dtype=tl.float32)
    squares = tl.zeros((BLOCK_C,), dtype=tl.float32)
    merged = 0.0  # rows
    for start in range(0, parts, BLOCK_S):
        left = parts - start - offs_s
        count = tl.where(left > 1, part_rows, tl.where(left == 1, rows - (parts - 1) * part_rows, 0)).to(tl.float32)
        offs = (start + offs_s)[:, None] * CHANNELS + offs_c[None, :]
        mask = (left > 0)[:, None] & mask_c[None, :]
        their_mean, their_squares = _merge(
            count[:, None],
            tl.load(mean_ptr + offs, mask=mask, other=0.0),
            tl.load(squares_ptr + offs, mask=mask, other=0.0),
        )
        theirs = tl.sum(count, axis=0)
        d = their_mean - mean
        squares += their_squares + d * d * (merged * theirs / (merged + theirs))
        mean += d * (theirs / (merged + theirs))
        merged += theirs
    return mean, squares


@triton.jit
def _move_buffers(running_mean_ptr, running_var_ptr, offs_c, mask_c, mean, squares, rows, momentum):
    """The running statistics a step towards the mean and the unbiased variance of the batch, as ``nn.BatchNorm2d``."""
    running_mean = tl.load(running_mean_ptr + offs_c, mask=mask_c, other=0.0)
    running_var = tl.load(running_var_ptr + offs_c, mask=mask_c, other=0.0)
    tl.store(running_mean_ptr + offs_c, running_mean + momentum * (mean - running_mean), mask=mask_c)
    tl.store(running_var_ptr + offs_c, running_var + momentum * (squares / (rows - 1) - running_var), mask=mask_c)


@triton.jit
def _sum_parts(sums_ptr, offs_c, mask_c, parts, CHANNELS: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr):
    """(BLOCK_C,): the sums of all parts. sums_ptr: (parts, CHANNELS) float32."""
    offs_s = tl.arange(0, BLOCK_S)
    acc = tl.zeros((BLOCK_S, BLOCK_C), dtype=tl.float32)
    for start in range(0, parts, BLOCK_S):
        offs = (start + offs_s)[:, None] * CHANNELS + offs_c[None, :]
        acc += tl.load(sums_ptr + offs, mask=(start + offs_s < parts)[:, None] & mask_c[None, :], other=0.0)
    return tl.sum(acc, axis=0)
