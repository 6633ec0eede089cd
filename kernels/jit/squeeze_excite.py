"""Launchers and compile cases of squeeze-and-excite and the block epilogue.

Two forms, chosen by shape (:func:`plan`). *Single pass*: a program holds the whole maps of a few samples on chip,
computes their gates there and writes the output, so that the large operands cross memory once. *Two-pass*: a reduction,
the small matrix products, and an element-wise pass that reads the maps again. It is for maps that do not fit, and for
weights that one program would take long to read: a multiprocessor loads about 64 bytes a clock, so that the 8 MB of
2,048 channels in float32 would take 80 µs, while the products of the two-pass form are split over many programs.

In both, the two small matrix products are tiled over the batch, so that the weights are read once for a tile of
samples. In a single pass the small (N, C) intermediates go from one product to the next through memory: a program reads
back only what it wrote itself, behind a barrier.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .case import Budget, CompileCase, Stream
from .guard import on_operands_device
from .squeeze_excite_kernels import (
    LINEAR,
    RELU,
    RELU_GRADIENT,
    SIGMOID,
    _batch_product,
    _excite,
    _single_pass_backward,
    _single_pass_forward,
    _squeeze,
    _weight_gradients,
)

SINGLE_PASS_ELEMENTS = 16_384  # a sample's map up to this size stays in the registers of one program ...
MAP_BYTES = 65_536  # ... where, padded to powers of two, it takes no more than this
STREAMED_WEIGHTS = 2**18  # bytes of weights that one program may read: at 64 bytes a clock, about a launch's time
PRODUCT_BLOCK = {"BLOCK_M": 16, "BLOCK_O": 128, "BLOCK_K": 64}  # samples, outputs, depth of a product's tile
SPLIT_PRODUCT_BLOCK = {"BLOCK_M": 32, "BLOCK_O": 32, "BLOCK_K": 64}  # small, for many programs with little to read
TILE_ELEMENTS = 2048  # of a map in a program of two passes, as far as it has them: 128-bit loads of 16 bits


class Plan(NamedTuple):
    """How one shape is launched."""

    is_single_pass: bool
    block_n: int  # samples a program
    block_p: int
    block_c: int
    num_warps: int


def plan(
    pixels: int,
    channels: int,
    hidden: int,
    dtype: torch.dtype,
    weight_dtype: torch.dtype,
    is_single_pass: bool | None = None,
) -> Plan:
    """Form and block sizes for maps of ``pixels`` x ``channels``; ``is_single_pass`` overrides the choice of form."""
    block_p, block_c = triton.next_power_of_2(pixels), triton.next_power_of_2(channels)
    map_bytes = block_p * block_c * dtype.itemsize
    if is_single_pass is None:
        weight_bytes = 2 * hidden * channels * weight_dtype.itemsize
        fits = pixels * channels <= SINGLE_PASS_ELEMENTS and map_bytes <= MAP_BYTES
        is_single_pass = fits and weight_bytes <= STREAMED_WEIGHTS
    if not is_single_pass:
        block_p = min(32, block_p)
        return Plan(False, 1, block_p, min(max(64, TILE_ELEMENTS // block_p), block_c), 4)
    # Enough samples a program that their maps outweigh the weights they share, as far as they fit on chip.
    wanted = triton.next_power_of_2(max(1, 2 * hidden // pixels))
    block_n = max(1, min(wanted, MAP_BYTES // 2 // map_bytes, PRODUCT_BLOCK["BLOCK_M"]))
    # A program holds its maps and, for each sample and channel, the gate and its like in float32.
    held = block_n * (map_bytes + 8 * block_c)
    most_warps = 8 if torch.version.hip else 16  # AMD's have 64 lanes
    num_warps = 4 if held <= 2**14 else 8 if held <= 100_000 else 16
    return Plan(True, block_n, block_p, block_c, min(num_warps, most_warps))


def precision_of(x: Tensor) -> str:
    """Of the small products. TF32 keeps more than the 8 or 11 bits of a 16-bit ``x``; float32 takes three of them."""
    if x.dtype != torch.float32:
        return "tf32"
    return "ieee" if torch.version.hip else "tf32x3"


@on_operands_device
def forward(
    x: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    shortcut: Tensor | None,
    keep_scale: Tensor | None,
    is_single_pass: bool | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``(y, mean, hidden, gate)``: y (N, C, H, W) channels_last; mean, gate (N, C) and hidden (N, R) in float32.

    ``x`` and ``shortcut`` in another memory format are copied to channels_last first.
    """
    n, channels, height, width = x.shape
    pixels, hidden_width = height * width, w1.shape[0]
    x = x.contiguous(memory_format=torch.channels_last)
    dtype = x.dtype
    if shortcut is not None:
        shortcut = shortcut.contiguous(memory_format=torch.channels_last)
        dtype = torch.promote_types(dtype, shortcut.dtype)
    w1, b1, w2, b2 = (t.contiguous() for t in (w1, b1, w2, b2))
    keep_scale = None if keep_scale is None else keep_scale.contiguous()
    y = torch.empty_like(x, dtype=dtype)
    mean, gate = (x.new_empty((n, channels), dtype=torch.float32) for _ in range(2))
    hidden = x.new_empty((n, hidden_width), dtype=torch.float32)
    if y.numel() == 0:
        return y, mean.zero_(), hidden.zero_(), gate.zero_()
    flags = {"HAS_SHORTCUT": shortcut is not None, "HAS_KEEP": keep_scale is not None}
    shape = {"PIXELS": pixels, "CHANNELS": channels}
    precision, chosen = precision_of(x), plan(pixels, channels, hidden_width, x.dtype, w1.dtype, is_single_pass)
    if chosen.is_single_pass:
        _single_pass_forward[(triton.cdiv(n, chosen.block_n),)](
            x, w1, b1, w2, b2, shortcut, keep_scale, y, mean, hidden, gate,
            n,
            **shape, HIDDEN=hidden_width, **flags, PRECISION=precision,
            BLOCK_N=chosen.block_n, BLOCK_P=chosen.block_p, BLOCK_C=chosen.block_c, **PRODUCT_BLOCK,
            num_warps=chosen.num_warps,
        )  # fmt: skip
        return y, mean, hidden, gate
    tile = {"BLOCK_P": chosen.block_p, "BLOCK_C": chosen.block_c, "num_warps": chosen.num_warps}
    channel_blocks = triton.cdiv(channels, chosen.block_c)
    _squeeze[(n, channel_blocks)](
        x, None, None, None, None, None, mean,
        **shape, IS_BACKWARD=False, HAS_SHORTCUT=False, HAS_KEEP=False, **tile,
    )  # fmt: skip
    _launch_product(mean, w1, b1, hidden, False, RELU, precision)
    _launch_product(hidden, w2, b2, gate, False, SIGMOID, precision)
    _excite[(n, triton.cdiv(pixels, chosen.block_p), channel_blocks)](
        x, gate, keep_scale, shortcut, y, **shape, IS_BACKWARD=False, **flags, **tile
    )
    return y, mean, hidden, gate


