"""Builds the augmentations of a recipe."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rsengine.augment.fills import fill_colour
from rsengine.augment.operations import (
    AlternatingFlip,
    Cutout,
    HorizontalFlip,
    PolicyOperation,
    RandomCrop,
    SeededOperation,
)
from rsengine.augment.policies import policy_of

if TYPE_CHECKING:
    from rsengine.config import AugmentSection


def training_augmentations(augment: AugmentSection, mean: Sequence[float], seed: int) -> list[SeededOperation]:
    """The operations of a recipe, in order. ``mean``: of the data set, 0 to 1; one of the fill colours."""
    operations: list[SeededOperation] = []
    if augment.crop_padding:
        operations.append(RandomCrop(augment.crop_padding, augment.crop_mode, seed=seed))
    if augment.flip:
        operations.append(AlternatingFlip(seed) if augment.alternating_flip else HorizontalFlip(seed))
    if augment.policy != "none":
        make = functools.partial(policy_of, augment)
        fill = fill_colour(augment.policy_fill, mean)
        operations.append(PolicyOperation(make, augment.policy_interpolation, fill, seed))
    if augment.cutout_holes:
        fill = fill_colour(augment.cutout_fill, mean)
        operations.append(Cutout(augment.cutout_holes, augment.cutout_size, fill, seed=seed))
    return operations
