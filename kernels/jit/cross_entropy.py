"""Launchers, block sizes and compile cases of label-smoothed cross-entropy."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType

import torch
import triton
from torch import Tensor

from .case import Budget, CompileCase, Stream
from .cross_entropy_kernels import _columns_kernel, _finish_kernel, _rows_kernel, _scale_kernel
from .guard import on_operands_device

WARP_TILE = 512  # logits a warp keeps in registers: 16 a thread, so that a multiprocessor's registers hold 32 warps
TILE = 1024  # logits a program aims at
PROGRAM_TILE = 8192  # logits a program holds at most: a batch that fits needs no second launch
ROW_TILE = 4096  # the longest row held at once; a longer one is swept in column blocks
COLUMN_BLOCK = 2048
COLUMN_WARPS = 8  # 8 logits a thread: with 16 only one program fits a multiprocessor's registers
FINISH_BLOCK = 1024
SCALE_BLOCK = 2048


@on_operands_device
def forward(
    logits: Tensor,
    target: Tensor,
    smoothing: float,
    reduction: str,
    gradient_scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(loss, correct, gradient)`` of float32, bfloat16 or float16 logits, in one launch, or two for large batches.

    Args:
        logits: (N, C), and target: (N,) int64 or (N, C) floating point. What is not contiguous is copied first.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``.
        gradient_scale: the gradient is the summed loss's times this; ``None`` for no gradient.

    Returns:
        loss () or (N,) float32, correct () int64, and the gradient (N, C) in the logits' dtype, or (0,) for none.
    """
    n, classes = logits.shape
    reduced = reduction != "none"
    gradient = logits.new_empty(0 if gradient_scale is None else logits.shape)
    if n == 0:
        loss = logits.new_zeros(() if reduced else (0,), dtype=torch.float32)
        return loss, logits.new_zeros((), dtype=torch.int64), gradient
    loss = logits.new_empty(() if reduced else (n,), dtype=torch.float32)
    correct = logits.new_empty((), dtype=torch.int64)
    by_rows = classes <= ROW_TILE
    block_m, block_c, num_warps = rows_tile(n, classes) if by_rows else (1, COLUMN_BLOCK, COLUMN_WARPS)
    parts = triton.cdiv(n, block_m)
    # One program writes the results itself; several leave their parts for another to add up.
    part_loss = logits.new_empty(parts, dtype=torch.float32) if reduced and parts > 1 else loss
    part_correct = logits.new_empty(parts, dtype=torch.int64) if parts > 1 else correct
    pointers = (logits.contiguous(), target.contiguous(), part_loss, part_correct, gradient)
    scalars = (
        1.0 - smoothing,
        smoothing / classes,
        1.0 / n if reduction == "mean" else 1.0,
        0.0 if gradient_scale is None else gradient_scale,
    )
    flags = {
        "IS_SOFT": target.is_floating_point(),
        "IS_SMOOTHED": smoothing > 0.0,
        "HAS_GRADIENT": gradient_scale is not None,
    }
    if by_rows:
        _rows_kernel[(parts,)](
            *pointers,
            n,
            *scalars,
            CLASSES=classes,
            BLOCK_M=block_m,
            BLOCK_C=block_c,
            IS_REDUCED=reduced,
            **flags,
            num_warps=num_warps,
        )
    else:
        _columns_kernel[(parts,)](*pointers, *scalars, CLASSES=classes, BLOCK_C=block_c, **flags, num_warps=num_warps)
    if parts > 1:
        _finish_kernel[(1,)](part_loss, part_correct, loss, correct, parts, BLOCK=FINISH_BLOCK, IS_REDUCED=reduced)
    return loss, correct, gradient


