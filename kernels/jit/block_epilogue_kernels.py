"""The Triton kernels of the block epilogue from its batch norm on; :mod:`.block_epilogue` launches them.

Maps are channels_last: (N, P, C) in memory, P = H * W pixels. A tile of a map is (BLOCK_N, BLOCK_P, BLOCK_C): images,
pixels, channels. C, P and the hidden width are compile-time constants, as in :mod:`.squeeze_excite_kernels`. All
arithmetic on maps is in float32; the two products are of operands in the dtype of the weights.

With ``deviation`` the inverse of the standard deviation, ``scale = weight * deviation`` and ``kept = keep * gate``::

    y  = relu(shortcut + kept * (scale * (x - mean) + bias))
    dx = scale * (kept * g + dsqueezed / P - (dbias + (x - mean) * deviation * dweight) / rows)

g is the gradient past the ReLU. Nothing between x and y is ever a map.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .squeeze_excite_kernels import (
    BIAS,
    LINEAR,
    RELU,
    RELU_GRADIENT,
    _product_rows,
    _relu,
    _relu_gradient,
    _weight_gradients,
)
from .statistics_kernels import _merge_parts, _move_buffers


@triton.jit
def _tile(offs_n, n_end, p, offs_c, PIXELS: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_P: tl.constexpr):
    """Offsets into a map, and their mask, of the tile that begins at pixel ``p``."""
    offs_p = p + tl.arange(0, BLOCK_P)
    offs = (offs_n.to(tl.int64)[:, None, None] * PIXELS + offs_p[None, :, None]) * CHANNELS + offs_c[None, None, :]
    mask = (offs_n < n_end)[:, None, None] & (offs_p < PIXELS)[None, :, None] & (offs_c < CHANNELS)[None, None, :]
    return offs, mask


@triton.jit
def _store_statistics(
    mean, squares, weight_ptr, running_mean_ptr, running_var_ptr, mean_ptr, deviation_ptr,
    rows, momentum, eps,
    offs_c, mask_c,
):  # fmt: skip
    """Of a block of channels: mean and deviation, and the buffers moved in place. Returns the scale."""
    deviation = tl.rsqrt(squares / rows + eps)
    tl.store(mean_ptr + offs_c, mean, mask=mask_c)
    tl.store(deviation_ptr + offs_c, deviation, mask=mask_c)
    _move_buffers(running_mean_ptr, running_var_ptr, offs_c, mask_c, mean, squares, rows, momentum)
    return tl.load(weight_ptr + offs_c, mask=mask_c, other=0.0) * deviation


@triton.jit
def _whole_statistics(
    x_ptr, weight_ptr, bias_ptr, running_mean_ptr, running_var_ptr, mean_ptr, deviation_ptr, centred_ptr, squeezed_ptr,
    n, momentum, eps,
    PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """All rows of a block of channels in one program: the batch's statistics, and of each image the centred mean and
    ``squeezed``, the mean of the normalised map."""
    offs_n = tl.arange(0, BLOCK_N)
    offs_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < CHANNELS
    offs, mask = _tile(offs_n, n, 0, offs_c, PIXELS, CHANNELS, BLOCK_P)
    rows = n * PIXELS
    x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    mean = tl.sum(tl.sum(x, axis=1), axis=0) / rows
    x = tl.where(mask, x - mean[None, None, :], 0.0)
    squares = tl.sum(tl.sum(x * x, axis=1), axis=0)
    centred = tl.sum(x, axis=1) / PIXELS
    rest = tl.sum(centred, axis=0) / n  # 0 but for the rounding of the mean
    scale = _store_statistics(
        mean + rest, squares - rest * rest * rows,
        weight_ptr, running_mean_ptr, running_var_ptr, mean_ptr, deviation_ptr,
        rows, momentum, eps, offs_c, mask_c,
    )  # fmt: skip
    centred -= rest[None, :]
    squeezed = centred * scale[None, :] + tl.load(bias_ptr + offs_c, mask=mask_c, other=0.0)[None, :]
    offs_nc = offs_n[:, None] * CHANNELS + offs_c[None, :]
    mask_nc = (offs_n < n)[:, None] & mask_c[None, :]
    tl.store(centred_ptr + offs_nc, centred, mask=mask_nc)
    tl.store(squeezed_ptr + offs_nc, squeezed.to(squeezed_ptr.dtype.element_ty), mask=mask_nc)


@triton.jit
def _split_statistics(
    x_ptr, image_mean_ptr, partial_ptr,
    n, images,
    PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The mean of each image, and of a split of ``images`` whole ones the mean and the sum of squares about it.

    ``partial_ptr``: (2, splits, CHANNELS). Tiles are merged as :mod:`.statistics_kernels` merges parts.
    """
    split = tl.program_id(1)
    offs_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < CHANNELS
    n_end = tl.minimum((split + 1) * images, n)
    count = 0.0
    mean = tl.zeros((BLOCK_C,), dtype=tl.float32)
    squares = tl.zeros((BLOCK_C,), dtype=tl.float32)
    for start in range(split * images, n_end, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        image_mean = tl.zeros((BLOCK_N, BLOCK_C), dtype=tl.float32)
        for p in range(0, PIXELS, BLOCK_P):
            offs, mask = _tile(offs_n, n_end, p, offs_c, PIXELS, CHANNELS, BLOCK_P)
            x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
            pixels = tl.minimum(PIXELS - p, BLOCK_P)
            tile_count = (tl.minimum(n_end - start, BLOCK_N) * pixels).to(tl.float32)
            tile_mean = tl.sum(tl.sum(x, axis=1), axis=0) / tile_count
            x = tl.where(mask, x - tile_mean[None, None, :], 0.0)
            image_mean += (tile_mean[None, :] + tl.sum(x, axis=1) / pixels - image_mean) * (pixels / (p + pixels))
            share = tile_count / (count + tile_count)
            delta = tile_mean - mean
            mean += delta * share
            squares += tl.sum(tl.sum(x * x, axis=1), axis=0) + delta * delta * (count * share)
            count += tile_count
        mask_nc = (offs_n < n_end)[:, None] & mask_c[None, :]
        tl.store(image_mean_ptr + offs_n[:, None] * CHANNELS + offs_c[None, :], image_mean, mask=mask_nc)
    tl.store(partial_ptr + split * CHANNELS + offs_c, mean, mask=mask_c)
    tl.store(partial_ptr + (tl.num_programs(1) + split) * CHANNELS + offs_c, squares, mask=mask_c)


@triton.jit
def _merge_statistics(
    partial_ptr, weight_ptr, bias_ptr, running_mean_ptr, running_var_ptr,
    mean_ptr, deviation_ptr, centred_ptr, squeezed_ptr,
    n, images, splits, momentum, eps,
    PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """What :func:`_whole_statistics` stores, from the splits' partials; ``centred_ptr`` holds the images' means."""
    offs_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < CHANNELS
    rows = n * PIXELS
    mean, squares = _merge_parts(
        partial_ptr, partial_ptr + splits * CHANNELS, offs_c, mask_c,
        rows, splits, images * PIXELS,
        CHANNELS, BLOCK_S, BLOCK_C,
    )  # fmt: skip
    scale = _store_statistics(
        mean, squares, weight_ptr, running_mean_ptr, running_var_ptr, mean_ptr, deviation_ptr,
        rows, momentum, eps, offs_c, mask_c,
    )  # fmt: skip
    bias = tl.load(bias_ptr + offs_c, mask=mask_c, other=0.0)
    for start in range(0, n, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        offs_nc = offs_n[:, None] * CHANNELS + offs_c[None, :]
        mask_nc = (offs_n < n)[:, None] & mask_c[None, :]
        centred = tl.load(centred_ptr + offs_nc, mask=mask_nc, other=0.0) - mean[None, :]
        squeezed = centred * scale[None, :] + bias[None, :]
        tl.store(centred_ptr + offs_nc, centred, mask=mask_nc)
        tl.store(squeezed_ptr + offs_nc, squeezed.to(squeezed_ptr.dtype.element_ty), mask=mask_nc)


@triton.jit
def _gate(logit_ptr, offs_nc, mask_nc):
    return tl.sigmoid(tl.load(logit_ptr + offs_nc, mask=mask_nc, other=0.0).to(tl.float32))


@triton.jit
def _keep(keep_ptr, offs_n, n_end):
    return tl.load(keep_ptr + offs_n, mask=offs_n < n_end, other=0.0).to(tl.float32)[:, None]


@triton.jit
def _transform_tile(
    x_ptr, shortcut_ptr, y_ptr, weight_ptr, bias_ptr, mean_ptr, deviation_ptr, logit_ptr, keep_ptr,
    offs_n, n_end, p, offs_c,
    PIXELS: tl.constexpr, CHANNELS: tl.constexpr, HAS_KEEP: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    mask_c = offs_c < CHANNELS
    offs, mask = _tile(offs_n, n_end, p, offs_c, PIXELS, CHANNELS, BLOCK_P)
    kept = _gate(logit_ptr, offs_n[:, None] * CHANNELS + offs_c[None, :], (offs_n < n_end)[:, None] & mask_c[None, :])
    if HAS_KEEP:
        kept *= _keep(keep_ptr, offs_n, n_end)
    scale = tl.load(weight_ptr + offs_c, mask=mask_c, other=0.0)
    scale *= tl.load(deviation_ptr + offs_c, mask=mask_c, other=0.0)
    bias = tl.load(bias_ptr + offs_c, mask=mask_c, other=0.0)
    mean = tl.load(mean_ptr + offs_c, mask=mask_c, other=0.0)
    x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32) - mean[None, None, :]
    y = x * (kept * scale[None, :])[:, None, :] + (kept * bias[None, :])[:, None, :]
    y = _relu(y + tl.load(shortcut_ptr + offs, mask=mask, other=0.0).to(tl.float32))
    tl.store(y_ptr + offs, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _transform(
    x_ptr, shortcut_ptr, y_ptr, weight_ptr, bias_ptr, mean_ptr, deviation_ptr, logit_ptr, keep_ptr,
    n,
    PIXELS: tl.constexpr, CHANNELS: tl.constexpr, HAS_KEEP: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_c = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    _transform_tile(
        x_ptr, shortcut_ptr, y_ptr, weight_ptr, bias_ptr, mean_ptr, deviation_ptr, logit_ptr, keep_ptr,
        offs_n, n, tl.program_id(1) * BLOCK_P, offs_c, PIXELS, CHANNELS, HAS_KEEP, BLOCK_P,
    )  # fmt: skip


@triton.jit
def _gate_and_transform(
    x_ptr, shortcut_ptr, y_ptr, weight_ptr, bias_ptr, mean_ptr, deviation_ptr, logit_ptr, keep_ptr,
    squeezed_ptr, w1_ptr, b1_ptr, w2_ptr, b2_ptr, hidden_ptr,
    n,
    PIXELS: tl.constexpr, CHANNELS: tl.constexpr, HIDDEN: tl.constexpr,
    HAS_KEEP: tl.constexpr, PRECISION: tl.constexpr,
    IMAGES: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_M: tl.constexpr,
    SQUEEZE_O: tl.constexpr, SQUEEZE_K: tl.constexpr, EXCITE_O: tl.constexpr, EXCITE_K: tl.constexpr,
):  # fmt: skip
    """:func:`_transform` of a program's IMAGES after the two products that make their gates."""
    n_start = tl.program_id(0) * IMAGES
    n_end = tl.minimum(n_start + IMAGES, n)
    _product_rows(
        squeezed_ptr, w1_ptr, b1_ptr, hidden_ptr, n_start, n_end, CHANNELS, HIDDEN, CHANNELS, 1,
        RELU, PRECISION, BLOCK_M, SQUEEZE_O, SQUEEZE_K,
    )  # fmt: skip
    _product_rows(
        hidden_ptr, w2_ptr, b2_ptr, logit_ptr, n_start, n_end, HIDDEN, CHANNELS, HIDDEN, 1,
        BIAS, PRECISION, BLOCK_M, EXCITE_O, EXCITE_K,
    )  # fmt: skip
    for start in range(n_start, n_end, BLOCK_N):
        for c in range(0, CHANNELS, BLOCK_C):
            for p in range(0, PIXELS, BLOCK_P):
                _transform_tile(
                    x_ptr, shortcut_ptr, y_ptr, weight_ptr, bias_ptr, mean_ptr, deviation_ptr, logit_ptr, keep_ptr,
                    start + tl.arange(0, BLOCK_N), n_end, p, c + tl.arange(0, BLOCK_C),
                    PIXELS, CHANNELS, HAS_KEEP, BLOCK_P,
                )  # fmt: skip


@triton.jit
def _sums_tile(
    dy_ptr, y_ptr, x_ptr, weight_ptr, bias_ptr, mean_ptr, deviation_ptr, logit_ptr, keep_ptr,
    total_ptr, product_ptr, dlogit_ptr,
    offs_n, n_end, offs_c,
    PIXELS: tl.constexpr, CHANNELS: tl.constexpr, HAS_KEEP: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Over the pixels of each image ``total = sum(g)`` and ``product = sum(g * (x - mean))``; from them ``dlogit``."""
    mask_c = offs_c < CHANNELS
    mean = tl.load(mean_ptr + offs_c, mask=mask_c, other=0.0)
    totals = tl.zeros((BLOCK_N, BLOCK_P, BLOCK_C), dtype=tl.float32)
    products = tl.zeros((BLOCK_N, BLOCK_P, BLOCK_C), dtype=tl.float32)
    for p in range(0, PIXELS, BLOCK_P):
        offs, mask = _tile(offs_n, n_end, p, offs_c, PIXELS, CHANNELS, BLOCK_P)
        g = _relu_gradient(tl.load(dy_ptr + offs, mask=mask, other=0.0), y_ptr + offs, mask).to(tl.float32)
        x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32) - mean[None, None, :]
        totals += g
        products += g * x
    total, product = tl.sum(totals, axis=1), tl.sum(products, axis=1)
    offs_nc = offs_n[:, None] * CHANNELS + offs_c[None, :]
    mask_nc = (offs_n < n_end)[:, None] & mask_c[None, :]
    tl.store(total_ptr + offs_nc, total, mask=mask_nc)
    tl.store(product_ptr + offs_nc, product, mask=mask_nc)
    scale = tl.load(weight_ptr + offs_c, mask=mask_c, other=0.0)
    scale *= tl.load(deviation_ptr + offs_c, mask=mask_c, other=0.0)
    bias = tl.load(bias_ptr + offs_c, mask=mask_c, other=0.0)
    gate = _gate(logit_ptr, offs_nc, mask_nc)
    dlogit = (bias[None, :] * total + scale[None, :] * product) * gate * (1.0 - gate)
    if HAS_KEEP:
        dlogit *= _keep(keep_ptr, offs_n, n_end)
    tl.store(dlogit_ptr + offs_nc, dlogit.to(dlogit_ptr.dtype.element_ty), mask=mask_nc)


@triton.jit
def _image_sums(
    dy_ptr, y_ptr, x_ptr, weight_ptr, bias_ptr, mean_ptr, deviation_ptr, logit_ptr, keep_ptr,
    total_ptr, product_ptr, dlogit_ptr,
    n,
    PIXELS: tl.constexpr, CHANNELS: tl.constexpr, HAS_KEEP: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    _sums_tile(
        dy_ptr, y_ptr, x_ptr, weight_ptr, bias_ptr, mean_ptr, deviation_ptr, logit_ptr, keep_ptr,
        total_ptr, product_ptr, dlogit_ptr, offs_n, n, offs_c, PIXELS, CHANNELS, HAS_KEEP, BLOCK_N, BLOCK_P, BLOCK_C,
    )  # fmt: skip


@triton.jit
def _image_sums_and_squeeze(
    dy_ptr, y_ptr, x_ptr, weight_ptr, bias_ptr, mean_ptr, deviation_ptr, logit_ptr, keep_ptr,
    total_ptr, product_ptr, dlogit_ptr, w1_ptr, w2_ptr, hidden_ptr, dhidden_ptr, dsqueezed_ptr,
    n,
    PIXELS: tl.constexpr, CHANNELS: tl.constexpr, HIDDEN: tl.constexpr,
    HAS_KEEP: tl.constexpr, PRECISION: tl.constexpr,
    IMAGES: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_M: tl.constexpr,
    SQUEEZE_O: tl.constexpr, SQUEEZE_K: tl.constexpr, EXCITE_O: tl.constexpr, EXCITE_K: tl.constexpr,
):  # fmt: skip
    """:func:`_image_sums` of a program's IMAGES and the two products back to the gradient of ``squeezed``."""
    n_start = tl.program_id(0) * IMAGES
    n_end = tl.minimum(n_start + IMAGES, n)
    for start in range(n_start, n_end, BLOCK_N):
        for c in range(0, CHANNELS, BLOCK_C):
            _sums_tile(
                dy_ptr, y_ptr, x_ptr, weight_ptr, bias_ptr, mean_ptr, deviation_ptr, logit_ptr, keep_ptr,
                total_ptr, product_ptr, dlogit_ptr,
                start + tl.arange(0, BLOCK_N), n_end, c + tl.arange(0, BLOCK_C),
                PIXELS, CHANNELS, HAS_KEEP, BLOCK_N, BLOCK_P, BLOCK_C,
            )  # fmt: skip
    _product_rows(
        dlogit_ptr, w2_ptr, hidden_ptr, dhidden_ptr, n_start, n_end, CHANNELS, HIDDEN, 1, HIDDEN,
        RELU_GRADIENT, PRECISION, BLOCK_M, SQUEEZE_O, SQUEEZE_K,
    )  # fmt: skip
    _product_rows(
        dhidden_ptr, w1_ptr, hidden_ptr, dsqueezed_ptr, n_start, n_end, HIDDEN, CHANNELS, 1, CHANNELS,
        LINEAR, PRECISION, BLOCK_M, EXCITE_O, EXCITE_K,
    )  # fmt: skip


@triton.jit
def _parameter_gradients(
    total_ptr, product_ptr, dsqueezed_ptr, centred_ptr, deviation_ptr, logit_ptr, keep_ptr, dweight_ptr, dbias_ptr,
    dlogit_ptr, hidden_ptr, dhidden_ptr, squeezed_ptr, dw1_ptr, db1_ptr, dw2_ptr, db2_ptr,
    n,
    CHANNELS: tl.constexpr, HIDDEN: tl.constexpr, HAS_KEEP: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Every sum over the images. Programs: (channels, hidden, which of w1, w2 and batch norm's two vectors)."""
    if tl.program_id(2) < 2:
        _weight_gradients(
            dlogit_ptr, hidden_ptr, dhidden_ptr, squeezed_ptr, dw1_ptr, db1_ptr, dw2_ptr, db2_ptr,
            n, CHANNELS, HIDDEN, PRECISION, BLOCK_C, BLOCK_R, BLOCK_N,
        )  # fmt: skip
    elif tl.program_id(1) == 0:
        offs_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
        mask_c = offs_c < CHANNELS
        sums = tl.zeros((BLOCK_C,), dtype=tl.float32)
        products = tl.zeros((BLOCK_C,), dtype=tl.float32)
        for start in range(0, n, BLOCK_N):
            offs_n = start + tl.arange(0, BLOCK_N)
            offs_nc = offs_n[:, None] * CHANNELS + offs_c[None, :]
            mask_nc = (offs_n < n)[:, None] & mask_c[None, :]
            kept = _gate(logit_ptr, offs_nc, mask_nc)
            if HAS_KEEP:
                kept *= _keep(keep_ptr, offs_n, n)
            total = tl.load(total_ptr + offs_nc, mask=mask_nc, other=0.0)
            product = tl.load(product_ptr + offs_nc, mask=mask_nc, other=0.0)
            dsqueezed = tl.load(dsqueezed_ptr + offs_nc, mask=mask_nc, other=0.0).to(tl.float32)
            centred = tl.load(centred_ptr + offs_nc, mask=mask_nc, other=0.0)
            # The gradient of batch norm's output is kept * g + dsqueezed / P.
            sums += tl.sum(kept * total + dsqueezed, axis=0)
            products += tl.sum(kept * product + dsqueezed * centred, axis=0)
        products *= tl.load(deviation_ptr + offs_c, mask=mask_c, other=0.0)
        tl.store(dbias_ptr + offs_c, sums, mask=mask_c)
        tl.store(dweight_ptr + offs_c, products, mask=mask_c)


@triton.jit
def _gradient(
    dy_ptr, y_ptr, x_ptr, dx_ptr, dshortcut_ptr,
    weight_ptr, mean_ptr, deviation_ptr, dweight_ptr, dbias_ptr, logit_ptr, keep_ptr, dsqueezed_ptr,
    n,
    PIXELS: tl.constexpr, CHANNELS: tl.constexpr, HAS_KEEP: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_c = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < CHANNELS
    offs_nc = offs_n[:, None] * CHANNELS + offs_c[None, :]
    mask_nc = (offs_n < n)[:, None] & mask_c[None, :]
    offs, mask = _tile(offs_n, n, tl.program_id(1) * BLOCK_P, offs_c, PIXELS, CHANNELS, BLOCK_P)
    g = _relu_gradient(tl.load(dy_ptr + offs, mask=mask, other=0.0), y_ptr + offs, mask)
    tl.store(dshortcut_ptr + offs, g, mask=mask)

    rows = tl.cast(n * PIXELS, tl.float32)  # a function: with one image n is a constant, which has no methods
    deviation = tl.load(deviation_ptr + offs_c, mask=mask_c, other=0.0)
    scale = tl.load(weight_ptr + offs_c, mask=mask_c, other=0.0) * deviation
    slope = scale * deviation * tl.load(dweight_ptr + offs_c, mask=mask_c, other=0.0) / rows
    kept = _gate(logit_ptr, offs_nc, mask_nc)
    if HAS_KEEP:
        kept *= _keep(keep_ptr, offs_n, n)
    dsqueezed = tl.load(dsqueezed_ptr + offs_nc, mask=mask_nc, other=0.0).to(tl.float32)
    dbias = tl.load(dbias_ptr + offs_c, mask=mask_c, other=0.0)
    constant = scale[None, :] * (dsqueezed / PIXELS - dbias[None, :] / rows)
    mean = tl.load(mean_ptr + offs_c, mask=mask_c, other=0.0)
    x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32) - mean[None, None, :]
    dx = g.to(tl.float32) * (kept * scale[None, :])[:, None, :] + constant[:, None, :] - x * slope[None, None, :]
    tl.store(dx_ptr + offs, dx.to(dx_ptr.dtype.element_ty), mask=mask)
