"""What all loaders of ``.beton`` files share: the order of the images, and how an epoch is cut into batches."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from rsengine.data.beton.reader import BetonReader
from rsengine.errors import LoaderError, smaller_batch
from rsengine.output import counted
from rsengine.parallel.ranks import ALONE, Ranks

if TYPE_CHECKING:
    from rsengine.augment import SeededOperation


def epoch_order(seed: int, epoch: int, count: int) -> np.ndarray:
    """The order of ``count`` images in a shuffled epoch: a permutation, (count,) int64, of (seed, epoch) alone."""
    return np.random.default_rng((seed, epoch)).permutation(count)


class BetonLoader(ABC):
    """Batches of one ``.beton`` file of images of one size. Each class gives the same ones for the same arguments.

    Args:
        path: the file.
        batch_size: images a batch, over all processes.
        augmentations: applied to each image, see :mod:`rsengine.augment`.
        shuffle: a new order each epoch, from ``seed`` and the epoch alone; otherwise the order of the file.
        drop_last: leave out the last batch where it is not full.
        ranks: the processes that share the batches, of which each gets its part. They divide ``batch_size``.

    Attributes:
        reader: of the file.
        image_size: (height, width) in pixels.

    Raises:
        LoaderError: the images differ in size, or do not fill a batch.
        DataError: the file is damaged.
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
        ranks: Ranks = ALONE,
    ) -> None:
        self.reader = BetonReader(Path(path))
        self.batch_size, self.augmentations = batch_size, list(augmentations)
        self.shuffle, self.drop_last, self.seed, self.ranks = shuffle, drop_last, seed, ranks
        self.part_size = batch_size // ranks.size  # images of a batch in this process
        count = len(self.reader)
        if len(self) == 0:
            raise LoaderError(
                f"{path}: {counted(count, 'image')} cannot fill one batch of {batch_size}; {smaller_batch(count)}"
            )
        heights, widths = self.reader.heights, self.reader.widths
        self.image_size = int(heights[0]), int(widths[0])
        if (heights != heights[0]).any() or (widths != widths[0]).any():
            raise LoaderError(f"{path}: expected images of one size; got several; convert them again with --size N")

    def __len__(self) -> int:
        """Batches in an epoch."""
        full, rest = divmod(len(self.reader), self.batch_size)
        return full + (rest > 0 and not self.drop_last)

    def order(self, epoch: int, start: int) -> np.ndarray:
        """The places in the file of an epoch's images from batch ``start`` on, (M,) int64: this process's part.

        Every batch but the last has :attr:`part_size` of them; that may have fewer, or none in some of the processes.
        """
        count = len(self.reader)
        order = epoch_order(self.seed, epoch, count) if self.shuffle else np.arange(count)
        return self.ranks.part(order[start * self.batch_size : len(self) * self.batch_size])

    @abstractmethod
    def epoch(self, epoch: int = 0, *, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of one epoch from batch ``start`` on, owned by the caller. Close it when leaving early.

        Each is (N, H, W, 3) uint8 images and (N,) int64 labels; none is empty.

        Raises:
            LoaderError: the pipeline fails.
        """
