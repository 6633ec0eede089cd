"""Predictions of each image: scikit-learn's calibration and Brier score, and the mistakes in their order."""

import numpy as np
import pytest
import torch
from sklearn.calibration import calibration_curve
from sklearn.metrics import brier_score_loss

from rsengine.engine.predictions import Predictions, joined, one_batch


@pytest.fixture
def logits():
    return torch.randn(400, 5, generator=torch.Generator().manual_seed(1)) * 2


@pytest.fixture
def labels():
    return torch.randint(0, 5, (400,), generator=torch.Generator().manual_seed(2))


def test_calibration_and_brier_score_equal_scikit_learns(logits, labels):
    predictions = joined(one_batch(*batch) for batch in zip(logits.split(150), labels.split(150), strict=True))
    probabilities = logits.double().softmax(1).numpy()
    confidence, right = probabilities.max(1), probabilities.argmax(1) == labels.numpy()
    found = predictions.calibration(bins=10)
    accuracy, mean = calibration_curve(right, confidence, n_bins=10)
    full = found.counts > 0
    np.testing.assert_allclose(found.accuracy[full], accuracy)
    np.testing.assert_allclose(found.confidence[full], mean)
    assert found.ece == pytest.approx(float((found.counts[full] / 400 * np.abs(accuracy - mean)).sum()))
    assert np.isnan(found.accuracy[~full]).all() and not full.all()
    expected = brier_score_loss(labels.numpy(), probabilities, labels=range(5), scale_by_half=False)
    assert found.brier == pytest.approx(expected)


def test_a_bin_includes_its_upper_edge():
    one = np.ones(3)
    predictions = Predictions(np.zeros(3, int), np.zeros(3, int), np.array([0.5, 0.500001, 1.0]), one)
    assert predictions.calibration(bins=2).counts.tolist() == [1, 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_predicted_class_is_the_evaluations(logits, labels, dtype):
    """Rounded logits are often equal; the confusion matrix takes the first of them."""
    logits = logits.to(dtype)
    predictions = joined([one_batch(logits, labels)])
    assert predictions.predicted.tolist() == logits.argmax(1).tolist()
    assert predictions.labels.tolist() == labels.tolist()


def test_the_worst_mistakes_come_first_and_are_mistakes():
    labels, predicted = np.array([0, 1, 2, 0, 1]), np.array([1, 1, 0, 2, 0])
    predictions = Predictions(labels, predicted, np.array([0.6, 0.99, 0.9, 0.6, 0.7]), np.ones(5))
    assert predictions.worst(3).tolist() == [2, 4, 0]  # of equal ones the first in the set
    assert predictions.worst(25).tolist() == [2, 4, 0, 3]


def test_without_mistakes_there_are_none():
    predictions = Predictions(np.array([1]), np.array([1]), np.array([0.5]), np.array([0.5]))
    assert predictions.worst(25).tolist() == []
