"""The common form of all sources before conversion."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from rsengine.data.errors import DataError
from rsengine.data.sources.images import ChosenSplit, Split
from rsengine.data.sources.labels import refuse_unusable_names


@dataclass(frozen=True, eq=False)
class Source:
    """Samples and their classes, from any form.

    Attributes:
        name: short name of the data set.
        form: a description of the source.
        classes: class names; labels are indices into it.
        train, test: the samples.
        checksum: sha256 of the source. None for a folder of pictures, whose checksum the conversion computes while it
            reads them anyway, from `paths`.
        paths: relative path of every picture, train then test, when `checksum` is None.
        one_size: whether images that differ in size are refused where no size is asked for.
        own_test: whether the source has a test set of its own, and no share of the training set stands for it.
        sorted_names: whether the classes are in the order of their names as strings, for want of one in the source.

    Raises:
        DataError: two classes of one name, or one without.
    """

    name: str
    form: str
    classes: tuple[str, ...]
    train: Split
    test: Split
    checksum: str | None
    paths: tuple[str, ...] = ()
    one_size: bool = False
    own_test: bool = True
    sorted_names: bool = False

    def __post_init__(self) -> None:
        refuse_unusable_names(self.classes, self.name)


def keys_of_train(source: Source) -> list[str]:
    """A name for each training sample, by which a share of them is chosen."""
    return list(source.paths[: len(source.train)]) or [str(i) for i in range(len(source.train))]


def with_validation(source: Source, fraction: float, seed: int, log: Callable[[str], None]) -> Source:
    """The same source with a share of every training class in place of its test set, which is said.

    Recipes are chosen on that share, so that the test set stays unseen until the choice is made.
    """
    train, test = _divided(source.train, keys_of_train(source), fraction, seed, source.name)
    log(
        f"{source.name}: testing on {len(test)} of {len(source.train)} training images, {fraction:g} of every class "
        f"(seed {seed}); the {len(source.test)} images of the test set are not used"
    )
    paths = tuple(source.paths[i] for i in (*train.places, *test.places)) if source.paths else ()
    return replace(source, name=f"{source.name}-validation", train=train, test=test, paths=paths)


def set_aside(
    split: Split, keys: list[str], fraction: float, seed: int, where: str, log: Callable[[str], None]
) -> tuple[ChosenSplit, ChosenSplit]:
    """Divide a split without a test set into training and test samples, chosen as :func:`split_by_hash` does."""
    train, test = _divided(split, keys, fraction, seed, where)
    log(
        f"{where}: no test set, so {len(test)} of {len(split)} images, {fraction:g} of every class, "
        f"are set aside for testing (seed {seed})"
    )
    return train, test


def _divided(split: Split, keys: list[str], fraction: float, seed: int, where: str) -> tuple[ChosenSplit, ChosenSplit]:
    chosen = split_by_hash(split.labels, keys, fraction, seed, where)
    return ChosenSplit(split, np.flatnonzero(~chosen)), ChosenSplit(split, np.flatnonzero(chosen))


def split_by_hash(labels: np.ndarray, keys: list[str], fraction: float, seed: int, where: str) -> np.ndarray:
    """Choose a test set, the same share of every class.

    Within a class the samples are put in the order of sha256("seed:key") and the first are taken, so that the choice
    depends on nothing but the seed and the names of the samples, on any machine and with any version of numpy.

    Args:
        labels: (N,) int64.
        keys: a name for each sample.
        fraction: share of each class, between 0 and 1; at least one sample a class, and at least one remains.

    Returns:
        (N,) bool, True for test.

    Raises:
        DataError: a class has fewer than two samples.
    """

    chosen = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        if len(members) < 2:
            raise DataError(
                f"{where}: {keys[members[0]]} is the only image of its class, and one is needed to train and one to "
                "test; add images, or give train/ and test/ folders"
            )
        count = min(max(1, round(fraction * len(members))), len(members) - 1)
        chosen[ranked(members, keys, seed)[:count]] = True
    return chosen


def ranked(members: np.ndarray, keys: list[str], seed: int) -> list[int]:
    """Indices of samples in the order of sha256("seed:key"), the key of sample `i` being `keys[i]`."""
    return sorted(
        members.tolist(),
        key=lambda i: hashlib.sha256(f"{seed}:{keys[i]}".encode("utf-8", "surrogateescape")).digest(),
    )
