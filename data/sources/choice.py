"""Parts of a source: some of its classes, fewer training images, its classes in another order."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from rsengine.data.errors import DataError, few
from rsengine.data.sources.base import Source, keys_of_train, ranked
from rsengine.data.sources.images import ChosenSplit, Split
from rsengine.data.sources.labels import natural_key

ORDERS = ("string", "natural")


@dataclass(frozen=True, eq=False)
class RelabelledSplit(ChosenSplit):
    """Some samples of another split with new labels: `numbers[label]` for `label`."""

    numbers: np.ndarray

    @property
    def labels(self) -> np.ndarray:
        return self.numbers[self.split.labels[self.places]]


def in_order(source: Source, order: str, log: Callable[[str], None]) -> Source:
    """The classes of a source in the order of their names: "string", as torchvision's `ImageFolder` has them, or
    "natural", as timm has them, which sorts numbers by value.

    Raises:
        DataError: "natural" for a source that says itself which class is which number.
    """
    if not source.sorted_names:
        if order != ORDERS[0]:
            raise DataError(f"{source.name}: the source itself numbers the classes; leave out --class-order {order}")
        return source
    natural = tuple(sorted(source.classes, key=natural_key))
    if order == "natural":
        return _with(source, natural)
    if all(name.isdecimal() for name in source.classes) or (
        natural != source.classes and any(any(map(str.isdecimal, name)) for name in source.classes)
    ):
        log(
            f"{source.name}: class names with numbers are sorted as strings ({few(source.classes)}), "
            "as torchvision's ImageFolder does; --class-order natural sorts them by value"
        )
    return source


def with_classes(source: Source, names: Sequence[str]) -> Source:
    """The source with these of its classes alone, in the order which the source has them in.

    Raises:
        DataError: a name that is none of the source's, or comes twice; fewer than two names.
    """
    if unknown := [name for name in names if name not in source.classes]:
        lower = {name.lower(): name for name in reversed(source.classes)}
        near = difflib.get_close_matches(unknown[0].lower(), lower, 1)
        whole = next((name for name in source.classes if "," in name and unknown[0] in _pieces(name)), None)
        hint = f"did you mean {lower[near[0]]}?" if near else f"the classes are {few(source.classes)}"
        if whole is not None:
            hint = f"a name with a comma stands in quotation marks, as in --classes '\"{whole}\",…'"
        raise DataError(f"{source.name}: has no class {few(unknown)}; {hint}")
    if len(set(names)) != len(names):
        raise DataError(f"{source.name}: a class is named twice among {few(names)}; name it once")
    if len(names) < 2:
        raise DataError(f"{source.name}: at least two classes are needed, got {len(names)}; name more with --classes")
    kept = tuple(name for name in source.classes if name in names)
    return replace(_with(source, kept), name=f"{source.name}-{len(kept)}-classes")


def _pieces(name: str) -> list[str]:
    """The parts of a class name between its commas, for which it is taken without quotation marks."""
    return [piece.strip() for piece in name.split(",")]


def without_empty_classes(source: Source, log: Callable[[str], None]) -> Source:
    """The source without the classes that neither split has an image of, which is said."""
    labels = np.union1d(source.train.labels, source.test.labels)
    if len(labels) == len(source.classes):
        return source
    kept = tuple(source.classes[label] for label in labels)
    log(f"{source.name}: leaving out {few([n for n in source.classes if n not in kept])}, of which there are no images")
    return _with(source, kept)


def with_subset(source: Source, amount: float, seed: int, log: Callable[[str], None]) -> Source:
    """The source with fewer training images, the same share of every class; the test set stays whole.

    A smaller amount takes some of those that a larger one takes, see :func:`rsengine.data.sources.base.ranked`.

    Args:
        amount: a share between 0 and 1, or a whole number of images.

    Raises:
        DataError: more images than there are, or fewer than there are classes.
    """
    labels, total = source.train.labels, len(source.train)
    count = amount if isinstance(amount, int) else round(amount * total)
    present, sizes = np.unique(labels, return_counts=True)
    if not len(present) <= count <= total:
        raise DataError(
            f"{source.name}: a subset of {count} images, where there are {total} in {len(present)} classes that need "
            "one each; give another --subset"
        )
    keys, queue = keys_of_train(source), []
    for label, size in zip(present, sizes, strict=True):
        # The k-th of a class of n is due at the share (k + 1/2)/n of all, the first of each class before all others.
        for k, index in enumerate(ranked(np.flatnonzero(labels == label), keys, seed)):
            queue.append(((k + 0.5) / size if k else 0.0, index))
    chosen = [index for _, index in sorted(queue)[:count]]
    places = np.sort(np.array(chosen, np.int64))
    log(f"{source.name}: training on {count} of {total} images, chosen from every class alike (seed {seed})")
    kept = [source.paths[i] for i in (*places, *range(total, len(source.paths)))] if source.paths else ()
    return replace(
        source, name=f"{source.name}-subset-{count}", train=ChosenSplit(source.train, places), paths=tuple(kept)
    )


def _with(source: Source, classes: tuple[str, ...]) -> Source:
    """The samples of these of its classes, which are numbered anew."""
    numbers = np.full(len(source.classes), -1, np.int64)
    numbers[[source.classes.index(name) for name in classes]] = np.arange(len(classes))
    train, test = (_renumbered(split, numbers) for split in (source.train, source.test))
    first = len(source.train)
    places = (*train.places, *(first + test.places))
    paths = tuple(source.paths[i] for i in places) if source.paths else ()
    return replace(source, classes=classes, train=train, test=test, paths=paths)


def _renumbered(split: Split, numbers: np.ndarray) -> RelabelledSplit:
    return RelabelledSplit(split, np.flatnonzero(numbers[split.labels] >= 0), numbers)
