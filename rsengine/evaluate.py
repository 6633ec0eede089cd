"""``python -m rsengine.evaluate RUN``: measure what a run has learned, in any format, on a test set."""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rsengine.data import Dataset, find_dataset
from rsengine.data.beton.reader import BetonReader
from rsengine.data.find import named_by_environment, variable_of
from rsengine.data.paths import convert_command
from rsengine.data.sources.images import LARGEST_SIDE, resize_and_crop
from rsengine.engine.predictions import Predictions, joined, one_batch
from rsengine.errors import SettingsError, run_command
from rsengine.export import Classifier, load_classifier
from rsengine.input.choose import choose_loader
from rsengine.output import add_output_options, counted, escaped, parsed, print_json, program, speaker
from rsengine.run.same_data import measured_data_of, relation_of
from rsengine.run.weights import WeightsError

BATCH = 500
EXAMPLE = "example: %(prog)s runs/quickstart-20261126-140000 --flip --per-class"


@dataclass(frozen=True)
class Measured:
    """A classifier on a test set.

    Attributes:
        predictions: for each image.
        loss: mean cross-entropy.
        images_per_second: of the network alone, without the first batch if there are others.
    """

    predictions: Predictions
    loss: float
    images_per_second: float

    @property
    def accuracy(self) -> float:
        return float((self.predictions.predicted == self.predictions.labels).mean())


def measure(classifier: Classifier, batches: Iterable[tuple[Tensor, Tensor]], *, flip: bool = False) -> Measured:
    """Measure ``classifier`` on ``batches`` of (N, H, W, 3) uint8 images and (N,) int64 labels, at least one.

    Args:
        flip: the probabilities are the means of those of each image and of its mirror image.

    Raises:
        WeightsError: the weights overflow.
    """
    each, seconds, counts, loss = [], [], [], 0.0
    for images, labels in batches:
        begun = time.perf_counter()
        scores = classifier.logits(images).double().log_softmax(1)
        if flip:
            mirrored = classifier.logits(images.flip(2)).double().log_softmax(1)
            scores = torch.logaddexp(scores, mirrored) - math.log(2)
        seconds.append(time.perf_counter() - begun)
        counts.append(len(labels))
        each.append(one_batch(scores, labels))
        loss -= float(scores.gather(1, labels[:, None]).sum())
    start = 1 if len(counts) > 1 else 0  # the first batch is slower: the libraries prepare themselves
    speed = sum(counts[start:]) / sum(seconds[start:])
    return Measured(joined(each), loss / sum(counts), speed)


