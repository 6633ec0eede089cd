"""Batches from a ``.beton`` file by memory map, made in a thread of their own, for machines without FFCV.

The images are copied from the map, or decoded by Pillow where they are stored as JPEG, and augmented by the operations
of :mod:`rsengine.augment`. All of that releases the GIL, so it works beside the training step.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rsengine.cache import keep_compiled_code
from rsengine.data.beton.reader import MODE_RAW
from rsengine.data.errors import DataError, UserError
from rsengine.errors import LoaderError
from rsengine.input.loader import BetonLoader

BATCHES_AHEAD = 3  # at most this many wait for the caller


class StreamLoader(BetonLoader):
    """The batches of rsengine's own stream."""

    def __init__(self, path: Path | str, batch_size: int, **options: Any) -> None:
        super().__init__(path, batch_size, **options)
        keep_compiled_code()  # before the first import of numba
        from rsengine.input.gather import gather

        height, width = self.image_size
        self._all_raw = bool((self.reader.modes == MODE_RAW).all())
        if self._all_raw and (self.reader.sizes != height * width * 3).any():
            raise DataError(f"{path}: images are not as long as {height}x{width} pixels; convert the data set again")
        self._gather, self._file = gather, np.memmap(path, np.uint8, "r").view(np.ndarray)

    def epoch(self, epoch: int = 0, *, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        order = self.order(epoch, start)
        places = [order[i : i + self.part_size] for i in range(0, len(order), self.part_size)]
        return ahead(lambda number: self._batch(places[number], epoch), len(places))

    def _batch(self, chosen: np.ndarray, epoch: int) -> tuple[Tensor, Tensor]:
        images = torch.empty(len(chosen), *self.image_size, 3, dtype=torch.uint8)
        pixels = images.numpy()
        self._read(chosen, pixels)
        for operation in self.augmentations:
            operation.apply(pixels, chosen, epoch)
        return images, torch.from_numpy(self.reader.labels[chosen])

    def _read(self, chosen: np.ndarray, out: np.ndarray) -> None:
        """Fill ``out``, (N, H, W, 3) uint8, with images as they are stored."""
        if self._all_raw:
            self._gather(self._file, self.reader.pointers, chosen, out.reshape(len(out), -1))
        else:
            for place, image in zip(chosen.tolist(), out, strict=True):
                image[:] = self.reader.image(place)


def ahead(make: Callable[[int], Any], count: int, most: int = BATCHES_AHEAD) -> Iterator[Any]:
    """``make(0)`` to ``make(count - 1)``, made in a thread that is at most ``most`` of them ahead of the caller.

    The thread begins with the first of them and has ended when the iterator has, at its end or when it is closed.

    Raises:
        LoaderError: ``make`` raised something else than a :class:`UserError`, which is passed on as it is.
    """
    ready: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()
    room = threading.Semaphore(most)
    closed = threading.Event()

    def work() -> None:
        try:
            for number in range(count):
                room.acquire()
                if closed.is_set():
                    return
                ready.put((make(number), None))
        except BaseException as error:  # the caller raises it
            ready.put((None, error))

    thread = threading.Thread(target=work, name="rsengine batches", daemon=True)
    thread.start()
    try:
        for _ in range(count):
            made, error = ready.get()
            if isinstance(error, UserError):
                raise error
            if error is not None:
                what = " ".join(f"{type(error).__name__}: {error}".split())
                raise LoaderError(f"the data pipeline's thread ended early: {what}") from error
            room.release()
            yield made
    finally:
        closed.set()
        room.release()
        thread.join()
