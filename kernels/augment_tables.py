"""What the augmentations in PyTorch, Triton and numba share: numbers of operations and random streams, and tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

# What a setting of a policy makes of an image. The operations that map each value by itself share LOOKUP.
IDENTITY, LOOKUP, AFFINE, COLOR, CONTRAST, SHARPNESS, AUTOCONTRAST, EQUALIZE = range(8)
CROP_STREAM, FLIP_STREAM, CUTOUT_STREAM, POLICY_STREAM = 1, 2, 3, 4  # of random numbers
FLIPS = ("none", "random", "alternating")
LARGEST_PADDING = 2**14 - 1


class PolicyTables(NamedTuple):
    """The tables of a compiled policy on the device of the images; shapes as :class:`rsengine.augment.program.Program`
    says, which also says how draws become operations."""

    kinds: Tensor
    factors: Tensor
    lookups: Tensor
    tables: Tensor
    fixed: Tensor
    matrices: Tensor
    first: Tensor
    levels: Tensor
    gates: Tensor
    exponentials: Tensor


def check_crop_padding(name: str, padding: int, size: Sequence[int], *, reflect: bool) -> None:
    """Raise ``ValueError`` about ``name`` where images of ``size`` (height, width) cannot be padded by ``padding``.

    Reflection does not repeat the pixels at the border, so that it has one pixel less than the side to give.
    """
    largest = min(*size, LARGEST_PADDING + 1) - 1 if reflect else LARGEST_PADDING
    if padding and not 0 < padding <= largest:
        how = f" to mirror images of {size[0]}x{size[1]}" if reflect else ""
        raise ValueError(f"{name}: expected 0 to {largest}{how}; got {padding}")


def check_colour(name: str, colour: Sequence[int]) -> None:
    """Raise ``ValueError`` about ``name`` where ``colour`` is not one of uint8 pixels."""
    if len(colour) != 3 or not all(0 <= channel <= 255 for channel in colour):
        raise ValueError(f"{name}: expected three numbers from 0 to 255; got {tuple(colour)}")
