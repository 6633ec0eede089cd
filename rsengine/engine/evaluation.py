"""Accuracy, loss and confusion matrix of a network on a whole split."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from rsengine.device import Execution
from rsengine.engine.graph import CapturedStep
from rsengine.engine.predictions import Predictions, interleaved, joined, one_batch
from rsengine.kernels import label_smoothed_cross_entropy
from rsengine.model.preprocess import Preprocess
from rsengine.parallel.ranks import ALONE, Ranks


@dataclass(frozen=True)
class Evaluation:
    """The results of a network on a split."""

    loss: float  # mean over images
    accuracy: float  # 0 to 1
    confusion: np.ndarray  # (C, C) int64, rows: true class, columns: predicted
    predictions: Predictions | None = None  # for each image, where they were asked for

    @property
    def images(self) -> int:
        return int(self.confusion.sum())

    @property
    def calibration(self) -> dict[str, float] | None:
        """``ece`` and ``brier`` of :class:`rsengine.engine.predictions.Calibration`; None without predictions."""
        if self.predictions is None:
            return None
        found = self.predictions.calibration()
        return {"ece": found.ece, "brier": found.brier}


class EvaluationStep:
    """Adds one batch to the sums of several networks: ``step(images, labels)``, (N, H, W, 3) uint8 and (N,) int64.

    A tensor program like the training step: nothing in it waits for the device, so it can be captured. Call it inside
    :meth:`evaluation_mode`.

    Args:
        models: by name.
        label_smoothing: that of training makes the loss comparable with the training loss.
        ranks: the processes that share the split; each measures its part, and all get the whole result.
    """

    def __init__(
        self,
        models: Mapping[str, nn.Module],
        preprocess: Preprocess,
        execution: Execution,
        num_classes: int,
        label_smoothing: float = 0.0,
        ranks: Ranks = ALONE,
    ) -> None:
        self.models, self.preprocess, self.execution = dict(models), preprocess, execution
        self.num_classes, self.label_smoothing, self.ranks = num_classes, label_smoothing, ranks
        device = execution.device
        self.losses = {name: torch.zeros((), dtype=torch.float64, device=device) for name in models}
        cells = num_classes**2
        self.confusions = {name: torch.zeros(cells, dtype=torch.int64, device=device) for name in models}
        self._each: dict[str, list[tuple[Tensor, ...]]] | None = None  # predictions by batch, while they are kept

    @torch.inference_mode()
    def __call__(self, images: Tensor, labels: Tensor) -> None:
        x = self.preprocess(images)
        for name, model in self.models.items():
            with self.execution.autocast():
                logits = model.forward(x)  # calling a compiled module would compile it again for evaluation
            loss, _ = label_smoothed_cross_entropy(logits, labels, self.label_smoothing, "sum")
            self.losses[name].add_(loss.double())
            cells = labels * self.num_classes + logits.argmax(dim=1)
            self.confusions[name].scatter_add_(0, cells, torch.ones_like(cells))  # bincount would wait for the device
            if self._each is not None:
                self._each[name].append(one_batch(logits, labels))

    def state_tensors(self) -> list[Tensor]:
        """What a call changes and keeps, always at the same addresses."""
        return [*self.losses.values(), *self.confusions.values()]

    @contextlib.contextmanager
    def evaluation_mode(self) -> Iterator[None]:
        """Put the networks into evaluation mode, and every module back into its own mode afterwards."""
        modes = [(module, module.training) for model in self.models.values() for module in model.modules()]
        try:
            for model in self.models.values():
                model.eval()
            yield
        finally:
            for module, training in modes:
                module.training = training

    def measure(
        self,
        batches: Iterable[tuple[Tensor, Tensor]],
        captured: CapturedStep | None = None,
        *,
        predictions: bool = False,
    ) -> dict[str, Evaluation]:
        """Measure the networks on ``batches``, whose last may be smaller. Waits for the device once, at the end.

        No parameter, buffer, mode or random number generator changes.

        Args:
            captured: this step, captured. It is used for batches of its size, and the step itself for others.
            predictions: keep what the networks say of each image too. A captured step cannot, and is not used then.
        """
        for tensor in self.state_tensors():  # of an evaluation that was interrupted
            tensor.zero_()
        device = self.execution.device
        self._each = {name: [] for name in self.models} if predictions else None
        try:
            with self.evaluation_mode():
                for images, labels in batches:
                    fits = captured is not None and not predictions and images.shape == captured.inputs[0].shape
                    (captured if fits else self)(images.to(device), labels.to(device))
            return self._results()
        finally:
            self._each = None

    def _results(self) -> dict[str, Evaluation]:
        for tensor in self.state_tensors():
            self.ranks.sum_(tensor)
        results = {}
        for name in self.models:
            confusion = self.confusions[name].reshape(self.num_classes, self.num_classes).cpu().numpy().copy()
            count = int(confusion.sum())
            loss, accuracy = float(self.losses[name]) / max(count, 1), float(np.trace(confusion)) / max(count, 1)
            each = self._joined(self._each[name]) if self._each is not None and count else None
            results[name] = Evaluation(loss, accuracy, confusion, each)
        return results

    def _joined(self, batches: list[tuple[Tensor, ...]]) -> Predictions:
        """The predictions of all processes, in the order of the set."""
        parts = self.ranks.all_of(joined(batches) if batches else None)
        if len(parts) == 1:
            return parts[0]
        return interleaved(parts)
