"""The Triton implementation of label-smoothed cross-entropy against the float64 reference and eager's error."""

import math
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from rsengine.kernels import label_smoothed_cross_entropy, reference
from rsengine.kernels.jit import cross_entropy as launchers
from tests.tolerances import assert_close

from .conftest import INTERPRETED

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
REDUCTIONS = ["mean", "sum", "none"]
SMOOTHINGS = [0.0, 0.1, 1.0]
# (N, C)
BATCHES = [(1, 10), (7, 10), (128, 10), (513, 10)]  # one program; 513 is one row more than one holds
CLASSES = [
    (3, 1),  # one class: the loss is 0
    (5, 2),
    (7, 100),
    (128, 100),
    (7, 1000),
    (9, 1000),  # one row more than one program holds
    (2, 4096),  # the longest row of one tile
    (3, 4097),  # the shortest that is swept in blocks, each row beginning elsewhere in its 16 bytes
    (2, 6143),  # one column short of whole blocks
    (2, 6144),  # rows of whole blocks
    (1, 50_257),
]
INF, NAN = float("inf"), float("nan")
# The first classes of a row whose target is class 0, and whether it counts as correct.
SPECIAL_ROWS = {
    "-inf elsewhere": ([2.0, -INF, 1.0, -INF], True),
    "-inf at the target": ([-INF, 1.0, 2.0, 0.0], False),
    "+inf at the target": ([INF, 1.0, 2.0, 0.0], True),
    "+inf elsewhere": ([1.0, INF, 2.0, 0.0], False),
    "+inf twice": ([INF, INF, 0.0, 0.0], True),
    "both infinities": ([INF, -INF, 0.0, 1.0], True),
    "only -inf": ([-INF, -INF, -INF, -INF], True),
    "NaN at the target": ([NAN, 1.0, 2.0, 0.0], True),
    "NaN elsewhere": ([1.0, NAN, 2.0, 0.0], False),
    "a tie, the target first": ([2.0, 2.0, 1.0, 2.0], True),
    "a tie, the target second": ([1.0, 2.0, 2.0, 1.0], False),
}


def operands(n, c, dtype, device, *, soft=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(n, c, generator=generator, dtype=torch.float64)
    target = torch.randint(0, c, (n,), generator=generator)
    logits[torch.arange(n), target] += 3.0 * (torch.arange(n) % 2)  # so that some rows are correct
    if soft:
        other = torch.randint(0, c, (n,), generator=generator)
        target = 0.75 * F.one_hot(target, c).float() + 0.25 * F.one_hot(other, c).float()
    return logits.to(device, dtype).requires_grad_(), target.to(device)


def run(logits, target, smoothing, reduction, upstream=None, impl="triton"):
    """Loss, count and the gradient for the gradient ``upstream`` of the loss (1 where it is None)."""
    loss, correct = label_smoothed_cross_entropy(logits, target, smoothing, reduction, impl=impl)
    (gradient,) = torch.autograd.grad(loss, logits, torch.ones_like(loss) if upstream is None else upstream)
    return loss.detach(), correct, gradient


def check(logits, target, smoothing, reduction, upstream=None):
    exact = logits.detach().double().requires_grad_()
    true_loss, true_correct = reference.label_smoothed_cross_entropy(exact, target, smoothing, reduction)
    weight = torch.ones_like(true_loss) if upstream is None else upstream.double()
    (true_gradient,) = torch.autograd.grad(true_loss, exact, weight)
    loss, correct, gradient = run(logits, target, smoothing, reduction, upstream)
    eager_loss, _, eager_gradient = run(logits, target, smoothing, reduction, upstream, impl="eager")
    assert loss.dtype == torch.float32 and gradient.dtype == logits.dtype
    # A loss is a sum over rows, a gradient entry is one of 1 / N: the absolute terms are of those sizes.
    assert_close(loss, true_loss, scale=max(1.0, float(true_loss.detach().abs().max())), eager=eager_loss)
    size = float(weight.abs().max()) / (logits.shape[0] if reduction == "mean" else 1)
    assert_close(gradient, true_gradient, scale=size, eager=eager_gradient)
    assert correct.dtype == torch.int64 and correct.shape == () and int(correct) == int(true_correct)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "c"), BATCHES + CLASSES)
def test_matches_the_reference_in_loss_gradient_and_count(n, c, dtype, device):
    settings = list(product(SMOOTHINGS, REDUCTIONS, [False, True]))
    # The large ones take the interpreter a while: there each dtype tries a third, and the three together all of them.
    for smoothing, reduction, soft in settings if n * c < 1000 else settings[DTYPES.index(dtype) :: len(DTYPES)]:
        check(*operands(n, c, dtype, device, soft=soft), smoothing, reduction)


