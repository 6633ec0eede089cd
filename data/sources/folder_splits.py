"""Which of the folders beside each other are splits, and which are classes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import PurePosixPath

from rsengine.data.errors import DataError, few
from rsengine.data.sources.images import is_picture
from rsengine.data.sources.splits import CANNOT_TELL, TRAIN, Placed, indistinct, placed
from rsengine.data.sources.tree import Tree

REMEDY = "put the classes into train/ and test/, or rename what is a class"


def find_splits(tree: Tree, folder: str, log: Callable[[str], None]) -> dict[str, str]:
    """split -> its folder directly inside `folder`, with a train among them; empty where the folders are classes.

    Folders are splits when all that hold pictures say one, and differ by that word alone: a class called train, among
    apple and bus, is a class. Further folders are passed over, which is said, where train and test show by the same
    classes in both that they are splits.

    Raises:
        DataError: no train, two of one split, or folders of which it cannot be told whether they are splits.
    """
    folders = tree.children(folder)[1]
    said = {each: placed(_name(each)) for each in folders}
    splits = {each: place for each, place in said.items() if place.split}
    pictured = _with_pictures(tree, folder) if splits else set()
    siblings = [each for each in folders if each in splits or each in pictured]
    chosen = splits if len(splits) == len(siblings) and _differ_by_split(splits) else _with_same_classes(tree, splits)
    if not chosen:
        _check_classes(tree, folder, folders, splits, siblings)
        for each in splits:
            log(f"{tree.where(each)}: taken for a class, as the folders beside it are")
        return {}
    by_split: dict[str, str] = {}
    for each, place in chosen.items():
        if (other := by_split.setdefault(place.split, each)) != each:
            raise DataError(f"{tree.where(other)}: says {place.split}, as {_name(each)} does; merge or remove one")
    if TRAIN not in by_split:
        raise DataError(f"{tree.where(folder or '.')}: has {few(sorted(map(_name, chosen)))} but no train; add train/")
    if ignored := [each for each in folders if each not in chosen]:
        log(f"{tree.where(folder or '.')}: taking {' and '.join(map(_name, chosen))}, ignoring {few(ignored)}")
    return by_split


def refuse_splits_inside(tree: Tree, folder: str) -> None:
    """Raise DataError where folders inside the classes in `folder` are splits, as in cat/train and cat/test: they would
    be mixed."""
    inside: dict[str, list[str]] = {}
    for each in sorted(tree.folders):
        parent = each.rpartition("/")[0]
        if parent != folder and parent.startswith(folder + "/" if folder else ""):
            inside.setdefault(parent, []).append(_name(each))
    for parent, names in inside.items():
        if (pair := indistinct(names)) is not None:
            raise DataError(
                f"{tree.where(parent)}: holds {pair[0]} and {pair[1]}, which would be mixed; "
                "put train and test above the classes, as in train/cat and test/cat"
            )


def _name(folder: str) -> str:
    return PurePosixPath(folder).name


def _with_pictures(tree: Tree, folder: str) -> set[str]:
    """The folders directly inside `folder` that hold pictures, and not annotations or notes alone."""
    depth = folder.count("/") + 2 if folder else 1
    # What has no suffix may be a picture.
    names = (name for name in tree.below(folder).files if is_picture(name) or not PurePosixPath(name).suffix)
    return {"/".join(name.split("/")[:depth]) for name in names}


def _differ_by_split(splits: dict[str, Placed]) -> bool:
    return len({place.rest for place in splits.values()}) == 1


def _with_same_classes(tree: Tree, splits: dict[str, Placed]) -> dict[str, Placed]:
    """The train among `splits`, and what goes with it, where another split has the same classes inside."""
    for train, place in splits.items():
        group = {each: other for each, other in splits.items() if other.rest == place.rest}
        classes = _inside(tree, train)
        if place.split == TRAIN and len(classes) > 1:
            for each, other in group.items():
                if other.split != TRAIN and _inside(tree, each) == classes:
                    return group
    return {}


def _inside(tree: Tree, folder: str) -> set[str]:
    return {_name(each) for each in tree.children(folder)[1]}


def _check_classes(tree: Tree, folder: str, folders: list[str], splits: dict[str, Placed], siblings: list[str]) -> None:
    """Raise DataError unless the folders can be classes, though some of them say a split."""
    where, names = tree.where(folder or "."), {_name(each) for each in folders}
    if (pair := indistinct(sorted(names))) is not None:
        raise DataError(f"{where}: holds {pair[0]} and {pair[1]}; {CANNOT_TELL}; {REMEDY}")
    others = [_name(each) for each in siblings if each not in splits]
    for each in splits:
        inside = _inside(tree, each)
        if inside & names or (len(others) == 1 and len(inside) > 1):
            raise DataError(
                f"{where}: {_name(each)} may be a split or a class, and {few(others)} beside it the same; {REMEDY}"
            )
