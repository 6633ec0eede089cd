"""Which pixels a convolution reads, as ``plan.h`` takes it: one row of int32 for each way."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

Taps = dict[int, tuple[int, int]]  # by the number of a tap, the row and column that it meets, which may be outside


class Plan(NamedTuple):
    """A convolution with padding ``kernel // 2`` on maps of one size.

    Attributes:
        forward: how outputs are made from inputs; ``None``: each from the same pixel.
        back: how the gradients of inputs are made from those of outputs.
        height, width: of the output.
    """

    forward: Tensor | None
    back: Tensor | None
    height: int
    width: int


@functools.lru_cache(maxsize=256)
def plan(height: int, width: int, kernel: int, stride: int) -> Plan:
    """``kernel``: 1 or 3, on either side."""
    rows, columns = (height - 1) // stride + 1, (width - 1) // stride + 1
    if kernel == 1 and stride == 1:
        return Plan(None, None, rows, columns)
    reach, taps = kernel // 2, [(i, j) for i in range(kernel) for j in range(kernel)]

    def read(pixel: int) -> Taps:
        y, x = divmod(pixel, columns)
        return {t: (y * stride + i - reach, x * stride + j - reach) for t, (i, j) in enumerate(taps)}

    def spread(pixel: int) -> Taps:
        y, x = divmod(pixel, width)
        met = {t: (y + reach - i, x + reach - j) for t, (i, j) in enumerate(taps)}
        met = {t: (u // stride, v // stride) for t, (u, v) in met.items() if u % stride == v % stride == 0}
        return {t: (u, v) for t, (u, v) in met.items() if u <= rows and v <= columns}  # no further than the border

    return Plan(
        _grouped(rows * columns, read, height, width), _grouped(height * width, spread, rows, columns), rows, columns
    )


def _grouped(pixels: int, met: Callable[[int], Taps], height: int, width: int) -> Tensor:
    """The pixels that are made from maps of this size, grouped by the taps that they meet.

    Taps that meet the border meet zeros. On maps of up to 2x2 pixels, where that is most of them, they are left out.
    """
    groups: dict[tuple[int, ...], list[tuple[int, list[int]]]] = {}
    for pixel in range(pixels):
        taps = met(pixel)
        if height <= 2 and width <= 2:
            taps = {t: (y, x) for t, (y, x) in taps.items() if 0 <= y < height and 0 <= x < width}
        places = [(y + 1) * (width + 2) + x + 1 for y, x in taps.values()]
        groups.setdefault(tuple(taps), []).append((pixel, places))
    table = [len(groups), _stride([members for taps, members in groups.items() if taps]), height, width]
    for taps, members in groups.items():
        table += [len(members), len(taps), *taps, *(pixel for pixel, _ in members)]
        table += [place for _, places in members for place in places]
    return torch.tensor(table, dtype=torch.int32)


def _stride(groups: list[list[tuple[int, list[int]]]]) -> int:
    """How far apart the places are that any 16 pixels in a row of a group meet; 0 if that is not one number."""
    steps: set[int] = set()
    for members in groups:
        if len(members) % 16:
            return 0
        for first in range(0, len(members), 16):
            for (_, here), (_, following) in zip(
                members[first : first + 15], members[first + 1 : first + 16], strict=True
            ):
                steps.update(b - a for a, b in zip(here, following, strict=True))
    return steps.pop() if len(steps) == 1 and min(steps) > 0 else 0