@pytest.mark.slow_grid
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("c", [1, 2, 10, 100, 1000, 4097, 50_257])
def test_matches_the_reference_over_the_whole_grid(c, dtype, device):
    batches = [1, 7, 128] if c <= 1000 else [1, 7]
    for n, smoothing, reduction, soft in product(batches, SMOOTHINGS, REDUCTIONS, [False, True]):
        check(*operands(n, c, dtype, device, soft=soft), smoothing, reduction)


@given(
    n=st.integers(1, 40),
    c=st.one_of(st.integers(1, 300), st.integers(4090, 6200)),
    dtype=st.sampled_from(DTYPES),
    smoothing=st.one_of(st.just(0.0), st.floats(0, 1)),
    reduction=st.sampled_from(REDUCTIONS),
    soft=st.booleans(),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None)
def test_property_matches_the_reference(device, n, c, dtype, smoothing, reduction, soft, seed):
    check(*operands(min(n, 4) if c > 4000 else n, c, dtype, device, soft=soft, seed=seed), smoothing, reduction)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "c"), [(33, 10), (600, 10), (3, 4097)])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_the_incoming_gradient_scales_the_gradient(reduction, n, c, dtype, device):
    logits, target = operands(n, c, dtype, device)
    factors = torch.randn(n, generator=torch.Generator().manual_seed(1)).to(device)
    factors[::3] = 1.0
    check(logits, target, 0.1, reduction, factors if reduction == "none" else factors[1])
    if reduction == "none":
        check(logits, target, 0.1, reduction, torch.full((), 2.0, device=device).expand(n))  # what loss.sum() sends


@pytest.mark.parametrize(("n", "c"), [(128, 10), (4, 4097)])
def test_float16_gradients_survive_until_the_loss_scale_lifts_them(n, c, device):
    logits, target = operands(n, c, torch.float16, device)
    logits = (2 * logits.detach()).requires_grad_()  # wide: most gradients are far below float16's smallest number
    scale = torch.tensor(65536.0, device=device)
    for reduction in ("mean", "sum"):
        check(logits, target, 0.0, reduction, scale / (n if reduction == "sum" else 1))
    gradient = run(logits, target, 0.0, "mean", scale)[2]
    exact = run(logits.detach().double().requires_grad_(), target, 0.0, "mean", scale.double(), impl="eager")[2]
    # What float16 holds with full precision must have it, but for the target's own entry: a difference with 1.
    visible = (exact.abs() > 2.0**-14) & (torch.arange(c, device=device) != target[:, None])
    assert visible.sum() > n
    torch.testing.assert_close(gradient.double()[visible], exact[visible], rtol=2e-3, atol=0)


@pytest.mark.parametrize("c", [4, 1000, 4099, 8192])
@pytest.mark.parametrize("smoothing", SMOOTHINGS)
@pytest.mark.parametrize("soft", [False, True], ids=["indices", "probabilities"])
def test_infinities_and_ties_are_as_in_torch(soft, smoothing, c, device):
    logits = torch.zeros(len(SPECIAL_ROWS), c)
    for row, (values, _) in zip(logits, SPECIAL_ROWS.values(), strict=True):
        row[4:] = -INF if values == [-INF] * 4 else -2.0
        row[:4] = torch.tensor(values)
    logits = logits.to(device).requires_grad_()
    target = torch.zeros(len(logits), dtype=torch.int64, device=device)
    target = F.one_hot(target, c).float() if soft else target
    loss, correct, gradient = run(logits, target, smoothing, "none")
    twin = logits.detach().clone().requires_grad_()
    theirs = F.cross_entropy(twin, target, label_smoothing=smoothing, reduction="none")
    torch.testing.assert_close(loss, theirs.detach(), equal_nan=True, rtol=1e-5, atol=1e-5)
    (their_gradient,) = torch.autograd.grad(theirs.sum(), twin)
    torch.testing.assert_close(gradient, their_gradient, equal_nan=True, rtol=1e-5, atol=1e-6)
    assert int(correct) == sum(is_correct for _, is_correct in SPECIAL_ROWS.values())


@pytest.mark.parametrize("c", [10, 4097])
def test_infinity_reaches_the_reduced_loss_and_leaves_the_other_rows_alone(c, device):
    logits, target = operands(3, c, torch.float32, device)
    with torch.no_grad():
        logits[1, target[1]] = -INF
    loss, _, gradient = run(logits, target, 0.0, "mean")
    assert loss == INF and gradient.isfinite().all()
    torch.testing.assert_close(gradient[1, target[1]].item(), -1 / 3)
    with torch.no_grad():
        logits[1] = -INF
    loss, _, gradient = run(logits, target, 0.0, "mean")
    assert loss.isnan() and gradient[1].isnan().all() and gradient[[0, 2]].isfinite().all()


