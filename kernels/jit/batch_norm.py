"""Launchers and compile cases of batch norm.

Two forms, chosen by shape (:func:`plan`). *Single pass*: a program holds all rows of a few channels on chip, so that
the maps cross memory once, in one launch. *Two-pass*, for what does not fit: partial sums over splits of the rows, then
a kernel whose programs merge those of their channels and pass over their rows a second time. No program adds to
another's sums, so that the same input gives the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from .batch_norm_kernels import (
    _input_gradient,
    _input_gradient_on_chip,
    _normalise,
    _normalise_on_chip,
    _partial_statistics,
    _partial_sums,
)
from .case import Budget, CompileCase, Stream
from .guard import on_operands_device
from .statistics_kernels import MOST_PROGRAMS, PARTS_AT_ONCE, row_splits

VECTOR_BYTES, SECTOR_BYTES, LINE_BYTES = 16, 32, 128  # of one access, of what memory hands out, of a cache's line
SINGLE_PASS_ELEMENTS = 16_384  # of one map, padded to powers of two, stay in the registers of one program
TILE_BYTES = 8192  # of one map that a program of two passes works on at a time ...
STAGES = 4  # ... with the next ones on their way


class Plan(NamedTuple):
    """How one shape is launched."""

    is_single_pass: bool
    block_m: int  # rows a program holds
    block_c: int
    num_warps: int
    splits: int  # of the rows: programs for one block of channels
    split_rows: int


def plan(rows: int, channels: int, dtype: torch.dtype, is_single_pass: bool | None = None) -> Plan:
    """Form and block sizes for maps of ``rows`` x ``channels``; ``is_single_pass`` overrides the choice of form."""
    size, widest = dtype.itemsize, triton.next_power_of_2(channels)
    block_m = triton.next_power_of_2(rows)
    # Rows that are not aligned need an address for each number, and so more registers: a thread gets half as many.
    share = 1 if channels * size % VECTOR_BYTES == 0 else 2
    most = SINGLE_PASS_ELEMENTS // share
    if is_single_pass is None:
        is_single_pass = block_m * (VECTOR_BYTES // size) <= most
    if is_single_pass:
        # Half a sector of each row, where a whole one does not fit, is read twice from a cache and once from memory.
        block_c = SECTOR_BYTES if block_m * (SECTOR_BYTES // size) <= most else VECTOR_BYTES
        block_c = min(block_c // size, widest)
        num_warps = min(max(triton.next_power_of_2(block_m * block_c * share // 1024), 4), 16)
        return Plan(True, block_m, block_c, num_warps, 1, rows)
    # Whole lines of memory, or less of them where the programs would not occupy the GPU.
    block_c = min(LINE_BYTES // size, widest)
    while True:
        tile_rows = min(TILE_BYTES // share // (block_c * size), block_m)
        splits, split_rows = row_splits(rows, triton.cdiv(channels, block_c), tile_rows)
        programs = triton.cdiv(channels, block_c) * splits
        if 2 * programs > MOST_PROGRAMS or block_c * size <= SECTOR_BYTES:
            return Plan(False, tile_rows, block_c, 4, splits, split_rows)
        block_c //= 2


@on_operands_device
def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    momentum: float,
    eps: float,
    relu: bool,
    is_single_pass: bool | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(y, mean, deviation)``: y (N, C, H, W) channels_last; mean and inverse deviation (C,) in float32.

    ``x`` in another memory format is copied to channels_last first. The running statistics are moved in place.
    """
    x = x.contiguous(memory_format=torch.channels_last)
    channels = x.shape[1]
    rows = x.numel() // channels
    y = torch.empty_like(x, memory_format=torch.channels_last)
    mean, deviation = torch.empty_like(weight), torch.empty_like(weight)
    chosen = plan(rows, channels, x.dtype, is_single_pass)
    block = {"BLOCK_M": chosen.block_m, "BLOCK_C": chosen.block_c}
    grid = triton.cdiv(channels, chosen.block_c), chosen.splits
    if chosen.is_single_pass:
        _normalise_on_chip[grid[:1]](
            x, weight, bias, running_mean, running_var, y, mean, deviation,
            rows,
            momentum, eps,
            CHANNELS=channels, HAS_RELU=relu,
            **block,
            num_warps=chosen.num_warps,
        )  # fmt: skip
        return y, mean, deviation
    splits = chosen.splits, chosen.split_rows
    partials = weight.new_empty(2, chosen.splits, channels)
    _partial_statistics[grid](
        x, partials,
        rows, *splits,
        CHANNELS=channels,
        **block, STAGES=STAGES,
        num_warps=chosen.num_warps,
    )  # fmt: skip
    _normalise[grid](
        x, partials, weight, bias, running_mean, running_var, y, mean, deviation,
        rows, *splits,
        momentum, eps,
        CHANNELS=channels, HAS_RELU=relu,
        BLOCK_S=PARTS_AT_ONCE, **block, STAGES=STAGES,
        num_warps=chosen.num_warps,
    )  # fmt: skip
    return y, mean, deviation