@on_operands_device
def backward(
    dy: Tensor,
    x: Tensor,
    y: Tensor | None,
    w1: Tensor,
    w2: Tensor,
    keep_scale: Tensor | None,
    mean: Tensor,
    hidden: Tensor,
    gate: Tensor,
    shortcut_dtype: torch.dtype | None,
    is_single_pass: bool | None = None,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor, Tensor]:
    """``(dx, dshortcut, dw1, db1, dw2, db2)`` in the dtypes of what they belong to; ``y`` only with a shortcut."""
    n, channels, height, width = x.shape
    pixels, hidden_width = height * width, w1.shape[0]
    x, dy = (t.contiguous(memory_format=torch.channels_last) for t in (x, dy))
    w1, w2 = w1.contiguous(), w2.contiguous()
    keep_scale = None if keep_scale is None else keep_scale.contiguous()
    dx = torch.empty_like(x)
    dshortcut = None if y is None else torch.empty_like(x, dtype=shortcut_dtype)
    dw1, dw2 = torch.empty_like(w1), torch.empty_like(w2)
    db1, db2 = dw1.new_empty(hidden_width), dw2.new_empty(channels)
    if x.numel() == 0:
        return dx, dshortcut, dw1.zero_(), db1.zero_(), dw2.zero_(), db2.zero_()
    dz2, dmean = torch.empty_like(gate), torch.empty_like(mean)
    dz1 = torch.empty_like(hidden)
    flags = {"HAS_SHORTCUT": y is not None, "HAS_KEEP": keep_scale is not None}
    shape = {"PIXELS": pixels, "CHANNELS": channels}
    precision, chosen = precision_of(x), plan(pixels, channels, hidden_width, x.dtype, w1.dtype, is_single_pass)
    if chosen.is_single_pass:
        _single_pass_backward[(triton.cdiv(n, chosen.block_n),)](
            dy, x, y, w1, w2, keep_scale, hidden, gate, dx, dshortcut, dz2, dz1, dmean,
            n,
            **shape, HIDDEN=hidden_width, **flags, PRECISION=precision,
            BLOCK_N=chosen.block_n, BLOCK_P=chosen.block_p, BLOCK_C=chosen.block_c, **PRODUCT_BLOCK,
            num_warps=chosen.num_warps,
        )  # fmt: skip
    else:
        tile = {"BLOCK_P": chosen.block_p, "BLOCK_C": chosen.block_c, "num_warps": chosen.num_warps}
        channel_blocks = triton.cdiv(channels, chosen.block_c)
        _squeeze[(n, channel_blocks)](
            x, dy, y, gate, keep_scale, dshortcut, dz2, **shape, IS_BACKWARD=True, **flags, **tile
        )
        _launch_product(dz2, w2, hidden, dz1, True, RELU_GRADIENT, precision)
        _launch_product(dz1, w1, hidden, dmean, True, LINEAR, precision)
        _excite[(n, triton.cdiv(pixels, chosen.block_p), channel_blocks)](
            dy if dshortcut is None else dshortcut, gate, keep_scale, dmean, dx,
            **shape, IS_BACKWARD=True, **flags, **tile,
        )  # fmt: skip
    _weight_gradients[(triton.cdiv(channels, 32), triton.cdiv(hidden_width, 64), 2)](
        dz2, hidden, dz1, mean, dw1, db1, dw2, db2,
        n,
        CHANNELS=channels, HIDDEN=hidden_width, PRECISION=precision,
        BLOCK_C=32, BLOCK_R=64, BLOCK_N=32,
        num_warps=4,
    )  # fmt: skip
    return dx, dshortcut, dw1, db1, dw2, db2


