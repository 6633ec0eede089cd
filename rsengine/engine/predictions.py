"""What a network says of each image of a set, how well its probabilities are calibrated, where it errs most."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

BINS = 15  # of confidence: what Guo et al. (2017) use


@dataclass(frozen=True)
class Calibration:
    """Confidence, the probability of the predicted class, against accuracy, in bins of equal width over (0, 1].

    Attributes:
        counts: (B,) int64, images in each bin.
        confidence, accuracy: (B,) float64, their means in each bin; NaN in a bin without images.
        ece: expected calibration error, the mean over the images of |accuracy - confidence| of their bins (Guo et al.,
            `On Calibration of Modern Neural Networks <https://arxiv.org/abs/1706.04599>`_, 2017).
        brier: the mean over the images of the squared distance between the probabilities and the one-hot label, summed
            over the classes: 0 to 2 (Brier, 1950).
    """

    counts: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray
    ece: float
    brier: float


@dataclass(frozen=True)
class Predictions:
    """Of N >= 1 images in the order of their set.

    Attributes:
        labels, predicted: (N,) int64, classes.
        probability: (N,) float64, of the predicted class.
        squared_error: (N,) float64, squared distance between the probabilities and the one-hot label.
    """

    labels: np.ndarray
    predicted: np.ndarray
    probability: np.ndarray
    squared_error: np.ndarray

    def calibration(self, bins: int = BINS) -> Calibration:
        """Calibration in ``bins`` bins, of which each includes its upper edge."""
        right = (self.predicted == self.labels).astype(np.float64)
        # Against the edges themselves, so that a probability on one falls below it.
        edges = np.linspace(0.0, 1.0, bins + 1)
        places = np.clip(np.searchsorted(edges, self.probability, side="left") - 1, 0, bins - 1)
        counts = np.bincount(places, minlength=bins)
        sums = [np.bincount(places, weights=values, minlength=bins) for values in (self.probability, right)]
        confidence, accuracy = (np.divide(total, counts, out=np.full(bins, np.nan), where=counts > 0) for total in sums)
        ece = float(np.abs(sums[0] - sums[1]).sum() / len(right))
        return Calibration(counts, confidence, accuracy, ece, float(self.squared_error.mean()))

    def worst(self, most: int) -> np.ndarray:
        """(M,) int64: the images that were misclassified with the highest probabilities, at most ``most``."""
        wrong = np.flatnonzero(self.predicted != self.labels)
        return wrong[np.argsort(-self.probability[wrong], kind="stable")[:most]]


def one_batch(logits: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    """What :func:`joined` makes :class:`Predictions` of, for one batch.

    Args:
        logits: (N, C), any floating-point type.
        labels: (N,) int64.

    Returns:
        The fields of :class:`Predictions`, (N,) each, on the device of the logits.
    """
    # In double precision, so that a confident network's probabilities are told apart, and rank as its logits do.
    probabilities = torch.softmax(logits.double(), dim=1)
    predicted = logits.argmax(dim=1)
    own = probabilities.gather(1, labels[:, None])[:, 0]
    squared_error = (probabilities.square().sum(dim=1) - 2 * own + 1).clamp(min=0)
    return labels.clone(), predicted, probabilities.gather(1, predicted[:, None])[:, 0], squared_error


def joined(batches: Iterable[tuple[Tensor, ...]]) -> Predictions:
    """The predictions of all ``batches``, one or more, each from :func:`one_batch`. Waits for the device."""
    return Predictions(*(torch.cat(parts).cpu().numpy() for parts in zip(*batches, strict=True)))


def interleaved(parts: Sequence[Predictions | None]) -> Predictions:
    """The predictions of a set of which part r of N has the images r, r + N, r + 2N, …; None: a part without images."""
    found = [part for part in parts if part is not None]
    count = sum(len(part.labels) for part in found)

    def whole(name: str) -> np.ndarray:
        values = np.empty(count, getattr(found[0], name).dtype)
        for rank, part in enumerate(parts):
            if part is not None:
                values[rank :: len(parts)] = getattr(part, name)
        return values

    return Predictions(*(whole(each.name) for each in fields(Predictions)))
