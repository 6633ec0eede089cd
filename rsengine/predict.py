"""``python -m rsengine.predict RUN INPUT ...``: classify pictures with what a run has learned, in any format."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from rsengine.data import DataError
from rsengine.errors import SettingsError, run_command
from rsengine.export import Classifier, load_classifier
from rsengine.output import add_output_options, counted, escaped, parsed, print_json, program, speaker
from rsengine.run.pictures import Picture, pictures
from rsengine.run.results import Labelled, as_object, best_of, results_file
from rsengine.run.weights import Weights

PIXELS = 256 * 32 * 32  # in a batch, so that memory does not depend on how many pictures there are
EXAMPLE = "example: %(prog)s runs/quickstart-20261126-140000 photos/ cat.jpg --top 5 --out found.csv"


def predict(network: Weights | Classifier, images: np.ndarray) -> Tensor:
    """Class probabilities of images, preprocessed exactly as in training.

    Args:
        images: (N, H, W, 3) uint8 RGB, of the size the network was trained on.

    Returns:
        (N, C) float32 on the CPU, each row summing to 1.

    Raises:
        WeightsError: the weights overflow.
    """
    classifier = network if isinstance(network, Classifier) else Classifier.of_weights(network)
    return classifier.probabilities(images)


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns its exit status: 0, 1 when some pictures could not be read, 2 when none could."""
    parser = argparse.ArgumentParser(prog=program("predict"), description=__doc__, epilog=EXAMPLE)
    parser.add_argument("run", help="a run folder, or what rsengine.export wrote: a folder or a file of it")
    parser.add_argument(
        "images",
        nargs="+",
        metavar="INPUT",
        type=Path,
        help="picture files, folders of them, .npy or .npz files with (N, H, W, 3) uint8, or .beton files",
    )
    parser.add_argument("--top", type=int, default=3, metavar="K", help="classes to name for each picture (default: 3)")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="write a .csv, .json or .npy in place of a line for each picture"
    )
    parser.add_argument(
        "--pictures", type=Path, metavar="DIR", help="of labelled input, write confusion.png and mistakes.png there"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add_output_options(parser, result="the predictions, but with --out, and what labels say of them,")
    return run_command(lambda: _predict(parsed(parser, argv)))


def _predict(arguments: argparse.Namespace) -> int:
    if arguments.top < 1:
        raise SettingsError(f"--top {arguments.top}: expected at least 1")
    say = speaker(quiet=arguments.quiet, json=arguments.json)
    classifier = load_classifier(arguments.run, arguments.device)
    say(f"weights: {classifier}")
    top, labelled = min(arguments.top, len(classifier.classes)), Labelled(classifier.classes)
    read, failed, drawn = 0, 0, []
    predictions: list[dict[str, Any]] | None = [] if arguments.json and arguments.out is None else None
    with contextlib.ExitStack() as stack:
        file = None
        if arguments.out is not None:
            file = stack.enter_context(results_file(arguments.out, classifier.classes, top))
        found = pictures(arguments.images, classifier.image_size, classifier.classes, say)
        for batch, errors in batches(found, classifier.image_size):
            failed += len(errors)
            if not batch:
                continue
            probabilities = predict(classifier, np.stack([each.pixels for each in batch])).numpy()
            for each, shares in zip(batch, probabilities, strict=True):
                if file is not None:
                    file(each.name, each.label, shares)
                else:
                    say(_line(classifier, each.name, shares, top))
                if predictions is not None:
                    predictions.append(as_object(each.name, each.label, shares, classifier.classes, top))
                if each.label is not None:
                    labelled.add(each.pixels, each.label, shares)
            read += len(batch)
    if arguments.out is not None:
        say(f"wrote {escaped(arguments.out)}: {counted(read, 'picture')}")
    if labelled.images:
        for line in labelled.lines():
            say(line)
        if arguments.pictures is None:
            say("--pictures DIR draws the confusion matrix and the most confident mistakes")
        else:
            drawn = labelled.draw(arguments.pictures, say)
            for path in drawn:
                say(f"wrote {escaped(path)}")
    elif arguments.pictures is not None:
        say(f"--pictures {escaped(arguments.pictures)}: nothing drawn, for no picture that was read has a label")
    status = 0 if not failed else 1 if read else DataError.status
    if arguments.json and status != DataError.status:
        result = {
            "weights": str(classifier.path),
            "format": classifier.kind,
            "pictures": read,
            "unreadable": failed,
            "predictions": predictions,
            "out": None if arguments.out is None else str(arguments.out),
            "labelled": None,
            "drawn": [str(path) for path in drawn],
        }
        if labelled.images:
            scores = {"pictures": labelled.images, "accuracy": labelled.accuracy}
            result["labelled"] = scores | {"classes": list(labelled.classes), "confusion": labelled.confusion.tolist()}
        print_json(result)
    return status


def batches(
    found: Iterable[Picture | DataError], size: tuple[int, int]
) -> Iterator[tuple[list[Picture], list[DataError]]]:
    """The pictures in batches of bounded memory, with the errors met on the way, which are printed as they come."""
    most = max(1, PIXELS // (size[0] * size[1]))
    batch: list[Picture] = []
    errors: list[DataError] = []
    for each in found:
        if isinstance(each, DataError):
            errors.append(each)
            print(f"error: {escaped(each)}", file=sys.stderr)
        else:
            batch.append(each)
        if len(batch) == most:
            yield batch, errors
            batch, errors = [], []
    if batch or errors:
        yield batch, errors


def _line(classifier: Classifier, name: str, probabilities: np.ndarray, top: int) -> str:
    """The name of a picture, and its likeliest classes with their probabilities."""
    scores = ", ".join(f"{escaped(classifier.classes[c])} {p:.1%}" for c, p in best_of(probabilities, top))
    return f"{escaped(name)}: {scores}"


if __name__ == "__main__":
    sys.exit(main())