def _launch_product(
    a: Tensor, w: Tensor, b: Tensor, out: Tensor, is_transposed: bool, epilogue: tl.constexpr, precision: str
) -> None:
    """``out = epilogue(a @ w.T)``, or ``epilogue(a @ w)`` where ``is_transposed``."""
    n, depth = a.shape
    width = out.shape[1]
    grid = triton.cdiv(n, SPLIT_PRODUCT_BLOCK["BLOCK_M"]), triton.cdiv(width, SPLIT_PRODUCT_BLOCK["BLOCK_O"])
    _batch_product[grid](
        a, w, b, out,
        n,
        DEPTH=depth, OUT=width,
        STRIDE_WO=1 if is_transposed else depth, STRIDE_WK=width if is_transposed else 1,
        EPILOGUE=epilogue.value, PRECISION=precision,
        **SPLIT_PRODUCT_BLOCK,
        num_warps=4,
    )  # fmt: skip


# (channels, pixels a side, dtype, with the shortcut): the stages of ResNet-RS-50 at 32x32 with stem stride 2, the plain
# op, then maps that need two passes: the first stage at stem stride 1, and ImageNet's first and last stage at 224x224.
CASES = (
    (256, 8, torch.bfloat16, True),
    (512, 4, torch.bfloat16, True),
    (1024, 2, torch.bfloat16, True),
    (2048, 1, torch.bfloat16, True),
    (256, 8, torch.float32, True),
    (2048, 1, torch.float32, True),
    (512, 4, torch.bfloat16, False),
    (256, 16, torch.bfloat16, True),
    (256, 56, torch.bfloat16, True),
    (2048, 7, torch.bfloat16, True),
)
BUDGETS = {
    "_single_pass_forward": Budget(255, 112 * 1024, 16),
    "_single_pass_backward": Budget(255, 112 * 1024, 16),
    "_squeeze": Budget(128, 16 * 1024, 16, store_bytes=4),
    "_batch_product": Budget(232, 112 * 1024, 16),
    "_excite": Budget(128, 16 * 1024, 16),
    "_weight_gradients": Budget(168, 64 * 1024, 16),
}


