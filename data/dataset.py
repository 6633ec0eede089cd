"""A converted data set: a folder with train.beton, test.beton and dataset.json, which says what is in them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from rsengine.data.beton.reader import LARGEST_SIDE, MODES, BetonReader
from rsengine.data.checksums import verify_contents
from rsengine.data.errors import DataError
from rsengine.data.identity import content_identity
from rsengine.data.paths import BETONS, DESCRIPTION, TEMPORARY, convert_command, expanded
from rsengine.data.staging import put_back

FORMAT = "rsengine dataset"
FORMAT_VERSION = 1
OPTIONAL = {"identity", "sha256"}  # fields that older versions did not write
AGAIN = f"convert the source again with `{convert_command()} SOURCE --out DIR`"


@dataclass(frozen=True)
class Dataset:
    """What dataset.json says.

    Attributes:
        folder: where the three files lie.
        name: short name of the data set, such as `cifar10`.
        classes: class names; the label of a sample is an index into it.
        train_count, test_count: samples in each split.
        class_counts: for "train" and "test", the samples of each class, in the order of `classes`.
        image_size: (height, width) in pixels, None when the images differ in size.
        mean, std: per channel (red, green, blue) over all pixels of train, in units where white is 1; the standard
            deviation is that of the population, and 1 for a channel whose pixels are all the same.
        checksum: sha256 of the source: of the archive or file itself, or for a folder of the text
            "<sha256>  <relative path>\\n" over its files sorted by path (what `sha256sum` prints).
        source: a description of its source.
        image_format: "raw" or "jpg", how the images are stored.
        versions: name -> version of the software that wrote it.
        options: the options of the conversion.
        identity: of the samples, see :func:`identity_of`; empty in what older versions wrote.
        sha256: for "train" and "test", of the .beton file; empty in what older versions wrote.
    """

    folder: Path
    name: str
    classes: tuple[str, ...]
    train_count: int
    test_count: int
    class_counts: dict[str, tuple[int, ...]]
    image_size: tuple[int, int] | None
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    checksum: str
    source: str
    image_format: str = "raw"
    versions: dict[str, str] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    identity: str = ""
    sha256: dict[str, str] = field(default_factory=dict)

    @property
    def train_beton(self) -> Path:
        """The training samples: fields `image` (uint8 RGB) and `label` (int64)."""
        return self.folder / BETONS["train"]

    @property
    def test_beton(self) -> Path:
        """The test samples, in the same fields."""
        return self.folder / BETONS["test"]

    def to_json(self) -> str:
        """The text of dataset.json."""
        content = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "name": self.name,
            "classes": list(self.classes),
            "counts": {"train": self.train_count, "test": self.test_count},
            "class_counts": {split: list(counts) for split, counts in self.class_counts.items()},
            "image_size": None if self.image_size is None else list(self.image_size),
            "image_format": self.image_format,
            "mean": list(self.mean),
            "std": list(self.std),
            "source": self.source,
            "checksum": self.checksum,
            "identity": self.identity,
            "sha256": self.sha256,
            "options": self.options,
            "versions": self.versions,
        }
        return json.dumps(content, indent=2) + "\n"


def identity_of(dataset: Dataset) -> str:
    """64 hexadecimal digits that differ for any two data sets whose splits differ in a sample or in their order.

    Raises DataError when the files must be read for it and one is damaged.
    """
    return dataset.identity or content_identity(dataset.classes, (dataset.train_beton, dataset.test_beton))


def load_dataset(folder: str | Path) -> Dataset:
    """Read and check the converted data set in `folder`.

    All but the pixels is checked each time. Where dataset.json holds checksums of the .beton files, their contents are
    compared with these too when the files are first used on a machine, see :func:`verify_contents`.

    Raises:
        DataError: the folder is no converted data set, of another format version, or its .beton files are missing,
            damaged or hold other samples than dataset.json says.
    """
    folder = expanded(folder)
    path = folder / DESCRIPTION
    if TEMPORARY.match(folder.resolve().name):
        raise DataError(f"{folder}: left over from an interrupted conversion; remove it and {AGAIN}")
    put_back(folder)
    if not folder.exists():
        raise DataError(f"{folder}: no such folder; {AGAIN}")
    if not path.is_file():
        raise DataError(f"{folder}: no {DESCRIPTION} in it, so it is not a converted data set; {AGAIN}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        version = content["format_version"] if content.get("format") == FORMAT else None
    except (ValueError, AttributeError, KeyError, RecursionError) as error:
        raise DataError(f"{path}: not a description of a data set ({error}); {AGAIN}") from error
    if version != FORMAT_VERSION:
        stated = "is not a description of a data set" if version is None else f"has format version {version}"
        raise DataError(f"{path}: {stated}, this program reads version {FORMAT_VERSION}; {AGAIN}")
    try:
        dataset = _from_content(folder, content)
    except _Wrong as error:
        raise DataError(f"{path}: {error}; {AGAIN}") from error
    for split in BETONS:
        _check_beton(dataset, split)
    verify_contents({folder / name: dataset.sha256[split] for split, name in BETONS.items() if dataset.sha256})
    return dataset


def _check_beton(dataset: Dataset, split: str) -> None:
    """Raise DataError unless a .beton file is whole and holds what dataset.json says, as far as its metadata tell."""
    beton = dataset.folder / BETONS[split]
    if not beton.is_file():
        raise DataError(f"{beton}: missing; {AGAIN}")
    reader, counts = BetonReader(beton), dataset.class_counts[split]
    if len(reader) != sum(counts):
        raise DataError(f"{beton}: {len(reader)} samples where {DESCRIPTION} says {sum(counts)}; {AGAIN}")
    outside = (reader.labels < 0) | (reader.labels >= len(counts))
    if outside.any():
        label = reader.labels[np.argmax(outside)]
        raise DataError(f"{beton}: label {label} where {DESCRIPTION} names {len(counts)} classes; {AGAIN}")
    if not np.array_equal(np.bincount(reader.labels, minlength=len(counts)), counts):
        raise DataError(f"{beton}: other labels than the class_counts in {DESCRIPTION} say; {AGAIN}")
    if dataset.image_size is not None and reader.image_size() != dataset.image_size:
        height, width = dataset.image_size
        raise DataError(f"{beton}: images of another size than {height}×{width}, as {DESCRIPTION} says; {AGAIN}")
    if (reader.modes != MODES[dataset.image_format]).any():
        raise DataError(f"{beton}: images not stored as {dataset.image_format}, as {DESCRIPTION} says; {AGAIN}")


class _Wrong(Exception):
    """A field of dataset.json, and what it should be."""


def _from_content(folder: Path, content: dict[str, Any]) -> Dataset:
    """Check the type and the range of every field. Raises _Wrong, which names the field."""

    def get(name: str, what: str, is_right: Callable[[Any], bool], inside: dict[str, Any] = content) -> Any:
        value = inside.get(name)
        if not is_right(value) or (name not in inside and name not in OPTIONAL):
            found = "nothing" if name not in inside else repr(value)
            raise _Wrong(f"{name}: expected {what}, got {found if len(found) <= 40 else found[:40] + '…'}")
        return value

    def is_whole(value: Any, least: int, most: int) -> bool:
        return type(value) is int and least <= value <= most

    def are(values: Any, is_right: Callable[[Any], bool], count: int | None = None) -> bool:
        return isinstance(values, list) and count in (None, len(values)) and all(is_right(value) for value in values)

    def is_share(value: Any) -> bool:
        return type(value) in (int, float) and 0 <= value <= 1  # which NaN is not

    def is_text(value: Any) -> bool:
        return isinstance(value, str)

    def is_digest(value: Any) -> bool:
        return is_text(value) and re.fullmatch("[0-9a-f]{64}", value) is not None

    def is_table(value: Any) -> bool:
        return isinstance(value, dict)

    classes = get("classes", "a list of names", lambda value: are(value, is_text) and len(value) > 0)
    counts, class_counts = get("counts", "a table", is_table), get("class_counts", "a table", is_table)
    for split in BETONS:
        get(split, "a number of images", lambda value: is_whole(value, 1, 2**48), counts)
        numbers = f"the number of images of each of the {len(classes)} classes"
        get(split, numbers, lambda value: are(value, lambda n: is_whole(n, 0, 2**48), len(classes)), class_counts)
        if sum(class_counts[split]) != counts[split]:
            raise _Wrong(f"class_counts: those of {split} sum up to {sum(class_counts[split])}, not {counts[split]}")
    size = get(
        "image_size",
        f"[height, width] from 1 to {LARGEST_SIDE}, or null",
        lambda value: value is None or are(value, lambda side: is_whole(side, 1, LARGEST_SIDE), 2),
    )
    mean, std = (get(name, "three numbers from 0 to 1", lambda v: are(v, is_share, 3)) for name in ("mean", "std"))
    sha256 = get("sha256", "a table", lambda value: value is None or is_table(value)) or {}
    for split in BETONS if sha256 else ():
        get(split, "the sha256 of its file", is_digest, sha256)
    versions = get("versions", "a table of texts", lambda v: is_table(v) and all(map(is_text, v.values())))
    return Dataset(
        folder=folder,
        name=get("name", "a text", is_text),
        classes=tuple(classes),
        train_count=counts["train"],
        test_count=counts["test"],
        class_counts={split: tuple(class_counts[split]) for split in BETONS},
        image_size=None if size is None else (size[0], size[1]),
        mean=tuple(map(float, mean)),
        std=tuple(float(value or 1) for value in std),  # older conversions wrote the 0 of a flat channel
        checksum=get("checksum", "a text", is_text),
        source=get("source", "a text", is_text),
        image_format=get("image_format", " or ".join(MODES), lambda value: is_text(value) and value in MODES),
        versions=versions,
        options=get("options", "a table", is_table),
        identity=get("identity", "64 hexadecimal digits", lambda v: v in (None, "") or is_digest(v)) or "",
        sha256={split: sha256[split] for split in BETONS} if sha256 else {},
    )
