"""Decoding pictures, and the kinds of split: pixels in memory, encoded pictures read when needed, parts of a split."""

from __future__ import annotations

import hashlib
import io
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Protocol

import numpy as np
from PIL import Image, PngImagePlugin

from rsengine.data.errors import DataError
from rsengine.data.sources.archives import Blob

# Decoders that read plain pictures; Pillow knows others which start programs (EPS) or read other files.
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "PPM", "TIFF", "WEBP")
SUFFIXES = frozenset({".jpg", ".jpeg", ".jpe", ".png", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp"})
LARGEST_SIDE = 65535  # .beton files keep sides in 16 bits
LARGEST_AREA = 2**30 // 12  # pixels, about where Pillow begins to warn of an attack
ORIENTATION = 0x0112  # the EXIF tag, and what undoes each of its values
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
JPEG_SIGNATURE = b"\xff\xd8\xff"
# In the coded pixels of a JPEG, FF 00 stands for the byte FF, and FF D0 … D7 are marks to resume at. FF may come many
# times before a marker.
JPEG_MARKER = re.compile(rb"\xff([^\x00\xd0-\xd7\xff])")
JPEG_END = 0xD9
JPEG_BARE = frozenset({0x01, *range(0xD0, 0xD9)})  # markers without a segment
REMEDY = "repair or remove it"
# Editors put megabytes of XMP and colour profiles into a PNG. Pillow takes one of them for an attack at its default of
# a mebibyte, and all of them together at this.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY


def is_picture(name: str) -> bool:
    """Whether the name is that of a picture."""
    return PurePosixPath(name).suffix.lower() in SUFFIXES


def decode_rgb(data: bytes, name: str, formats: Sequence[str] = FORMATS) -> np.ndarray:
    """Decode a picture to RGB.

    Grey, palette and CMYK pictures are converted, 16-bit grey is scaled to 8 bits, transparent pixels are laid over
    white, and an EXIF rotation is applied. Of an animation, the first frame is used.

    Args:
        data: the content of the file.
        name: for the error message.
        formats: Pillow's names of the decoders to try.

    Returns:
        (height, width, 3) uint8 RGB, contiguous.

    Raises:
        DataError: not a picture, damaged, cut short, or absurdly large.
    """
    if not data:
        raise DataError(f"{name}: empty file, not an image; {REMEDY}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of tags that Pillow passes over, and of sizes that are refused here
            if data.startswith(PNG_SIGNATURE):
                with Image.open(io.BytesIO(data), formats=["PNG"]) as picture:
                    picture.verify()  # checks the checksum of every chunk, which loading does not; for one use only
            with Image.open(io.BytesIO(data), formats=formats) as picture:
                if max(picture.size) > LARGEST_SIDE or picture.width * picture.height > LARGEST_AREA:
                    raise DataError(
                        f"{name}: {picture.width}×{picture.height} pixels is too large; scale it down or remove it"
                    )
                if data.startswith(JPEG_SIGNATURE) and not _has_jpeg_end(data):
                    # Cut short, even where all pixels seem to be there.
                    raise DataError(f"{name}: truncated JPEG; {REMEDY}")
                picture.load()
                return _to_rgb(picture, name)
    except DataError:
        raise
    except Image.UnidentifiedImageError as error:
        raise DataError(f"{name}: not an image this program reads ({', '.join(formats)}); {REMEDY}") from error
    except (Image.DecompressionBombError, MemoryError) as error:
        raise DataError(f"{name}: {str(error) or 'more than memory holds'}; scale it down or remove it") from error
    except Exception as error:  # damaged files make Pillow's decoders raise almost anything
        reason = str(error)[:200] or type(error).__name__
        raise DataError(f"{name}: damaged image ({reason}); {REMEDY}") from error


def _has_jpeg_end(data: bytes) -> bool:
    """Whether the first picture in `data` has its end marker. What follows it is not looked at: phones append films."""
    position = len(JPEG_SIGNATURE) - 1
    while (marker := JPEG_MARKER.search(data, position)) is not None:
        kind, position = marker[1][0], marker.end()
        if kind == JPEG_END:
            return True
        if kind not in JPEG_BARE:
            # A segment states its length, itself included; a thumbnail in it has an end marker of its own. Coded
            # pixels follow the segment that starts a scan, and the search passes over them.
            position += int.from_bytes(data[position : position + 2], "big")
    return False


def _to_rgb(picture: Image.Image, name: str) -> np.ndarray:
    # Before the conversion below, which would drop the EXIF block.
    turn = picture.getexif().get(ORIENTATION)
    if isinstance(turn, int) and turn in UPRIGHT:
        picture = picture.transpose(UPRIGHT[turn])
    if picture.mode.startswith("I;16") or (picture.mode == "I" and picture.format in ("PNG", None)):
        # 16-bit grey; Pillow's own conversion would clip it at 255.
        grey = np.asarray(picture).astype(np.uint32) // 257
        return np.repeat(grey.astype(np.uint8)[..., None], 3, axis=2)
    if picture.mode in ("I", "F"):
        raise DataError(f"{name}: pixels of type {picture.mode} have no agreed range; save it as 8-bit RGB")
    if picture.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, (255, 255, 255, 255)), picture)
    return np.array(picture.convert("RGB"))


def resize_and_crop(pixels: np.ndarray, size: int) -> np.ndarray:
    """Resize the shorter side to `size` pixels (bicubic, antialiased) and crop the central square.

    Args:
        pixels: (height, width, 3) uint8.

    Returns:
        (size, size, 3) uint8; `pixels` itself if it has that size.
    """
    height, width = pixels.shape[:2]
    if (height, width) == (size, size):
        return pixels
    scale = size / min(height, width)
    # Only the box that survives the crop is resized; the filter still sees the pixels around it.
    side = size / scale
    left, top = (width - side) / 2, (height - side) / 2
    picture = Image.fromarray(pixels)
    square = picture.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
    return np.array(square)


class Split(Protocol):
    """The samples of one split, in the order in which they are written. Safe to use from several threads."""

    labels: np.ndarray  # (N,) int64

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """Where sample `index` comes from, for messages."""
        ...

    def load(self, index: int) -> tuple[np.ndarray, bytes]:
        """Pixels (height, width, 3) uint8 of sample `index`, and the sha256 of its encoded form (empty if it has none).

        Raises DataError.
        """
        ...

    def resized(self, size: int) -> Split:
        """The same samples as squares of `size` pixels."""
        ...


@dataclass(frozen=True, eq=False)
class ArraySplit:
    """Samples whose pixels are in memory.

    Attributes:
        images: (N, height, width, 3) uint8.
        labels: (N,) int64.
        source: for messages.
        size: resize and crop to this side when not None.
    """

    images: np.ndarray
    labels: np.ndarray
    source: str
    size: int | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        return f"{self.source}, image {index}"

    def load(self, index: int) -> tuple[np.ndarray, bytes]:
        pixels = self.images[index]
        return (pixels if self.size is None else resize_and_crop(pixels, self.size)), b""

    def resized(self, size: int) -> ArraySplit:
        return replace(self, size=size)


@dataclass(frozen=True, eq=False)
class EncodedSplit:
    """Samples kept as encoded pictures and decoded each time they are asked for.

    Attributes:
        blobs: where the pictures lie.
        names: where they come from, for messages.
        labels: (N,) int64.
        size: resize and crop to this side when not None.
    """

    blobs: Sequence[Blob]
    names: Sequence[str]
    labels: np.ndarray
    size: int | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        return self.names[index]

    def load(self, index: int) -> tuple[np.ndarray, bytes]:
        try:
            data = self.blobs[index].read()
        except OSError as error:
            raise DataError(f"{self.names[index]}: {error.strerror}; check the file and its permissions") from error
        pixels = decode_rgb(data, self.names[index])
        return (pixels if self.size is None else resize_and_crop(pixels, self.size)), hashlib.sha256(data).digest()

    def resized(self, size: int) -> EncodedSplit:
        return replace(self, size=size)


@dataclass(frozen=True, eq=False)
class ChosenSplit:
    """Some samples of another split, in the order of `places`, (N,) indices into it."""

    split: Split
    places: np.ndarray

    @property
    def labels(self) -> np.ndarray:
        return self.split.labels[self.places]

    def __len__(self) -> int:
        return len(self.places)

    def name(self, index: int) -> str:
        return self.split.name(int(self.places[index]))

    def load(self, index: int) -> tuple[np.ndarray, bytes]:
        return self.split.load(int(self.places[index]))

    def resized(self, size: int) -> ChosenSplit:
        return replace(self, split=self.split.resized(size))
