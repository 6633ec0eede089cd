"""Labels as numbers, and the names of their classes, whatever form they come in."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from rsengine.data.errors import DataError, few
from rsengine.data.sources.images import Split


def whole_numbers(labels: np.ndarray, where: str) -> np.ndarray:
    """Labels in an array of any integer type, one for each sample.

    Args:
        labels: (N,) or (N, 1).
        where: for messages.

    Returns:
        (N,) int64.

    Raises:
        DataError: another shape, another type, or a number that int64 does not hold.
    """
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim == 2:
        raise DataError(
            f"{where}: {labels.shape[1]} columns of labels, where every image has one class; if one column of each row "
            "is 1 and the others are 0, save labels.argmax(axis=1)"
        )
    if labels.ndim != 1:
        raise DataError(f"{where}: labels of shape {labels.shape}, not (N,) or (N, 1); save one number for each image")
    if labels.dtype.kind in "US":
        raise DataError(
            f"{where}: labels of type {labels.dtype}, not whole numbers; number the names of all splits alike, as "
            "np.unique(labels, return_inverse=True) does, and save the second array of the two"
        )
    if labels.dtype.kind not in "iu":
        raise DataError(f"{where}: labels of type {labels.dtype}, not whole numbers; save labels.astype('int64')")
    if labels.dtype.kind == "u" and len(labels) and labels.max() > np.iinfo(np.int64).max:
        raise DataError(f"{where}: label {labels.max()} out of range; number the classes from 0")
    return labels.astype(np.int64)


def named_or_numbered(
    classes: tuple[str, ...] | None, splits: Sequence[Split], where: str, log: Callable[[str], None]
) -> tuple[str, ...]:
    """The names of the classes in all splits: `classes`, or the numbers up to the largest label, which is said.

    Raises:
        DataError: a label out of range.
    """
    numbered = classes is None
    if classes is None:
        # Every class needs an image, so that a label beyond their number is none.
        count = min(int(max(part.labels.max(initial=-1) for part in splits)) + 1, sum(map(len, splits)))
        classes = tuple(str(label) for label in range(count))
    for part in splits:
        wrong = np.flatnonzero((part.labels < 0) | (part.labels >= len(classes)))
        if len(wrong):
            raise DataError(
                f"{part.name(wrong[0])}: label {part.labels[wrong[0]]} out of range 0 … {len(classes) - 1}; "
                "number the classes from 0, remove the unlabelled images or give another file"
            )
    if numbered:
        log(f"{where}: the classes have no names; they are numbered 0 … {len(classes) - 1}")
    return classes


def refuse_unusable_names(classes: Sequence[str], where: str) -> None:
    """Raise DataError for a name that is empty or is that of two classes: nothing could tell which is meant."""
    if twice := [name for name, count in Counter(classes).items() if count > 1]:
        raise DataError(f"{where}: two classes have the name {few(twice)}; rename one")
    if any(not name.strip() for name in classes):
        raise DataError(f"{where}: class {[not name.strip() for name in classes].index(True)} has no name; name it")


def natural_key(name: str) -> tuple[list[str | int], str]:
    """Sorts names as people do, class2 before class10 and capitals like small letters; timm's order of class folders.

    Names that are equal in this are sorted as strings.
    """
    pieces = re.split(r"(\d+)", name.lower())  # text and digits take turns
    return [int(piece) if place % 2 else piece for place, piece in enumerate(pieces)], name
