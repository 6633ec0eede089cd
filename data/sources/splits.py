"""Tells from names which files and folders are for training and which for testing, and when that cannot be told.

To take a test set for training data, or a class for a split, shows in no result but a wrong one. So a name counts only
where the names beside it agree, and names that differ by such a word and cannot be placed are refused.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import NamedTuple

from rsengine.data.errors import DataError, few

TRAIN, TEST, VALIDATION = "train", "test", "validation"
WORDS = {TRAIN: "train(?:ing)?", TEST: "test(?:ing)?", VALIDATION: "val(?:id(?:ation)?)?"}
COLUMNS = frozenset({"split", "set", "subset", "usage", "partition"})  # that say the split of each row
CANNOT_TELL = "it cannot be told which is for training"
# Words of their own: not in `contest` or `trains`, but in `cifar10train`, `train_set` and `trainset`.
_WORD = re.compile(
    "(?<![^\\W\\d_])(?:" + "|".join(f"(?P<{split}>{word})" for split, word in WORDS.items()) + ")(?:set)?(?![^\\W\\d_])"
)
# Anywhere, and more of them: whatever may tell two splits apart that are not recognised.
_HINT = re.compile("|".join((*WORDS.values(), "eval(?:uation)?", "dev", "holdout")))
_PART = re.compile(r"(?P<before>.*?)(?P<number>\d+)(?P<of>[-_]of[-_])(?P<count>\d+)(?!\d)")  # train-00000-of-00002
_NUMBER = re.compile(r"\d+|of|(?=[a-f]*\d)[0-9a-f]{8,}")  # in train-00000-of-00002-a09b74b3


class Placed(NamedTuple):
    """What a name says: the split, "" for none, and the rest of the name without numbers of parts."""

    split: str
    rest: str


def placed(name: str) -> Placed:
    """What the name of a file (without its suffix) or folder says. One that says several splits says none."""
    text = re.sub(r"(?<=[a-z\d])(?=[A-Z])", "_", name).lower()  # cifarTrain
    splits = {word.lastgroup or "" for word in _WORD.finditer(text)}
    if len(splits) != 1:
        return Placed("", text)
    words = re.findall(r"[^\W_]+", _WORD.sub(" ", text))
    return Placed(splits.pop(), " ".join(word for word in words if not _NUMBER.fullmatch(word)))


def missing_part(names: Iterable[str]) -> str | None:
    """The first file that is not among `names`, though those beside it number the parts that there are, as in
    train-00000-of-00002.parquet; None where all are there."""
    numbers: dict[tuple[str, str, str, str], set[int]] = {}
    for name in names:
        folder, last = os.path.split(name)
        if part := _PART.match(last):
            suffix = os.path.splitext(last)[1]  # between, a checksum of each may stand
            key = os.path.join(folder, part["before"]), part["of"], part["count"], suffix
            numbers.setdefault(key, set()).add(int(part["number"]))
    for (before, of, count, suffix), found in numbers.items():
        first = 1 if int(count) in found else 0
        # No further than to the first that is missing: the number may be enormous.
        missing = next((i for i in range(first, first + int(count)) if i not in found), None)
        if missing is not None:
            return f"{before}{missing:0{len(count)}}{of}{count}{suffix}"
    return None


def split_column(columns: Sequence[str], others: Collection[str], where: str) -> str | None:
    """The column that says the split of each row, if there is one that is none of `others`.

    Raises:
        DataError: several are called so.
    """
    found = [column for column in columns if column.strip().lower() in COLUMNS and column not in others]
    if len(found) > 1:
        raise DataError(f"{where}: the columns {few(found)} may say the splits; leave one in")
    return found[0] if found else None


def split_of_row(value: object, column: str, where: str) -> str:
    """The split that a cell of such a column says. Raises DataError where it says none."""
    if split := placed(str(value)).split:
        return split
    raise DataError(
        f"{where}: {column} is {str(value)!r:.60}, none of train, test and validation; correct it, or rename the column"
    )


def testing(splits: Collection[str], where: str, log: Callable[[str], None]) -> str | None:
    """Which of the splits to test on: the test split, without one validation, which is said where there are both."""
    if TEST in splits and VALIDATION in splits:
        log(f"{where}: testing on test, ignoring validation")
    return next((split for split in (TEST, VALIDATION) if split in splits), None)


def indistinct(names: Iterable[str]) -> tuple[str, str] | None:
    """Two names that differ by a word for a split, such as `mytrain` and `mytest`, if there are any."""
    seen: dict[str, tuple[str, list[str]]] = {}
    for name in names:
        text = name.lower()
        if not (hints := _HINT.findall(text)):
            continue
        first, others = seen.setdefault(re.sub(r"\d+", "", _HINT.sub("*", text)), (name, hints))
        if others != hints:
            return first, name
    return None
