"""Detects the form of a source, and opens it."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from rsengine.data.errors import DataError, few
from rsengine.data.paths import expanded
from rsengine.data.sources.archives import file_digest, is_archive
from rsengine.data.sources.arrays import find_arrays, open_arrays
from rsengine.data.sources.base import Source
from rsengine.data.sources.digits import open_digits
from rsengine.data.sources.folders import find_class_folders, open_class_folders
from rsengine.data.sources.official import BY_ARCHIVE, LAYOUTS, find_layout, open_official, verify_archive
from rsengine.data.sources.parquet import SUFFIX, find_parquet, open_parquet
from rsengine.data.sources.splits import missing_part
from rsengine.data.sources.tables import TABLES, find_tables, open_tables
from rsengine.data.sources.tiny_imagenet import find_tiny_imagenet, open_tiny_imagenet
from rsengine.data.sources.torchvision_sets import PREFIX, TorchvisionName, open_torchvision
from rsengine.data.sources.tree import Tree, open_tree

DIGITS = "digits"
FOLDER_FRACTION, DIGITS_FRACTION = 0.1, 0.2
PARTS = frozenset({SUFFIX, ".npy", ".npz", *TABLES})
FORMS = (
    "the official CIFAR-10/100 archives or folders, Parquet files, NumPy arrays (.npz), class folders "
    "(train/cat/1.jpg), pictures with a table (file,label), a tar or zip of them, torchvision:NAME, or the word digits"
)


def is_named(source: str | Path) -> bool:
    """Whether a source is a name that this program knows, and not a path."""
    return (str(source) == DIGITS and not Path(source).exists()) or str(source).startswith(PREFIX)


def place_of(source: str | Path) -> Path | None:
    """The file or folder that a source is read from; None for what comes with a package."""
    if str(source).startswith(PREFIX):
        return TorchvisionName.parse(str(source)).root
    return None if is_named(source) else Path(source)


def source_name(source: str | Path) -> str:
    """A short name for a data set, from the name of its file or folder."""
    if str(source).startswith(PREFIX):
        return TorchvisionName.parse(str(source)).title
    name = Path(source).absolute().name
    name = re.sub(r"\.(tar(\.\w+)?|tgz|tbz2?|txz|zip|parquet|np[yz])$", "", name, flags=re.IGNORECASE)
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", name).strip("-.") or "dataset"


def open_source(
    source: str | Path,
    scratch: Path,
    *,
    verify: bool = True,
    test_fraction: float | None = None,
    label_column: str | None = None,
    seed: int = 0,
    log: Callable[[str], None] = print,
) -> Source:
    """Detect the form of `source` and open it; pictures in class folders and Parquet are not decoded yet.

    Args:
        source: a path, "torchvision:NAME[:ROOT]", or "digits".
        scratch: an existing folder for temporary files, needed as long as the result is used.
        verify: compare official CIFAR files with their published checksums.
        test_fraction: share of every class to test on where there is no test set; default 0.1, for digits 0.2.
        label_column: the column of the labels in Parquet files and tables; None takes the one that is called so.
        seed: chooses those samples.
        log: called with one line for each decision.

    Raises:
        DataError: with the file and the remedy, for everything that can be wrong with it.
    """
    if is_named(source):
        _refuse_column(label_column, source)
        if str(source) == DIGITS:
            return open_digits(test_fraction=DIGITS_FRACTION if test_fraction is None else test_fraction, seed=seed)
        fraction = FOLDER_FRACTION if test_fraction is None else test_fraction
        return open_torchvision(str(source), scratch, test_fraction=fraction, seed=seed, log=log)
    path, fraction = expanded(source), FOLDER_FRACTION if test_fraction is None else test_fraction
    official = BY_ARCHIVE.get(path.name)
    if verify and official is not None and path.is_file():
        # Before unpacking: an incomplete download is better called that than a damaged archive.
        verify_archive(official, str(path), file_digest(path, "md5"))
    tree = open_tree(path, scratch)
    if tree.hidden:
        hidden = f"{few(tree.hidden)}, hidden by the dot, though pictures lie there"
        log(f"{path}: leaving out {hidden}; rename what is a class")
    if (found := find_layout(tree)) is not None:
        _refuse_column(label_column, path)
        return open_official(tree, *found, verify=verify, log=log)
    if official is not None:
        raise DataError(f"{path}: does not hold what {path.name} should; download it again")
    _refuse_missing_part(path, tree)
    options = {"name": source_name(path), "test_fraction": fraction, "seed": seed, "log": log}
    if files := find_parquet(tree):
        return open_parquet(tree, files, scratch, label_column=label_column, **options)
    if tables := find_tables(tree, label_column, log):
        return open_tables(tree, tables, **options)
    _refuse_column(label_column, path)
    if arrays := find_arrays(tree):
        return open_arrays(tree, arrays, scratch, **options)
    if (place := find_tiny_imagenet(tree)) is not None:
        return open_tiny_imagenet(tree, place, name=options["name"], log=log)
    if tree.kind != "file" and (folder := find_class_folders(tree)) is not None:
        return open_class_folders(tree, folder, **options)
    raise DataError(_unknown(path, tree))


def _refuse_missing_part(path: Path, tree: Tree) -> None:
    """Raise DataError where files, or the source itself, are parts of a whole that is not all there."""
    inside = missing_part(name for name in tree.files if PurePosixPath(name).suffix.lower() in PARTS)
    beside = None if tree.kind == "folder" else missing_part([path.name])
    if (missing := beside or inside) is None:
        return
    if beside and (path.parent / beside).exists():
        raise DataError(f"{path}: is one part of several, such as {missing}; give the folder that holds all of them")
    raise DataError(f"{path}: {missing} is missing, by the names of the other parts; add it, or rename those")


def _refuse_column(column: str | None, source: str | Path) -> None:
    if column is not None:
        raise DataError(f"{source}: no Parquet file and no table with a column {column}; leave out --label-column")


def _unknown(path: Path, tree: Tree) -> str:
    if tree.kind == "file":
        if any(path.name in layout.files for layout in LAYOUTS):
            return f"{path}: is one file of a data set; give the folder it lies in, {path.absolute().parent}"
        if path.stat().st_size == 0:
            return f"{path}: empty file; download or copy it again"
        if path.suffix.lower() in TABLES:
            return f"{path}: a table alone; give the folder that holds it and the pictures, {path.absolute().parent}"
        return f"{path}: a single file that is no archive and no {SUFFIX} file; give {FORMS}"
    if not tree.files:
        return f"{path}: no files in it; give {FORMS}"
    if tree.kind == "folder":
        inside = [name for name in tree.files if "/" not in name and is_archive(path / name)]
        if len(inside) > 1:  # perhaps one for training and one for testing
            return f"{path}: holds no images, but the archives {few(inside)}; unpack them into one folder, or give one"
        if inside:
            return f"{path}: holds no images, but the archive {inside[0]}; give {path / inside[0]} itself"
    return f"{path}: no class folders, no Parquet and no CIFAR files in it; give {FORMS}"
