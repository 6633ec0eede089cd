"""Class folders: one folder a class, inside train/ and test/ or at the top, on disk or in an archive."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import PurePosixPath

import numpy as np

from rsengine.data.errors import DataError, few
from rsengine.data.sources.base import Source, set_aside
from rsengine.data.sources.folder_splits import find_splits, refuse_splits_inside
from rsengine.data.sources.images import EncodedSplit, Split, is_picture
from rsengine.data.sources.splits import TEST, TRAIN, VALIDATION, indistinct, placed
from rsengine.data.sources.tree import Tree
from rsengine.output import counted

DEEPEST_WRAPPER = 4


def find_class_folders(tree: Tree) -> str | None:
    """The folder that holds train/ or the class folders, "" for the root; None if there are none.

    A single folder around everything, as most archives have, is looked through.
    """
    folder = ""
    for _ in range(DEEPEST_WRAPPER):
        files, folders = tree.children(folder)
        if not folders:
            return None
        alone = len(folders) == 1 and not _is_split(folders[0]) and not any(is_picture(name) for name in files)
        if not (alone and tree.children(folders[0])[1]):
            return folder
        folder = folders[0]
    return None


def open_class_folders(
    tree: Tree, folder: str, *, name: str, test_fraction: float, seed: int, log: Callable[[str], None]
) -> Source:
    """Collect the pictures of class folders; they are decoded later, one at a time.

    Classes are the folder names, sorted; samples are sorted by path. Without a test folder a share of every class
    becomes the test set, chosen by `seed`, which is said through `log`.

    Raises:
        DataError: a class without pictures, train and test with different classes, pictures outside class folders.
    """
    by_split = find_splits(tree, folder, log)
    if not by_split:
        classes, names, labels = _collect(tree, folder, log)
        return _split(tree, classes, names, labels, name, test_fraction, seed, log)
    train = by_split[TRAIN]
    classes, names, labels = _collect(tree, train, log)
    candidates = [by_split[each] for each in (TEST, VALIDATION) if each in by_split]
    usable = [each for each in candidates if tree.children(each)[1]]
    if not usable:
        if candidates:
            log(f"{tree.where(candidates[0])}: has no class folders, so it cannot be used as the test set")
        return _split(tree, classes, names, labels, name, test_fraction, seed, log)
    if len(candidates) > 1:
        log(f"{tree.root}: testing on {usable[0]}, ignoring {', '.join(c for c in candidates if c != usable[0])}")
    test_classes, test_names, test_labels = _collect(tree, usable[0], log)
    if classes != test_classes:
        only = [f"{each} only in {train}" for each in sorted(set(classes) - set(test_classes))]
        only += [f"{each} only in {usable[0]}" for each in sorted(set(test_classes) - set(classes))]
        raise DataError(f"{tree.root}: train and test have different classes ({', '.join(only[:4])}); make them agree")
    train_split, test_split = _encoded(tree, names, labels), _encoded(tree, test_names, test_labels)
    return _source(tree, name, classes, train_split, test_split, [*names, *test_names])


def _is_split(folder: str) -> bool:
    """Whether a folder is called nothing but train, test or the like."""
    said = placed(PurePosixPath(folder).name)
    return bool(said.split) and not said.rest


def _collect(tree: Tree, folder: str, log: Callable[[str], None]) -> tuple[tuple[str, ...], list[str], np.ndarray]:
    """Class names, file names and labels below `folder`."""
    beside, folders = tree.children(folder)
    stray = [name for name in beside if is_picture(name)]
    if stray:
        others = f", and so do {few(stray[1:])}" if len(stray) > 1 else ""
        raise DataError(
            f"{tree.where(stray[0])}: lies outside the class folders{others}; move it into one or remove it"
        )
    if beside:
        log(f"{tree.where(beside[0])}: ignored, with {counted(len(beside) - 1, 'other file')} beside the class folders")
    if len(folders) < 2:
        found = PurePosixPath(folders[0]).name if folders else "none"
        raise DataError(f"{tree.where(folder or '.')}: at least two class folders are needed, found {found}; add them")
    index = {each: label for label, each in enumerate(folders)}
    depth = folder.count("/") + 2 if folder else 1
    names, labels = [], []
    for name in tree.below(folder).files:
        label = index.get("/".join(name.split("/")[:depth]))
        if label is not None:
            names.append(name)
            labels.append(label)
    refuse_splits_inside(tree, folder)
    counts = np.bincount(np.array(labels, np.int64), minlength=len(folders))
    if empty := [each for each, count in zip(folders, counts, strict=True) if count == 0]:
        others = f", and so are {few(empty[1:])}" if len(empty) > 1 else ""
        raise DataError(f"{tree.where(empty[0])}: empty class folder{others}; add images or remove it")
    # Sorted by class and then by path, whatever the file system or the archive made of it.
    order = sorted(range(len(names)), key=lambda i: (labels[i], names[i]))
    classes = tuple(PurePosixPath(each).name for each in folders)
    return classes, [names[i] for i in order], np.array([labels[i] for i in order], np.int64)


def _split(
    tree: Tree,
    classes: tuple[str, ...],
    names: list[str],
    labels: np.ndarray,
    name: str,
    test_fraction: float,
    seed: int,
    log: Callable[[str], None],
) -> Source:
    if (pair := indistinct(names)) is not None:
        log(f"{tree.root}: {pair[0]} and {pair[1]} are mixed; to keep them apart, move them into train/ and test/")
    train, test = set_aside(_encoded(tree, names, labels), names, test_fraction, seed, str(tree.root), log)
    paths = [names[i] for i in (*train.places, *test.places)]
    return replace(_source(tree, name, classes, train, test, paths), own_test=False)


def _encoded(tree: Tree, names: list[str], labels: np.ndarray) -> EncodedSplit:
    return EncodedSplit([tree.files[each] for each in names], [tree.where(each) for each in names], labels)


def _source(tree: Tree, name: str, classes: tuple[str, ...], train: Split, test: Split, paths: list[str]) -> Source:
    checksum = None if tree.kind == "folder" else tree.checksum(())
    return Source(name, f"class folders, {tree.kind}", classes, train, test, checksum, tuple(paths), sorted_names=True)
