"""NumPy arrays of pictures and labels: .npz files, and .npy and .npz files in a folder or an archive.

An .npz file is a zip of .npy files, so both are read alike, and without pickles: as a folder of this name would be. The
names are those of MedMNIST (`train_images`, `val_labels`), of Keras (`x_train`, `y_test`), or others that hold such
words.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath

import numpy as np

from rsengine.data.errors import DataError, few
from rsengine.data.sources.archives import Spool, unpack_inside
from rsengine.data.sources.base import Source, set_aside
from rsengine.data.sources.images import LARGEST_SIDE, ArraySplit, Split, is_picture
from rsengine.data.sources.labels import named_or_numbered, whole_numbers
from rsengine.data.sources.splits import TRAIN, placed, testing
from rsengine.data.sources.tree import Tree
from rsengine.output import counted

SUFFIX, ZIPPED = ".npy", ".npz"
IMAGES = frozenset({"images", "image", "imgs", "img", "x", "data", "pixels"})
LABELS = frozenset({"labels", "label", "y", "targets", "target"})
CHANNELS = (1, 3)


def find_arrays(tree: Tree) -> list[str]:
    """Names of the files of arrays in a tree that holds no pictures beside them."""
    names = [name for name in tree.files if name.lower().endswith((SUFFIX, ZIPPED))]
    return [] if any(is_picture(name) for name in tree.files) else names


def open_arrays(
    tree: Tree,
    names: list[str],
    scratch: Path,
    *,
    name: str,
    test_fraction: float,
    seed: int,
    log: Callable[[str], None],
) -> Source:
    """Read arrays of pictures and labels into memory; what is in .npz files is unpacked into one file in `scratch`.

    Images are (N, H, W), (N, H, W, C) or (N, C, H, W) uint8 with one channel or three; labels (N,) or (N, 1) of any
    integer type.

    Raises:
        DataError: damaged files, pickles, images without labels, another shape or type, labels out of range.
    """
    given, origins = tree, {each: each for each in names}
    if zips := [each for each in names if each.lower().endswith(ZIPPED)]:
        tree, origins = _unpacked(tree, names, zips, scratch)
    pairs = _pairs(tree, list(origins), log)
    test_split = testing(pairs, str(tree.root), log)
    chosen = [pairs[split] for split in (TRAIN, test_split) if split is not None]
    used = [each for pair in chosen for each in pair]
    splits: Sequence[Split] = [_read(tree, *pair) for pair in chosen]
    classes = named_or_numbered(None, splits, str(tree.root), log)
    if test_split is None:
        keys = [f"image {index}" for index in range(len(splits[0]))]
        splits = set_aside(splits[0], keys, test_fraction, seed, str(tree.root), log)
    return Source(
        name,
        f"NumPy arrays, {tree.kind}",
        classes,
        *splits,
        given.checksum({origins[each] for each in used}),
        own_test=test_split is not None,
    )


def _unpacked(tree: Tree, names: list[str], zips: list[str], scratch: Path) -> tuple[Tree, dict[str, str]]:
    """The tree with the arrays of .npz files, as if in folders; and the name of each array -> that of its file."""
    origins = {each: each for each in names if each not in zips}
    files = {each: tree.files[each] for each in origins}
    with Spool(scratch / "spool-arrays") as spool:
        unpacked = unpack_inside({tree.where(each): tree.files[each] for each in zips}, spool)
    for each in zips:
        for inside, blob in unpacked[tree.where(each)].items():
            if inside.lower().endswith(SUFFIX):
                array = f"{each[: -len(ZIPPED)]}/{inside}"
                files[array], origins[array] = blob, each
    return replace(tree, files=files), origins


def _pairs(tree: Tree, names: list[str], log: Callable[[str], None]) -> dict[str, tuple[str, str]]:
    """split -> the names of its images and of its labels, with a train among them."""
    folders = [PurePosixPath(each).parts[:-1] for each in names]
    around = len(os.path.commonprefix(folders))
    found: dict[str, dict[str, str]] = {}
    sets: dict[str, str] = {}
    for each in names:
        parts = PurePosixPath(each).with_suffix("").parts[around:]
        said = placed("_".join(parts))
        words = [word for word in said.rest.replace("_", " ").split()]
        kinds = [word for word in words if word in IMAGES | LABELS]
        if len(kinds) != 1:
            log(f"{tree.where(each)}: ignored, its name says neither images nor labels")
            continue
        kind = "images" if kinds[0] in IMAGES else "labels"
        sets.setdefault(" ".join(word for word in words if word != kinds[0]), each)
        if (other := found.setdefault(said.split, {}).setdefault(kind, each)) != each:
            raise DataError(f"{tree.where(each)}: holds {kind} of {said.split or 'all'}, as {other} does; remove one")
    if len(sets) > 1:
        first, second = list(sets.values())[:2]
        raise DataError(
            f"{tree.root}: {first} and {second} belong to different data sets, or do not say which is for training; "
            "call them x_train and x_test, or give one data set"
        )
    if not found:
        raise DataError(
            f"{tree.root}: no arrays called images and labels among {few(names)}; call them train_images and "
            "train_labels, or x_train and y_train"
        )
    if set(found) == {""}:
        found = {TRAIN: found[""]}
    if "" in found:
        raise DataError(f"{tree.where(next(iter(found[''].values())))}: name says neither train nor test; rename it")
    if TRAIN not in found:
        raise DataError(f"{tree.root}: no arrays of train among {few(names)}; add or rename them")
    for split, pair in found.items():
        if len(pair) == 1:
            (kind, each) = next(iter(pair.items()))
            other = "labels" if kind == "images" else "images"
            raise DataError(f"{tree.where(each)}: {kind} without {other} of {split}; add them or remove it")
    return {split: (pair["images"], pair["labels"]) for split, pair in found.items()}


def _read(tree: Tree, images: str, labels: str) -> ArraySplit:
    pixels, numbers = _pixels(_load(tree, images), tree.where(images)), _load(tree, labels)
    numbers = whole_numbers(numbers, tree.where(labels))
    if len(pixels) != len(numbers):
        raise DataError(
            f"{tree.where(images)}: {counted(len(pixels), 'image')}, but {counted(len(numbers), 'label')} in {labels}; "
            "save both again"
        )
    return ArraySplit(pixels, numbers, tree.where(images))


def _load(tree: Tree, name: str) -> np.ndarray:
    content = io.BytesIO(tree.read(name))
    try:
        return np.lib.format.read_array(content, allow_pickle=False)
    except Exception as error:  # NumPy evaluates the header, and passes on whatever Python's parser raises
        if "allow_pickle" in str(error):
            raise DataError(f"{tree.where(name)}: holds Python objects; save an array of numbers") from error
        raise DataError(f"{tree.where(name)}: damaged array ({error!s:.100}); download or save it again") from error


def _pixels(array: np.ndarray, where: str) -> np.ndarray:
    """(N, height, width, 3) uint8."""
    if array.dtype != np.uint8:
        raise DataError(f"{where}: pixels of type {array.dtype}, not uint8; save them as whole numbers from 0 to 255")
    shape = array.shape
    if array.ndim == 3:
        array = array[..., None]
    elif array.ndim != 4 or not {shape[1], shape[3]} & set(CHANNELS):
        raise DataError(
            f"{where}: expected images of shape (N, H, W), (N, H, W, C) or (N, C, H, W) with C = 1 or 3, got {shape}; "
            "save them so, without transparency"
        )
    elif shape[3] not in CHANNELS:
        array = array.transpose(0, 2, 3, 1)
    elif shape[1] in CHANNELS:
        raise DataError(f"{where}: of shape {shape} it cannot be told which axis holds the channels; save (N, H, W, 3)")
    if 0 in array.shape:
        raise DataError(f"{where}: no pixels in an array of shape {shape}; save images")
    if max(array.shape[1:3]) > LARGEST_SIDE:
        raise DataError(f"{where}: {array.shape[2]}×{array.shape[1]} pixels is too large; scale the images down")
    return np.ascontiguousarray(np.broadcast_to(array, (*array.shape[:3], 3)))
