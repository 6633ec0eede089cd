"""Pictures whose classes a table names: CSV of file and label beside a folder, as Kaggle gives CIFAR-10."""

from __future__ import annotations

import codecs
import csv
import io
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import PurePosixPath

import numpy as np

from rsengine.data.errors import DataError, few
from rsengine.data.sources.base import Source, set_aside
from rsengine.data.sources.images import EncodedSplit, is_picture
from rsengine.data.sources.splits import TRAIN, placed, split_column, split_of_row, testing
from rsengine.data.sources.tree import Tree
from rsengine.output import counted

TABLES = (".csv", ".tsv")
DELIMITERS = ",;\t|"
LABEL_COLUMNS = ("label", "labels", "class", "class_name", "category", "target", "fine_label", "coarse_label")
UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
SAMPLE = re.compile("submission")  # Kaggle's sample of a submission has labels, but not the right ones


@dataclass(frozen=True)
class Table:
    """What a table says.

    Attributes:
        name: the file in the tree.
        split: the split that a column of it says, or else its name, train where that says none.
        files: (N,) names of pictures in the tree.
        labels: (N,) class names.
        by_column: whether a column says the split, so that the table may be a part of what the file holds.
    """

    name: str
    split: str
    files: list[str]
    labels: list[str]
    by_column: bool = False


class Pictures:
    """The pictures below a folder, found by what a table calls them: by the path, or by the name alone in the folders
    of its split, with the suffix or without."""

    def __init__(self, tree: Tree, folder: str, split: str) -> None:
        start = len(folder) + 1 if folder else 0
        self.paths = {name[start:]: name for name in tree.below(folder).files if is_picture(name)}
        self.others: dict[str, set[str]] = {}
        said = {parent: placed(parent).split for parent in {path.rpartition("/")[0] for path in self.paths}}
        for path, name in self.paths.items():
            parent, _, last = path.rpartition("/")
            keys = {path, last} if said[parent] in ("", split) else {path}
            for key in keys | {key.rpartition(".")[0] for key in keys}:
                self.others.setdefault(key, set()).add(name)

    def find(self, called: str) -> set[str]:
        """The pictures that may be meant, by their names in the tree."""
        called = called.strip().replace("\\", "/").removeprefix("./")
        return {self.paths[called]} if called in self.paths else self.others.get(called, set())


def find_tables(tree: Tree, label_column: str | None, log: Callable[[str], None]) -> list[Table]:
    """The tables outermost in the tree that name pictures and their classes; none where there are no pictures, or where
    the tables only repeat the names of the folders that these lie in.

    Args:
        label_column: the column of the classes; None takes the one that is called so.

    Raises:
        DataError: a table with several such columns, or that is wrong.
    """
    names = [name for name in tree.files if PurePosixPath(name).suffix.lower() in TABLES]
    depth = min((name.count("/") for name in names), default=0)
    names = [name for name in names if name.count("/") == depth]
    folders = {os.path.dirname(name) for name in names}
    if len(folders) > 1 and not all(placed(PurePosixPath(folder).name).split for folder in folders):
        return []  # in class folders, say
    tables, passed_over = [], []
    for name in names:
        read = _read(tree, name, label_column)
        if isinstance(read, list) and SAMPLE.search(name.lower()):
            log(f"{tree.where(name)}: ignored, a sample of a submission")
        elif isinstance(read, list):
            tables += read
        elif read:
            passed_over.append(f"{tree.where(name)}: {read}")
    if passed_over and not tables and not _several_folders(tree):
        raise DataError(passed_over[0])  # nothing else tells the classes
    for line in passed_over:
        log(f"ignoring {line}")
    return [] if all(_repeats_folders(table) for table in tables) else tables


def _several_folders(tree: Tree) -> bool:
    """Whether pictures lie in folders of different names that are no splits, so that these may be classes."""
    names = {PurePosixPath(name).parent.name for name in tree.files if is_picture(name)}
    return len({name for name in names if not placed(name).split}) > 1


