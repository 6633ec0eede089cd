"""Accuracy, loss and confusion matrix of a network on a whole split.

Also a command: ``python -m rsengine.evaluate RUN`` measures the saved weights of a run folder again.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from rsengine.device import Execution, choose_execution
from rsengine.kernels import label_smoothed_cross_entropy
from rsengine.preprocess import Preprocess


@dataclass(frozen=True)
class Evaluation:
    """What a network does on a split."""

    loss: float  # mean over images
    accuracy: float  # 0 to 1
    confusion: np.ndarray  # (C, C) int64, rows: true class, columns: predicted

    @property
    def images(self) -> int:
        return int(self.confusion.sum())


@torch.inference_mode()
def evaluate(
    models: Mapping[str, nn.Module],
    batches: Iterable[tuple[Tensor, Tensor]],
    preprocess: Preprocess,
    execution: Execution,
    num_classes: int,
    label_smoothing: float = 0.0,
) -> dict[str, Evaluation]:
    """Measure several networks in one pass over the same batches.

    The networks run in evaluation mode, and are put back into the mode they were in: no parameter, buffer or random
    number generator changes. With the ``label_smoothing`` of training, the loss can be drawn beside the training loss.

    Args:
        models: by name.
        batches: (N, H, W, 3) uint8 images and (N,) int64 labels; the last batch may be smaller.

    Returns:
        An :class:`Evaluation` for each name.
    """
    device = execution.device
    modes = {name: model.training for name, model in models.items()}
    losses = {name: torch.zeros((), dtype=torch.float64, device=device) for name in models}
    confusions = {name: torch.zeros(num_classes**2, dtype=torch.int64, device=device) for name in models}
    try:
        for model in models.values():
            model.eval()
        for images, labels in batches:
            labels = labels.to(device)
            x = preprocess(images.to(device))
            for name, model in models.items():
                with execution.autocast():
                    logits = model(x)
                loss, _ = label_smoothed_cross_entropy(logits, labels, label_smoothing, "sum")
                losses[name] += loss.double()
                cells = labels * num_classes + logits.argmax(dim=1)
                confusions[name] += torch.bincount(cells, minlength=num_classes**2)
    finally:
        for name, model in models.items():
            model.train(modes[name])
    results = {}
    for name in models:
        confusion = confusions[name].reshape(num_classes, num_classes).cpu().numpy()
        count = max(int(confusion.sum()), 1)
        results[name] = Evaluation(float(losses[name]) / count, float(np.trace(confusion)) / count, confusion)
    return results


def main(argv: list[str] | None = None) -> int:
    from rsengine.data import DataError, find_dataset
    from rsengine.loader import BetonLoader, LoaderError
    from rsengine.weights import WeightsError, load_weights

    parser = argparse.ArgumentParser(
        prog="python -m rsengine.evaluate", description="Measure saved weights on a test set."
    )
    parser.add_argument("run", help="a run folder, or its weights.safetensors")
    parser.add_argument("--data", help="converted folder or source; default: as rsengine.train finds it")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--precision", choices=("auto", "bf16", "fp32"), default="auto")
    arguments = parser.parse_args(argv)
    try:
        execution = choose_execution(arguments.device, arguments.precision)
        weights = load_weights(arguments.run)
        dataset = find_dataset(arguments.data)
        if tuple(dataset.classes) != weights.classes:
            raise WeightsError(
                f"{arguments.run}: trained on other classes than {dataset.name} has; name its data with --data"
            )
        loader = BetonLoader(dataset.test_beton, 500)
    except (ValueError, DataError, WeightsError, LoaderError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    model = weights.model.to(execution.device, memory_format=torch.channels_last)
    preprocess = Preprocess(weights.mean, weights.std, execution.device)
    result = evaluate({"ema": model}, loader.epoch(), preprocess, execution, len(weights.classes))["ema"]
    scores = f"accuracy {result.accuracy:.2%}, cross-entropy {result.loss:.4f}"
    print(f"{dataset.name}: {scores} on {result.images:,} test images")
    return 0


if __name__ == "__main__":
    sys.exit(main())
