"""Triton code of the batch augmentation: one program an image, held in registers from the gather to the store."""

from __future__ import annotations

import triton
import triton.language as tl

from ..augment_tables import (
    AFFINE,
    AUTOCONTRAST,
    COLOR,
    CONTRAST,
    CROP_STREAM,
    CUTOUT_STREAM,
    EQUALIZE,
    FLIP_STREAM,
    LOOKUP,
    POLICY_STREAM,
    SHARPNESS,
)

_LOOKUP, _AFFINE, _COLOR, _CONTRAST = (tl.constexpr(kind) for kind in (LOOKUP, AFFINE, COLOR, CONTRAST))
_SHARPNESS, _AUTOCONTRAST, _EQUALIZE = (tl.constexpr(kind) for kind in (SHARPNESS, AUTOCONTRAST, EQUALIZE))
_CROP_STREAM, _FLIP_STREAM = tl.constexpr(CROP_STREAM), tl.constexpr(FLIP_STREAM)
_CUTOUT_STREAM, _POLICY_STREAM = tl.constexpr(CUTOUT_STREAM), tl.constexpr(POLICY_STREAM)


@triton.jit
def _below(word, bound):
    """An integer below ``bound`` from a 32-bit word."""
    return ((word.to(tl.int64) * bound) >> 32).to(tl.int32)


@triton.jit
def _words(seed, index, epoch, STREAM: tl.constexpr, block):
    return tl.philox(seed, index, epoch, tl.full((), STREAM, tl.uint32), tl.full((), 0, tl.uint32) + block)


@triton.jit
def _mirrored(place, SIDE: tl.constexpr):
    """A place up to SIDE - 1 beyond the border, reflected into the image."""
    return SIDE - 1 - tl.abs(SIDE - 1 - tl.abs(place))


@triton.jit
def _blend(degenerate, value, factor):
    """Pillow's blend in float32: product and sum are rounded by themselves (the launch turns fusion off)."""
    start = degenerate.to(tl.float32)
    mixed = start + factor * (value.to(tl.float32) - start)
    return tl.minimum(tl.maximum(mixed, 0.0), 255.0).to(tl.int32)


