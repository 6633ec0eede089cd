"""Parts of a run's page about its test set: confusion matrix, classes, the most confident mistakes, calibration."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Sequence

import numpy as np

from rsengine.engine.predictions import Calibration
from rsengine.output import counted
from rsengine.run.formats import NONE, count, fixed, percent
from rsengine.run.mistakes import Mistake
from rsengine.run.page import Markup, details, image_tag, note, picture, scrolled, shortened, table, tag

_CELLS = 40  # classes up to which every cell of the matrix is a number
_ROWS = 1000  # classes in the table
_BLUE = np.array([0, 114, 178])


def wilson(right: float, images: int) -> tuple[float, float]:
    """The 95 % confidence interval of a fraction that was found ``right`` among ``images`` >= 1 (Wilson, 1927)."""
    z2 = 1.959964**2
    middle = (right + z2 / (2 * images)) / (1 + z2 / images)
    half = math.sqrt(z2 * (right * (1 - right) + z2 / (4 * images)) / images) / (1 + z2 / images)
    return max(0.0, middle - half), min(1.0, middle + half)


def confusion_matrix(matrix: np.ndarray, classes: Sequence[str]) -> Iterator[Markup]:
    """The matrix as a table with counts and percent, or beyond 40 classes as a picture with its largest entries.

    ``matrix``: (C, C) int64, row = true class, column = predicted class.
    """
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    if len(classes) <= _CELLS:
        yield note("Rows are true classes, columns predicted ones: images, and percent of the true class.")
        yield _cells(matrix, shares, classes)
    else:
        yield note("Rows are true classes, columns predicted ones; the darker, the more of the true class.")
        yield _heat(shares)
    wrong = matrix - np.diag(np.diagonal(matrix))
    rows = []
    for place in np.argsort(-wrong, axis=None, kind="stable")[:15]:
        true, predicted = np.unravel_index(place, wrong.shape)
        if images := wrong[true, predicted]:
            names = (shortened(classes[true]), shortened(classes[predicted]))
            rows.append((*names, count(images), percent(shares[true, predicted])))
    if rows:
        yield tag("h3", "The most frequent confusions")
        yield table(("True class", "Predicted as", "Images", "Of the true class"), rows, numbers=(2, 3))


def _cells(matrix: np.ndarray, shares: np.ndarray, classes: Sequence[str]) -> Markup:
    names = [shortened(name, 24) for name in classes]
    heads = [tag("th", name, scope="col", title=classes[i]) for i, name in enumerate(names)]
    rows = [tag("thead", tag("tr", tag("td"), *heads))]
    lines = []
    for i, name in enumerate(names):
        cells = [tag("th", name, scope="row", title=classes[i])]
        for j in range(len(names)):
            content = [f"{matrix[i, j]:,}", tag("small", percent(shares[i, j], 1))] if matrix[i, j] else []
            # The root, because the errors worth seeing are a few percent.
            style = f"--share:{math.sqrt(shares[i, j]):.3f}"
            cells.append(tag("td", *content, style=style, class_="right" if i == j else None))
        lines.append(tag("tr", *cells))
    rows.append(tag("tbody", *lines))
    return scrolled(tag("table", *rows, class_="matrix"), "Confusion matrix")


def _heat(shares: np.ndarray) -> Markup:
    from PIL import Image

    depth = np.sqrt(shares)[:, :, None]
    pixels = (255 * (1 - depth) + _BLUE * depth).astype(np.uint8)
    image, file = Image.fromarray(pixels), io.BytesIO()
    image.thumbnail((1000, 1000))
    image.save(file, "PNG", optimize=True)
    return image_tag(file.getvalue(), "png", "Confusion matrix", class_="heat")


def class_table(matrix: np.ndarray, classes: Sequence[str]) -> Iterator[Markup]:
    """How well each class is recognised, to be sorted by any column."""
    totals, given, right = matrix.sum(axis=1), matrix.sum(axis=0), np.diagonal(matrix)
    order = range(len(classes))
    if len(classes) > _ROWS:
        order = sorted((i for i in order if totals[i]), key=lambda i: right[i] / totals[i])[:_ROWS]
        yield note(f"The {len(order):,} classes with the lowest recall, of {len(classes):,}.")
    rows, keys = [], []
    for i in order:
        recall = right[i] / totals[i] if totals[i] else None
        precision = right[i] / given[i] if given[i] else None
        f1 = 2 * right[i] / (totals[i] + given[i]) if totals[i] + given[i] else None
        errors = matrix[i].copy()
        errors[i] = 0
        worst = int(errors.argmax())
        taken = f"{shortened(classes[worst], 40)} ({errors[worst]:,})" if errors[worst] else NONE
        numbers = (recall, precision, f1)
        rows.append((shortened(classes[i]), count(totals[i]), count(right[i]), *map(percent, numbers), taken))
        shown = [None if value is None else f"{value:.6g}" for value in numbers]
        keys.append((shortened(classes[i]), totals[i], right[i], *shown, taken))
    head = ("Class", "Test images", "Correct", "Recall", "Precision", "F1", "Most often taken for")
    yield table(head, rows, numbers=range(1, 6), keys=keys)


def mistakes(found: Sequence[Mistake], classes: Sequence[str]) -> Iterator[Markup]:
    """Images that were misclassified with the highest probabilities."""
    if not found:
        yield tag("p", "No test image was misclassified.")
        return
    yield note(f"The {len(found)} misclassified test images whose wrong class was given the highest probability.")
    items = []
    for each in found:
        true, predicted = shortened(classes[each.label]), shortened(classes[each.predicted])
        image = picture(each.pixels, f"Test image {each.index}: {true}, predicted as {predicted}")
        lines = [tag("b", f"{predicted}, {percent(each.probability, 1)}"), tag("span", f"true: {true}")]
        items.append(tag("li", image, *lines, tag("div", f"test image {each.index}", class_="note")))
    yield tag("ul", *items, class_="mistakes")


def calibration(found: Calibration) -> Iterator[Markup]:
    """The reliability diagram, and its bins as a table."""
    yield tag(
        "p",
        tag("b", f"Expected calibration error (ECE) {percent(found.ece)}"),
        f" in {len(found.counts)} bins of equal width; ",
        tag("b", f"Brier score {fixed(found.brier, 4)}"),
        ", the mean squared distance between probabilities and one-hot labels, summed over the classes "
        "(0 is best, 2 worst).",
    )
    yield _diagram(found)
    yield note(
        "Bars: accuracy of the images in each bin of confidence. Red: its distance from the bin's mean confidence."
    )
    size, rows = len(found.counts), []
    for i, images in enumerate(found.counts):
        if images:
            numbers = (percent(found.confidence[i]), percent(found.accuracy[i]))
            rows.append((f"{100 * i / size:.1f} to {100 * (i + 1) / size:.1f} %", count(images), *numbers))
    head = ("Confidence", "Images", "Mean confidence", "Accuracy")
    yield details("The bins", table(head, rows, numbers=(1, 2, 3)))


def _diagram(found: Calibration) -> Markup:
    left, top, side = 52, 12, 360
    size = len(found.counts)

    def y(value: float) -> float:
        return top + side * (1 - value)

    parts: list[Markup] = []
    for tick in (0, 0.2, 0.4, 0.6, 0.8, 1.0):
        parts += [
            tag("line", class_="grid", x1=left, x2=left + side, y1=f"{y(tick):.1f}", y2=f"{y(tick):.1f}"),
            tag("text", f"{tick:.0%}", x=left - 6, y=f"{y(tick) + 4:.1f}", text_anchor="end"),
            tag("text", f"{tick:.0%}", x=f"{left + side * tick:.1f}", y=top + side + 18, text_anchor="middle"),
        ]
    for i, images in enumerate(found.counts):
        if not images:
            continue
        accuracy, confidence = found.accuracy[i], found.confidence[i]
        low, high = sorted((accuracy, confidence))
        box = {"x": f"{left + side * i / size + 1:.1f}", "width": f"{side / size - 2:.1f}"}
        words = f"{counted(images, 'image')}: confidence {percent(confidence)}, accuracy {percent(accuracy)}"
        bars = [
            tag("rect", class_="bar", y=f"{y(accuracy):.1f}", height=f"{side * accuracy:.1f}", **box),
            tag("rect", class_="gap", y=f"{y(high):.1f}", height=f"{side * (high - low):.1f}", **box),
        ]
        parts.append(tag("g", tag("title", words), *bars))
    parts += [
        tag("line", class_="ideal", x1=left, y1=y(0), x2=left + side, y2=y(1)),
        tag("text", "Confidence", x=left + side / 2, y=top + side + 38, text_anchor="middle"),
        tag("text", "Accuracy", transform=f"translate(12 {top + side / 2}) rotate(-90)", text_anchor="middle"),
    ]
    label = f"Reliability diagram: expected calibration error {percent(found.ece)}"
    view = f"0 0 {left + side + 16} {top + side + 46}"
    return tag("svg", *parts, viewBox=view, role="img", aria_label=label, class_="calibration")
