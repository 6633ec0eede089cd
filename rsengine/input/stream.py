"""Batches from a ``.beton`` file through FFCV, without FFCV's pitfalls.

FFCV sets torch's thread count to its own number of workers, returns views of a buffer that it will overwrite, leaves
its thread running when a loop ends early, or waiting forever if that is near the end of an epoch, hangs forever when
that thread dies, and reads wherever a damaged file says. Here the thread count is restored, batches are copies, the
thread is always ended and joined, its death raises an error, and the file is checked first.
"""

from __future__ import annotations

import contextlib
import queue
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rsengine.augment import SeededOperation, for_ffcv
from rsengine.data.beton.reader import BetonReader
from rsengine.device import preserved_threads
from rsengine.errors import LoaderError, smaller_batch

with preserved_threads():
    import ffcv  # noqa: F401  (first: ffcv.loader cannot be imported by itself)
    from ffcv.fields.decoders import IntDecoder, SimpleRGBImageDecoder
    from ffcv.loader import Loader
    from ffcv.loader.epoch_iterator import EpochIterator
    from ffcv.transforms import ToTensor
    from ffcv.traversal_order.base import TraversalOrder


class BetonLoader:
    """Batches of one ``.beton`` file of images of one size.

    Args:
        path: the file, with fields ``image`` and ``label``.
        batch_size: images a batch.
        augmentations: applied to each image, see :mod:`rsengine.augment`.
        shuffle: a new order each epoch, from ``seed`` and the epoch alone; otherwise the order of the file.
        drop_last: leave out the last batch where it is not full.
    """

    def __init__(
        self,
        path: Path | str,
        batch_size: int,
        *,
        augmentations: Sequence[SeededOperation] = (),
        shuffle: bool = False,
        drop_last: bool = False,
        seed: int = 0,
    ) -> None:
        BetonReader(path)  # raises DataError for a damaged file
        self.batch_size = batch_size
        self.augmentations = for_ffcv(augmentations)
        self._order = _Order(shuffle, seed)
        with preserved_threads():
            self._loader = Loader(
                str(path),
                batch_size=batch_size,
                num_workers=1,  # decodes several hundred thousand CIFAR images a second
                order=self._order,
                drop_last=drop_last,
                seed=seed,
                pipelines={
                    "image": [SimpleRGBImageDecoder(), *self.augmentations, ToTensor()],
                    "label": [IntDecoder(), ToTensor()],
                },
            )
        if len(self) == 0:
            count = self._order.count
            raise LoaderError(f"{path}: {count} images do not fill one batch of {batch_size}; {smaller_batch(count)}")

    def __len__(self) -> int:
        """Batches in an epoch."""
        return len(self._loader)

    def epoch(self, epoch: int = 0, *, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of one epoch from batch ``start`` on, owned by the caller.

        Each is (N, H, W, 3) uint8 images and (N,) int64 labels. Raises :class:`LoaderError` if the pipeline dies.
        """
        for operation in self.augmentations:
            operation.epoch = epoch
        self._order.skip = start * self.batch_size
        self._loader.next_epoch = epoch
        threads = torch.get_num_threads()
        with preserved_threads():
            iterator = iter(self._loader)
        try:
            for count in range(start, len(self)):
                images, labels = _next(iterator)
                if count == start:  # FFCV's thread sets torch's threads once, before its first batch
                    torch.set_num_threads(threads)
                yield images.clone(), labels.flatten().clone()
        finally:
            _end(iterator)


class _Order(TraversalOrder):
    """FFCV's traversal order, able to begin in the middle of an epoch. FFCV calls it once with its loader."""

    def __init__(self, shuffle: bool, seed: int) -> None:
        self.shuffle, self.seed = shuffle, seed
        self.skip = 0
        self.count = 0
        self.distributed = False

    def __call__(self, loader: Loader) -> _Order:
        self.count = len(loader.indices)
        return self

    def sample_order(self, epoch: int) -> np.ndarray:
        order = (
            np.random.default_rng((self.seed, epoch)).permutation(self.count) if self.shuffle else np.arange(self.count)
        )
        return order[self.skip :].astype(np.uint64)


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