def open_tables(
    tree: Tree, tables: list[Table], *, name: str, test_fraction: float, seed: int, log: Callable[[str], None]
) -> Source:
    """Collect the pictures that the tables name; they are decoded later. Classes are the labels, sorted as strings.

    Raises:
        DataError: two tables of one split, or none of train.
    """
    by_split: dict[str, Table] = {}
    for table in tables:
        if (other := by_split.setdefault(table.split, table)) is not table:
            raise DataError(
                f"{tree.where(table.name)}: has labels of {table.split}, as {other.name} has; remove one, or call them "
                "train.csv and test.csv"
            )
    if TRAIN not in by_split:
        raise DataError(f"{tree.root}: no table of train, but {few([table.name for table in tables])}; add one")
    test_split = testing(by_split, str(tree.root), log)
    used = [by_split[split] for split in (TRAIN, test_split) if split is not None]
    classes = tuple(sorted({label for table in used for label in table.labels}))
    for table in used:
        log(f"{tree.where(table.name)}: {counted(len(table.files), 'label')} of {table.split}")
    if left := {each for each in tree.files if is_picture(each)} - {each for table in tables for each in table.files}:
        log(f"{tree.root}: leaving out {counted(len(left), 'picture')} without a label, such as {min(left)}")
    splits = [encoded(tree, table, classes) for table in used]
    if test_split is None:
        splits = list(set_aside(splits[0], used[0].files, test_fraction, seed, str(tree.root), log))
    checksum = tree.checksum({each for table in used for each in (table.name, *table.files)})
    return Source(
        name,
        f"pictures and a table, {tree.kind}",
        classes,
        *splits,
        checksum,
        sorted_names=True,
        own_test=test_split is not None,
    )


def encoded(tree: Tree, table: Table, classes: tuple[str, ...]) -> EncodedSplit:
    """The samples of a table."""
    number = {name: label for label, name in enumerate(classes)}
    labels = np.array([number[label] for label in table.labels], np.int64)
    return EncodedSplit([tree.files[each] for each in table.files], [tree.where(each) for each in table.files], labels)


def resolved(tree: Tree, name: str, split: str, rows: Iterable[tuple[int, str, str]], pictures: Pictures) -> Table:
    """A table from its rows of line, file and label.

    Raises:
        DataError: files that are not there, may be several or are named twice; rows without label; no rows.
    """
    where = tree.where(name)
    files: dict[str, str] = {}
    missing = []
    for line, called, label in rows:
        found = pictures.find(called)
        if not label:
            raise DataError(f"{where} line {line}: no label; add it or remove the line")
        if not found:
            missing.append(called)
        elif len(found) > 1:
            raise DataError(f"{where} line {line}: {called} may be {few(sorted(found))}; give the whole path")
        elif (file := next(iter(found))) in files:
            raise DataError(f"{where} line {line}: {called} is listed twice; remove one of the lines")
        else:
            files[file] = label
    if missing:
        raise DataError(f"{where}: no picture {few(missing)}; add what is missing or remove the lines")
    if not files:
        raise DataError(f"{where}: no lines below the first; give a table with pictures")
    return Table(name, split, list(files), list(files.values()))


