"""The augmentations as FFCV operations: pad-and-crop, flips, Cutout, and the policies.

The loops are numba functions at module level, which are compiled once per machine and cached on disk; code that FFCV
generates is compiled again in every process. They run in FFCV's thread and release the GIL.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from threading import Thread, current_thread
from types import SimpleNamespace
from weakref import WeakKeyDictionary

import numba as nb
import numpy as np
from numba import njit
from numba.core.dispatcher import Dispatcher
from numba.typed import typeddict

from rsengine.augment import policies
from rsengine.augment.generator import below, philox
from rsengine.augment.policy_loop import program_arrays, run_augmix, run_policy
from rsengine.augment.program import Program, compile_policy
from rsengine.device import preserved_threads
from rsengine.kernels.augment_tables import (
    CROP_STREAM,
    CUTOUT_STREAM,
    FLIP_STREAM,
    check_colour,
    check_crop_padding,
)

# Importing FFCV makes a typed dictionary, whose methods numba would compile in every process, in about three seconds.
# With caching they are compiled once per machine, like our own functions.
for _method in vars(typeddict).values():
    if isinstance(_method, Dispatcher):
        _method.enable_caching()

with preserved_threads():
    import ffcv  # noqa: F401  (first: ffcv.pipeline cannot be imported by itself)
    from ffcv.loader.epoch_iterator import EpochIterator
    from ffcv.memory_managers import os_cache
    from ffcv.pipeline.allocation_query import AllocationQuery
    from ffcv.pipeline.operation import Operation
    from ffcv.pipeline.state import State


class _ReadOnly:
    """A numba scalar type whose array types are read-only."""

    def __init__(self, dtype: nb.types.Type):
        self._dtype = dtype

    def __getitem__(self, layout: slice | tuple[slice, ...]) -> nb.types.Array:
        return self._dtype[layout].copy(readonly=True)


# FFCV's memory manager makes its array type read-only by writing to it. numba shares one object per type, so functions
# already compiled for such an array could no longer be found under their own key (KeyError at the next compilation).
# A type that is read-only from the start leaves that write without effect.
os_cache.nb = SimpleNamespace(types=nb.types, uint8=_ReadOnly(nb.uint8), uint64=nb.uint64)


class SeededOperation(Operation):
    """Base of the operations: uint8 (N, H, W, 3) images in and out, random numbers from (seed, epoch, index).

    The epoch is the loader's: FFCV counts the passes over its data in ``Loader.next_epoch``, which also decides the
    order of the images. Setting :attr:`epoch` gives the next pass that number, and later passes count on from it.
    """

    in_place = True

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.seed = seed
        self._set = 0
        self._is_for_next_pass = False
        self._ahead_of_loader = 0
        # FFCV runs each pass in a thread of its own, and one that was abandoned may still be working on a batch.
        self._passes: WeakKeyDictionary[Thread, int] = WeakKeyDictionary()

    @property
    def epoch(self) -> int:
        """In the thread of a pass, the number of that pass; elsewhere the number last set, initially 0."""
        return self._passes.get(current_thread(), self._set)

    @epoch.setter
    def epoch(self, number: int) -> None:
        self._set, self._is_for_next_pass = number, True

    def _begin_pass(self, iterator: EpochIterator) -> None:
        number = iterator.loader.next_epoch - 1  # counted up before the thread begins
        if self._is_for_next_pass:
            self._ahead_of_loader, self._is_for_next_pass = self._set - number, False
        self._passes[iterator] = number + self._ahead_of_loader

    def apply(self, images: np.ndarray, destination: np.ndarray | None, indices: np.ndarray) -> np.ndarray:
        """Augment ``images``, (N, H, W, 3) uint8, whose places in the data set are ``indices``, (N,)."""
        raise NotImplementedError

    def generate_code(self) -> Callable:
        def code(images: np.ndarray, destination: np.ndarray | None, indices: np.ndarray) -> np.ndarray:
            iterator = current_thread()
            if isinstance(iterator, EpochIterator) and iterator not in self._passes:
                self._begin_pass(iterator)
            return self.apply(images, destination, np.asarray(indices, dtype=np.int64))

        code.with_indices = True  # asks FFCV for the indices of the batch
        return code

    def declare_state_and_memory(self, previous_state: State) -> tuple[State, AllocationQuery | None]:
        memory = None if self.in_place else AllocationQuery(previous_state.shape, previous_state.dtype)
        return replace(previous_state, jit_mode=False), memory


class RandomCrop(SeededOperation):
    """Pad every side by ``padding`` pixels and crop back to the size of the image, at a uniform offset.

    Args:
        mode: ``"zero"`` pads with black, ``"reflect"`` with the image mirrored at its border pixels, which are not
            repeated; the padding is then less than each side.
    """

    in_place = False

    def __init__(self, padding: int = 4, mode: str = "zero", seed: int = 0) -> None:
        super().__init__(seed)
        if padding < 0:
            raise ValueError(f"RandomCrop: expected padding >= 0; got {padding}")
        if mode not in policies.CROP_MODES:
            raise ValueError(f"RandomCrop: expected mode {' or '.join(policies.CROP_MODES)}; got {mode!r}")
        self.padding, self.mode = padding, mode

    def apply(self, images: np.ndarray, destination: np.ndarray | None, indices: np.ndarray) -> np.ndarray:
        out = np.empty_like(images) if destination is None else destination[: len(images)]
        check_crop_padding("RandomCrop: padding", self.padding, images.shape[1:3], reflect=self.mode == "reflect")
        if self.mode == "reflect":
            _crop_reflect(images, out, indices, self.seed, self.epoch, self.padding)
        else:
            _crop(images, out, indices, self.seed, self.epoch, self.padding)
        return out


class HorizontalFlip(SeededOperation):
    """Mirror left to right, in place, with probability one half."""

    alternating = False

    def apply(self, images: np.ndarray, destination: np.ndarray | None, indices: np.ndarray) -> np.ndarray:
        _flip(images, indices, self.seed, self.epoch, self.alternating)
        return images


class AlternatingFlip(HorizontalFlip):
    """Mirror each image left to right in every other epoch, half of them in the first (Jordan 2024, arXiv 2404.00498).

    In two epochs in a row the network sees every image both ways, which a random flip leaves to chance.
    """

    alternating = True


class Cutout(SeededOperation):
    """Blank ``holes`` squares of ``size`` x ``size`` pixels, in place (DeVries & Taylor, arXiv 1708.04552).

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

    def apply(self, images: np.ndarray, destination: np.ndarray | None, indices: np.ndarray) -> np.ndarray:
        _cutout(images, indices, self.seed, self.epoch, self.holes, self.size, self.fill)
        return images


