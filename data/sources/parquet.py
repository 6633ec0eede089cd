"""Parquet files in the layout of the Hugging Face Hub: a column of pictures and a column of labels."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from rsengine.data.errors import DataError, few
from rsengine.data.sources.archives import Blob, Spool
from rsengine.data.sources.base import Source, set_aside
from rsengine.data.sources.images import EncodedSplit
from rsengine.data.sources.labels import named_or_numbered
from rsengine.data.sources.splits import (
    CANNOT_TELL,
    TRAIN,
    indistinct,
    placed,
    split_column,
    split_of_row,
    testing,
)
from rsengine.data.sources.tree import Tree

SUFFIX = ".parquet"
IMAGE_COLUMNS = ("img", "image")
LABEL_COLUMNS = ("label", "labels", "fine_label", "coarse_label")
ROWS = 512  # rows in memory at a time


def find_parquet(tree: Tree) -> list[str]:
    """Names of the Parquet files in the tree."""
    return [name for name in tree.files if name.lower().endswith(SUFFIX)]


def open_parquet(
    tree: Tree,
    names: list[str],
    scratch: Path,
    *,
    label_column: str | None,
    name: str,
    test_fraction: float,
    seed: int,
    log: Callable[[str], None],
) -> Source:
    """Copy the encoded pictures out of Parquet files into a file in `scratch`; they are decoded later, one at a time.

    A row belongs to the split that a column of its file says, or else the name of the file, or the folder it is in:
    train, test or validation.

    Raises:
        DataError: pyarrow is not installed, damaged file, missing columns, rows without picture, labels out of range,
            files of which it cannot be told to which split they belong.
    """
    groups = _by_split(tree, names)
    parts: dict[str, list[EncodedSplit]] = {}
    keys: dict[str, list[str]] = {}  # not with the place of the files, on which no choice depends
    titles: list[tuple[str, ...] | None] = []
    used: list[str] = []

    def read(split: str) -> None:
        for each in groups[split]:
            part, classes, said = _read(tree, each, spool, label_column, split)
            titles.append(classes)
            used.append(each)
            for name in dict.fromkeys(said):
                rows = [row for row, other in enumerate(said) if other == name]
                parts.setdefault(name, []).append(_rows(part, rows))
                keys.setdefault(name, []).extend(f"{each} row {row}" for row in rows)

    with Spool(scratch / "spool-parquet") as spool:
        read(TRAIN)
        test_split = testing({*groups, *parts}, str(tree.root), log)
        if test_split in groups:
            read(test_split)
    if TRAIN not in parts:
        raise DataError(f"{tree.root}: no rows of train, but {few(sorted(parts))}; add some")
    chosen = [_joined(parts[split]) for split in (TRAIN, test_split) if split is not None]
    if len(set(titles)) > 1:
        raise DataError(f"{tree.root}: the Parquet files name different classes; give files of one data set")
    classes = named_or_numbered(titles[0], chosen, str(tree.root), log)
    train, test = chosen if test_split else set_aside(chosen[0], keys[TRAIN], test_fraction, seed, str(tree.root), log)
    return Source(
        name, f"Parquet, {tree.kind}", classes, train, test, tree.checksum(used), own_test=test_split is not None
    )


def _by_split(tree: Tree, names: list[str]) -> dict[str, list[str]]:
    """split -> its files, with a train among them, which all are where no name says a split."""
    # Around all files, only a folder that is called nothing but `test` says anything about them.
    folders = [PurePosixPath(each).parts[:-1] for each in names]
    around = {part for part in os.path.commonprefix(folders) if placed(part).rest}
    groups: dict[str, list[str]] = {}
    rests: dict[str, set[str]] = {}
    for each, parts in zip(names, folders, strict=True):
        stem = PurePosixPath(each).stem
        split = next((s for part in (stem, *reversed(parts)) if part not in around and (s := placed(part).split)), "")
        groups.setdefault(split, []).append(each)
        rests.setdefault(split, set()).add(placed(stem).rest if placed(stem).split else "")
    if set(groups) == {""}:
        if (pair := indistinct(names)) is not None:
            raise DataError(f"{tree.root}: {pair[0]} and {pair[1]}: {CANNOT_TELL}; call them train and test")
        return {TRAIN: groups[""]}
    if TRAIN not in groups:
        raise DataError(f"{tree.root}: no train*.parquet among {few(sorted(names))}; add or rename it")
    if "" in groups:
        raise DataError(f"{tree.where(groups[''][0])}: name says neither train nor test; rename or remove it")
    for split, found in rests.items():
        if found.isdisjoint(rests[TRAIN]) and "" not in found | rests[TRAIN]:
            raise DataError(
                f"{tree.root}: {groups[TRAIN][0]} and {groups[split][0]} are named after different data sets; "
                "name them alike or give one data set"
            )
    return groups


def _read(
    tree: Tree, name: str, spool: Spool, label_column: str | None, split: str
) -> tuple[EncodedSplit, tuple[str, ...] | None, list[str]]:
    """One Parquet file: its samples, its class names where it has them, and the split of each sample, which is `split`
    where no column says it."""
    try:
        import pyarrow as arrow
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(f"{tree.where(name)}: needs pyarrow; run: pip install pyarrow") from error
    where, blob = tree.where(name), tree.files[name]
    blobs: list[Blob] = []
    labels: list[int] = []
    said: list[str] = []
    try:
        content = arrow.BufferReader(tree.read(name)) if tree.kind == "archive" else blob.path
        with arrow.parquet.ParquetFile(content) as file:
            columns = file.schema_arrow.names
            image = _column(columns, IMAGE_COLUMNS, where, "leave one of them out")
            label = label_column or _column(columns, LABEL_COLUMNS, where, "choose one with --label-column")
            if label not in columns:
                raise DataError(f"{where}: no column {label}; choose from {few(columns)} with --label-column")
            divided = split_column(columns, {image, label}, where)
            wanted = [image, label, *([divided] if divided else [])]
            if twice := [each for each in wanted if columns.count(each) > 1]:
                raise DataError(f"{where}: has two columns {twice[0]}; leave one of them out")
            classes = _class_names(file.schema_arrow.metadata, label, where)
            for batch in file.iter_batches(ROWS, columns=wanted):
                values = [] if divided is None else batch.column(batch.schema.get_field_index(divided)).to_pylist()
                said += [
                    split_of_row(value, str(divided), f"{where} row {row}")
                    for row, value in enumerate(values, start=len(labels))
                ]
                pictures = batch.column(batch.schema.get_field_index(image)).to_pylist()
                for row, (picture, number) in enumerate(
                    zip(pictures, batch.column(batch.schema.get_field_index(label)).to_pylist(), strict=True),
                    start=len(labels),
                ):
                    blobs.append(spool.append(_picture(picture, f"{where} row {row}")))
                    labels.append(_label(number, f"{where} row {row}"))
    except (arrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise DataError(f"{where}: damaged Parquet file ({error}); download it again") from error
    if not labels:
        raise DataError(f"{where}: no rows; give a file with images")
    names = [f"{where} row {row}" for row in range(len(labels))]
    return EncodedSplit(blobs, names, np.array(labels, np.int64)), classes, said or [split] * len(labels)


def _picture(value: Any, where: str) -> bytes:
    data = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(data, bytes):
        raise DataError(f"{where}: no image bytes in it (only a path?); export the data set with its images embedded")
    return data


def _label(value: Any, where: str) -> int:
    if type(value) is not int:
        raise DataError(f"{where}: label is {value!r:.60}, not a whole number; remove the row or number the classes")
    if not -(2**63) <= value < 2**63:
        raise DataError(f"{where}: label {value} out of range; number the classes from 0")
    return value


def _column(columns: list[str], names: tuple[str, ...], where: str, choose: str) -> str:
    """The column that has one of the names."""
    found = [name for name in names if name in columns]
    if not found:
        raise DataError(f"{where}: needs a column {' or '.join(names)}, has {', '.join(sorted(columns))}; rename one")
    if len(found) > 1:
        raise DataError(f"{where}: has the columns {' and '.join(found)}; {choose}")
    return found[0]


def _class_names(metadata: dict[bytes, bytes] | None, label: str, where: str) -> tuple[str, ...] | None:
    """Class names from the description which the Hugging Face library stores in the file; None when it has none.

    Raises:
        DataError: a description of another form than that library's.
    """
    if not metadata or b"huggingface" not in metadata:
        return None
    try:
        content: Any = json.loads(metadata[b"huggingface"])
        for key in ("info", "features", label):
            content = _inside(content, dict).get(key, {})
        names = [_inside(name, str) for name in _inside(_inside(content, dict).get("names", []), list)]
    except (ValueError, RecursionError) as error:  # a text that is no JSON is a ValueError too
        raise DataError(f"{where}: damaged description of its columns ({error}); download it again") from error
    return tuple(names) or None


def _inside(value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise ValueError(f"{value!r:.40} is no {kind.__name__}")
    return value


def _rows(split: EncodedSplit, rows: list[int]) -> EncodedSplit:
    return EncodedSplit([split.blobs[i] for i in rows], [split.names[i] for i in rows], split.labels[rows])


def _joined(parts: list[EncodedSplit]) -> EncodedSplit:
    return EncodedSplit(
        [blob for part in parts for blob in part.blobs],
        [name for part in parts for name in part.names],
        np.concatenate([part.labels for part in parts]),
    )
