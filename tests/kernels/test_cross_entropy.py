"""Label-smoothed cross-entropy against its reference in float64 and against torch.nn.functional."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

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


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("soft", [False, True], ids=["indices", "probabilities"])
def test_equals_torch(soft, reduction, smoothing):
    logits, target = inputs(16, 10, torch.float32)
    goal = F.one_hot(target, 10).float() if soft else target
    loss, correct = label_smoothed_cross_entropy(logits, goal, smoothing, reduction)
    theirs = F.cross_entropy(logits, goal, label_smoothing=smoothing, reduction=reduction)
    torch.testing.assert_close(loss, theirs)
    assert int(correct) == int((logits.argmax(1) == target).sum())
    torch.testing.assert_close(*(torch.autograd.grad(each.sum(), logits)[0] for each in (loss, theirs)))


INF = float("inf")


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize(
    ("row", "is_correct"),
    [
        ([2.0, -INF, 1.0], True),
        ([-INF, 1.0, 2.0], False),
        ([INF, 1.0, 2.0], True),
        ([1.0, INF, 2.0], False),
        ([-INF, -INF, -INF], True),
        ([2.0, 2.0, 1.0], True),  # the first of equal logits is the prediction
        ([1.0, 2.0, 2.0], False),
    ],
    ids=str,
)
def test_infinities_and_ties_are_as_in_torch(row, is_correct, smoothing):
    logits, target = torch.tensor([row], requires_grad=True), torch.tensor([0])
    loss, correct = label_smoothed_cross_entropy(logits, target, smoothing)
    theirs = F.cross_entropy(logits, target, label_smoothing=smoothing)
    torch.testing.assert_close(loss, theirs, equal_nan=True)
    grads = [torch.autograd.grad(each, logits)[0] for each in (loss, theirs)]
    torch.testing.assert_close(*grads, equal_nan=True)
    assert bool(correct) is is_correct
    if row == [-INF, 1.0, 2.0]:
        assert loss == INF and grads[0].isfinite().all()


@pytest.mark.parametrize("outside", [-1, 10, -100])  # -100 is what F.cross_entropy by itself skips
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_target_outside_the_classes_raises_on_the_cpu(smoothing, outside):
    with pytest.raises(IndexError, match="out of bounds"):
        label_smoothed_cross_entropy(torch.zeros(2, 10), torch.tensor([1, outside]), smoothing)


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


@pytest.mark.parametrize("function", [label_smoothed_cross_entropy, reference.label_smoothed_cross_entropy])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gradcheck(reduction, smoothing, function):
    logits, target = inputs(4, 5, torch.float64)
    soft = torch.rand(4, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64).softmax(dim=1)
    for goal in (target, soft):
        assert torch.autograd.gradcheck(lambda x, goal=goal: function(x, goal, smoothing, reduction)[0], (logits,))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_in_one_graph(backend):
    def step(logits, target):
        loss, correct = label_smoothed_cross_entropy(logits, target, 0.1)
        return 3 * loss, correct

    logits, target = inputs(16, 10, torch.float32)
    torch._dynamo.reset()
    loss, correct = torch.compile(step, fullgraph=True, backend=backend)(logits, target)
    true_loss, true_correct = step(logits, target)
    torch.testing.assert_close(loss, true_loss)
    assert torch.equal(correct, true_correct)
    torch.testing.assert_close(*(torch.autograd.grad(each, logits)[0] for each in (loss, true_loss)))


def test_triton_says_why_it_cannot_run(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    target = torch.zeros(3, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="'triton' cannot run label_smoothed_cross_entropy here, because Triton"):
        label_smoothed_cross_entropy(torch.zeros(3, 4), target, impl="triton")
    with pytest.raises(RuntimeError, match=r"the kernels compute in float32, and the input is torch\.float64"):
        label_smoothed_cross_entropy(torch.zeros(3, 4, dtype=torch.float64), target, impl="triton")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("soft", [False, True], ids=["indices", "probabilities"])
def test_the_fused_op_on_fake_tensors(soft, reduction, dtype):
    op = torch.ops.rsengine.label_smoothed_cross_entropy
    with FakeTensorMode():
        logits = torch.empty(20, 7, dtype=dtype)[::2].requires_grad_()  # not contiguous; the gradient is
        target = torch.empty(10, 7) if soft else torch.empty(10, dtype=torch.int64)
        loss, correct, gradient = op(logits, target, 0.1, reduction, True)
        assert loss.shape == ((10,) if reduction == "none" else ()) and loss.dtype == torch.float32
        assert correct.shape == () and correct.dtype == torch.int64
        assert gradient.shape == (10, 7) and gradient.dtype == dtype and gradient.is_contiguous()
        assert loss.requires_grad and not correct.requires_grad and not gradient.requires_grad
        loss.sum().backward()
        assert logits.grad.shape == (10, 7) and logits.grad.dtype == dtype
        evaluated = op(logits.detach(), target, 0.1, reduction, False)
        assert evaluated[2].shape == (0,) and not evaluated[0].requires_grad


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
        ((torch.zeros(3, 4), torch.zeros(3, 4, requires_grad=True)), "target: expected one that requires no gradient"),
    ],
)
def test_wrong_arguments_are_named(arguments, words):
    with pytest.raises(ValueError, match=words):
        label_smoothed_cross_entropy(*arguments)
