"""The pictures that a prediction is asked for: files, folders of them, NumPy arrays and ``.beton`` files.

Where the source says what a picture shows, its class goes with it: the first folder below the one that was given, if
it has the name of a class; ``labels`` in a ``.npz`` file; the labels of a ``.beton`` file.
"""

from __future__ import annotations

import functools
import os
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import numpy as np
from PIL import Image

from rsengine.checked import Field, FieldError
from rsengine.data import DataError
from rsengine.data.beton.reader import BetonReader
from rsengine.data.errors import few
from rsengine.data.paths import DESCRIPTION
from rsengine.data.sources.arrays import IMAGES, LABELS
from rsengine.data.sources.images import FORMATS, SUFFIXES, decode_rgb, resize_and_crop
from rsengine.data.sources.tree import walk
from rsengine.output import counted, escaped

ARRAYS, BETON = (".npy", ".npz"), ".beton"
STARTS_PROGRAMS = {"EPS"}  # whose decoder in Pillow does
IN_FOLDERS = SUFFIXES | {".avif", ".heic", ".heif", ".ico", ".jfif", ".jp2", ".j2k", ".qoi", ".tga"}


@dataclass(frozen=True)
class Picture:
    """``pixels``: (height, width, 3) uint8 RGB. ``label``: the number of its class, None where nothing says it."""

    name: str
    pixels: np.ndarray
    label: int | None = None


def pictures(
    given: Iterable[Path], size: tuple[int, int], classes: Sequence[str], say: Callable[[str], None] = print
) -> Iterator[Picture | DataError]:
    """The pictures that ``given`` names, of ``size``. What cannot be read gives its error in its place.

    Args:
        given: of a folder, all pictures below it are meant, by name.
        size: (height, width) of the network's images.
        classes: of the network.
        say: called with a line where a source has labels, and some or all say nothing of these classes.
    """
    for path in given:
        if os.path.isdir(path):
            yield from _folder(path, size, classes, say)
        elif path.suffix.lower() in ARRAYS:
            yield from _each(path, size, lambda path: _arrays(path, len(classes)))
        elif path.suffix.lower() == BETON:
            yield from _each(path, size, lambda path: _beton(path, classes, say))
        else:
            yield _file(path, size, None)


def fitted(pixels: np.ndarray, size: tuple[int, int], name: str) -> np.ndarray:
    """``pixels``, (height, width, 3) uint8, in ``size``: the shorter side scaled to fit, then centre-cropped.

    Raises:
        DataError: a network for images that are not square, and a picture of another size.
    """
    if pixels.shape[:2] == size:
        return pixels
    if size[0] != size[1]:
        raise DataError(f"{name}: {pixels.shape[0]}x{pixels.shape[1]} pixels; this network takes {size[0]}x{size[1]}")
    return resize_and_crop(pixels, size[0])


def read_image(path: Path, size: tuple[int, int]) -> np.ndarray:
    """A picture file as (height, width, 3) uint8 RGB of ``size``, see :func:`fitted`.

    Raises:
        DataError: not a readable picture, or of a size that does not fit.
    """
    try:
        pixels = decode_rgb(path.read_bytes(), str(path), _formats())
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); give the path of a picture") from error
    return fitted(pixels, size, str(path))


@functools.cache
def _formats() -> tuple[str, ...]:
    """Every decoder that Pillow has here: the usual ones first, for the others must not take their pictures."""
    Image.init()
    return (*FORMATS, *sorted(set(Image.OPEN) - set(FORMATS) - STARTS_PROGRAMS))


def _file(path: Path, size: tuple[int, int], label: int | None) -> Picture | DataError:
    try:
        return Picture(str(path), read_image(path, size), label)
    except DataError as error:
        return error


def _folder(
    path: Path, size: tuple[int, int], classes: Sequence[str], say: Callable[[str], None]
) -> Iterator[Picture | DataError]:
    try:
        files, _ = walk(path)
    except DataError as error:
        yield error
        return
    names = [name for name in sorted(files) if PurePath(name).suffix.lower() in IN_FOLDERS]
    if not names:
        yield DataError(f"{path}: holds no pictures ({', '.join(sorted(IN_FOLDERS))})")
    numbers = {name: number for number, name in enumerate(classes)}
    if line := _unknown_labels(path, names, classes):
        say(line)
    for name in names:
        first, *below = PurePath(name).parts
        yield _file(path / name, size, numbers.get(first) if below else None)