@on_operands_device
def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    deviation: Tensor,
    relu: bool,
    is_single_pass: bool | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(dx, dweight, dbias)``: dx in the dtype of ``x`` and channels_last; ``dy`` may have any dtype and strides."""
    x = x.contiguous(memory_format=torch.channels_last)
    dy = dy.to(x.dtype).contiguous(memory_format=torch.channels_last)
    channels = x.shape[1]
    rows = x.numel() // channels
    dx = torch.empty_like(x, memory_format=torch.channels_last)
    dweight, dbias = torch.empty_like(weight), torch.empty_like(weight)
    chosen = plan(rows, channels, x.dtype, is_single_pass)
    block = {"BLOCK_M": chosen.block_m, "BLOCK_C": chosen.block_c}
    grid = triton.cdiv(channels, chosen.block_c), chosen.splits
    if chosen.is_single_pass:
        _input_gradient_on_chip[grid[:1]](
            dy, x, weight, bias, mean, deviation, dx, dweight, dbias,
            rows,
            CHANNELS=channels, HAS_RELU=relu,
            **block,
            num_warps=chosen.num_warps,
        )  # fmt: skip
        return dx, dweight, dbias
    splits = chosen.splits, chosen.split_rows
    partials = weight.new_empty(2, chosen.splits, channels)
    _partial_sums[grid](
        dy, x, weight, bias, mean, deviation, partials,
        rows, *splits,
        CHANNELS=channels, HAS_RELU=relu,
        **block, STAGES=STAGES,
        num_warps=chosen.num_warps,
    )  # fmt: skip
    _input_gradient[grid](
        dy, x, partials, weight, bias, mean, deviation, dx, dweight, dbias,
        rows, *splits,
        CHANNELS=channels, HAS_RELU=relu,
        BLOCK_S=PARTS_AT_ONCE, **block, STAGES=STAGES,
        num_warps=chosen.num_warps,
    )  # fmt: skip
    return dx, dweight, dbias


# (channels, pixels a side, dtype, with the ReLU): the stages of ResNet-RS-50 at 32x32 with stem stride 2, of which the
# first takes two passes; then ImageNet's first and last stage at 224x224.
CASES = (
    (64, 8, torch.bfloat16, True),
    (256, 8, torch.bfloat16, False),
    (128, 4, torch.bfloat16, True),
    (256, 2, torch.bfloat16, True),
    (2048, 1, torch.bfloat16, False),
    (256, 8, torch.float32, True),
    (512, 1, torch.float32, True),
    (256, 56, torch.bfloat16, True),
    (2048, 7, torch.bfloat16, True),
)
BATCH = 128
BUDGETS = {
    "_normalise_on_chip": Budget(112, 1024, 16),
    "_input_gradient_on_chip": Budget(128, 1024, 16),
    "_partial_statistics": Budget(144, 24 * 1024, 16, store_bytes=4),
    "_normalise": Budget(128, 28 * 1024, 16),
    "_partial_sums": Budget(160, 48 * 1024, 16, store_bytes=4),
    "_input_gradient": Budget(112, 52 * 1024, 16),
}


def compile_cases() -> list[CompileCase]:
    """Forward and backward at the shapes in ``CASES``. Bytes are counted on a few images, in the form of the batch."""
    cases = []
    for channels, side, dtype, has_relu in CASES:
        name = f"batch_norm{'_relu' if has_relu else ''} {{}}, {str(dtype)[6:]}, {channels}x{side}x{side}"
        small = max(1, min(100, 320 // (side * side)))
        shape = {"channels": channels, "side": side, "dtype": dtype, "has_relu": has_relu}
        for launch, label in ((_forward_case, "forward"), (_backward_case, "backward")):
            eager = partial(_eager_case, **shape, is_backward=launch is _backward_case)
            run = partial(launch, **shape)
            cases.append(CompileCase(name.format(label), run, BATCH, small, BUDGETS, eager))
    return cases


def _operands(n: int, channels: int, side: int, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor], bool]:
    """Uninitialised maps in ``dtype``, float32 vectors of the channels, and which form a whole batch takes."""
    maps = [torch.empty(n, channels, side, side, dtype=dtype, memory_format=torch.channels_last) for _ in range(2)]
    form = plan(BATCH * side * side, channels, dtype).is_single_pass
    return maps, [torch.empty(channels) for _ in range(4)], form


def _forward_case(n: int, channels: int, side: int, dtype: torch.dtype, has_relu: bool) -> dict[str, Stream]:
    (x, _), vectors, is_single_pass = _operands(n, channels, side, dtype)
    y = forward(x, *vectors, 0.1, 1e-5, has_relu, is_single_pass)[0]
    return {"x": Stream([x], 1 if is_single_pass else 2, 0), "y": Stream([y], 0, 1)}


def _backward_case(n: int, channels: int, side: int, dtype: torch.dtype, has_relu: bool) -> dict[str, Stream]:
    (x, dy), vectors, is_single_pass = _operands(n, channels, side, dtype)
    dx = backward(dy, x, *vectors, has_relu, is_single_pass)[0]
    reads = 1 if is_single_pass else 2
    return {"x": Stream([x], reads, 0), "dy": Stream([dy], reads, 0), "dx": Stream([dx], 0, 1)}


def _eager_case(
    kernels: ModuleType, n: int, channels: int, side: int, dtype: torch.dtype, has_relu: bool, is_backward: bool
) -> Callable[[], object]:
    (x, dy), vectors, _ = _operands(n, channels, side, dtype)
    leaves = [t.requires_grad_(is_backward) for t in (x, *vectors[:2])]

    def run_forward() -> Tensor:
        with torch.set_grad_enabled(is_backward):
            return kernels.batch_norm(*leaves, *vectors[2:], relu=has_relu, impl="eager")

    if not is_backward:
        return run_forward
    y = run_forward()
    return lambda: torch.autograd.grad(y, leaves, dy, retain_graph=True)
