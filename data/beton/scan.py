"""Reads every sample of a split once, to prove that it decodes and to measure what dataset.json and the checks need."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace

import numpy as np
from tqdm import tqdm

from rsengine.data.beton.processes import fork_context, start_worker
from rsengine.data.errors import DataError, few
from rsengine.data.sources.images import ArraySplit, Split

CHUNK = 32  # samples in a task; after an error or Ctrl-C, tasks that have begun are completed
FEW = 1024  # below this many samples starting processes costs more than it saves
BLOCK = 1 << 20  # pixels summed at a time
KEEP = 1 << 28  # bytes of decoded images of one size that are kept, so that the writer need not decode them again


@dataclass(frozen=True, eq=False)
class Scan:
    """What was measured on N samples.

    Attributes:
        heights, widths: (N,) int64, pixels.
        checksums: (N,) uint32, crc32 of the RGB bytes of each image.
        means: (N, 3) float32, mean of each image and channel, 0..255.
        digests: sha256 of each encoded picture; empty where the pixels were in memory.
        pixels: number of pixels.
        sums, squares: (3,) Python integers, exact sums over all pixels of the channel values and of their squares.
        images: (N, height, width, 3) uint8, if the images were encoded, share one size and are few enough; else None.
        bad: name and error of each sample that cannot be decoded; its measurements are zeros.
    """

    heights: np.ndarray
    widths: np.ndarray
    checksums: np.ndarray
    means: np.ndarray
    digests: list[bytes]
    pixels: int
    sums: np.ndarray
    squares: np.ndarray
    images: np.ndarray | None = None
    bad: tuple[tuple[str, DataError], ...] = ()

    def mean_and_std(self) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
        """Per-channel mean and population standard deviation, white being 1.

        The sums are whole numbers of any length, so the only rounding is that of the last division and root.
        """
        n = self.pixels
        mean = [s / n / 255 for s in self.sums]
        std = [((n * q - s * s) / (n * n)) ** 0.5 / 255 for s, q in zip(self.sums, self.squares, strict=True)]
        return (mean[0], mean[1], mean[2]), (std[0], std[1], std[2])

    def image_size(self) -> tuple[int, int] | None:
        """(height, width) if all images share it, else None."""
        if np.ptp(self.heights) == 0 and np.ptp(self.widths) == 0:
            return int(self.heights[0]), int(self.widths[0])
        return None

    def largest(self) -> int:
        """Bytes of the largest image, uncompressed."""
        return int((self.heights * self.widths).max()) * 3


def scan(split: Split, *, workers: int, progress: bool, description: str) -> Scan:
    """Decode all samples of `split` in `workers` processes; memory stays bounded by a few images a process.

    Samples that cannot be decoded are no error yet, see :func:`refuse_bad`.

    Raises:
        DataError: a worker that died.
    """
    ranges = [(start, min(start + CHUNK, len(split))) for start in range(0, len(split), CHUNK)]
    with tqdm(total=len(split), desc=description, unit="img", leave=False, disable=None if progress else True) as bar:
        parts, kept = [], 0
        for part in _scans(split, ranges, workers):
            bar.update(len(part.heights))
            kept += 0 if part.images is None else part.images.nbytes
            parts.append(part if kept <= KEEP else replace(part, images=None))
            if kept > KEEP and parts[0].images is not None:  # too many after all: drop those kept so far
                parts = [replace(each, images=None) for each in parts]
    return Scan(
        heights=np.concatenate([part.heights for part in parts]),
        widths=np.concatenate([part.widths for part in parts]),
        checksums=np.concatenate([part.checksums for part in parts]),
        means=np.concatenate([part.means for part in parts]),
        digests=[digest for part in parts for digest in part.digests],
        pixels=sum(part.pixels for part in parts),
        sums=sum(part.sums for part in parts),
        squares=sum(part.squares for part in parts),
        images=_joined([part.images for part in parts]),
        bad=tuple(each for part in parts for each in part.bad),
    )


def refuse_bad(scans: Iterable[Scan]) -> None:
    """Raise one DataError that names the samples of all splits that cannot be decoded, if there are any."""
    bad = [each for one in scans for each in one.bad]
    if not bad:
        return
    error, others = bad[0][1], [name for name, _ in bad[1:]]
    if not others:
        raise error
    raise DataError(f"{error}; {len(others):,} more cannot be used either: {few(others)}") from error


def _scans(split: Split, ranges: list[tuple[int, int]], workers: int) -> Iterator[Scan]:
    if workers <= 1 or len(split) < FEW or _is_ready(split):
        for start, stop in ranges:
            yield scan_part(split.part(start, stop))
        return
    executor = ProcessPoolExecutor(workers, fork_context(), start_worker, (os.getpid(),))
    try:
        yield from executor.map(scan_part, (split.part(start, stop) for start, stop in ranges))
    except BrokenProcessPool as error:
        raise DataError(
            "a decoding process died, probably for want of memory; try again with --workers 1 or a smaller --size"
        ) from error
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


def scan_part(split: Split) -> Scan:
    """`scan` of a small split, in this process."""
    count = len(split)
    heights, widths = np.zeros(count, np.int64), np.zeros(count, np.int64)
    checksums, means = np.zeros(count, np.uint32), np.zeros((count, 3), np.float32)
    digests, pixels, images = [], 0, []
    keep = not _is_ready(split)
    sums, squares = np.zeros(3, object), np.zeros(3, object)
    bad = []
    for index in range(count):
        try:
            image, digest = split.load(index)
        except DataError as error:
            bad.append((split.name(index), error))
            keep = False
            continue
        image = np.ascontiguousarray(image)
        heights[index], widths[index] = image.shape[:2]
        checksums[index] = zlib.crc32(image)
        if digest:
            digests.append(digest)
        keep = keep and image.size * count <= KEEP and image.shape[:2] == (heights[0], widths[0])
        if keep:
            images.append(image)
        flat = image.reshape(-1, 3)
        total = np.zeros(3, np.int64)
        for start in range(0, len(flat), BLOCK):
            # float64 holds these sums exactly: at most 2**20 · 255² < 2**53
            block = flat[start : start + BLOCK].astype(np.float64)
            total += block.sum(axis=0).astype(np.int64)
            squares += np.einsum("pc,pc->c", block, block).astype(np.int64).astype(object)
        means[index] = total / len(flat)
        sums += total.astype(object)
        pixels += len(flat)
    return Scan(
        heights=heights,
        widths=widths,
        checksums=checksums,
        means=means,
        digests=digests,
        pixels=pixels,
        sums=sums,
        squares=squares,
        images=np.stack(images) if keep else None,
        bad=tuple(bad),
    )


def _is_ready(split: Split) -> bool:
    """Whether the pixels are in memory as they will be written."""
    return isinstance(split, ArraySplit) and split.size is None


def _joined(images: list[np.ndarray | None]) -> np.ndarray | None:
    present = [each for each in images if each is not None]
    if len(present) < len(images) or len({each.shape[1:] for each in present}) > 1:
        return None
    return np.concatenate(present)
