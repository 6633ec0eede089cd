"""``python -m rsengine.evaluate RUN``: measure the saved weights of a run folder on a test set."""

from __future__ import annotations

import argparse
import sys

import torch

from rsengine.data import Dataset, find_dataset
from rsengine.data.paths import convert_command
from rsengine.device import choose_execution
from rsengine.engine.evaluation import EvaluationStep
from rsengine.errors import run_command
from rsengine.input.choose import choose_loader
from rsengine.model.preprocess import Preprocess
from rsengine.run.weights import Weights, WeightsError, finite, load_weights


def main(argv: list[str] | None = None) -> int:
    """The command. Returns its exit status: 0, or 2 for bad input."""
    parser = argparse.ArgumentParser(
        prog="python -m rsengine.evaluate", description="Measure saved weights on a test set."
    )
    parser.add_argument("run", help="a run folder, or its weights.safetensors")
    parser.add_argument("--data", help="converted folder or source; default: as rsengine.train finds it")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--precision", choices=("auto", "bf16", "fp32"), default="auto")
    arguments = parser.parse_args(argv)
    return run_command(lambda: _evaluate(arguments))


def _evaluate(arguments: argparse.Namespace) -> int:
    execution = choose_execution(arguments.device, arguments.precision)
    weights = load_weights(arguments.run)
    dataset = find_dataset(arguments.data)
    if tuple(dataset.classes) != weights.classes:
        raise WeightsError(
            f"{arguments.run}: trained on other classes than {dataset.name} has; name its data with --data"
        )
    _refuse_other_size(dataset, weights)
    loader = choose_loader("auto").open(dataset.test_beton, 500)
    model = weights.model.to(execution.device, memory_format=torch.channels_last)
    preprocess = Preprocess(weights.mean, weights.std, execution.device)
    evaluation = EvaluationStep({"ema": model}, preprocess, execution, len(weights.classes))
    result = evaluation.measure(loader.epoch())["ema"]
    finite(torch.tensor(result.loss))
    scores = f"accuracy {result.accuracy:.2%}, cross-entropy {result.loss:.4f}"
    print(f"{dataset.name}: {scores} on {result.images:,} test images")
    return 0


def _refuse_other_size(dataset: Dataset, weights: Weights) -> None:
    """The network would take other sizes, and give an accuracy that says nothing about it."""
    if dataset.image_size == weights.image_size:
        return
    height, width = weights.image_size
    has = "differ in size" if dataset.image_size is None else "are {}x{}".format(*dataset.image_size)
    remedy = "give images of that size"
    if height == width:
        remedy = f"convert them again: `{convert_command()} SOURCE --out DIR --size {height}`"
    raise WeightsError(f"{dataset.folder}: its images {has}; the network learned {height}x{width}; {remedy}")


if __name__ == "__main__":
    sys.exit(main())
