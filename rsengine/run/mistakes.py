"""The test images that a network misclassifies with the highest probabilities, and a picture of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rsengine.data import Dataset
from rsengine.data.beton.reader import BetonReader
from rsengine.engine.evaluation import Evaluation
from rsengine.run import plots

MISTAKES_FILE = "mistakes.png"
MOST, COLUMNS = 25, 5  # mistakes that are shown, and in a row of the picture


@dataclass(frozen=True)
class Mistake:
    """An image that was misclassified. ``index``: in the test set; ``pixels``: (H, W, 3) uint8."""

    index: int
    pixels: np.ndarray
    label: int
    predicted: int
    probability: float


def mistakes_of(dataset: Dataset, evaluation: Evaluation) -> list[Mistake]:
    """The most confident ones of an evaluation on the test set of ``dataset``, the most confident first; none where it
    kept no predictions."""
    found = evaluation.predictions
    if found is None:
        return []
    reader = BetonReader(dataset.test_beton)
    return [
        Mistake(i, reader.image(i), int(found.labels[i]), int(found.predicted[i]), float(found.probability[i]))
        for i in found.worst(MOST).tolist()
    ]


def draw_mistakes(found: Sequence[Mistake], labels: Sequence[str], path: Path, *, title: str) -> None:
    """Write ``found``, at least one, into the PNG ``path``. ``labels``: names of the classes, which a font has."""
    columns = min(COLUMNS, len(found))
    blank = np.full_like(found[0].pixels, 255)  # the rows of a grid are equally long
    rows, captions = [], []
    for start in range(0, len(found), columns):
        some = found[start : start + columns]
        missing = columns - len(some)
        rows.append(("", np.stack([*(each.pixels for each in some), *[blank] * missing])))
        texts = [f"{labels[each.predicted]} {each.probability:.0%}\ntrue: {labels[each.label]}" for each in some]
        captions.append([*texts, *[""] * missing])
    plots.image_grid(rows, path, titles=[""] * columns, captions=captions, title=title)
