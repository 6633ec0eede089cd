"""A converted data set: a folder with train.beton, test.beton and dataset.json, which says what is in them."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rsengine.data.beton.reader import ALLOCATION, read_header
from rsengine.data.errors import DataError
from rsengine.data.identity import content_identity
from rsengine.data.paths import BETONS, DESCRIPTION, TEMPORARY, expanded
from rsengine.data.staging import put_back

FORMAT = "rsengine dataset"
FORMAT_VERSION = 1


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
    """Read and check the converted data set in `folder`, without reading the pixels.

    Raises:
        DataError: the folder is no converted data set, of another format version, or its .beton files are missing,
            incomplete or hold another number of samples than dataset.json says.
    """
    folder = expanded(folder)
    path = folder / DESCRIPTION
    again = "convert the source again with `python data/convert.py SOURCE --out DIR`"
    if TEMPORARY.match(folder.resolve().name):
        raise DataError(f"{folder}: left over from an interrupted conversion; remove it and {again}")
    put_back(folder)
    if not path.is_file():
        raise DataError(f"{folder}: no {DESCRIPTION} in it, so it is not a converted data set; {again}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        version = content["format_version"] if content.get("format") == FORMAT else None
    except (ValueError, AttributeError, KeyError) as error:
        raise DataError(f"{path}: not a description of a data set ({error}); {again}") from error
    if version != FORMAT_VERSION:
        stated = "is not a description of a data set" if version is None else f"has format version {version}"
        raise DataError(f"{path}: {stated}, this program reads version {FORMAT_VERSION}; {again}")
    try:
        dataset = _from_content(folder, content)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{path}: damaged ({type(error).__name__}: {error}); {again}") from error
    for beton, count in ((dataset.train_beton, dataset.train_count), (dataset.test_beton, dataset.test_count)):
        if not beton.is_file():
            raise DataError(f"{beton}: missing; {again}")
        header = read_header(beton)
        if header.samples != count:
            raise DataError(f"{beton}: {header.samples} samples where {DESCRIPTION} says {count}; {again}")
        if header.size != header.table + count * ALLOCATION.itemsize:
            raise DataError(f"{beton}: incomplete ({header.size} bytes); {again}")
    return dataset


def _from_content(folder: Path, content: dict[str, Any]) -> Dataset:
    """Build a Dataset, raising ValueError, KeyError or TypeError on anything inconsistent."""
    classes = tuple(str(name) for name in content["classes"])
    counts = {split: int(content["counts"][split]) for split in BETONS}
    class_counts = {split: tuple(int(n) for n in content["class_counts"][split]) for split in BETONS}
    for split in BETONS:
        if len(class_counts[split]) != len(classes) or sum(class_counts[split]) != counts[split]:
            raise ValueError(f"class_counts of {split} do not agree with classes and counts")
    size = content["image_size"]
    return Dataset(
        folder=folder,
        name=str(content["name"]),
        classes=classes,
        train_count=counts["train"],
        test_count=counts["test"],
        class_counts=class_counts,
        image_size=None if size is None else (int(size[0]), int(size[1])),
        mean=_three(content["mean"]),
        std=_three([value or 1.0 for value in content["std"]]),  # older conversions wrote the 0 of a flat channel
        checksum=str(content["checksum"]),
        source=str(content["source"]),
        image_format=str(content["image_format"]),
        versions={str(key): str(value) for key, value in content["versions"].items()},
        options=dict(content["options"]),
        identity=str(content.get("identity", "")),
    )


def _three(values: list[float]) -> tuple[float, float, float]:
    red, green, blue = (float(value) for value in values)
    return red, green, blue
