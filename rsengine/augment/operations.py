"""Pad-and-crop, horizontal flip and Cutout as FFCV operations.

The loops are numba functions at module level, so that their machine code is cached on disk and compiled once a machine;
FFCV compiles what it generates itself anew in every process. They run in FFCV's thread without the interpreter lock.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from numba import njit

from rsengine.augment.generator import draw, key
from rsengine.device import preserved_threads

with preserved_threads():
    import ffcv  # noqa: F401  (first: ffcv.pipeline cannot be imported by itself)
    from ffcv.pipeline.allocation_query import AllocationQuery
    from ffcv.pipeline.operation import Operation
    from ffcv.pipeline.state import State


class SeededOperation(Operation):
    """Base of the operations: uint8 (N, H, W, 3) images in and out, random numbers from (seed, epoch, index).

    Set :attr:`epoch` before each pass over the data; otherwise every pass augments an image the same way.
    """

    stream = 0  # tells the random numbers of one operation from those of another
    in_place = True

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.seed = seed
        self.epoch = 0

    def apply(self, images: np.ndarray, destination: np.ndarray | None, indices: np.ndarray) -> np.ndarray:
        """Augment ``images``, (N, H, W, 3) uint8, whose places in the data set are ``indices``, (N,)."""
        raise NotImplementedError

    def generate_code(self) -> Callable:
        def code(images: np.ndarray, destination: np.ndarray | None, indices: np.ndarray) -> np.ndarray:
            return self.apply(images, destination, np.asarray(indices, dtype=np.int64))

        code.with_indices = True  # asks FFCV for the indices of the batch
        return code

    def declare_state_and_memory(self, previous_state: State) -> tuple[State, AllocationQuery | None]:
        memory = None if self.in_place else AllocationQuery(previous_state.shape, previous_state.dtype)
        return replace(previous_state, jit_mode=False), memory


class RandomCrop(SeededOperation):
    """Pad every side by ``padding`` black pixels and crop back to the size of the image, at a uniform offset."""

    stream, in_place = 1, False

    def __init__(self, padding: int = 4, seed: int = 0) -> None:
        super().__init__(seed)
        self.padding = padding

    def apply(self, images: np.ndarray, destination: np.ndarray | None, indices: np.ndarray) -> np.ndarray:
        out = np.empty_like(images) if destination is None else destination[: len(images)]
        _crop(images, out, indices, self.seed, self.epoch, self.stream, self.padding)
        return out


class HorizontalFlip(SeededOperation):
    """Mirror left to right, in place, with probability one half."""

    stream = 2

    def apply(self, images: np.ndarray, destination: np.ndarray | None, indices: np.ndarray) -> np.ndarray:
        _flip(images, indices, self.seed, self.epoch, self.stream)
        return images


class Cutout(SeededOperation):
    """Blank ``holes`` squares of ``size`` x ``size`` pixels, in place (DeVries & Taylor, arXiv 1708.04552).

    Centres are uniform over the pixels of the image, so that a square may reach over the border and is clipped there.

    Args:
        fill: uint8 colour of the squares; the mean colour of the data set becomes 0 once normalised.
    """

    stream = 3

    def __init__(self, holes: int = 1, size: int = 8, fill: Sequence[int] = (0, 0, 0), seed: int = 0) -> None:
        super().__init__(seed)
        self.holes, self.size = holes, size
        self.fill = np.asarray(fill, dtype=np.uint8)

    def apply(self, images: np.ndarray, destination: np.ndarray | None, indices: np.ndarray) -> np.ndarray:
        _cutout(images, indices, self.seed, self.epoch, self.stream, self.holes, self.size, self.fill)
        return images


@njit(cache=True, nogil=True)
def _crop(images, out, indices, seed, epoch, stream, padding):
    n, height, width, channels = images.shape
    for i in range(n):
        image_key = key(seed, epoch, indices[i], stream)
        top = draw(image_key, 0, 2 * padding + 1) - padding
        left = draw(image_key, 1, 2 * padding + 1) - padding
        for y in range(height):
            for x in range(width):
                inside = 0 <= y + top < height and 0 <= x + left < width
                for c in range(channels):
                    out[i, y, x, c] = images[i, y + top, x + left, c] if inside else np.uint8(0)


@njit(cache=True, nogil=True)
def _flip(images, indices, seed, epoch, stream):
    n, height, width, channels = images.shape
    for i in range(n):
        if draw(key(seed, epoch, indices[i], stream), 0, 2) == 1:
            for y in range(height):
                for x in range(width // 2):
                    for c in range(channels):
                        mirrored = images[i, y, width - 1 - x, c]
                        images[i, y, width - 1 - x, c] = images[i, y, x, c]
                        images[i, y, x, c] = mirrored


@njit(cache=True, nogil=True)
def _cutout(images, indices, seed, epoch, stream, holes, size, fill):
    n, height, width, channels = images.shape
    for i in range(n):
        image_key = key(seed, epoch, indices[i], stream)
        for hole in range(holes):
            top = draw(image_key, 2 * hole, height) - size // 2
            left = draw(image_key, 2 * hole + 1, width) - size // 2
            for y in range(max(top, 0), min(top + size, height)):
                for x in range(max(left, 0), min(left + size, width)):
                    for c in range(channels):
                        images[i, y, x, c] = fill[c]