def rows_tile(n: int, classes: int) -> tuple[int, int, int]:
    """``(BLOCK_M, BLOCK_C, num_warps)``: the whole batch where one program holds it, else several rows or one."""
    block_c = triton.next_power_of_2(classes)
    block_m = triton.next_power_of_2(n)
    if block_m * block_c > PROGRAM_TILE:
        block_m = max(1, TILE // block_c)
    return block_m, block_c, max(1, block_m * block_c // WARP_TILE)


@on_operands_device
def scale_(gradient: Tensor, factor: Tensor, remaining: float) -> None:
    """In place, ``gradient *= factor * remaining``, without touching it where that is exactly 1.

    Args:
        gradient: (N, C) contiguous.
        factor: () or (N,), read on the device.
    """
    n = gradient.numel()
    if n == 0:
        return
    per_row = factor.dim() == 1
    _scale_kernel[(triton.cdiv(n, SCALE_BLOCK),)](
        gradient,
        factor,
        n,
        factor.stride(0) if per_row else 0,
        remaining,
        CLASSES=gradient.shape[1],
        BLOCK=SCALE_BLOCK,
        IS_PER_ROW=per_row,
    )


def compile_cases() -> list[CompileCase]:
    """Training and evaluation at CIFAR's, ImageNet's and a language model's numbers of classes, and the scaling."""
    # Rows of 10 classes begin at multiples of 4 bytes (bfloat16) or 8 (float32), rows of 100 at multiples of 8; no
    # wider access can stay inside a row. Elsewhere the design asks for 16 bytes, 50,257 classes included.
    cases = [
        _case(10, torch.bfloat16, 128, 7, vector_bytes=4),
        _case(10, torch.float32, 128, 7, vector_bytes=8),
        _case(10, torch.bfloat16, 512, 7, vector_bytes=4),
        _case(10, torch.bfloat16, 10_000, 700, vector_bytes=4),
        _case(100, torch.bfloat16, 512, 70, vector_bytes=8),
        _case(1000, torch.bfloat16, 4096, 9),
        _case(1000, torch.float32, 4096, 9),
        _case(1000, torch.bfloat16, 4096, 9, soft=True),
        _case(50_257, torch.bfloat16, 2048, 2),
        _case(50_257, torch.bfloat16, 512, 2, soft=True),
        # Evaluation stores no more than a loss and a count a program: 8 bytes.
        _case(1000, torch.bfloat16, 4096, 9, training=False, vector_bytes=8),
        _case(50_257, torch.bfloat16, 2048, 2, training=False, vector_bytes=8),
    ]
    for dtype, per_row in ((torch.float16, False), (torch.bfloat16, True)):
        name = f"scale_gradient_, {str(dtype)[6:]}, 1000 classes{', a factor a row' if per_row else ''}"
        launch, eager = (
            functools.partial(function, classes=1000, dtype=dtype, per_row=per_row)
            for function in (_launch_scale, _eager_scale)
        )
        cases.append(CompileCase(name, launch, 4096, 9, {"_scale_kernel": Budget(48, 64, 16)}, eager))
    return cases


def _case(
    classes: int,
    dtype: torch.dtype,
    size: int,
    small: int,
    *,
    soft: bool = False,
    training: bool = True,
    vector_bytes: int = 16,
) -> CompileCase:
    by_rows = classes <= ROW_TILE
    registers = 96 if by_rows else 112
    budgets = {
        "_rows_kernel" if by_rows else "_columns_kernel": Budget(registers, 4096, vector_bytes),
        "_finish_kernel": Budget(64, 64, 8),
    }
    name = (
        f"label_smoothed_cross_entropy {'training' if training else 'evaluation'}, {str(dtype)[6:]}, {size}x{classes}"
    )
    launch, eager = (
        functools.partial(function, classes=classes, dtype=dtype, soft=soft, training=training)
        for function in (_launch_forward, _eager_forward)
    )
    return CompileCase(f"{name}{', soft targets' if soft else ''}", launch, size, small, budgets, eager)


def _launch_forward(n: int, classes: int, dtype: torch.dtype, soft: bool, training: bool) -> dict[str, Stream]:
    logits = torch.empty(n, classes, dtype=dtype)
    target = torch.empty(n, classes) if soft else torch.empty(n, dtype=torch.int64)
    gradient = forward(logits, target, 0.1, "mean", 1.0 / n if training else None)[2]
    reads = 2 if training and classes > ROW_TILE else 1
    streams = {"logits": Stream([logits], reads, 0)}
    if training:
        streams["gradient"] = Stream([gradient], 0, 1)
    if soft:
        streams["target"] = Stream([target], reads, 0)
    return streams


def _launch_scale(n: int, classes: int, dtype: torch.dtype, per_row: bool) -> dict[str, Stream]:
    gradient = torch.empty(n, classes, dtype=dtype)
    scale_(gradient, torch.full((n,) if per_row else (), 2.0), 1.0)
    return {"gradient": Stream([gradient], 1, 1)}


def _eager_forward(
    kernels: ModuleType, n: int, classes: int, dtype: torch.dtype, soft: bool, training: bool
) -> Callable[[], object]:
    logits = torch.zeros(n, classes, dtype=dtype, requires_grad=training)
    target = torch.full((n, classes), 1 / classes) if soft else torch.zeros(n, dtype=torch.int64)

    def run() -> object:
        with torch.set_grad_enabled(training):
            loss, correct = kernels.label_smoothed_cross_entropy(logits, target, 0.1, impl="eager")
        return torch.autograd.grad(loss, logits) if training else correct

    return run


def _eager_scale(_kernels: ModuleType, n: int, classes: int, dtype: torch.dtype, per_row: bool) -> Callable[[], object]:
    gradient = torch.zeros(n, classes, dtype=dtype)
    factor = torch.full((n, 1) if per_row else (), 2.0)
    return lambda: gradient.mul_(factor)
