"""Tiny ImageNet as Stanford gives it: class folders to train on, and a list of the classes of the validation images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import PurePosixPath

from rsengine.data.errors import DataError
from rsengine.data.sources.base import Source
from rsengine.data.sources.images import is_picture
from rsengine.data.sources.splits import TEST, TRAIN
from rsengine.data.sources.tables import Pictures, Table, encoded, resolved
from rsengine.data.sources.tree import Tree

ANNOTATIONS, WORDS = "val_annotations.txt", "words.txt"


def find_tiny_imagenet(tree: Tree) -> str | None:
    """The file that lists the validation images, if the tree has that layout."""
    for name in tree.files:
        folder, _, last = name.rpartition("/")
        if last == ANNOTATIONS and _beside(folder, TRAIN) in tree.folders:
            return name
    return None


def open_tiny_imagenet(tree: Tree, annotations: str, *, name: str, log: Callable[[str], None]) -> Source:
    """Collect the training images, and the validation images as the test set, since those called test have no labels.

    Classes are in the order of their WordNet numbers, as torchvision's `ImageFolder` has them; they are called by the
    first word that words.txt gives for the number, or by the number where no word, or the same for two, is given.

    Raises:
        DataError: a list that names images or classes which are not there.
    """
    validation, train = annotations.rpartition("/")[0], _beside(annotations.rpartition("/")[0], TRAIN)
    numbers = [PurePosixPath(folder).name for folder in tree.children(train)[1]]
    # Lists of boxes lie beside the images.
    files = [each for each in tree.below(train).files if is_picture(each)]
    of_train = Table(train, TRAIN, files, [each[len(train) + 1 :].split("/")[0] for each in files])
    rows = list(_rows(tree, annotations))
    if unknown := [(line, number) for line, _, number in rows if number not in set(numbers)]:
        line, number = unknown[0]
        raise DataError(f"{tree.where(annotations)} line {line}: {train} has no class {number}; unpack it again")
    of_test = resolved(tree, annotations, TEST, rows, Pictures(tree, validation, TEST))
    log(f"{tree.root}: testing on the {len(rows)} validation images, whose classes are known")
    splits = [encoded(tree, table, tuple(numbers)) for table in (of_train, of_test)]
    words = _beside(validation, WORDS)
    used = [annotations, *of_train.files, *of_test.files, *([words] if words in tree.files else [])]
    return Source(
        name, f"Tiny ImageNet, {tree.kind}", _names(tree, numbers, words), splits[0], splits[1], tree.checksum(used)
    )


def _beside(folder: str, name: str) -> str:
    parent = folder.rpartition("/")[0]
    return f"{parent}/{name}" if parent else name


def _rows(tree: Tree, name: str) -> Iterator[tuple[int, str, str]]:
    """Line, file and class of the lines "file, class, box", with tabs between them."""
    for line, text in enumerate(tree.read(name).decode("utf-8", "replace").splitlines(), start=1):
        cells = text.split("\t")
        if text.strip() and len(cells) < 2:
            raise DataError(f"{tree.where(name)} line {line}: no file and class; unpack the archive again")
        if text.strip():
            yield line, cells[0], cells[1].strip()


def _names(tree: Tree, numbers: list[str], words: str) -> tuple[str, ...]:
    if words not in tree.files:
        return tuple(numbers)
    lines = (line.partition("\t") for line in tree.read(words).decode("utf-8", "replace").splitlines())
    first = {number: text.split(",")[0].strip() for number, _, text in lines}
    count = Counter(first.get(number, "") for number in numbers)
    return tuple(word if (word := first.get(each, "")) and count[word] == 1 else each for each in numbers)
