"""What a network says of pictures, as a file: a table (``.csv``), a list (``.json``) or an array (``.npy``)."""

from __future__ import annotations

import contextlib
import csv
import heapq
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rsengine.errors import SettingsError
from rsengine.output import counted, escaped
from rsengine.run import plots
from rsengine.run.files import CONFUSION_FILE, atomic_path, writing
from rsengine.run.lettering import labels_said
from rsengine.run.mistakes import MISTAKES_FILE, MOST, Mistake, draw_mistakes

_MOST_COLUMNS = 20  # classes of a confusion matrix in text
Row = Callable[[str, "int | None", np.ndarray], None]


@contextlib.contextmanager
def results_file(path: Path, classes: Sequence[str], top: int) -> Iterator[Row]:
    """In this block ``row(name, label, probabilities)`` adds a picture; the file is there when it is left.

    ``.csv`` has the columns ``image``, ``true`` (empty where unknown), and ``class_K`` and ``probability_K`` for K from
    1 to ``top``. ``.json`` is a list of objects with ``image``, ``true`` and ``classes``. ``.npy`` is (N, C) float32
    probabilities, in the order of the pictures that could be read.

    Raises:
        SettingsError: a name with another ending.
        WriteError: the disk refuses it.
    """
    if path.suffix not in _WRITERS:
        raise SettingsError(f"--out {path}: expected a name that ends in {', '.join(_WRITERS)}")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary, _WRITERS[path.suffix](temporary, classes, top) as row:
        yield row


def as_object(
    name: str, label: int | None, probabilities: np.ndarray, classes: Sequence[str], top: int
) -> dict[str, Any]:
    """A picture in values that JSON holds: its name, its class where that is known, and the likeliest classes."""
    best = [{"class": classes[c], "probability": round(p, 6)} for c, p in best_of(probabilities, top)]
    return {"image": name, "true": None if label is None else classes[label], "classes": best}


def best_of(probabilities: np.ndarray, top: int) -> list[tuple[int, float]]:
    """The ``top`` likeliest classes with their probabilities, the likeliest first; equal ones in their order."""
    order = np.argsort(-probabilities, kind="stable")[:top]
    return [(int(place), float(probabilities[place])) for place in order]


@contextlib.contextmanager
def _csv(path: Path, classes: Sequence[str], top: int) -> Iterator[Row]:
    with open(path, "w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        table = csv.writer(file)
        columns = ((f"class_{k}", f"probability_{k}") for k in range(1, top + 1))
        table.writerow(["image", "true", *itertools.chain(*columns)])

        def row(name: str, label: int | None, probabilities: np.ndarray) -> None:
            best = ((classes[c], f"{p:.6g}") for c, p in best_of(probabilities, top))
            table.writerow([name, "" if label is None else classes[label], *itertools.chain(*best)])

        yield row


@contextlib.contextmanager
def _json(path: Path, classes: Sequence[str], top: int) -> Iterator[Row]:
    with open(path, "w", encoding="utf-8") as file:
        separator = "[\n"

        def row(name: str, label: int | None, probabilities: np.ndarray) -> None:
            nonlocal separator
            file.write(separator + json.dumps(as_object(name, label, probabilities, classes, top)))
            separator = ",\n"

        yield row
        file.write("[]\n" if separator == "[\n" else "\n]\n")


@contextlib.contextmanager
def _npy(path: Path, classes: Sequence[str], top: int) -> Iterator[Row]:
    rows: list[np.ndarray] = []
    yield lambda name, label, probabilities: rows.append(probabilities)
    with open(path, "wb") as file:  # np.save gives a name without its ending another one
        np.save(file, np.stack(rows) if rows else np.zeros((0, len(classes)), np.float32))


_WRITERS: dict[str, Any] = {".csv": _csv, ".npy": _npy, ".json": _json}


class Labelled:
    """What comes out for pictures whose classes are known: accuracy, confusion matrix, the most confident mistakes."""

    def __init__(self, classes: Sequence[str]) -> None:
        self.classes = classes
        self.confusion = np.zeros((len(classes), len(classes)), np.int64)  # rows: true class, columns: predicted
        self._worst: list[tuple[float, int, Mistake]] = []
        self._numbers = itertools.count()

    def add(self, pixels: np.ndarray, label: int, probabilities: np.ndarray) -> None:
        """Add a picture, (height, width, 3) uint8, of class ``label``."""
        predicted = int(probabilities.argmax())
        self.confusion[label, predicted] += 1
        if predicted != label:
            number, probability = next(self._numbers), float(probabilities[predicted])
            # Of equal ones the first is kept.
            item = (probability, -number, Mistake(number, pixels, label, predicted, probability))
            (heapq.heappush if len(self._worst) < MOST else heapq.heappushpop)(self._worst, item)

    @property
    def images(self) -> int:
        return int(self.confusion.sum())

    @property
    def accuracy(self) -> float:
        """0 to 1, of at least one picture."""
        return float(np.trace(self.confusion) / self.images)

    def lines(self) -> Iterator[str]:
        """The accuracy, and the confusion matrix, or of many classes the most frequent confusions."""
        yield f"accuracy {self.accuracy:.2%} on {counted(self.images, 'labelled image')}"
        names = [escaped(name) for name in self.classes]
        if len(names) <= _MOST_COLUMNS:
            width = max(len(f"{self.confusion.max()}"), len(f"{len(names)}")) + 1
            side = max(map(len, names))
            yield "confusion matrix (rows: true class; columns: predicted class, in the same order)"
            for name, counts in zip(names, self.confusion, strict=True):
                yield f"  {name:{side}}{''.join(f'{count:{width}}' for count in counts)}"
            return
        wrong = self.confusion.copy()
        np.fill_diagonal(wrong, 0)
        for place in np.argsort(-wrong, axis=None, kind="stable")[:10]:
            true, predicted = np.unravel_index(place, wrong.shape)
            if wrong[true, predicted]:
                yield f"  {names[true]} taken for {names[predicted]}: {wrong[true, predicted]:,}"

    def draw(self, folder: Path, say: Callable[[str], None] = print) -> list[Path]:
        """Write ``confusion.png`` and, unless there was no mistake, ``mistakes.png`` into ``folder``."""
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        drawn = [folder / CONFUSION_FILE]
        labels = labels_said(self.classes, say)
        title = f"{self.accuracy:.2%} of {counted(self.images, 'image')}"
        plots.confusion(self.confusion, drawn[0], classes=labels, title=title)
        if worst := [mistake for *_, mistake in sorted(self._worst, reverse=True)]:
            drawn.append(folder / MISTAKES_FILE)
            draw_mistakes(worst, labels, drawn[1], title="Most confident mistakes")
        return drawn
