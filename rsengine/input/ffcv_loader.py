"""Batches from a ``.beton`` file through FFCV, without FFCV's pitfalls. Importing this module imports FFCV.

FFCV sets torch's thread count to its own number of workers, returns views of a buffer that it will overwrite, leaves
its thread running when a loop ends early, or waiting forever if that is near the end of an epoch, and hangs forever
when that thread dies. Here the thread count is restored, batches are copies, the thread is always ended and joined, and
its death raises an error.
"""

from __future__ import annotations

import contextlib
import queue
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rsengine.augment import for_ffcv
from rsengine.device import preserved_threads
from rsengine.errors import LoaderError
from rsengine.input.loader import BetonLoader

with preserved_threads():
    import ffcv  # noqa: F401  (first: ffcv.loader cannot be imported by itself)
    from ffcv.fields.decoders import IntDecoder, SimpleRGBImageDecoder
    from ffcv.loader import Loader
    from ffcv.loader.epoch_iterator import EpochIterator
    from ffcv.transforms import ToTensor
    from ffcv.traversal_order.base import TraversalOrder


class FfcvLoader(BetonLoader):
    """The batches through FFCV, in its thread. FFCV prints the error of a pipeline that fails itself."""

    def __init__(self, path: Path | str, batch_size: int, **options: Any) -> None:
        super().__init__(path, batch_size, **options)
        self._operations = for_ffcv(self.augmentations)
        self._order = _Order(np.arange(len(self.reader)))
        with preserved_threads():
            self._loader = Loader(
                str(path),
                batch_size=self.part_size,
                num_workers=1,  # decodes several hundred thousand CIFAR images a second
                order=self._order,
                drop_last=self.drop_last,
                seed=self.seed,
                pipelines={
                    "image": [SimpleRGBImageDecoder(), *self._operations, ToTensor()],
                    "label": [IntDecoder(), ToTensor()],
                },
            )

    def epoch(self, epoch: int = 0, *, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        for operation in self._operations:
            operation.epoch = epoch
        order = self.order(epoch, start)
        if not len(order):
            return
        self._order.images = order
        self._loader.next_epoch = epoch
        threads = torch.get_num_threads()
        with preserved_threads():
            iterator = iter(self._loader)
        try:
            for number in range(-(-len(order) // self.part_size)):
                images, labels = _next(iterator)
                if number == 0:  # FFCV's thread sets torch's threads once, before its first batch
                    torch.set_num_threads(threads)
                yield images.clone(), labels.flatten().clone()
        finally:
            _end(iterator)


class _Order(TraversalOrder):
    """FFCV's traversal order: the places that :attr:`images` holds. FFCV calls it once with its loader."""

    def __init__(self, images: np.ndarray) -> None:
        self.images = images
        self.distributed = False

    def __call__(self, loader: Loader) -> _Order:
        return self

    def sample_order(self, epoch: int) -> np.ndarray:
        return self.images.astype(np.uint64)


def _next(iterator: EpochIterator) -> tuple[Tensor, Tensor]:
    """``next(iterator)``, but with an error instead of an endless wait if the thread has died."""
    while iterator.output_queue.empty():
        if not iterator.is_alive() and iterator.output_queue.empty():
            raise LoaderError("the data pipeline's thread ended early; its own error is printed above")
        time.sleep(0.0005)
    return next(iterator)


def _end(iterator: EpochIterator) -> None:
    """Let the thread make no further batch, and wait for its end. It stops only where the queue has room for what it
    puts there, the mark of the epoch's end included."""
    iterator.iter_ixes = iter(())
    iterator.close()
    while iterator.is_alive():
        with contextlib.suppress(queue.Empty):
            iterator.output_queue.get(timeout=0.01)
    iterator.join()
