"""Evaluation: right numbers, the last partial batch included, and not a bit of the network changed."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rsengine.device import Execution
from rsengine.engine.evaluation import EvaluationStep
from rsengine.model import resnet_rs
from rsengine.model.preprocess import Preprocess

FP32 = Execution(torch.device("cpu"), None, 1, "test")
PREPROCESS = Preprocess((0.5,) * 3, (0.25,) * 3)


def network():
    torch.manual_seed(0)
    model = resnet_rs(blocks=(1, 1), num_classes=4, width_multiplier=0.125, stem_width=8, dropout=0.5, drop_path=0.5)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return model


def data():
    generator = torch.Generator().manual_seed(3)
    images = torch.randint(0, 256, (25, 16, 16, 3), generator=generator, dtype=torch.uint8)
    return images, torch.randint(0, 4, (25,), generator=generator)


def batched(size):
    images, labels = data()
    return zip(images.split(size), labels.split(size), strict=True)


def test_numbers_equal_a_plain_loop():
    model, (images, labels) = network(), data()
    result = EvaluationStep({"m": model}, PREPROCESS, FP32, 4, label_smoothing=0.1).measure(batched(10))["m"]
    model.eval()
    logits = model(PREPROCESS(images)).detach()
    assert result.images == 25
    assert result.accuracy == pytest.approx(float((logits.argmax(1) == labels).float().mean()))
    assert result.loss == pytest.approx(float(F.cross_entropy(logits, labels, label_smoothing=0.1)), rel=1e-5)
    for truth, predicted in zip(labels, logits.argmax(1), strict=True):
        result.confusion[truth, predicted] -= 1
    assert not result.confusion.any()


def test_it_changes_no_parameter_buffer_mode_or_random_number():
    """The report's code normalised with test-batch statistics and trained its running statistics on test data."""
    model = network().train()
    model.stages[0].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    EvaluationStep({"m": model}, PREPROCESS, FP32, 4).measure(batched(10))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert model.training and torch.equal(state, torch.get_rng_state())
    assert all(p.grad is None for p in model.parameters())


def test_the_result_does_not_depend_on_the_batches():
    """It would if batch norm or dropout were still training."""
    model = network().train()
    step = EvaluationStep({"m": model}, PREPROCESS, FP32, 4)
    results = [step.measure(batched(size))["m"] for size in (25, 10, 1)]
    assert len({r.accuracy for r in results}) == 1
    assert results[1].loss == pytest.approx(results[0].loss, rel=1e-5)
    assert results[2].loss == pytest.approx(results[0].loss, rel=1e-5)


def test_the_mode_comes_back_after_an_error():
    model = network().train()
    batch = torch.zeros(1, 16, 16, 2, dtype=torch.uint8), torch.zeros(1).long()
    with pytest.raises(RuntimeError):
        EvaluationStep({"m": model}, PREPROCESS, FP32, 4).measure([batch])
    assert model.training


def test_predictions_are_kept_only_where_asked_for_and_in_the_order_of_the_set():
    model, (images, labels) = network(), data()
    step = EvaluationStep({"m": model}, PREPROCESS, FP32, 4)
    result = step.measure(batched(10), predictions=True)["m"]
    logits = model.eval()(PREPROCESS(images)).detach()
    assert result.predictions.labels.tolist() == labels.tolist()
    assert result.predictions.predicted.tolist() == logits.argmax(1).tolist()
    assert result.predictions.probability == pytest.approx(logits.softmax(1).amax(1).numpy(), rel=1e-5)
    again = step.measure(batched(10))["m"]
    assert again.predictions is None and again.accuracy == result.accuracy
