"""Data sets that torchvision knows, as `torchvision:NAME[:ROOT]`: it reads them, checks them and downloads them."""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import inspect
import shutil
import socket
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from rsengine.cache import cache_folder
from rsengine.data.errors import DataError
from rsengine.data.paths import expanded
from rsengine.data.sources.archives import Blob, Spool
from rsengine.data.sources.base import Source, set_aside
from rsengine.data.sources.choice import without_empty_classes
from rsengine.data.sources.images import Split, resize_and_crop
from rsengine.data.sources.labels import named_or_numbered

PREFIX = "torchvision:"
SPLITS = {"train": ("train", "trainval"), "test": ("test", "val", "valid")}  # the first that there is
SECONDS = 30.0  # without an answer, in a download


@dataclass(frozen=True)
class TorchvisionName:
    """What `torchvision:NAME[/PART][:ROOT]` says. `part` is the split of EMNIST, such as letters."""

    name: str
    part: str
    root: Path

    @classmethod
    def parse(cls, text: str) -> TorchvisionName:
        """Without a root, a folder of the cache. Raises DataError where there is no name."""
        name, _, root = text.removeprefix(PREFIX).partition(":")
        name, _, part = name.partition("/")
        if not name.isidentifier():
            raise DataError(f"{text}: names no data set; give {PREFIX}NAME or {PREFIX}NAME:ROOT, as in {PREFIX}MNIST")
        return cls(name, part, expanded(root) if root else cache_folder() / "torchvision" / name)

    @property
    def title(self) -> str:
        """Short name of the data set."""
        return "-".join(word.lower() for word in (self.name, self.part) if word)


@dataclass(frozen=True, eq=False)
class PixelSplit:
    """Samples whose pixels lie in a file, with a size for each.

    Attributes:
        blobs: where the pixels lie, (height, width) or (height, width, 3) uint8.
        shapes: their shapes.
        labels: (N,) int64.
        source: for messages.
        size: resize and crop to this side when not None.
    """

    blobs: list[Blob]
    shapes: list[tuple[int, ...]]
    labels: np.ndarray
    source: str
    size: int | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        return f"{self.source}, image {index}"

    def load(self, index: int) -> tuple[np.ndarray, bytes]:
        pixels = np.frombuffer(self.blobs[index].read(), np.uint8).reshape(self.shapes[index])
        if pixels.ndim == 2:
            pixels = np.repeat(pixels[..., None], 3, axis=2)
        return (pixels if self.size is None else resize_and_crop(pixels, self.size)), b""

    def resized(self, size: int) -> PixelSplit:
        return replace(self, size=size)


def fetch(text: str, log: Callable[[str], None]) -> None:
    """Download a data set whose root is empty. Raises DataError where it cannot be."""
    said = TorchvisionName.parse(text)
    if not said.root.is_dir() or not any(said.root.iterdir()):
        _open(said, log)


def open_torchvision(
    text: str, scratch: Path, *, test_fraction: float, seed: int, log: Callable[[str], None]
) -> Source:
    """Read a data set of torchvision whose items are a picture and a number.

    Its split `train` (or `trainval`) is for training, and `test`, or else `val`, for testing. Of a set without splits a
    share is set aside. What is not in the root is downloaded there. Pixels are copied into a file in `scratch`.

    Raises:
        DataError: a name that torchvision does not know, a set of another kind, one that is neither in the root nor can
            be downloaded, or that torchvision finds damaged.
    """
    said = TorchvisionName.parse(text)
    where, digest = f"torchvision's {said.name}", hashlib.sha256()
    sets = _open(said, log)
    with Spool(scratch / "spool-torchvision") as spool:
        splits: Sequence[Split] = [
            _read(each, said.name, f"{where} {split}", spool, digest) for split, each in sets.items()
        ]
    names = [_class_names(each) for each in sets.values()]
    if names[0] != names[-1]:
        raise DataError(f"{said.root}: {where} has different classes for training and testing; download it again")
    classes = named_or_numbered(names[0], splits, where, log)
    if len(splits) == 1:
        keys = [f"image {index}" for index in range(len(splits[0]))]
        splits = set_aside(splits[0], keys, test_fraction, seed, where, log)
    source = Source(said.title, where, classes, *splits, digest.hexdigest(), one_size=True, own_test=len(sets) > 1)
    return without_empty_classes(source, log)


def _open(said: TorchvisionName, log: Callable[[str], None]) -> dict[str, Any]:
    """split -> torchvision's data set: train and test, or all of it as train."""
    kind, options = _kind(said), {}
    parameters = inspect.signature(kind).parameters
    if said.name == "EMNIST":  # what it calls splits are data sets, each with a train and a test
        if said.part not in kind.splits:
            raise DataError(f"{PREFIX}{said.name}: name one of {', '.join(kind.splits)}, as in {PREFIX}EMNIST/letters")
        options["split"] = said.part
    elif said.part:
        raise DataError(f"{PREFIX}{said.name}/{said.part}: only EMNIST has parts; leave out /{said.part}")
    if "train" in parameters or options:
        return {name: _made(said, kind, {**options, "train": name == "train"}, log) for name in ("train", "test")}
    if "split" in parameters:
        return {name: _first(said, kind, splits, log) for name, splits in SPLITS.items()}
    return {"train": _made(said, kind, options, log)}