def compile_cases() -> list[CompileCase]:
    """Forward and backward at the shapes in ``CASES``. Bytes are counted on one tile of samples, not quite full.

    There the weights cross memory once; each further tile finds them in the GPU's second-level cache.
    """
    cases = []
    for channels, side, dtype, has_shortcut in CASES:
        name = f"squeeze_excite{'_residual' if has_shortcut else ''} {{}}, {str(dtype)[6:]}, {channels}x{side}x{side}"
        block_n = plan(side * side, channels, channels // 4, dtype, torch.float32).block_n
        shape = {"channels": channels, "side": side, "dtype": dtype, "has_shortcut": has_shortcut}
        for launch, label in ((_forward_case, "forward"), (_backward_case, "backward")):
            eager = partial(_eager_case, **shape, is_backward=launch is _backward_case)
            run = partial(launch, **shape)
            cases.append(CompileCase(name.format(label), run, 128, max(1, block_n - 1), BUDGETS, eager))
    return cases


def _operands(n: int, channels: int, side: int, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Uninitialised maps in ``dtype``, float32 weights, and float32 (mean, hidden, gate) of a case."""
    hidden = channels // 4
    maps = [torch.empty(n, channels, side, side, dtype=dtype, memory_format=torch.channels_last) for _ in range(3)]
    weights = [torch.empty(shape) for shape in ((hidden, channels), (hidden,), (channels, hidden), (channels,))]
    return maps, weights, [torch.empty(n, width) for width in (channels, hidden, channels)]


def _forward_case(n: int, channels: int, side: int, dtype: torch.dtype, has_shortcut: bool) -> dict[str, Stream]:
    (x, shortcut, _), weights, _ = _operands(n, channels, side, dtype)
    y = forward(x, *weights, shortcut if has_shortcut else None, torch.empty(n) if has_shortcut else None)[0]
    x_reads = 1 if plan(side * side, channels, channels // 4, dtype, torch.float32).is_single_pass else 2
    streams = {"x": Stream([x], x_reads, 0), "y": Stream([y], 0, 1), "weights": Stream(weights[::2], 1, 0)}
    return streams | {"shortcut": Stream([shortcut], 1, 0)} if has_shortcut else streams


def _backward_case(n: int, channels: int, side: int, dtype: torch.dtype, has_shortcut: bool) -> dict[str, Stream]:
    (x, y, dy), (w1, _, w2, _), saved = _operands(n, channels, side, dtype)
    again = 0 if plan(side * side, channels, channels // 4, dtype, torch.float32).is_single_pass else 1
    if not has_shortcut:
        dx = backward(dy, x, None, w1, w2, None, *saved, None)[0]
        streams = {"x": Stream([x], 1, 0), "dy": Stream([dy], 1 + again, 0), "dx": Stream([dx], 0, 1)}
        return streams | {"weights": Stream([w1, w2], 1, 0)}
    dx, dshortcut, *_ = backward(dy, x, y, w1, w2, torch.empty(n), *saved, dtype)
    return {
        "x": Stream([x], 1, 0),
        "y": Stream([y], 1, 0),
        "dy": Stream([dy], 1, 0),
        "dshortcut": Stream([dshortcut], again, 1),  # the second pass reads the masked gradient back
        "dx": Stream([dx], 0, 1),
        "weights": Stream([w1, w2], 1, 0),
    }


def _eager_case(
    kernels: ModuleType, n: int, channels: int, side: int, dtype: torch.dtype, has_shortcut: bool, is_backward: bool
) -> Callable[[], object]:
    (x, shortcut, dy), weights, _ = _operands(n, channels, side, dtype)
    leaves = [t.requires_grad_(is_backward) for t in ((x, *weights, shortcut) if has_shortcut else (x, *weights))]
    keep_scale = [torch.ones(n)] if has_shortcut else []
    op = kernels.squeeze_excite_residual if has_shortcut else kernels.squeeze_excite

    def run_forward() -> Tensor:
        is_low = dtype != torch.float32
        with torch.autocast(x.device.type, torch.bfloat16, enabled=is_low), torch.set_grad_enabled(is_backward):
            return op(*leaves, *keep_scale, impl="eager")

    if not is_backward:
        return run_forward
    y = run_forward()
    return lambda: torch.autograd.grad(y, leaves, dy, retain_graph=True)
