"""Write .beton files with numpy alone, as FFCV's DatasetWriter with one worker does, byte for byte.

The layout is described in `rsengine.data.beton.reader`. FFCV fetches whole pages, so no image goes over the end of one.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from rsengine.data.beton.reader import (
    ALLOCATION,
    BETON_VERSION,
    FIELD,
    FIELD_TYPES,
    HEADER,
    LARGEST_PAGE,
    METADATA,
    SAMPLE,
    SMALLEST_PAGE,
)
from rsengine.data.errors import DataError

USUAL_PAGE = 1 << 23  # bytes, FFCV's own choice
BUFFER = 1 << 20  # bytes written at once


class BetonWriter:
    """A .beton file of a known number of samples, which are appended in order.

    The file becomes one that can be read in :meth:`finish`; a process that ends before leaves one without a header.

    Args:
        path: the file, which must not exist.
        labels: (N,) int64, N at least 1.

    Attributes:
        page_size: bytes in a page, a power of two, chosen by the first image; doubled where a later one does not fit.
    """

    def __init__(self, path: Path, labels: np.ndarray) -> None:
        self.page_size = SMALLEST_PAGE
        self._samples = np.zeros(len(labels), SAMPLE)
        self._samples["label"] = labels
        self._table = np.zeros(len(labels), ALLOCATION)
        self._count = 0
        self._end = METADATA + self._samples.nbytes
        self._file = path.open("xb", buffering=BUFFER)

    def append(self, stored: bytes | np.ndarray, height: int, width: int, mode: int) -> None:
        """Write the next image.

        Args:
            stored: raw (height, width, 3) uint8 RGB, contiguous, or the bytes of a JPEG.
            height, width: pixels.
            mode: MODE_RAW or MODE_JPEG.

        Raises:
            DataError: larger than the largest page.
            OSError: the disk is full.
        """
        size = memoryview(stored).nbytes
        if size > LARGEST_PAGE:
            raise DataError(f"an image of {size} bytes is too large for a .beton file; use --size")
        least = size if self._count else max(size, min(size * len(self._samples), USUAL_PAGE))
        while self.page_size < least:
            self.page_size *= 2  # what is written stays valid: what is inside a small page is inside a larger one
        if not self._count or self._end // self.page_size != (self._end + size - 1) // self.page_size:
            self._end = _next_page(self._end, self.page_size)
            self._file.seek(self._end)
        self._samples["image"][self._count] = mode, width, height, self._end
        self._table[self._count] = self._count, self._end, size
        self._file.write(stored)
        self._count += 1
        self._end += size

    def finish(self) -> None:
        """Write all but the images, the header last. Raises OSError when the disk is full."""
        table = _next_page(self._end, self.page_size)
        self._file.seek(table)
        self._file.write(self._table)
        self._file.seek(HEADER.itemsize)
        fields = np.zeros(len(FIELD_TYPES), FIELD)
        for field, (name, kind) in zip(fields, FIELD_TYPES.items(), strict=True):
            field["type"] = kind
            field["name"][: len(name)] = np.frombuffer(name.encode("ascii"), np.uint8)
        self._file.write(fields)
        self._file.write(self._samples)
        self._file.seek(0)
        self._file.write(np.array((BETON_VERSION, len(fields), self.page_size, self._count, table), HEADER))
        self._file.flush()

    def __enter__(self) -> BetonWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()


def _next_page(position: int, page: int) -> int:
    return -(-position // page) * page