def main(argv: list[str] | None = None) -> int:
    """The command. Returns its exit status: 0, or 2 for bad input."""
    parser = argparse.ArgumentParser(
        prog=program("evaluate"),
        description="Measure what a run has learned, in any format, on a test set.",
        epilog=EXAMPLE,
    )
    parser.add_argument("run", help="a run folder, or what rsengine.export wrote: a folder or a file of it")
    parser.add_argument("--data", help="converted folder or source; default: $RSENGINE_DATA, or the run's own")
    parser.add_argument("--flip", action="store_true", help="average each image with its mirror image")
    parser.add_argument("--per-class", action="store_true", help="a table of the classes")
    parser.add_argument(
        "--size", type=int, metavar="N", help="scale and crop the images to NxN, other than the network learned"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--precision", choices=("auto", "bf16", "fp32"), default="auto")
    add_output_options(parser, result="the figures")
    arguments = parsed(parser, argv)
    return run_command(lambda: _evaluate(arguments))


def _evaluate(arguments: argparse.Namespace) -> int:
    say = speaker(quiet=arguments.quiet, json=arguments.json)
    classifier = load_classifier(arguments.run, arguments.device, arguments.precision)
    say(f"weights: {classifier}")
    folder = classifier.path if classifier.path.is_dir() else classifier.path.parent
    dataset = _data_for(arguments.data, folder, say)
    if tuple(dataset.classes) != classifier.classes:
        variable = variable_of(arguments.data)
        given = f"{dataset.name}, which {variable} names," if variable else dataset.name
        raise WeightsError(
            f"{arguments.run}: trained on other classes than {given} has; give the data it learned with --data"
        )
    relation = relation_of(dataset, folder)
    for line in relation.lines(dataset):
        say(line)
    result = measure(classifier, _batches(dataset, classifier, arguments.size), flip=arguments.flip)
    calibration = result.predictions.calibration()
    how = " (mean of each image and its mirror image)" if arguments.flip else ""
    if arguments.size is not None:
        how += f" (at {arguments.size}x{arguments.size})"
    count = len(result.predictions.labels)
    say(
        f"{dataset.name}: accuracy {result.accuracy:.2%}{how}, cross-entropy {result.loss:.4f} on "
        f"{counted(count, 'test image')}"
    )
    say(f"calibration: ECE {calibration.ece:.4f} ({len(calibration.counts)} bins), Brier score {calibration.brier:.4f}")
    say(f"throughput: {result.images_per_second:,.0f} images/s of the network alone, batches of {BATCH}")
    if arguments.per_class:
        for line in class_table(result.predictions, dataset.classes):
            say(line)
    if arguments.json:
        figures = {
            "weights": str(classifier.path),
            "format": classifier.kind,
            "dataset": dataset.name,
            "folder": str(dataset.folder),
            "run_data": relation.kind,
            "trained_on": relation.trained_on,
            "test_images": count,
            "flip": arguments.flip,
            "size": arguments.size,
            "accuracy": result.accuracy,
            "cross_entropy": result.loss,
            "ece": calibration.ece,
            "brier": calibration.brier,
            "images_per_second": result.images_per_second,
        }
        print_json(figures | {"classes": class_figures(result.predictions, dataset.classes)})
    return 0


def _data_for(data: str | None, folder: Path, say: Callable[[str], None]) -> Dataset:
    """What ``data`` or $RSENGINE_DATA names; else the data of the run in ``folder``, where it says which; else others.

    Raises:
        DataError, CheckpointError: there are none, or not any more.
    """
    if data is None and not named_by_environment() and (own := measured_data_of(folder)) is not None:
        say(f"data: {own.name} in {own.folder}, which the run began with")
        return own
    return find_dataset(data, log=say)


def class_figures(predictions: Predictions, classes: tuple[str, ...]) -> list[dict[str, Any]]:
    """For each class its images, accuracy (recall) and precision; None where there is no image to take it of."""
    confusion = _confusion(predictions, len(classes))
    return [
        {
            "class": name,
            "images": int(confusion[number].sum()),
            "accuracy": _share(confusion[number, number], confusion[number].sum()),
            "precision": _share(confusion[number, number], confusion[:, number].sum()),
        }
        for number, name in enumerate(classes)
    ]


def class_table(predictions: Predictions, classes: tuple[str, ...]) -> Iterator[str]:
    """A line for each class: images, accuracy (recall), precision, and what its images are most often taken for."""
    names, confusion = [escaped(name) for name in classes], _confusion(predictions, len(classes))
    width = max(5, *map(len, names))
    yield f"{'class':{width}}  images  accuracy  precision  most often taken for"
    for number, (name, figures) in enumerate(zip(names, class_figures(predictions, classes), strict=True)):
        recall, precision = (f"{v:.2%}" if v is not None else "–" for v in (figures["accuracy"], figures["precision"]))
        wrong = confusion[number].copy()
        wrong[number] = 0
        other = f"{names[wrong.argmax()]} ({wrong.max():,})" if wrong.any() else ""
        yield f"{name:{width}}  {figures['images']:6,}  {recall:>8}  {precision:>9}  {other}".rstrip()


def _confusion(predictions: Predictions, classes: int) -> np.ndarray:
    """(C, C) int64: rows are true classes, columns predicted ones."""
    cells = predictions.labels * classes + predictions.predicted
    return np.bincount(cells, minlength=classes**2).reshape(classes, classes)


def _share(part: int, whole: int) -> float | None:
    return float(part / whole) if whole else None


def _batches(dataset: Dataset, classifier: Classifier, size: int | None) -> Iterator[tuple[Tensor, Tensor]]:
    """The test set. Raises :class:`WeightsError` where its images have another size than the network takes."""
    if size is not None and not 1 <= size <= LARGEST_SIDE:
        raise SettingsError(f"--size {size}: expected pixels from 1 to {LARGEST_SIDE:,}")
    if size is not None and (size, size) != classifier.image_size and not classifier.any_size:
        height, width = classifier.image_size
        raise WeightsError(f"{classifier.path}: {classifier.kind}, takes {height}x{width} alone; leave out --size")
    if size is None:
        _refuse_other_size(dataset, classifier)
    elif dataset.image_size != (size, size):
        return _resized(dataset, size)
    return choose_loader("auto").open(dataset.test_beton, BATCH).epoch()


def _resized(dataset: Dataset, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    reader = BetonReader(dataset.test_beton)
    labels = torch.from_numpy(reader.labels)
    for start in range(0, len(reader), BATCH):
        places = range(start, min(start + BATCH, len(reader)))
        images = np.stack([resize_and_crop(reader.image(place), size) for place in places])
        yield torch.from_numpy(images), labels[start : places.stop]


def _refuse_other_size(dataset: Dataset, classifier: Classifier) -> None:
    """The network would take other sizes, and give an accuracy that says nothing about it."""
    if dataset.image_size == classifier.image_size:
        return
    height, width = classifier.image_size
    has = "differ in size" if dataset.image_size is None else "are {}x{}".format(*dataset.image_size)
    remedy = "give images of that size"
    if height == width:
        remedy = f"convert them again: `{convert_command()} SOURCE --out DIR --size {height}`"
    if classifier.any_size:
        remedy += ", or measure it at another size with --size N"
    raise WeightsError(f"{dataset.folder}: its images {has}; the network learned {height}x{width}; {remedy}")


if __name__ == "__main__":
    sys.exit(main())