def _kind(said: TorchvisionName) -> Any:
    """torchvision's class. Raises DataError where it has none of that name, or it needs more than a root."""
    try:
        from torchvision import datasets
    except ImportError as error:
        raise DataError(f"{PREFIX}{said.name}: needs torchvision; run: pip install torchvision") from error
    kind = getattr(datasets, said.name, None) if said.name in datasets.__all__ else None
    if kind is None:
        lower = {name.lower(): name for name in datasets.__all__}
        near = difflib.get_close_matches(said.name.lower(), lower, 1)
        hint = f"did you mean {PREFIX}{lower[near[0]]}?" if near else f"give {PREFIX}CIFAR10 or another that it has"
        raise DataError(f"{PREFIX}{said.name}: torchvision has no such data set; {hint}")
    parameters = inspect.signature(kind).parameters.values()
    required = {each.name for each in parameters if each.default is each.empty and each.kind is not each.VAR_KEYWORD}
    if "root" not in required or not required <= {"root", "split"}:
        raise _of_another_kind(said.name)
    return kind


def _of_another_kind(name: str) -> DataError:
    return DataError(f"{PREFIX}{name}: its items are not a picture and a class; give a data set for classification")


class _NoSuchSplit(Exception):
    """The data set has other splits."""


def _first(said: TorchvisionName, kind: Any, splits: Iterable[str], log: Callable[[str], None]) -> Any:
    """The first of the splits that the data set has."""
    for split in splits:
        with contextlib.suppress(_NoSuchSplit):
            return _made(said, kind, {"split": split}, log)
    raise DataError(f"{PREFIX}{said.name}: has none of the splits {', '.join(splits)}; give another data set")


def _made(said: TorchvisionName, kind: Any, options: dict[str, Any], log: Callable[[str], None]) -> Any:
    """torchvision's data set from the root, downloaded if it is not there."""
    from torchvision.datasets import MNIST

    if downloads := "download" in inspect.signature(kind).parameters or issubclass(kind, MNIST):
        options = {**options, "download": False}  # the default of SEMEION is another
    try:
        return kind(str(said.root), **options)
    except ImportError as error:
        package = (error.name or "").partition(".")[0]
        raise DataError(f"{PREFIX}{said.name}: needs {package}; run: pip install {package}") from error
    except Exception as error:  # no rule says what torchvision raises for what is missing or damaged
        if isinstance(error, ValueError) and "argument split" in str(error):
            raise _NoSuchSplit from error
        problem = _line(error)
    attempt, new = "it has no download for it", not said.root.exists()
    if downloads:
        log(f"{said.root}: torchvision cannot read {said.name} there ({problem}); downloading it")
        try:
            with _timeout():
                return kind(str(said.root), **{**options, "download": True})
        except Exception as error:
            attempt = f"cannot download it ({_line(error)})"
            if new and said.root.is_dir() and not any(path.is_file() for path in said.root.rglob("*")):
                shutil.rmtree(said.root)
    raise DataError(
        f"{said.root}: torchvision cannot read {said.name} there ({problem}), and {attempt}; put the files there as "
        f"torchvision keeps them, or give the folder that holds them as {PREFIX}{said.name}:ROOT"
    )


@contextlib.contextmanager
def _timeout() -> Iterator[None]:
    """A limit for answers from the network. torchvision sets none, and would wait for ever on a dead connection."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(SECONDS)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _line(error: Exception) -> str:
    """What an error says, in one line: torchvision's name the mirrors that it tried, in several."""
    text = " ".join(str(error).split()).removesuffix(" You can use download=True to download it")
    return text or type(error).__name__


def _read(dataset: Any, name: str, where: str, spool: Spool, digest: Any) -> PixelSplit:
    """Copy the pixels of a data set into `spool`, and add samples to `digest`."""
    blobs, shapes, labels = [], [], []
    if len(getattr(dataset, "targets", dataset)) != len(dataset):
        raise DataError(f"{where}: not one label for each image; download it again")
    for index in range(len(dataset)):
        try:
            item = dataset[index]
        except Exception as error:  # of a damaged file, which may be anything
            raise DataError(f"{where}, image {index}: damaged ({_line(error)}); download it again") from error
        if not isinstance(item, tuple) or len(item) != 2 or not isinstance(item[0], Image.Image):
            raise _of_another_kind(name)
        picture, label = item
        if not isinstance(label, int | np.integer) or isinstance(label, bool) or not abs(int(label)) < 1 << 62:
            raise _of_another_kind(name)
        pixels = np.asarray(picture if picture.mode == "L" else picture.convert("RGB"))
        blobs.append(spool.append(pixels.tobytes()))
        shapes.append(pixels.shape)
        labels.append(label)
        digest.update(f"{pixels.shape} {label} ".encode() + pixels.tobytes())
    if not labels:
        raise DataError(f"{where}: no images in it; download it again")
    return PixelSplit(blobs, shapes, np.array(labels, np.int64), where)


def _class_names(dataset: Any) -> tuple[str, ...] | None:
    """The names that the data set gives; those of ImageNet are tuples of synonyms."""
    names = getattr(dataset, "classes", None) or getattr(dataset, "categories", None)
    return names and tuple(name if isinstance(name, str) else ", ".join(name) for name in names)
