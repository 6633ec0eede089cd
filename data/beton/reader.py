"""Read .beton files with numpy alone.

The layout (version 2): a 24-byte header, one 1041-byte descriptor a field, one metadata record a sample, pages with the
pixels, and the allocation table. Only the two fields this project writes are understood: `image` and `label`. It is
used to check what FFCV wrote, and wherever FFCV should not be imported: that takes seconds and changes torch's thread
count.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rsengine.data.errors import DataError

BETON_VERSION = 2
HEADER = np.dtype(
    [("version", "<u2"), ("fields", "<u2"), ("page_size", "<u4"), ("samples", "<u8"), ("table", "<u8")], align=True
)
FIELD = np.dtype([("type", "u1"), ("name", "u1", (16,)), ("arguments", "u1", (1024,))], align=True)
IMAGE = np.dtype([("mode", "u1"), ("width", "<u2"), ("height", "<u2"), ("pointer", "<u8")])
SAMPLE = np.dtype([("image", IMAGE), ("label", "<i8")], align=True)
ALLOCATION = np.dtype([("sample", "<u8"), ("pointer", "<u8"), ("size", "<u8")])
FIELD_TYPES = {"label": 1, "image": 2}  # FFCV's numbers for IntField and RGBImageField
MODE_JPEG, MODE_RAW = 0, 1


@dataclass(frozen=True)
class BetonHeader:
    """What the first bytes of a .beton file say.

    Attributes:
        samples: number of samples.
        page_size: bytes in a page.
        table: offset in bytes of the allocation table.
        size: bytes in the file.
    """

    samples: int
    page_size: int
    table: int
    size: int


def read_header(path: Path) -> BetonHeader:
    """Read and check the header of the .beton file `path`: a few kilobytes, whatever the size of the file.

    Raises:
        DataError: not a .beton file of this project, or cut short.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        raw = file.read(HEADER.itemsize)
        if len(raw) < HEADER.itemsize:
            raise DataError(f"{path}: not a .beton file ({size} bytes); convert the data set again")
        header = np.frombuffer(raw, HEADER)[0]
        if int(header["version"]) != BETON_VERSION or int(header["fields"]) != len(FIELD_TYPES):
            raise DataError(
                f"{path}: not a .beton file with the fields image and label in format {BETON_VERSION}; "
                "convert the data set again"
            )
        raw = file.read(FIELD.itemsize * len(FIELD_TYPES))
    if len(raw) < FIELD.itemsize * len(FIELD_TYPES):
        raise DataError(f"{path}: cut short after {size} bytes; convert the data set again")
    descriptors = np.frombuffer(raw, FIELD)
    names = tuple(bytes(name).split(b"\0")[0].decode("ascii", "replace") for name in descriptors["name"])
    if names != ("image", "label") or [int(t) for t in descriptors["type"]] != [FIELD_TYPES[n] for n in names]:
        raise DataError(f"{path}: its fields are {', '.join(names)}, not image, label; convert the data set again")
    return BetonHeader(int(header["samples"]), int(header["page_size"]), int(header["table"]), size)


class BetonReader:
    """The samples of a .beton file, read through a memory map.

    Attributes:
        header: see `BetonHeader`.
        labels: (N,) int64.
        heights, widths: (N,) int64, pixels.
        modes: (N,) uint8, MODE_RAW or MODE_JPEG.
        pointers, sizes: (N,) int64, where each image lies in the file and its length in bytes.
    """

    def __init__(self, path: Path) -> None:
        """Raises DataError when the file is not a complete .beton file with one allocation a sample."""
        self.path = Path(path)
        self.header = read_header(self.path)
        count = self.header.samples
        expected = self.header.table + count * ALLOCATION.itemsize
        start = HEADER.itemsize + FIELD.itemsize * len(FIELD_TYPES)
        if self.header.table < start + count * SAMPLE.itemsize or self.header.size != expected:
            raise DataError(
                f"{path}: {self.header.size} bytes where {count} samples and their table need {expected}: "
                "the file is incomplete; convert the data set again"
            )
        # A plain view: slicing a memmap object costs several times as much.
        self._bytes = np.memmap(self.path, np.uint8, "r").view(np.ndarray)
        samples = self._bytes[start : start + count * SAMPLE.itemsize].view(SAMPLE)
        image = samples["image"]
        self.labels = samples["label"].astype(np.int64)
        self.heights, self.widths = image["height"].astype(np.int64), image["width"].astype(np.int64)
        self.modes, self.pointers = image["mode"].copy(), image["pointer"].astype(np.int64)
        table = self._bytes[self.header.table :].view(ALLOCATION)
        order = np.argsort(table["sample"], kind="stable")
        if not np.array_equal(table["sample"][order], np.arange(count)):
            raise DataError(f"{path}: the allocation table does not list each sample once; convert the data set again")
        if not np.array_equal(table["pointer"][order].astype(np.int64), self.pointers):
            raise DataError(f"{path}: allocation table and samples disagree; convert the data set again")
        self.sizes = table["size"][order].astype(np.int64)
        if count and int((self.pointers + self.sizes).max()) > self.header.table:
            raise DataError(f"{path}: an image lies outside the pages; convert the data set again")

    def __len__(self) -> int:
        return self.header.samples

    def stored(self, index: int) -> np.ndarray:
        """The bytes of image `index` as stored in the file: (size,) uint8, a view."""
        pointer = int(self.pointers[index])
        return self._bytes[pointer : pointer + int(self.sizes[index])]

    def image(self, index: int) -> np.ndarray:
        """Image `index`: (height, width, 3) uint8 RGB; a view of the file when stored raw.

        Raises:
            DataError: the bytes stored do not make an image of the stated size.
        """
        height, width, mode = int(self.heights[index]), int(self.widths[index]), int(self.modes[index])
        stored = self.stored(index)
        if mode == MODE_RAW:
            if stored.size != height * width * 3:
                raise DataError(f"{self.path}: image {index} has {stored.size} bytes, not {height}×{width}×3")
            return stored.reshape(height, width, 3)
        if mode != MODE_JPEG:
            raise DataError(f"{self.path}: image {index} has the unknown storage mode {mode}")
        from PIL import Image

        with Image.open(io.BytesIO(stored.tobytes()), formats=["JPEG"]) as picture:
            pixels = np.asarray(picture.convert("RGB"))
        if pixels.shape != (height, width, 3):
            raise DataError(f"{self.path}: image {index} decodes to {pixels.shape}, not {height}×{width}×3")
        return pixels
