"""Writes the samples of a split to a .beton file and measures them in the same pass, and checks what was written.

Threads decode and encode: Pillow lets others run while it does, and reading a file takes time of its own. The images
are written in their order by the caller's thread, and only a few are in memory at a time.
"""

from __future__ import annotations

import contextlib
import io
import warnings
import zlib
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from rsengine.data.beton.reader import MODE_RAW, MODES, BetonReader
from rsengine.data.beton.writer import BetonWriter
from rsengine.data.errors import DataError, few
from rsengine.data.sources.images import Split

JPEG_QUALITY, JPEG_SIDE = 95, 65500  # the longest side that libjpeg writes, pixels
CHUNK, CHUNK_BYTES = 64, 1 << 23  # samples in a task of a thread, and bytes of pixels: the fewer of both
BLOCK = 1 << 20  # pixels counted at a time


@dataclass(eq=False)
class Measured:
    """What was found in samples, and of how many of them.

    Attributes:
        heights, widths: of each sample, pixels.
        checksums: crc32 of each image as stored.
        digests: sha256 of each encoded picture; empty where the pixels were in memory.
        values: (3, 256) int64, how often each value occurs in a channel.
        bad: name and error of each sample that cannot be decoded; nothing else is said of it.
    """

    heights: list[int] = field(default_factory=list)
    widths: list[int] = field(default_factory=list)
    checksums: list[int] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)
    values: np.ndarray = field(default_factory=lambda: np.zeros((3, 256), np.int64))
    bad: list[tuple[str, DataError]] = field(default_factory=list)

    def add(self, other: Measured) -> None:
        """Append what was found in the samples that follow."""
        for name in ("heights", "widths", "checksums", "digests", "bad"):
            getattr(self, name).extend(getattr(other, name))
        self.values += other.values

    def mean_and_std(self) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
        """Per-channel mean and population standard deviation, white being 1.

        The sums are whole numbers of any length, so the only rounding is that of the last division and root.
        """
        mean, std = [], []
        for channel in self.values.tolist():
            n = sum(channel)
            s = sum(value * times for value, times in enumerate(channel))
            q = sum(value * value * times for value, times in enumerate(channel))
            mean.append(s / n / 255)
            std.append(((n * q - s * s) / (n * n)) ** 0.5 / 255)
        return (mean[0], mean[1], mean[2]), (std[0], std[1], std[2])


def write_split(
    path: Path, split: Split, *, image_format: str = "raw", workers: int = 1, progress: bool = False
) -> Measured:
    """Decode all samples of `split` in `workers` threads and write them to `path`, as raw pixels or as JPEG.

    Samples that cannot be decoded are no error yet, see :func:`refuse_bad`, but then the file is not finished.

    Raises:
        DataError: an image that does not fit in a .beton file.
        OSError: the disk is full.
    """
    found, mode = Measured(), MODES[image_format]
    with (
        tqdm(total=len(split), desc=path.stem, unit="img", leave=False, disable=None if progress else True) as bar,
        BetonWriter(path, split.labels) as writer,
        warnings.catch_warnings(),  # decoding sets the filters, and threads put them back in any order
        contextlib.closing(_parts(split, mode, workers)) as parts,
    ):
        for images, part in parts:
            found.add(part)
            bar.update(len(part.heights) + len(part.bad))
            if not found.bad:
                for image, height, width in zip(images, part.heights, part.widths, strict=True):
                    writer.append(image, height, width, mode)
        if not found.bad:
            writer.finish()
    return found


def refuse_bad(splits: Iterable[Measured]) -> None:
    """Raise one DataError that names the samples of all splits that cannot be decoded, if there are any."""
    bad = [each for one in splits for each in one.bad]
    if not bad:
        return
    error, others = bad[0][1], [name for name, _ in bad[1:]]
    if not others:
        raise error
    raise DataError(f"{error}; {len(others):,} more cannot be used either: {few(others)}") from error


