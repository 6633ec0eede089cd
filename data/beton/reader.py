"""Read and check .beton files with numpy alone.

The layout (version 2): a 24-byte header, one 1041-byte descriptor a field, one metadata record a sample, pages with the
images, and the allocation table. Only the two fields this project writes are understood: `image` and `label`. It is
used to check what was written, and wherever FFCV should not be imported: that takes seconds and changes torch's thread
count. FFCV believes whatever a file says and reads outside it, so the check comes before FFCV too.
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
FIELD_TYPES = {"image": 2, "label": 1}  # in their order; FFCV's numbers for RGBImageField and IntField
METADATA = HEADER.itemsize + FIELD.itemsize * len(FIELD_TYPES)  # where the metadata begin, in bytes
SMALLEST_PAGE, LARGEST_PAGE = 1 << 21, 1 << 31  # bytes, powers of two
MODE_JPEG, MODE_RAW = 0, 1
MODES = {"raw": MODE_RAW, "jpg": MODE_JPEG}
LARGEST_SIDE = (1 << 16) - 1  # pixels
# What comes before height and width in a JPEG of three channels, within so many bytes: FFCV decodes as many pixels as
# are there, however many it made room for.
JPEG_FRAME, JPEG_HEADER = b"\xff\xc0\x00\x11\x08", 1024
AGAIN = "convert the data set again"


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
        raw = file.read(METADATA)
    if len(raw) < HEADER.itemsize:
        raise DataError(f"{path}: not a .beton file ({size} bytes); {AGAIN}")
    header = np.frombuffer(raw, HEADER, 1)[0]
    if int(header["version"]) != BETON_VERSION or int(header["fields"]) != len(FIELD_TYPES):
        raise DataError(f"{path}: not a .beton file with the fields image and label in format {BETON_VERSION}; {AGAIN}")
    if len(raw) < METADATA:
        raise DataError(f"{path}: cut short after {size} bytes; {AGAIN}")
    descriptors = np.frombuffer(raw, FIELD, offset=HEADER.itemsize)
    names = [bytes(name).split(b"\0")[0].decode("ascii", "replace") for name in descriptors["name"]]
    if [(name, int(kind)) for name, kind in zip(names, descriptors["type"], strict=True)] != [*FIELD_TYPES.items()]:
        raise DataError(f"{path}: its fields are {', '.join(names)}, not image, label; {AGAIN}")
    page = int(header["page_size"])
    if page & (page - 1) or not SMALLEST_PAGE <= page <= LARGEST_PAGE:
        raise DataError(f"{path}: states pages of {page} bytes; {AGAIN}")
    return BetonHeader(int(header["samples"]), page, int(header["table"]), size)


class BetonReader:
    """The samples of a .beton file, read through a memory map.

    Attributes:
        header: see `BetonHeader`.
        labels: (N,) int64.
        heights, widths: (N,) int64, pixels.
        modes: (N,) uint8, MODE_RAW or MODE_JPEG.
        pointers, sizes: (N,) int64, where each image lies in the file and its length in bytes.
    """

    def __init__(self, path: Path | str) -> None:
        """Check everything but the pixels, which are not read.

        Raises:
            DataError: the file is not whole, an image lies outside the pages, on another image or over the end of a
                page, or is not what its mode and shape imply.
        """
        self.path = Path(path)
        self.header = header = read_header(self.path)
        count = header.samples
        expected = header.table + count * ALLOCATION.itemsize
        begin = METADATA + count * SAMPLE.itemsize
        if header.table < begin or header.size != expected:
            wrong = "too long" if begin <= header.table and header.size > expected else "incomplete"
            raise DataError(
                f"{path}: {header.size} bytes where {count} samples and their table need {expected}: "
                f"the file is {wrong}; {AGAIN}"
            )
        if not count:
            raise DataError(f"{path}: no samples in it; {AGAIN}")
        # A plain view: slicing a memmap object costs several times as much.
        self._bytes = np.memmap(self.path, np.uint8, "r").view(np.ndarray)
        samples = self._bytes[METADATA:begin].view(SAMPLE)
        image = samples["image"]
        self.labels = samples["label"].astype(np.int64)
        self.heights, self.widths = image["height"].astype(np.int64), image["width"].astype(np.int64)
        self.modes, pointers = image["mode"].copy(), image["pointer"].copy()
        table = self._bytes[header.table :].view(ALLOCATION)
        order = np.argsort(table["sample"], kind="stable")
        if not np.array_equal(table["sample"][order], np.arange(count)):
            raise DataError(f"{path}: the allocation table does not list each sample once; {AGAIN}")
        if not np.array_equal(table["pointer"][order], pointers):
            raise DataError(f"{path}: allocation table and samples disagree; {AGAIN}")
        sizes = table["size"][order]
        end = np.uint64(header.table)
        # In this order, so that no sum of two unsigned numbers goes round.
        self._refuse((pointers < begin) | (pointers > end) | (sizes > end - pointers), "lies outside the pages")
        self.pointers, self.sizes = pointers.astype(np.int64), sizes.astype(np.int64)
        self._refuse((self.modes != MODE_RAW) & (self.modes != MODE_JPEG), "has an unknown storage mode")
        pixels = self.heights * self.widths
        self._refuse((pixels == 0) | (self.sizes == 0), "is empty")
        self._refuse((self.modes == MODE_RAW) & (self.sizes != 3 * pixels), "has another length than its shape implies")
        self._refuse(
            self.pointers // header.page_size != (self.pointers + self.sizes - 1) // header.page_size,
            "goes over the end of a page",
        )
        places = np.argsort(self.pointers)
        overlaps = np.zeros(count, bool)
        overlaps[places[1:]] = (self.pointers + self.sizes)[places[:-1]] > self.pointers[places[1:]]
        self._refuse(overlaps, "lies on another image")
        other = np.zeros(count, bool)
        for index in np.flatnonzero(self.modes == MODE_JPEG):
            begin = self.stored(index)[:JPEG_HEADER].tobytes()
            side = begin.find(JPEG_FRAME) + len(JPEG_FRAME)
            stated = int(self.heights[index]).to_bytes(2, "big") + int(self.widths[index]).to_bytes(2, "big")
            other[index] = side < len(JPEG_FRAME) or begin[side : side + 4] != stated
        self._refuse(other, "is no JPEG of the stated shape")

    def _refuse(self, wrong: np.ndarray, what: str) -> None:
        if wrong.any():
            raise DataError(f"{self.path}: image {int(np.argmax(wrong))} {what}; {AGAIN}")

    def __len__(self) -> int:
        return self.header.samples

    def image_size(self) -> tuple[int, int] | None:
        """(height, width) if all images share it, else None."""
        if np.ptp(self.heights) == 0 and np.ptp(self.widths) == 0:
            return int(self.heights[0]), int(self.widths[0])
        return None

    def stored(self, index: int) -> np.ndarray:
        """The bytes of image `index` as stored in the file: (size,) uint8, a view."""
        pointer = int(self.pointers[index])
        return self._bytes[pointer : pointer + int(self.sizes[index])]

    def image(self, index: int) -> np.ndarray:
        """Image `index`: (height, width, 3) uint8 RGB; a view of the file when stored raw.

        Raises:
            DataError: the bytes stored do not make an image of the stated size.
        """
        height, width = int(self.heights[index]), int(self.widths[index])
        stored = self.stored(index)
        if self.modes[index] == MODE_RAW:
            return stored.reshape(height, width, 3)
        from PIL import Image

        try:
            with Image.open(io.BytesIO(stored.tobytes()), formats=["JPEG"]) as picture:
                pixels = np.asarray(picture.convert("RGB"))
        except (OSError, SyntaxError, ValueError) as error:
            raise DataError(f"{self.path}: image {index} is no JPEG that can be decoded ({error}); {AGAIN}") from error
        if pixels.shape != (height, width, 3):
            raise DataError(f"{self.path}: image {index} decodes to {pixels.shape}, not {height}×{width}×3; {AGAIN}")
        return pixels
