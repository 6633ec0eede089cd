"""Launchers and compile cases of the block epilogue from its batch norm on.

x is read twice, once for the statistics of the batch and the means of its images and once to be transformed; so are, in
the backward pass, dy, y and x: once for two sums of each image, once for the gradient. Two choices (:func:`plan`):

*Statistics*: where all rows of a few channels fit one program, it finishes what belongs to them. Elsewhere splits of
whole images leave partial statistics, and a second small kernel merges them.

*The products of squeeze-and-excite*: small weights are read by the programs that transform the images, and the products
cost no launch. Large ones would keep each such program busy for longer than the launches do: a multiprocessor loads 64
bytes a clock. They are left to PyTorch's library.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from .block_epilogue_kernels import (
    _gate_and_transform,
    _gradient,
    _image_sums,
    _image_sums_and_squeeze,
    _merge_statistics,
    _parameter_gradients,
    _split_statistics,
    _transform,
    _whole_statistics,
)
from .case import Budget, CompileCase, Stream
from .guard import on_operands_device
from .squeeze_excite import PRODUCT_BLOCK, STREAMED_WEIGHTS, precision_of

WHOLE_CHANNELS = 16  # of a program that holds all rows: 32 bytes a row in 16 bits, the least that memory hands out
WHOLE_BYTES = 65_536  # what it can hold: 128 for each of 512 threads
SPLIT_ELEMENTS, SPLIT_CHANNELS = 8192, 64
SPLIT_PROGRAMS, MOST_SPLITS = 512, 64  # a split is merged from 8 bytes a channel
TILE_ELEMENTS = 2048  # of a map, with four warps: two 128-bit loads of 16 bits in flight for a thread, or ...
FEW_ELEMENTS = 2**20  # ... one, where below this size of a map there would be fewer programs than warps to hide them
FUSED_ELEMENTS, FUSED_WARPS = 4096, 8
DEEP_ROW, DEEP_TILE = 512, 2**15  # bytes of weights: of an output, and of all in a tile of the first product
STREAMED_IMAGE = 2**17  # bytes of x and shortcut: larger maps of an image are too much for one program
MERGE_BLOCK = {"BLOCK_S": 64, "BLOCK_N": 64, "BLOCK_C": 16}
PARAMETER_BLOCK = {"BLOCK_C": 32, "BLOCK_R": 64, "BLOCK_N": 32}


class Tile(NamedTuple):
    """Images, pixels and channels of a map that a program has at once, powers of two."""

    BLOCK_N: int
    BLOCK_P: int
    BLOCK_C: int


class Plan(NamedTuple):
    """How one shape is launched."""

    is_whole: bool  # all rows of a block of channels in one program of the statistics
    split_images: int  # images of a split, where they are not
    tile: Tile
    is_fused: bool  # the products of squeeze-and-excite in the kernels that pass over the maps
    fused_images: int  # of a program of theirs
    fused_tile: Tile


def plan(
    n: int,
    pixels: int,
    channels: int,
    hidden: int,
    dtype: torch.dtype,
    products: torch.dtype,
    is_whole: bool | None = None,
    is_fused: bool | None = None,
) -> Plan:
    """Forms and block sizes for ``n`` maps of ``pixels`` x ``channels`` in ``dtype``, with products in ``products``.

    ``is_whole`` and ``is_fused`` override the choices.
    """
    block_p, block_c = min(32, triton.next_power_of_2(pixels)), triton.next_power_of_2(channels)
    if is_whole is None:
        rows = triton.next_power_of_2(n) * triton.next_power_of_2(pixels)
        is_whole = rows * WHOLE_CHANNELS * dtype.itemsize <= WHOLE_BYTES
    splits = min(n, MOST_SPLITS, triton.cdiv(SPLIT_PROGRAMS, triton.cdiv(channels, SPLIT_CHANNELS)))
    elements = TILE_ELEMENTS if n * pixels * channels >= FEW_ELEMENTS else TILE_ELEMENTS // 2
    narrow = min(64, block_c)
    block_n = max(1, min(elements // (block_p * narrow), triton.next_power_of_2(n)))

    weight_bytes, image_bytes = (2 * channels * each for each in (hidden * products.itemsize, pixels * dtype.itemsize))
    if is_fused is None:
        is_fused = weight_bytes <= STREAMED_WEIGHTS and image_bytes <= STREAMED_IMAGE
    # Images share the weights that a program reads, until they outweigh these or there would be too few programs.
    shared = min(weight_bytes // image_bytes, n // 64, PRODUCT_BLOCK["BLOCK_M"])
    images = 1 << max(0, shared.bit_length() - 1)
    fused_n = max(1, min(images, FUSED_ELEMENTS // (block_p * narrow)))
    fused_tile = Tile(fused_n, block_p, min(block_c, FUSED_ELEMENTS // (fused_n * block_p)))
    return Plan(is_whole, triton.cdiv(n, splits), Tile(block_n, block_p, narrow), is_fused, images, fused_tile)


def _product_blocks(w1: Tensor) -> dict[str, int]:
    """Tiles of the products of squeeze-and-excite, with ``w1`` and back, of images, outputs and depth.

    Each step along a product waits for memory. So the first, of few outputs and great depth, has deep tiles.
    """
    hidden, channels = (max(16, triton.next_power_of_2(extent)) for extent in w1.shape)  # tl.dot takes no less
    outputs = min(hidden, PRODUCT_BLOCK["BLOCK_O"])
    return {
        "BLOCK_M": PRODUCT_BLOCK["BLOCK_M"],
        "SQUEEZE_O": outputs,
        "SQUEEZE_K": min(channels, DEEP_ROW // w1.itemsize, DEEP_TILE // (outputs * w1.itemsize)),
        "EXCITE_O": min(channels, PRODUCT_BLOCK["BLOCK_O"]),
        "EXCITE_K": min(hidden, PRODUCT_BLOCK["BLOCK_K"]),
    }


def _whole_warps(elements: int) -> int:
    """32 elements a thread or more threads: a program waits less for memory the more of it there are."""
    return min(max(elements // 1024, 4), 8 if torch.version.hip else 16)  # AMD's have 64 lanes


@on_operands_device
def forward(
    x: Tensor,
    shortcut: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    keep_scale: Tensor | None,
    momentum: float,
    eps: float,
    chosen: Plan | None = None,
) -> tuple[Tensor, ...]:
    """``(y, mean, deviation, centred, squeezed, hidden, logit)``; moves ``running_mean`` and ``running_var``.

    y: (N, C, H, W) channels_last. mean and deviation (C,), and centred (N, C), the means of the images about it, in
    float32. squeezed (N, C), hidden (N, R) and logit (N, C) in the dtype of ``w1``, the products'.
    """
    n, channels, height, width = x.shape
    pixels, hidden_width, products = height * width, w1.shape[0], w1.dtype
    x, shortcut = (t.contiguous(memory_format=torch.channels_last) for t in (x, shortcut))
    w1, b1, w2, b2 = (t.to(products).contiguous() for t in (w1, b1, w2, b2))
    keep_scale = None if keep_scale is None else keep_scale.contiguous()
    chosen = chosen or plan(n, pixels, channels, hidden_width, x.dtype, products)
    y = torch.empty_like(x)
    mean, deviation = (x.new_empty(channels, dtype=torch.float32) for _ in range(2))
    centred = x.new_empty((n, channels), dtype=torch.float32)
    squeezed = x.new_empty((n, channels), dtype=products)
    shape = {"PIXELS": pixels, "CHANNELS": channels}

    results = running_mean, running_var, mean, deviation, centred, squeezed
    if chosen.is_whole:
        block = {"BLOCK_N": triton.next_power_of_2(n), "BLOCK_P": triton.next_power_of_2(pixels)}
        _whole_statistics[(triton.cdiv(channels, WHOLE_CHANNELS),)](
            x, weight, bias, *results,
            n, momentum, eps,
            **shape, **block, BLOCK_C=WHOLE_CHANNELS,
            num_warps=_whole_warps(block["BLOCK_N"] * block["BLOCK_P"] * WHOLE_CHANNELS),
        )  # fmt: skip
    else:
        images, splits = chosen.split_images, triton.cdiv(n, chosen.split_images)
        block_p = min(triton.next_power_of_2(pixels), SPLIT_ELEMENTS // SPLIT_CHANNELS)
        block_n = min(triton.next_power_of_2(images), SPLIT_ELEMENTS // SPLIT_CHANNELS // block_p)
        partial_statistics = x.new_empty((2, splits, channels), dtype=torch.float32)
        _split_statistics[(triton.cdiv(channels, SPLIT_CHANNELS), splits)](
            x, centred, partial_statistics,
            n, images,
            **shape, BLOCK_N=block_n, BLOCK_P=block_p, BLOCK_C=SPLIT_CHANNELS,
            num_warps=_whole_warps(block_n * block_p * SPLIT_CHANNELS),
        )  # fmt: skip
        _merge_statistics[(triton.cdiv(channels, MERGE_BLOCK["BLOCK_C"]),)](
            partial_statistics, weight, bias, *results,
            n, images, splits, momentum, eps,
            **shape, **MERGE_BLOCK,
            num_warps=4,
        )  # fmt: skip

    maps, flags = (x, shortcut, y, weight, bias, mean, deviation), {"HAS_KEEP": keep_scale is not None}
    if chosen.is_fused:
        hidden = x.new_empty((n, hidden_width), dtype=products)
        logit = torch.empty_like(squeezed)
        _gate_and_transform[(triton.cdiv(n, chosen.fused_images),)](
            *maps, logit, keep_scale, squeezed, w1, b1, w2, b2, hidden,
            n,
            **shape, HIDDEN=hidden_width, **flags, PRECISION=precision_of(w1),
            IMAGES=chosen.fused_images, **chosen.fused_tile._asdict(), **_product_blocks(w1),
            num_warps=FUSED_WARPS,
        )  # fmt: skip
    else:
        with torch.autocast(x.device.type, enabled=False):
            hidden = torch._addmm_activation(b1, squeezed, w1.t())  # of a ReLU
            logit = torch.addmm(b2, hidden, w2.t())
        _transform[_grid(n, pixels, channels, chosen.tile)](
            *maps, logit, keep_scale,
            n,
            **shape, **flags, **chosen.tile._asdict(),
            num_warps=4,
        )  # fmt: skip
    return y, mean, deviation, centred, squeezed, hidden, logit


@on_operands_device
def backward(
    dy: Tensor,
    x: Tensor,
    y: Tensor,
    weight: Tensor,
    bias: Tensor,
    w1: Tensor,
    w2: Tensor,
    keep_scale: Tensor | None,
    mean: Tensor,
    deviation: Tensor,
    centred: Tensor,
    squeezed: Tensor,
    hidden: Tensor,
    logit: Tensor,
    b1_dtype: torch.dtype,
    b2_dtype: torch.dtype,
    chosen: Plan | None = None,
) -> tuple[Tensor, ...]:
    """Gradients of x, shortcut, weight, bias, w1, b1, w2, b2, each in the dtype of what it belongs to."""
    n, channels, height, width = x.shape
    pixels, hidden_width, products = height * width, w1.shape[0], w1.dtype
    x, dy = (t.to(x.dtype).contiguous(memory_format=torch.channels_last) for t in (x, dy))
    dw1, dw2 = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (w1, w2))
    db1, db2 = w1.new_empty(hidden_width, dtype=b1_dtype), w2.new_empty(channels, dtype=b2_dtype)
    w1, w2 = (t.to(products).contiguous() for t in (w1, w2))
    keep_scale = None if keep_scale is None else keep_scale.contiguous()
    chosen = chosen or plan(n, pixels, channels, hidden_width, x.dtype, products)
    dx, dshortcut = torch.empty_like(x), torch.empty_like(x)
    dweight, dbias = torch.empty_like(weight), torch.empty_like(bias)
    total, product, dlogit = torch.empty_like(centred), torch.empty_like(centred), torch.empty_like(logit)
    shape, precision = {"PIXELS": pixels, "CHANNELS": channels}, precision_of(w1)
    flags = {"HAS_KEEP": keep_scale is not None}

    sums = dy, y, x, weight, bias, mean, deviation, logit, keep_scale, total, product, dlogit
    if chosen.is_fused:
        dhidden, dsqueezed = torch.empty_like(hidden), torch.empty_like(squeezed)
        _image_sums_and_squeeze[(triton.cdiv(n, chosen.fused_images),)](
            *sums, w1, w2, hidden, dhidden, dsqueezed,
            n,
            **shape, HIDDEN=hidden_width, **flags, PRECISION=precision,
            IMAGES=chosen.fused_images, **chosen.fused_tile._asdict(), **_product_blocks(w1),
            num_warps=FUSED_WARPS,
        )  # fmt: skip
    else:
        images, _, channel_blocks = _grid(n, pixels, channels, chosen.tile)
        _image_sums[(images, channel_blocks)](*sums, n, **shape, **flags, **chosen.tile._asdict(), num_warps=4)
        with torch.autocast(x.device.type, enabled=False):
            dhidden = torch.ops.aten.threshold_backward(dlogit @ w2, hidden, 0)
            dsqueezed = dhidden @ w1
    channel_blocks = triton.cdiv(channels, PARAMETER_BLOCK["BLOCK_C"])
    _parameter_gradients[(channel_blocks, triton.cdiv(hidden_width, PARAMETER_BLOCK["BLOCK_R"]), 3)](
        total, product, dsqueezed, centred, deviation, logit, keep_scale, dweight, dbias,
        dlogit, hidden, dhidden, squeezed, dw1, db1, dw2, db2,
        n,
        CHANNELS=channels, HIDDEN=hidden_width, **flags, PRECISION=precision,
        **PARAMETER_BLOCK,
        num_warps=4,
    )  # fmt: skip
    _gradient[_grid(n, pixels, channels, chosen.tile)](
        dy, y, x, dx, dshortcut, weight, mean, deviation, dweight, dbias, logit, keep_scale, dsqueezed,
        n,
        **shape, **flags, **chosen.tile._asdict(),
        num_warps=4,
    )  # fmt: skip
    return dx, dshortcut, dweight, dbias, dw1, db1, dw2, db2


def _grid(n: int, pixels: int, channels: int, tile: Tile) -> tuple[int, int, int]:
    """Tiles of a map: images, pixels, channels."""
    return tuple(triton.cdiv(extent, block) for extent, block in zip((n, pixels, channels), tile, strict=True))


SQUEEZE = 16  # channels of a stage of ResNet-RS to each of its hidden ones
# (channels, pixels a side, dtype of the maps, of the weights): the stages of ResNet-RS-50 at 32x32 with stem stride 2,
# as a step has them and in float32; its first stage at stem stride 1; ImageNet's first and last stage at 224x224.
CASES = (
    (256, 8, torch.bfloat16, torch.bfloat16),
    (512, 4, torch.bfloat16, torch.bfloat16),
    (1024, 2, torch.bfloat16, torch.bfloat16),
    (2048, 1, torch.bfloat16, torch.bfloat16),
    (256, 8, torch.float32, torch.float32),
    (512, 4, torch.float32, torch.float32),
    (2048, 1, torch.bfloat16, torch.float32),
    (256, 16, torch.bfloat16, torch.bfloat16),
    (256, 56, torch.bfloat16, torch.bfloat16),
    (2048, 7, torch.bfloat16, torch.bfloat16),
)
BATCH = 128
BUDGETS = {
    "_whole_statistics": Budget(128, 16 * 1024, 16, store_bytes=4),
    "_split_statistics": Budget(128, 16 * 1024, 16, store_bytes=4),
    "_merge_statistics": Budget(128, 16 * 1024, 16, store_bytes=8),
    "_transform": Budget(128, 16 * 1024, 16),
    "_gate_and_transform": Budget(255, 112 * 1024, 16),
    "_image_sums": Budget(128, 16 * 1024, 16, store_bytes=4),
    "_image_sums_and_squeeze": Budget(255, 112 * 1024, 16, store_bytes=4),
    "_parameter_gradients": Budget(168, 64 * 1024, 16, store_bytes=4),
    "_gradient": Budget(128, 16 * 1024, 16),
}


def compile_cases() -> list[CompileCase]:
    """Forward and backward at the shapes in ``CASES``, with the forms of the real batch also where bytes are counted.

    There one program has the weights: they cross memory once, and other programs find them in the second-level cache.
    """
    cases = []
    for channels, side, dtype, products in CASES:
        maps, weights = (str(each).removeprefix("torch.") for each in (dtype, products))
        label = f"{maps}{'' if maps == weights else f', weights {weights}'}, {channels}x{side}x{side}"
        shape = {"channels": channels, "side": side, "dtype": dtype, "products": products}
        chosen = plan(BATCH, side * side, channels, channels // SQUEEZE, dtype, products)
        is_large = side * side * channels > 2**17
        small = max(1, chosen.fused_images - 1) if chosen.is_fused else 1 if is_large else 3
        for launch, name in ((_forward_case, "forward"), (_backward_case, "backward")):
            eager = partial(_eager_case, **shape, is_backward=launch is _backward_case)
            run = partial(launch, **shape, chosen=chosen)
            name = f"batch_norm_squeeze_excite_residual {name}, {label}"
            cases.append(CompileCase(name, run, BATCH, small, BUDGETS, eager, uses_library=not chosen.is_fused))
    return cases


def _operands(
    n: int, channels: int, side: int, dtype: torch.dtype, products: torch.dtype
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Uninitialised maps in ``dtype``, float32 vectors and buffers, and weights in ``products``."""
    maps = [torch.empty(n, channels, side, side, dtype=dtype, memory_format=torch.channels_last) for _ in range(3)]
    shapes = (channels // SQUEEZE, channels), (channels // SQUEEZE,), (channels, channels // SQUEEZE), (channels,)
    return maps, [torch.empty(channels) for _ in range(4)], [torch.empty(shape, dtype=products) for shape in shapes]


def _forward_case(
    n: int, channels: int, side: int, dtype: torch.dtype, products: torch.dtype, chosen: Plan
) -> dict[str, Stream]:
    (x, shortcut, _), vectors, weights = _operands(n, channels, side, dtype, products)
    y, *_ = forward(x, shortcut, *vectors, *weights, torch.empty(n), 0.1, 1e-5, chosen)
    return {
        "x": Stream([x], 2, 0),
        "shortcut": Stream([shortcut], 1, 0),
        "y": Stream([y], 0, 1),
        "weights": Stream(weights[::2], 1, 0) if chosen.is_fused else Stream(weights[::2], 0, 0, library_reads=1),
    }


def _backward_case(
    n: int, channels: int, side: int, dtype: torch.dtype, products: torch.dtype, chosen: Plan
) -> dict[str, Stream]:
    (x, y, dy), (weight, bias, mean, deviation), (w1, b1, w2, b2) = _operands(n, channels, side, dtype, products)
    squeezed, logit = (torch.empty((n, channels), dtype=products) for _ in range(2))
    hidden = torch.empty((n, len(b1)), dtype=products)
    saved = mean, deviation, torch.empty(n, channels), squeezed, hidden, logit
    dx, dshortcut, _, _, dw1, _, dw2, _ = backward(
        dy, x, y, weight, bias, w1, w2, torch.empty(n), *saved, b1.dtype, b2.dtype, chosen
    )
    return {
        "dy": Stream([dy], 2, 0),
        "y": Stream([y], 2, 0),
        "x": Stream([x], 2, 0),
        "dx": Stream([dx], 0, 1),
        "dshortcut": Stream([dshortcut], 0, 1),
        "weights": Stream([w1, w2], 1, 0) if chosen.is_fused else Stream([w1, w2], 0, 0, library_reads=1),
        "their gradients": Stream([dw1, dw2], 0, 1),
    }


def _eager_case(
    kernels: ModuleType,
    n: int,
    channels: int,
    side: int,
    dtype: torch.dtype,
    products: torch.dtype,
    is_backward: bool,
) -> Callable[[], object]:
    (x, shortcut, dy), (weight, bias, *buffers), weights = _operands(n, channels, side, dtype, products)
    leaves = [t.requires_grad_(is_backward) for t in (x, weight, bias, *weights, shortcut)]
    keep_scale = torch.ones(n)

    def run_forward() -> Tensor:
        is_low = dtype != torch.float32
        with torch.autocast(x.device.type, torch.bfloat16, enabled=is_low), torch.set_grad_enabled(is_backward):
            return kernels.batch_norm_squeeze_excite_residual(
                *leaves[:3], *buffers, *leaves[3:], keep_scale, impl="eager"
            )

    if not is_backward:
        return run_forward
    y = run_forward()
    return lambda: torch.autograd.grad(y, leaves, dy, retain_graph=True)