def _unknown_labels(path: Path, names: Sequence[str], classes: Sequence[str]) -> str | None:
    """A line on the first folders below ``path`` that are no class, where others are, or are but for their case."""
    found = Counter(PurePath(name).parts[0] for name in names if len(PurePath(name).parts) > 1)
    known = {name.casefold(): name for name in classes}
    unknown = {name: number for name, number in found.items() if name not in classes}
    if not unknown or not any(name.casefold() in known for name in found):
        return None

    def described(name: str) -> str:
        near = known.get(name.casefold())
        hint = f"; did you mean {escaped(near)}?" if near is not None else ""
        return f"{escaped(name)} ({counted(unknown[name], 'picture')}{hint})"

    named = few([described(name) for name in unknown])
    total = sum(unknown.values())
    are, score = "is no class" if len(unknown) == 1 else "are no classes", "is" if total == 1 else "are"
    return f"{escaped(path)}: {named} {are} of the network, so {counted(total, 'picture')} {score} not scored"


Many = tuple[Callable[[int], np.ndarray], int, "np.ndarray | None"]  # an image by its place, how many, their labels


def _each(path: Path, size: tuple[int, int], read: Callable[[Path], Many]) -> Iterator[Picture | DataError]:
    """The images of a file that holds many."""
    try:
        image, count, labels = read(path)
    except DataError as error:
        yield error
        return
    except OSError as error:
        yield DataError(f"{path}: cannot be read ({error.strerror or error}); give the path of a file")
        return
    for place in range(count):
        name = f"{path}[{place}]"
        try:
            yield Picture(name, fitted(image(place), size, name), None if labels is None else int(labels[place]))
        except DataError as error:
            yield error


def _arrays(path: Path, classes: int) -> Many:
    try:
        content = np.load(path, mmap_mode="r", allow_pickle=False)
        arrays = {"": content} if isinstance(content, np.ndarray) else {name: content[name] for name in content.files}
    except OSError as error:
        if error.errno is not None:
            raise
        raise _damaged(path, error) from error
    except (ValueError, EOFError, zipfile.BadZipFile, KeyError, MemoryError, SyntaxError, TypeError) as error:
        raise _damaged(path, error) from error
    images = [array for name, array in arrays.items() if name.lower() in IMAGES or (len(arrays) == 1)]
    if len(images) != 1:
        raise DataError(f"{path}: expected one array called images; found {', '.join(arrays) or 'none'}; rename it")
    pixels = images[0]
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[3] != 3 or 0 in pixels.shape:
        raise DataError(f"{path}: expected images (N, H, W, 3) uint8; got {pixels.shape} {pixels.dtype}; save it so")
    labels = next((array for name, array in arrays.items() if name.lower() in LABELS), None)
    if labels is not None:
        _check_labels(path, labels, len(pixels), classes)
        labels = labels.reshape(-1)
    return (lambda place: np.ascontiguousarray(pixels[place])), len(pixels), labels


def _damaged(path: Path, error: Exception) -> DataError:
    return DataError(f"{path}: not an array of NumPy's, or damaged ({error!s:.100}); save it again with np.save")


def _check_labels(path: Path, labels: Any, count: int, classes: int) -> None:
    whole = labels.dtype.kind in "iu" and labels.size == count
    if not whole or labels.min() < 0 or labels.max() >= classes:
        raise DataError(
            f"{path}: labels: expected {count} integers from 0 to {classes - 1}; got {labels.shape} {labels.dtype}"
            + (f" from {labels.min()} to {labels.max()}" if whole else "")
            + "; leave them out, or give those of the network's classes"
        )


def _beton(path: Path, classes: Sequence[str], say: Callable[[str], None]) -> Many:
    reader = BetonReader(path)
    description, labels = path.parent / DESCRIPTION, reader.labels
    if description.is_file():
        try:
            theirs = tuple(
                each.text(any_bytes=True) for each in Field.of_json(description.read_bytes())["classes"].items()
            )
        except FieldError as error:
            raise DataError(f"{description}: {error}; convert the source again") from error
        if theirs != tuple(classes):
            say(f"{path}: its classes are others than the network's, so its labels are not used")
            return reader.image, len(reader), None
    if len(labels) and (labels.min() < 0 or labels.max() >= len(classes)):
        say(f"{path}: its labels are not among the network's {len(classes)} classes, so they are not used")
        return reader.image, len(reader), None
    return reader.image, len(reader), labels