class PolicyOperation(SeededOperation):
    """A policy of :mod:`rsengine.augment.policies`, in place, on images of any one size.

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
        make((32, 32))  # so that wrong numbers are refused here, and not in FFCV's thread
        self._compiled: tuple[Program, tuple[np.ndarray, ...]] | None = None

    def program(self, size: tuple[int, int]) -> Program:
        """The policy compiled for images of ``size`` (height, width)."""
        if self._compiled is None or self._compiled[0].size != size:
            program = compile_policy(self.make(size), size)
            self._compiled = program, program_arrays(program)
        return self._compiled[0]

    def apply(self, images: np.ndarray, destination: np.ndarray | None, indices: np.ndarray) -> np.ndarray:
        program = self.program(images.shape[1:3])
        _, tables = self._compiled
        if not len(images):
            return images
        if program.chains:
            run_augmix(images, indices, self.seed, self.epoch, tables, program.chains, self.bilinear, self.fill)
        else:
            run_policy(images, indices, self.seed, self.epoch, tables, self.bilinear, self.fill)
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
def _crop(images, out, indices, seed, epoch, padding):
    n, height, width, channels = images.shape
    for i in range(n):
        words = philox(seed, indices[i], epoch, CROP_STREAM, 0)
        top = below(words[0], 2 * padding + 1) - padding
        left = below(words[1], 2 * padding + 1) - padding
        for y in range(height):
            for x in range(width):
                inside = 0 <= y + top < height and 0 <= x + left < width
                for c in range(channels):
                    out[i, y, x, c] = images[i, y + top, x + left, c] if inside else np.uint8(0)


@njit(cache=True, nogil=True)
def _mirrored(place, size):
    """``place`` from 1 - size to 2 * size - 2, reflected into the image."""
    return size - 1 - abs(size - 1 - abs(place))


@njit(cache=True, nogil=True)
def _crop_reflect(images, out, indices, seed, epoch, padding):
    n, height, width, channels = images.shape
    for i in range(n):
        words = philox(seed, indices[i], epoch, CROP_STREAM, 0)
        top = below(words[0], 2 * padding + 1) - padding
        left = below(words[1], 2 * padding + 1) - padding
        for y in range(height):
            row = _mirrored(y + top, height)
            for x in range(width):
                column = _mirrored(x + left, width)
                for c in range(channels):
                    out[i, y, x, c] = images[i, row, column, c]


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
