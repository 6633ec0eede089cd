"""The augmentations of a data pipeline on the CPU: pad-and-crop, flips, Cutout, and the policies.

The loops are numba functions at module level, which are compiled once per machine and cached on disk. They run in the
thread of a loader and release the GIL. :mod:`rsengine.augment.ffcv_operations` makes FFCV's operations of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from numba import njit

from rsengine.augment import policies
from rsengine.augment.generator import below, philox
from rsengine.augment.pixels import copy_pixels
from rsengine.augment.policy_loop import program_arrays, run_augmix, run_policy
from rsengine.augment.program import Program, compile_policy
from rsengine.kernels.augment_tables import (
    CROP_STREAM,
    CUTOUT_STREAM,
    FLIP_STREAM,
    check_colour,
    check_crop_padding,
)


class SeededOperation:
    """Base of the operations: a function of the images and of (seed, epoch, index of each image) alone."""

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def apply(self, images: np.ndarray, indices: np.ndarray, epoch: int = 0) -> np.ndarray:
        """Augment ``images``, (N, H, W, 3) uint8, contiguous, in place and return them.

        ``indices``: (N,) int64, the places of the images in the data set.
        """
        raise NotImplementedError


class RandomCrop(SeededOperation):
    """Pad every side by ``padding`` pixels and crop back to the size of the image, at a uniform offset.

    Args:
        mode: ``"zero"`` pads with black, ``"reflect"`` with the image mirrored at its border pixels, which are not
            repeated; the padding is then less than each side.
    """

    def __init__(self, padding: int = 4, mode: str = "zero", seed: int = 0) -> None:
        super().__init__(seed)
        if padding < 0:
            raise ValueError(f"RandomCrop: expected padding >= 0; got {padding}")
        if mode not in policies.CROP_MODES:
            raise ValueError(f"RandomCrop: expected mode {' or '.join(policies.CROP_MODES)}; got {mode!r}")
        self.padding, self.mode = padding, mode

    def apply(self, images: np.ndarray, indices: np.ndarray, epoch: int = 0) -> np.ndarray:
        check_crop_padding("RandomCrop: padding", self.padding, images.shape[1:3], reflect=self.mode == "reflect")
        if self.mode == "reflect":
            _crop_reflect(images, indices, self.seed, epoch, self.padding)
        else:
            _crop(images, indices, self.seed, epoch, self.padding)
        return images


class HorizontalFlip(SeededOperation):
    """Mirror left to right with probability one half."""

    alternating = False

    def apply(self, images: np.ndarray, indices: np.ndarray, epoch: int = 0) -> np.ndarray:
        _flip(images, indices, self.seed, epoch, self.alternating)
        return images


class AlternatingFlip(HorizontalFlip):
    """Mirror each image left to right in every other epoch, half of them in the first (Jordan 2024, arXiv 2404.00498).

    In two epochs in a row the network sees every image both ways, which a random flip leaves to chance.
    """

    alternating = True


class Cutout(SeededOperation):
    """Blank ``holes`` squares of ``size`` x ``size`` pixels (DeVries & Taylor, arXiv 1708.04552).

    Centres are uniform over the pixels of the image, so that a square may reach over the border and is clipped there.

    Args:
        fill: uint8 colour of the squares; the mean colour of the data set becomes 0 once normalised.
    """

    def __init__(self, holes: int = 1, size: int = 8, fill: Sequence[int] = (0, 0, 0), seed: int = 0) -> None:
        super().__init__(seed)
        if holes < 1 or size < 1:
            raise ValueError(f"Cutout: expected holes >= 1 and size >= 1; got {holes}, {size}")
        self.holes, self.size = holes, size
        self.fill = _colour(fill)

    def apply(self, images: np.ndarray, indices: np.ndarray, epoch: int = 0) -> np.ndarray:
        _cutout(images, indices, self.seed, epoch, self.holes, self.size, self.fill)
        return images


class PolicyOperation(SeededOperation):
    """A policy of :mod:`rsengine.augment.policies`, on images of any one size.

    Args:
        make: returns the policy for images of a size (height, width).
        interpolation: ``"nearest"`` or ``"bilinear"``, for shears, translations and rotations.
        fill: uint8 colour of the pixels that these uncover.
    """

    def __init__(
        self,
        make: Callable[[tuple[int, int]], policies.Policy],
        interpolation: str = "nearest",
        fill: Sequence[int] = (0, 0, 0),
        seed: int = 0,
    ) -> None:
        super().__init__(seed)
        if interpolation not in policies.INTERPOLATIONS:
            raise ValueError(f"interpolation: expected {' or '.join(policies.INTERPOLATIONS)}; got {interpolation!r}")
        self.make, self.bilinear, self.fill = make, interpolation == "bilinear", _colour(fill)
        make((32, 32))  # so that wrong numbers are refused here, and not in a loader's thread
        self._compiled: tuple[Program, tuple[np.ndarray, ...]] | None = None

    def program(self, size: tuple[int, int]) -> Program:
        """The policy compiled for images of ``size`` (height, width)."""
        if self._compiled is None or self._compiled[0].size != size:
            program = compile_policy(self.make(size), size)
            self._compiled = program, program_arrays(program)
        return self._compiled[0]

    def apply(self, images: np.ndarray, indices: np.ndarray, epoch: int = 0) -> np.ndarray:
        program = self.program(images.shape[1:3])
        _, tables = self._compiled
        if not len(images):
            return images
        if program.chains:
            run_augmix(images, indices, self.seed, epoch, tables, program.chains, self.bilinear, self.fill)
        else:
            run_policy(images, indices, self.seed, epoch, tables, self.bilinear, self.fill)
        return images


class AutoAugment(PolicyOperation):
    """AutoAugment: see :func:`rsengine.augment.policies.autoaugment`. ``policy``: cifar10, imagenet or svhn."""

    def __init__(
        self, policy: str = "cifar10", interpolation: str = "nearest", fill: Sequence[int] = (0, 0, 0), seed: int = 0
    ) -> None:
        super().__init__(partial(policies.autoaugment, name=policy), interpolation, fill, seed)


class RandAugment(PolicyOperation):
    """RandAugment: see :func:`rsengine.augment.policies.randaugment`, whose arguments these are."""

    def __init__(
        self,
        num_ops: int = 2,
        magnitude: float = 9,
        bins: int = 31,
        *,
        magnitude_std: float = 0.0,
        increasing: bool = False,
        interpolation: str = "nearest",
        fill: Sequence[int] = (0, 0, 0),
        seed: int = 0,
    ) -> None:
        numbers = {"num_ops": num_ops, "magnitude": magnitude, "bins": bins, "magnitude_std": magnitude_std}
        super().__init__(partial(policies.randaugment, increasing=increasing, **numbers), interpolation, fill, seed)


class TrivialAugmentWide(PolicyOperation):
    """TrivialAugment-wide: see :func:`rsengine.augment.policies.trivialaugment`."""

    def __init__(self, interpolation: str = "nearest", fill: Sequence[int] = (0, 0, 0), seed: int = 0) -> None:
        super().__init__(policies.trivialaugment, interpolation, fill, seed)


class AugMix(PolicyOperation):
    """AugMix: see :func:`rsengine.augment.policies.augmix`, whose arguments the first three are."""

    def __init__(
        self,
        severity: int = 3,
        width: int = 3,
        depth: int = 3,
        interpolation: str = "nearest",
        fill: Sequence[int] = (0, 0, 0),
        seed: int = 0,
    ) -> None:
        make = partial(policies.augmix, severity=severity, width=width, depth=depth)
        super().__init__(make, interpolation, fill, seed)


def _colour(fill: Sequence[int]) -> np.ndarray:
    check_colour("fill", fill)
    return np.asarray(fill, dtype=np.uint8)


@njit(cache=True, nogil=True)
def _crop(images, indices, seed, epoch, padding):
    n, height, width, channels = images.shape
    rows = images.reshape(n, height, width * channels)
    image = np.empty((height, width * channels), np.uint8)
    for i in range(n):
        words = philox(seed, indices[i], epoch, CROP_STREAM, 0)
        top = below(words[0], 2 * padding + 1) - padding
        left = (below(words[1], 2 * padding + 1) - padding) * channels
        start = min(max(-left, 0), width * channels)
        stop = max(min(width * channels - left, width * channels), 0)
        copy_pixels(images[i], image)
        for y in range(height):
            row = rows[i, y]
            if 0 <= y + top < height:
                source = image[y + top]
                row[:start] = 0
                for x in range(start, stop):  # unsigned, because numba wraps negative places around, pixel by pixel
                    row[np.uint64(x)] = source[np.uint64(x + left)]
                row[stop:] = 0
            else:
                row[:] = 0


@njit(cache=True, nogil=True)
def _mirrored(place, size):
    """``place`` from 1 - size to 2 * size - 2, reflected into the image."""
    return size - 1 - abs(size - 1 - abs(place))


@njit(cache=True, nogil=True)
def _crop_reflect(images, indices, seed, epoch, padding):
    n, height, width, channels = images.shape
    image = np.empty((height, width, channels), np.uint8)
    for i in range(n):
        words = philox(seed, indices[i], epoch, CROP_STREAM, 0)
        top = below(words[0], 2 * padding + 1) - padding
        left = below(words[1], 2 * padding + 1) - padding
        copy_pixels(images[i], image)
        for y in range(height):
            row = _mirrored(y + top, height)
            for x in range(width):
                column = _mirrored(x + left, width)
                for c in range(channels):
                    images[i, y, x, c] = image[row, column, c]


@njit(cache=True, nogil=True)
def _flip(images, indices, seed, epoch, alternating):
    n, height, width, channels = images.shape
    for i in range(n):
        if alternating:
            mirror = (below(philox(seed, indices[i], 0, FLIP_STREAM, 0)[0], 2) + epoch) % 2 == 1
        else:
            mirror = below(philox(seed, indices[i], epoch, FLIP_STREAM, 0)[0], 2) == 1
        if mirror:
            for y in range(height):
                for x in range(width // 2):
                    for c in range(channels):
                        other = images[i, y, width - 1 - x, c]
                        images[i, y, width - 1 - x, c] = images[i, y, x, c]
                        images[i, y, x, c] = other


@njit(cache=True, nogil=True)
def _cutout(images, indices, seed, epoch, holes, size, fill):
    n, height, width, channels = images.shape
    for i in range(n):
        for block in range((holes + 1) // 2):
            words = philox(seed, indices[i], epoch, CUTOUT_STREAM, block)
            _blank(images[i], words[0], words[1], size, fill)
            if 2 * block + 1 < holes:
                _blank(images[i], words[2], words[3], size, fill)


@njit(cache=True, nogil=True)
def _blank(image, row_word, column_word, size, fill):
    height, width, channels = image.shape
    top = below(row_word, height) - size // 2
    left = below(column_word, width) - size // 2
    for y in range(max(top, 0), min(top + size, height)):
        for x in range(max(left, 0), min(left + size, width)):
            for c in range(channels):
                image[y, x, c] = fill[c]
