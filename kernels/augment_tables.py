"""What the augmentations in PyTorch, Triton and numba share: numbers of operations and random streams, and tables."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

# What a setting of a policy makes of an image. The operations that map each value by itself share LOOKUP.
IDENTITY, LOOKUP, AFFINE, COLOR, CONTRAST, SHARPNESS, AUTOCONTRAST, EQUALIZE = range(8)
CROP_STREAM, FLIP_STREAM, CUTOUT_STREAM, POLICY_STREAM = 1, 2, 3, 4  # of random numbers
FLIPS = ("none", "random", "alternating")


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
