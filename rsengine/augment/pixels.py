"""The operations on one image as numba code: Pillow's arithmetic, byte for byte.

Each takes (H, W, 3) uint8 C-contiguous arrays; ``image`` is read, ``out`` written, and they are never the same array.
The arithmetic is strict IEEE: numba without fastmath does not fuse a product and a sum into one rounding, and neither
does Pillow's C code.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from rsengine.kernels.augment_tables import AUTOCONTRAST, COLOR, CONTRAST, EQUALIZE, LOOKUP, SHARPNESS

_F0, _F255 = np.float32(0), np.float32(255)


@njit(cache=True, nogil=True)
def copy_pixels(image, out):
    """As ``out[:] = image``, which numba compiles to slower code."""
    flat, to = image.reshape(-1), out.reshape(-1)
    for i in range(flat.size):
        to[i] = flat[i]


@njit(cache=True, nogil=True)
def look_up(image, out, table):
    """``table``: (256,) uint8."""
    flat, to = image.reshape(-1), out.reshape(-1)
    for i in range(flat.size):
        to[i] = table[flat[i]]


@njit(cache=True, nogil=True)
def affine_nearest(image, out, fixed, fill):
    """``fixed``: six 16.16 fixed-point numbers; ``fill``: (3,) uint8."""
    height, width, _ = image.shape
    a, b, c = np.int64(fixed[0]), np.int64(fixed[1]), np.int64(fixed[2])
    d, e, f = np.int64(fixed[3]), np.int64(fixed[4]), np.int64(fixed[5])
    for y in range(height):
        u, v = b * y + c, e * y + f
        for x in range(width):
            sx, sy = u >> 16, v >> 16
            if 0 <= sx < width and 0 <= sy < height:
                out[y, x, 0] = image[sy, sx, 0]
                out[y, x, 1] = image[sy, sx, 1]
                out[y, x, 2] = image[sy, sx, 2]
            else:
                out[y, x, 0], out[y, x, 1], out[y, x, 2] = fill[0], fill[1], fill[2]
            u += a
            v += d


@njit(cache=True, nogil=True)
def affine_bilinear(image, out, matrix, fill):
    """``matrix``: six float64."""
    height, width, _ = image.shape
    for y in range(height):
        for x in range(width):
            u = matrix[0] * (x + 0.5) + matrix[1] * (y + 0.5) + matrix[2]
            v = matrix[3] * (x + 0.5) + matrix[4] * (y + 0.5) + matrix[5]
            if u < 0.0 or u >= width or v < 0.0 or v >= height:
                out[y, x, 0], out[y, x, 1], out[y, x, 2] = fill[0], fill[1], fill[2]
                continue
            u -= 0.5
            v -= 0.5
            left, top = int(np.floor(u)), int(np.floor(v))
            du, dv = u - left, v - top
            x0, x1 = max(left, 0), min(left + 1, width - 1)
            y0 = max(top, 0)
            for channel in range(3):
                near, far = float(image[y0, x0, channel]), float(image[y0, x1, channel])
                value = near + (far - near) * du
                if top + 1 < height:
                    near, far = float(image[top + 1, x0, channel]), float(image[top + 1, x1, channel])
                    value += (near + (far - near) * du - value) * dv
                out[y, x, channel] = np.uint8(value)


@njit(cache=True, nogil=True)
def _blend(degenerate, value, factor):
    """PIL's ``Image.blend`` in float32, cut to 0 ... 255 and truncated."""
    start = np.float32(degenerate)
    mixed = start + factor * (np.float32(value) - start)
    return np.uint8(min(max(mixed, _F0), _F255))


@njit(cache=True, nogil=True)
def _luma(image, y, x):
    red, green, blue = np.int64(image[y, x, 0]), np.int64(image[y, x, 1]), np.int64(image[y, x, 2])
    return (19595 * red + 38470 * green + 7471 * blue + 0x8000) >> 16


@njit(cache=True, nogil=True)
def color(image, out, factor):
    height, width, _ = image.shape
    for y in range(height):
        for x in range(width):
            grey = _luma(image, y, x)
            for channel in range(3):
                out[y, x, channel] = _blend(grey, image[y, x, channel], factor)


@njit(cache=True, nogil=True)
def contrast(image, out, factor, table):
    height, width, _ = image.shape
    total = 0
    for y in range(height):
        for x in range(width):
            total += _luma(image, y, x)
    mean = int(total / (height * width) + 0.5)
    for value in range(256):
        table[value] = _blend(mean, value, factor)
    look_up(image, out, table)


@njit(cache=True, nogil=True)
def sharpness(image, out, factor):
    height, width, _ = image.shape
    for y in range(height):
        for x in range(width):
            if 0 < y < height - 1 and 0 < x < width - 1:
                for channel in range(3):
                    total = 4 * np.int64(image[y, x, channel])
                    for row in range(y - 1, y + 2):
                        for column in range(x - 1, x + 2):
                            total += np.int64(image[row, column, channel])
                    out[y, x, channel] = _blend((total + 6) // 13, image[y, x, channel], factor)
            else:
                for channel in range(3):
                    out[y, x, channel] = image[y, x, channel]


@njit(cache=True, nogil=True)
def autocontrast(image, out, table):
    height, width, _ = image.shape
    for channel in range(3):
        low, high = 255, 0
        for y in range(height):
            for x in range(width):
                low, high = min(low, image[y, x, channel]), max(high, image[y, x, channel])
        if high > low:
            scale = 255.0 / (high - low)
            offset = -low * scale
            for value in range(256):
                table[value] = np.uint8(min(max(int(value * scale + offset), 0), 255))
        for y in range(height):
            for x in range(width):
                value = image[y, x, channel]
                out[y, x, channel] = table[value] if high > low else value


@njit(cache=True, nogil=True)
def equalize(image, out, table, counts):
    height, width, _ = image.shape
    for channel in range(3):
        counts[:] = 0
        last = 0
        for y in range(height):
            for x in range(width):
                value = image[y, x, channel]
                counts[value] += 1
                last = max(last, np.int64(value))
        step = (height * width - counts[last]) // 255  # 0 too where all pixels are the same
        if step:
            seen = step // 2
            for value in range(256):
                table[value] = np.uint8(min(seen // step, 255))
                seen += counts[value]
        for y in range(height):
            for x in range(width):
                value = image[y, x, channel]
                out[y, x, channel] = table[value] if step else value


@njit(cache=True, nogil=True)
def apply_setting(image, out, kind, factor, table, fixed, matrix, bilinear, fill, scratch, counts):
    """Apply one setting other than IDENTITY. ``scratch`` (256 uint8) and ``counts`` (256 int64) are work space."""
    if kind == LOOKUP:
        look_up(image, out, table)
    elif kind == COLOR:
        color(image, out, factor)
    elif kind == CONTRAST:
        contrast(image, out, factor, scratch)
    elif kind == SHARPNESS:
        sharpness(image, out, factor)
    elif kind == AUTOCONTRAST:
        autocontrast(image, out, scratch)
    elif kind == EQUALIZE:
        equalize(image, out, scratch, counts)
    elif bilinear:
        affine_bilinear(image, out, matrix, fill)
    else:
        affine_nearest(image, out, fixed, fill)