@pytest.mark.parametrize("c", [10, 1000, 4097])
@pytest.mark.parametrize("block", [0, -1], ids=["first block", "last block"])
def test_blocks_of_minus_infinity_are_probability_zero(c, block, device):
    logits, target = operands(2, c, torch.float32, device)
    half = slice(0, c // 2) if block == 0 else slice(c // 2, c)
    target[:] = c - 1 if block == 0 else 0
    with torch.no_grad():
        logits[:, half] = -INF
    loss, _, gradient = run(logits, target, 0.0, "none")
    kept = torch.ones(c, dtype=torch.bool)
    kept[half] = False
    truth = F.cross_entropy(logits.detach()[:, kept], target - c // 2 if block == 0 else target, reduction="none")
    torch.testing.assert_close(loss, truth)
    assert (gradient[:, half] == 0).all() and gradient.isfinite().all()


@pytest.mark.parametrize("c", [10, 1000, 4097])
@pytest.mark.parametrize("outside", ["-1", "C", "-100", "2^32"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_target_outside_the_classes_is_loud_in_its_own_row(smoothing, outside, c, device):
    logits, target = operands(3, c, torch.float32, device)
    before = run(logits, target, smoothing, "none")
    # 2^32 + k is k where only 32 bits are looked at: the row's largest logit, to be counted as wrong all the same.
    best = int(logits[1].argmax())
    target[1] = {"-1": -1, "C": c, "-100": -100, "2^32": 2**32 + best}[outside]
    loss, correct, gradient = run(logits, target, smoothing, "none")
    assert loss[1].isnan() and gradient[1].isnan().all()
    assert torch.equal(loss[[0, 2]], before[0][[0, 2]]) and torch.equal(gradient[[0, 2]], before[2][[0, 2]])
    assert int(correct) == int((logits.argmax(1) == target).sum())
    assert run(logits, target, smoothing, "mean")[0].isnan()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("c", [10, 1000, 6151])
@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_a_large_offset_of_all_logits_changes_nothing(offset, c, dtype, device):
    logits, target = operands(4, c, torch.float32, device)
    logits = (logits.detach() + offset).to(dtype).requires_grad_()
    for smoothing in SMOOTHINGS:
        check(logits, target, smoothing, "mean")


@pytest.mark.parametrize("c", [10, 8192])
@pytest.mark.parametrize("rising", [True, False], ids=["rising", "falling"])
def test_the_maximum_may_come_first_or_last(rising, c, device):
    ramp = torch.linspace(-200.0, 200.0, c, device=device)
    logits = torch.stack([ramp if rising else ramp.flip(0)] * 3).requires_grad_()
    check(logits, torch.tensor([0, c // 2, c - 1], device=device), 0.1, "none")


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("c", [10, 4097])
def test_empty_batch(c, reduction, device):
    logits = torch.zeros(0, c, device=device, requires_grad=True)
    target = torch.zeros(0, dtype=torch.int64, device=device)
    loss, correct = label_smoothed_cross_entropy(logits, target, 0.1, reduction, impl="triton")
    assert loss.shape == ((0,) if reduction == "none" else ()) and not loss.any() and int(correct) == 0
    loss.sum().backward()
    assert logits.grad.shape == (0, c)


def test_soft_targets_of_any_dtype_and_any_sum(device):
    logits, target = operands(9, 10, torch.float32, device, soft=True)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        check(logits, target.to(dtype), 0.1, "mean")
    check(logits, 2.5 * target, 0.1, "mean")  # the gradient holds softmax times the targets' sum
    check(logits, torch.zeros_like(target), 0.0, "mean")  # a row of padding
    logits, target = operands(2, 4097, torch.float32, device, soft=True)
    check(logits, 2.5 * target, 0.1, "mean")


def test_what_is_not_contiguous_and_not_aligned(device):
    logits, target = operands(14, 22, torch.bfloat16, device)
    wide, soft = logits.detach(), torch.rand(11, 7, device=device).softmax(dim=1)
    check(wide[::2, ::2].requires_grad_(), target[::2] % 11, 0.1, "mean")
    check(wide.t()[:14, :7].requires_grad_(), target % 7, 0.1, "sum")
    check(wide[:7, :11].requires_grad_(), soft.t(), 0.1, "none")
    check(wide.reshape(-1)[1 : 1 + 13 * 22].view(13, 22).requires_grad_(), target[1:], 0.1, "mean")  # 2 bytes off


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_second_backward_pass_raises_rather_than_scales_twice(dtype, device):
    logits, target = operands(5, 10, dtype, device)
    for factor in (1.0, 3.0):
        loss, _ = label_smoothed_cross_entropy(logits, target, 0.1, impl="triton")
        torch.autograd.grad(factor * loss, logits, retain_graph=True)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(factor * loss, logits)
    loss, _ = label_smoothed_cross_entropy(logits, target, 0.1, impl="triton")
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss, logits, create_graph=True)


def test_evaluation_computes_no_gradient(device):
    logits, target = operands(5, 10, torch.float32, device)
    with torch.no_grad():
        loss, correct = label_smoothed_cross_entropy(logits, target, 0.1, impl="triton")
    assert not loss.requires_grad and not correct.requires_grad
    truth = label_smoothed_cross_entropy(logits, target, 0.1, impl="triton")
    assert torch.equal(loss, truth[0]) and torch.equal(correct, truth[1]) and truth[0].requires_grad
    op = torch.ops.rsengine.label_smoothed_cross_entropy
    assert op(logits.detach(), target, 0.1, "mean", False)[2].shape == (0,)


def test_two_runs_give_the_same_bits(device):
    logits, target = operands(600, 10, torch.float32, device)
    for first, second in zip(run(logits, target, 0.1, "mean"), run(logits, target, 0.1, "mean"), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("soft", [False, True], ids=["indices", "probabilities"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_opcheck(reduction, soft, dtype, device):
    logits, target = operands(5, 10, dtype, device, soft=soft)
    op = torch.ops.rsengine.label_smoothed_cross_entropy.default
    torch.library.opcheck(op, (logits.detach(), target, 0.1, reduction, False))
    tests = ["test_schema", "test_autograd_registration", "test_faketensor"]
    if dtype != torch.float16:
        # This one returns the saved gradient, which float16's backward pass always scales in place; the public
        # function keeps it to itself, and is traced below.
        tests.append("test_aot_dispatch_dynamic")
    torch.library.opcheck(op, (logits, target, 0.1, reduction, True), test_utils=tests)


@pytest.mark.parametrize("factor", [2.0, [0.5, 1.0, 2.0]], ids=["one", "a row"])
def test_opcheck_of_the_scaling(factor, device):
    arguments = (torch.randn(3, 7, device=device), torch.tensor(factor, device=device), 0.5)
    torch.library.opcheck(torch.ops.rsengine.scale_gradient_.default, arguments)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiles_in_one_graph(reduction, dtype, device):
    def step(logits, target):
        loss, correct = label_smoothed_cross_entropy(logits, target, 0.1, reduction, impl="triton")
        return 3 * loss, correct

    logits, target = operands(6, 10, dtype, device)
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for function_loss, function_count in (step(logits, target), compiled(logits, target)):
        (gradient,) = torch.autograd.grad(function_loss.sum(), logits)
        true_loss, true_count = step(logits, target)
        torch.testing.assert_close(function_loss, true_loss)
        assert torch.equal(function_count, true_count)
        torch.testing.assert_close(gradient, torch.autograd.grad(true_loss.sum(), logits)[0])


@pytest.mark.parametrize(
    ("n", "c", "tile"), [(128, 10, (128, 16, 4)), (512, 10, (512, 16, 16)), (513, 10, (64, 16, 2))]
)
def test_a_batch_that_fits_one_program_is_one_launch(n, c, tile):
    assert launchers.rows_tile(n, c) == tile and math.prod(tile[:2]) <= launchers.PROGRAM_TILE


@pytest.mark.skipif(not INTERPRETED, reason="only the interpreter counts bytes")
@pytest.mark.filterwarnings("ignore:All-NaN slice")  # soft targets that nobody filled
@pytest.mark.parametrize("case", launchers.compile_cases(), ids=lambda case: case.name)
def test_every_stream_crosses_the_bus_as_often_as_it_says(case):
    from rsengine.kernels.proof import interpreter

    with interpreter.count_traffic() as traffic:
        streams = case.launch(case.small)
    for name, stream in streams.items():
        nbytes = sum(t.numel() * t.element_size() for t in stream.tensors)
        assert sum(traffic.read(t) for t in stream.tensors) == stream.reads * nbytes, name
        assert sum(traffic.written(t) for t in stream.tensors) == stream.writes * nbytes, name


@pytest.mark.skipif(not INTERPRETED, reason="only the interpreter counts bytes")
@pytest.mark.parametrize(("reduction", "factor"), [("mean", None), ("sum", 1.0), ("none", None), ("mean", 2.0)])
def test_backward_leaves_a_gradient_alone_that_is_already_right(reduction, factor):
    from rsengine.kernels.proof import interpreter

    logits, target = operands(7, 1000, torch.bfloat16, torch.device("cpu"))
    with interpreter.count_traffic() as traffic:
        gradient = run(logits, target, 0.1, reduction, None if factor is None else torch.tensor(factor))[2]
    once = gradient.numel() * gradient.element_size()
    again = once if factor == 2.0 else 0
    assert (traffic.read(logits), traffic.read(gradient), traffic.written(gradient)) == (once, again, once + again)
