"""Label-smoothed cross-entropy against its reference in float64 and against torch.nn.functional."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from rsengine.kernels import label_smoothed_cross_entropy, reference
from tests.tolerances import assert_close

SHAPES = [(1, 10), (7, 10), (128, 100), (3, 1000), (2, 50_257), (5, 1)]  # (5, 1): one class, loss 0


def inputs(n, c, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = (3 * torch.randn(n, c, generator=generator, dtype=torch.float64)).to(dtype)
    return logits.requires_grad_(), torch.randint(0, c, (n,), generator=generator)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_matches_the_reference_in_loss_gradient_and_count(shape, dtype, smoothing, reduction):
    logits, target = inputs(*shape, dtype)
    loss, correct = label_smoothed_cross_entropy(logits, target, smoothing, reduction)
    (grad,) = torch.autograd.grad(loss.sum(), logits)
    exact = logits.detach().double().requires_grad_()
    true_loss, true_correct = reference.label_smoothed_cross_entropy(exact, target, smoothing, reduction)
    (true_grad,) = torch.autograd.grad(true_loss.sum(), exact)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_close(loss.detach(), true_loss.detach(), scale=10 * max(1.0, float(true_loss.detach().abs().max())))
    assert grad.dtype == dtype
    # The gradient subtracts softmax times a sum over the classes, whose rounding grows with their number.
    assert_close(grad, true_grad, scale=max(1.0, shape[1] / 10_000))
    assert int(correct) == int(true_correct) and correct.dtype == torch.int64 and not correct.requires_grad


@given(
    n=st.integers(1, 9), c=st.integers(1, 30), smoothing=st.floats(0, 1), seed=st.integers(0, 1000), soft=st.booleans()
)
@settings(max_examples=60, deadline=None)
def test_property_matches_the_reference(n, c, smoothing, seed, soft):
    logits, target = inputs(n, c, torch.float64, seed)
    if soft:
        target = torch.rand(n, c, dtype=torch.float64).softmax(dim=1)
    loss, correct = label_smoothed_cross_entropy(logits, target, smoothing)
    true_loss, true_correct = reference.label_smoothed_cross_entropy(logits, target, smoothing)
    assert_close(loss.detach(), true_loss.detach(), scale=100)
    assert int(correct) == int(true_correct)


def test_equals_torch():
    logits, target = inputs(16, 10, torch.float32)
    loss, correct = label_smoothed_cross_entropy(logits, target, 0.1)
    torch.testing.assert_close(loss, F.cross_entropy(logits, target, label_smoothing=0.1))
    assert int(correct) == int((logits.argmax(1) == target).sum())


def test_smoothing_lowers_the_reward_of_certainty():
    logits = torch.tensor([[20.0, 0.0, 0.0]])
    plain, _ = label_smoothed_cross_entropy(logits, torch.tensor([0]), 0.0)
    smoothed, _ = label_smoothed_cross_entropy(logits, torch.tensor([0]), 0.3)
    assert plain < 1e-6 and smoothed > 1.0


def test_soft_targets_equal_hard_ones_where_they_are_one_hot():
    logits, target = inputs(8, 10, torch.float32)
    hard = label_smoothed_cross_entropy(logits, target, 0.1)
    soft = label_smoothed_cross_entropy(logits, F.one_hot(target, 10).float(), 0.1)
    torch.testing.assert_close(hard, soft)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_empty_batch(reduction):
    loss, correct = label_smoothed_cross_entropy(torch.zeros(0, 10), torch.zeros(0, dtype=torch.int64), 0.1, reduction)
    assert int(correct) == 0 and float(loss.sum()) == 0.0


def test_gradcheck():
    logits, target = inputs(4, 5, torch.float64)
    assert torch.autograd.gradcheck(lambda x: label_smoothed_cross_entropy(x, target, 0.1)[0], (logits,))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((torch.zeros(3), torch.zeros(3, dtype=torch.int64)), "logits: expected floating point"),
        ((torch.zeros(3, 0), torch.zeros(3, dtype=torch.int64)), "logits: expected floating point"),
        ((torch.zeros(3, 4, dtype=torch.int64), torch.zeros(3, dtype=torch.int64)), "logits: expected floating point"),
        ((torch.zeros(3, 4), torch.zeros(2, dtype=torch.int64)), r"target: expected int64 \(3,\)"),
        ((torch.zeros(3, 4), torch.zeros(3, dtype=torch.int32)), r"target: expected int64 \(3,\)"),
        ((torch.zeros(3, 4), torch.zeros(3, 5)), "target: expected int64"),
        ((torch.zeros(3, 4), torch.zeros(3, dtype=torch.int64), 1.5), "smoothing: expected a number in"),
        ((torch.zeros(3, 4), torch.zeros(3, dtype=torch.int64), 0.1, "avg"), "reduction: expected one of"),
    ],
)
def test_wrong_arguments_are_named(arguments, words):
    with pytest.raises(ValueError, match=words):
        label_smoothed_cross_entropy(*arguments)