def _read(tree: Tree, name: str, label_column: str | None) -> list[Table] | str:
    """A table, in its splits; or why it is none, "" where it has nothing to do with the pictures."""
    where, split = tree.where(name), _split_of(name) or TRAIN
    pictures = Pictures(tree, os.path.dirname(name), split)
    # Any other file may be called .csv too, so what is wrong is an error only in a table of pictures.
    content = tree.read(name) if pictures.paths else b""
    text = content.decode("utf-16" if content.startswith(UTF16) else "utf-8-sig", "replace")
    delimiter = max(DELIMITERS, key=text.partition("\n")[0].count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    rows: list[tuple[int, list[str]]] = []
    problem = ""
    try:
        rows += ((reader.line_num, cells) for cells in reader if cells)
    except csv.Error as error:
        problem = f"line {reader.line_num}: not a table ({error}); correct or remove it"
    header = [cell.strip() for cell in rows[0][1]] if rows else []
    file = _file_column(header, rows[1:], pictures, label_column)
    if file is None:
        return "none of its columns names one of the pictures; correct the names" if len(rows) > 1 else ""
    if problem:
        raise DataError(f"{where} {problem}")
    if pictures.find(header[file]):
        return "its first line names no columns; add the line file,label above it"
    divided = split_column(header, {header[file], label_column}, where)
    place = None if divided is None else header.index(divided)
    said = [placed(cells[place]).split for _, cells in rows[1:] if place is not None and place < len(cells)]
    if len(header) == 2 and not any(said):
        divided = place = None  # the classes themselves
    label = _label_column(header, file, place, label_column, where)
    if label is None and said and all(said):
        raise DataError(f"{where}: its column {divided} says the splits, but none the classes; add a column label")
    if label is None:
        wanted = f"no column {label_column}" if label_column else "no column called label"
        return f"{wanted} among {few(header)}; choose one with --label-column"
    if "\ufffd" in text:
        raise DataError(f"{where}: not in UTF-8; save it in this encoding")
    for line, cells in rows[1:]:
        if len(cells) != len(header):
            raise DataError(
                f"{where} line {line}: {counted(len(cells), 'cell')}, but {len(header)} in the first line; correct it"
            )
    named = [(line, cells[file], cells[label].strip()) for line, cells in rows[1:]]
    if divided is None or place is None:
        return [resolved(tree, name, split, named, pictures)]
    parts: dict[str, list[tuple[int, str, str]]] = {}
    for row, (line, cells) in zip(named, rows[1:], strict=True):
        parts.setdefault(split_of_row(cells[place], divided, f"{where} line {line}"), []).append(row)
    return _in_splits(tree, name, parts)


def _in_splits(tree: Tree, name: str, parts: dict[str, list[tuple[int, str, str]]]) -> list[Table]:
    """A table for each split from the rows of one file. Raises DataError where a picture is in two of them."""
    tables: list[Table] = []
    for split, rows in parts.items():
        table = resolved(tree, name, split, rows, Pictures(tree, os.path.dirname(name), split))
        for other in tables:
            if both := set(table.files) & set(other.files):
                raise DataError(f"{tree.where(name)}: {min(both)} is in {other.split} and in {split}; remove one line")
        tables.append(replace(table, by_column=True))
    return tables


def _file_column(
    header: list[str], rows: list[tuple[int, list[str]]], pictures: Pictures, label_column: str | None
) -> int | None:
    """The column that names most of the pictures, if one names any; labels that are numbers may be names of some."""
    counts = {
        column: len(set().union(*(pictures.find(cells[column]) for _, cells in rows if column < len(cells))))
        for column, title in enumerate(header)
        if title.lower() not in LABEL_COLUMNS and title != label_column
    }
    best = max(counts, key=lambda column: counts[column], default=None)
    return best if best is not None and counts[best] else None


def _split_of(name: str) -> str:
    """The split that the name of a table says, or the folder that it lies in; "" for none."""
    path = PurePosixPath(name)
    return placed(path.stem).split or placed(path.parent.name).split


def _label_column(header: list[str], file: int, split: int | None, wanted: str | None, where: str) -> int | None:
    if wanted is not None:
        return header.index(wanted) if wanted in header else None
    fitting = [i for i, name in enumerate(header) if name.lower() in LABEL_COLUMNS]
    if len(fitting) > 1:
        names = few([header[i] for i in fitting])
        raise DataError(f"{where}: the columns {names} may hold the labels; choose one with --label-column")
    others = [i for i in range(len(header)) if i not in (file, split)]
    if not fitting and len(others) == 1:
        return others[0]
    return fitting[0] if fitting else None


def _repeats_folders(table: Table) -> bool:
    """Whether there is a folder for each label and a label for each folder, and the table says no more."""
    if table.by_column:
        return False
    pairs = {(os.path.dirname(file), label) for file, label in zip(table.files, table.labels, strict=True)}
    return len(pairs) > 1 and len(pairs) == len({folder for folder, _ in pairs}) == len({label for _, label in pairs})