@triton.jit
def _smooth(value, x, y, place, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """Sums of 3x3 values with weight 1 and the centre's 5, over 13, rounded. Right inside the border only."""
    left, right = tl.where(x > 0, place - 1, place), tl.where((x < WIDTH - 1) & (y < HEIGHT), place + 1, place)
    rows = value + tl.gather(value, left, 0) + tl.gather(value, right, 0)
    above, below = tl.where(y > 0, place - WIDTH, place), tl.where(y < HEIGHT - 1, place + WIDTH, place)
    total = rows + tl.gather(rows, above, 0) + tl.gather(rows, below, 0) + 4 * value
    return (total + 6) // 13


@triton.jit
def _autocontrast(value, mask):
    low, high = tl.min(tl.where(mask, value, 255), 0), tl.max(tl.where(mask, value, 0), 0)
    bins = tl.arange(0, 256)
    scale = tl.full((), 255.0, tl.float64) / tl.maximum(high - low, 1).to(tl.float64)
    stretched = bins.to(tl.float64) * scale + (-low).to(tl.float64) * scale
    stretched = tl.minimum(tl.maximum(stretched, 0.0), 255.0).to(tl.int32)
    return tl.gather(tl.where(high > low, stretched, bins), value, 0)


@triton.jit
def _equalize(value, mask, PIXELS: tl.constexpr):
    counts = tl.histogram(value, 256, mask=mask)
    bins = tl.arange(0, 256)
    last = tl.max(tl.where(mask, value, 0), 0)
    step = (PIXELS - tl.sum(tl.where(bins == last, counts, 0), 0)) // 255  # 0 too where all pixels are the same
    before = tl.cumsum(counts, 0) - counts
    table = tl.minimum((step // 2 + before) // tl.maximum(step, 1), 255)
    return tl.gather(tl.where(step > 0, table, bins), value, 0)


@triton.jit
def _moved(value, inside, place, fill):
    return tl.where(inside, tl.gather(value, place, 0), fill)


@triton.jit
def _bilinear(value, inside, top_left, top_right, low_left, low_right, du, dv, fill):
    near = tl.gather(value, top_left, 0).to(tl.float64)
    upper = near + (tl.gather(value, top_right, 0).to(tl.float64) - near) * du
    near = tl.gather(value, low_left, 0).to(tl.float64)
    lower = near + (tl.gather(value, low_right, 0).to(tl.float64) - near) * du
    return tl.where(inside, (upper + (lower - upper) * dv).to(tl.int32), fill)


@triton.jit
def _store(out, value, scale, shift, mask, CHANNEL: tl.constexpr, IS_NORMALISED: tl.constexpr):
    if IS_NORMALISED:
        value = value.to(tl.float32) * tl.load(scale + CHANNEL) + tl.load(shift + CHANNEL)
    tl.store(out + CHANNEL, value.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["seed", "policy_fill", "cutout_fill"])
def _augment_kernel(
    images,
    indices,
    epoch,
    out,
    kinds,
    factors,
    lookups,
    tables,
    fixed,
    matrices,
    first,
    levels,
    gates,
    scale,
    shift,
    seed,
    policy_fill,
    cutout_fill,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    PADDING: tl.constexpr,
    IS_REFLECTED: tl.constexpr,
    FLIP: tl.constexpr,
    GROUPS: tl.constexpr,
    SLOTS: tl.constexpr,
    CHOICES: tl.constexpr,
    IS_BILINEAR: tl.constexpr,
    HOLES: tl.constexpr,
    HOLE_SIZE: tl.constexpr,
    IS_NORMALISED: tl.constexpr,
):
    """Colours come as red + 256 green + 65536 blue. ``FLIP``: 0 none, 1 random, 2 alternating."""
    PIXELS: tl.constexpr = HEIGHT * WIDTH
    program = tl.program_id(0).to(tl.int64)
    row = tl.load(indices + program)
    now = tl.load(epoch)
    index, period = (row & 0xFFFFFFFF).to(tl.uint32), (now & 0xFFFFFFFF).to(tl.uint32)
    place = tl.arange(0, BLOCK)
    mask = place < PIXELS
    y, x = place // WIDTH, place % WIDTH

    # Gather, with crop and flip in the addresses.
    source_x, source_y, inside = x, y, mask
    if FLIP == 1:
        w0, w1, w2, w3 = _words(seed, index, period, _FLIP_STREAM, 0)
        source_x = tl.where(_below(w0, 2) == 1, WIDTH - 1 - x, x)
    elif FLIP == 2:
        w0, w1, w2, w3 = _words(seed, index, tl.full((), 0, tl.uint32), _FLIP_STREAM, 0)
        source_x = tl.where(((_below(w0, 2) + now) & 1) == 1, WIDTH - 1 - x, x)
    if PADDING > 0:
        w0, w1, w2, w3 = _words(seed, index, period, _CROP_STREAM, 0)
        source_y += _below(w0, 2 * PADDING + 1) - PADDING
        source_x += _below(w1, 2 * PADDING + 1) - PADDING
        if IS_REFLECTED:
            source_y, source_x = _mirrored(source_y, HEIGHT), _mirrored(source_x, WIDTH)
        else:
            inside = inside & (source_y >= 0) & (source_y < HEIGHT) & (source_x >= 0) & (source_x < WIDTH)
    pixel = images + row * (PIXELS * 3) + (source_y * WIDTH + source_x) * 3
    r = tl.load(pixel, mask=inside, other=0).to(tl.int32)
    g = tl.load(pixel + 1, mask=inside, other=0).to(tl.int32)
    b = tl.load(pixel + 2, mask=inside, other=0).to(tl.int32)

    if SLOTS > 0:
        w0, w1, w2, w3 = _words(seed, index, period, _POLICY_STREAM, 0)
        group = _below(w0, GROUPS)
        fill_r, fill_g, fill_b = policy_fill & 255, (policy_fill >> 8) & 255, policy_fill >> 16
        for slot in range(SLOTS):
            w0, w1, w2, w3 = _words(seed, index, period, _POLICY_STREAM, 1 + slot)
            choice = (group * SLOTS + slot) * CHOICES + _below(w0, CHOICES)
            setting = tl.load(first + choice) + 2 * _below(w2, tl.load(levels + choice)) + _below(w3, 2)
            kind = tl.where(w1.to(tl.int64) < tl.load(gates + choice), tl.load(kinds + setting), 0)
            if kind == _LOOKUP:
                table = tables + tl.load(lookups + setting) * 256
                r = tl.load(table + r).to(tl.int32)
                g = tl.load(table + g).to(tl.int32)
                b = tl.load(table + b).to(tl.int32)
            elif kind == _AFFINE:
                if IS_BILINEAR:
                    matrix = matrices + setting * 6
                    centre_x, centre_y = x.to(tl.float64) + 0.5, y.to(tl.float64) + 0.5
                    u = tl.load(matrix) * centre_x + tl.load(matrix + 1) * centre_y + tl.load(matrix + 2)
                    v = tl.load(matrix + 3) * centre_x + tl.load(matrix + 4) * centre_y + tl.load(matrix + 5)
                    there = (u >= 0.0) & (u < WIDTH) & (v >= 0.0) & (v < HEIGHT)
                    u, v = tl.where(there, u, 0.5) - 0.5, tl.where(there, v, 0.5) - 0.5
                    left, top = tl.floor(u), tl.floor(v)
                    du, dv = u - left, v - top
                    x0, x1 = tl.maximum(left.to(tl.int32), 0), tl.minimum(left.to(tl.int32) + 1, WIDTH - 1)
                    y0 = tl.maximum(top.to(tl.int32), 0)
                    y1 = tl.where(top.to(tl.int32) + 1 < HEIGHT, top.to(tl.int32) + 1, y0)
                    tl_, tr, ll, lr = y0 * WIDTH + x0, y0 * WIDTH + x1, y1 * WIDTH + x0, y1 * WIDTH + x1
                    r = _bilinear(r, there, tl_, tr, ll, lr, du, dv, fill_r)
                    g = _bilinear(g, there, tl_, tr, ll, lr, du, dv, fill_g)
                    b = _bilinear(b, there, tl_, tr, ll, lr, du, dv, fill_b)
                else:
                    # 16.16 fixed point: below 2**14 a side and twice the slope, so that int32 holds it at this size.
                    numbers = fixed + setting * 6
                    column = tl.load(numbers) * x + tl.load(numbers + 1) * y + tl.load(numbers + 2)
                    line = tl.load(numbers + 3) * x + tl.load(numbers + 4) * y + tl.load(numbers + 5)
                    column, line = column >> 16, line >> 16
                    there = (column >= 0) & (column < WIDTH) & (line >= 0) & (line < HEIGHT)
                    origin = tl.where(there, line * WIDTH + column, 0)
                    r = _moved(r, there, origin, fill_r)
                    g = _moved(g, there, origin, fill_g)
                    b = _moved(b, there, origin, fill_b)
            elif kind == _AUTOCONTRAST:
                r, g, b = _autocontrast(r, mask), _autocontrast(g, mask), _autocontrast(b, mask)
            elif kind == _EQUALIZE:
                r, g, b = _equalize(r, mask, PIXELS), _equalize(g, mask, PIXELS), _equalize(b, mask, PIXELS)
            elif kind == _SHARPNESS:
                factor = tl.load(factors + setting)
                inner = (x > 0) & (x < WIDTH - 1) & (y > 0) & (y < HEIGHT - 1)
                r = tl.where(inner, _blend(_smooth(r, x, y, place, HEIGHT, WIDTH), r, factor), r)
                g = tl.where(inner, _blend(_smooth(g, x, y, place, HEIGHT, WIDTH), g, factor), g)
                b = tl.where(inner, _blend(_smooth(b, x, y, place, HEIGHT, WIDTH), b, factor), b)
            elif kind > 0:  # COLOR, CONTRAST
                factor = tl.load(factors + setting)
                grey = (19595 * r + 38470 * g + 7471 * b + 0x8000) >> 16
                if kind == _CONTRAST:
                    mean = (2 * tl.sum(tl.where(mask, grey, 0), 0) + PIXELS) // (2 * PIXELS)
                    grey = tl.zeros_like(grey) + mean
                r, g, b = _blend(grey, r, factor), _blend(grey, g, factor), _blend(grey, b, factor)

    for hole in tl.static_range(HOLES):
        w0, w1, w2, w3 = _words(seed, index, period, _CUTOUT_STREAM, hole // 2)
        if hole % 2 == 1:
            w0, w1 = w2, w3
        top = _below(w0, HEIGHT) - HOLE_SIZE // 2
        left = _below(w1, WIDTH) - HOLE_SIZE // 2
        blank = (y >= top) & (y < top + HOLE_SIZE) & (x >= left) & (x < left + HOLE_SIZE)
        r = tl.where(blank, cutout_fill & 255, r)
        g = tl.where(blank, (cutout_fill >> 8) & 255, g)
        b = tl.where(blank, cutout_fill >> 16, b)

    target = out + program * (PIXELS * 3) + place * 3
    _store(target, r, scale, shift, mask, 0, IS_NORMALISED)
    _store(target, g, scale, shift, mask, 1, IS_NORMALISED)
    _store(target, b, scale, shift, mask, 2, IS_NORMALISED)