def verify_beton(path: Path, labels: np.ndarray, measured: Measured, image_format: str) -> None:
    """Compare a .beton file with what was to be written: labels, sizes, storage mode and every stored byte.

    Raises:
        DataError: they differ.
    """
    beton, again = BetonReader(path), "the disk or the memory may be faulty; run it again"
    if not np.array_equal(beton.labels, labels):
        raise DataError(f"{path.name}: the labels read back differ from those written; {again}")
    if not (np.array_equal(beton.heights, measured.heights) and np.array_equal(beton.widths, measured.widths)):
        raise DataError(f"{path.name}: the image sizes read back differ from those written; {again}")
    if not (beton.modes == MODES[image_format]).all():
        raise DataError(f"{path.name}: the images are not stored as {image_format}; {again}")
    for index, checksum in enumerate(measured.checksums):
        if zlib.crc32(beton.stored(index)) != checksum:
            raise DataError(f"{path.name}: image {index} read back differs from what was written; {again}")


def count_shared(train: Path, test: Path, measured: tuple[Measured, Measured]) -> int:
    """How many images of the second .beton file are in the first too, byte for byte as stored.

    Args:
        train, test: the files.
        measured: what was found when they were written, whose checksums tell which images to compare.
    """
    readers, places = (BetonReader(train), BetonReader(test)), defaultdict(list)
    for index, key in enumerate(_keys(measured[0])):
        places[key].append(index)
    return sum(
        any(np.array_equal(readers[0].stored(other), readers[1].stored(index)) for other in places.get(key, ()))
        for index, key in enumerate(_keys(measured[1]))
    )


def _keys(measured: Measured) -> Iterator[tuple[int, int, int]]:
    return zip(measured.checksums, measured.heights, measured.widths, strict=True)


def _parts(split: Split, mode: int, workers: int) -> Iterator[tuple[list[bytes | np.ndarray], Measured]]:
    """The stored images of one part of `split` after another, and what was found in them."""
    waiting: deque[Future[tuple[list[bytes | np.ndarray], Measured]]] = deque()
    start, length, largest = 0, 1, 1  # the first picture tells how many of its size are few enough
    pool = ThreadPoolExecutor(workers)
    try:
        while start < len(split) or waiting:
            while start < len(split) and len(waiting) < 2 * workers:
                stop = min(start + length, len(split))
                waiting.append(pool.submit(_part, split, start, stop, mode))
                start = stop
            images, part = waiting.popleft().result()
            largest = max([largest, *(3 * h * w for h, w in zip(part.heights, part.widths, strict=True))])
            length = max(1, min(CHUNK, CHUNK_BYTES // largest))
            yield images, part
    finally:
        pool.shutdown(cancel_futures=True)


def _part(split: Split, start: int, stop: int, mode: int) -> tuple[list[bytes | np.ndarray], Measured]:
    pixels, images, part = [], [], Measured()
    for index in range(start, stop):
        try:
            image, digest = split.load(index)
            image = np.ascontiguousarray(image)
            stored = image if mode == MODE_RAW else _jpeg(image, split.name(index))
        except DataError as error:
            part.bad.append((split.name(index), error))
            continue
        pixels.append(image.reshape(-1, 3))
        images.append(stored)
        part.heights.append(image.shape[0])
        part.widths.append(image.shape[1])
        part.checksums.append(zlib.crc32(stored))
        part.digests += [digest] if digest else []
    if pixels:
        part.values += _values(np.concatenate(pixels) if len(pixels) > 1 else pixels[0])
    return images, part


def _jpeg(image: np.ndarray, name: str) -> bytes:
    if max(image.shape) > JPEG_SIDE:
        raise DataError(f"{name}: a side of more than {JPEG_SIDE} pixels cannot be stored as jpg; use --size")
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=JPEG_QUALITY)
    return buffer.getvalue()


def _values(pixels: np.ndarray) -> np.ndarray:
    """How often each value occurs in a channel of (N, 3) uint8: (3, 256) int64."""
    counts = np.zeros((3, 256), np.int64)
    for start in range(0, len(pixels), BLOCK):
        for channel, count in enumerate(counts):
            count += np.bincount(pixels[start : start + BLOCK, channel], minlength=256)
    return counts
