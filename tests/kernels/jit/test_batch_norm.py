"""The Triton kernels of batch norm against the float64 reference and eager's error in the same dtype."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from rsengine.kernels import batch_norm, reference
from rsengine.kernels.jit import batch_norm as launchers
from rsengine.kernels.jit.statistics_kernels import MOST_PROGRAMS, row_splits
from tests.tolerances import assert_close

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# (N, C, H, W), the rows of ResNet-RS-50's stages at batch 128 with fewer channels
STAGES = [(128, 96, 1, 1), (128, 64, 2, 2), (128, 24, 4, 4), (128, 16, 8, 8)]
ODD = [
    (3, 5, 1, 2),  # fewer rows and channels than any block
    (2, 8, 1, 1),  # the fewest rows that have a variance
    (1, 1, 3, 5),  # one image of one channel
    (5, 257, 3, 3),  # one channel more than a power of two
    (
        1,
        24,
        32,
        64,
    ),  # 2,048 rows, the most that a program holds of 16-bit numbers; 1.5 times a power of two of channels
    (1, 24, 3, 683),  # one row more: two passes, the last split of few rows
    (9, 33, 17, 20),  # two passes with tails in rows and channels
]
# Programs of two passes work on little at a time and merge few parts at once, so that small maps make them repeat it.
SMALL_STEPS = {"TILE_BYTES": 256, "PARTS_AT_ONCE": 4}
MOMENTUM, EPS = 0.3, 1e-3


def operands(shape, dtype, device, seed=0, shift=0.5):
    generator = torch.Generator().manual_seed(seed)
    channels = shape[1]

    def random(*size, scale=1.0, to=torch.float32, shift=0.0):
        return (shift + scale * torch.randn(*size, generator=generator, dtype=torch.float64)).to(device, to)

    x, dy = (random(*shape, scale=s, shift=t, to=dtype) for s, t in ((2.0, shift), (1.0, 0.0)))
    x, dy = (t.contiguous(memory_format=torch.channels_last) for t in (x, dy))
    buffers = torch.full((channels,), 0.25, device=device), torch.full((channels,), 2.0, device=device)
    return x, random(channels), random(channels), buffers, dy


def run(function, x, weight, bias, buffers, dy, is_open=None, **options):
    """Output, moved buffers and gradients; with ``is_open``, of the ReLU's side that is given."""
    leaves = [t.detach().clone().requires_grad_() for t in (x, weight, bias)]
    moved = [t.clone() for t in buffers]
    y = function(*leaves, *moved, MOMENTUM, EPS, **options)
    gradients = torch.autograd.grad(y, leaves, dy if is_open is None else dy * is_open)
    return [y.detach(), *moved, *gradients]


def check(x, weight, bias, buffers, dy, relu):
    """Everything against the reference, allowing twice the error of eager in the same dtype."""
    tensors = x, weight, bias, buffers, dy
    found = run(batch_norm, *tensors, relu=relu, impl="triton")
    assert found[0].is_contiguous(memory_format=torch.channels_last)
    # Where the ReLU's input is within rounding of 0 either side is right, and the gradient is that of the side taken.
    is_open = found[0] > 0 if relu else torch.ones_like(x)
    eager = run(batch_norm, *tensors, is_open, impl="eager")
    exact = [t.double() for t in (x, weight, bias)]
    truth = run(reference.batch_norm, *exact, [t.double() for t in buffers], dy.double(), is_open)
    if relu:
        size = float(truth[0].abs().max())
        assert (truth[0][(truth[0] > 0) != is_open].abs() < 1e-5 * max(1.0, size)).all()
        truth[0], eager[0] = truth[0].relu(), eager[0].relu()
    for ours, true, theirs in zip(found, truth, eager, strict=True):
        assert ours.dtype == theirs.dtype
        assert_close(ours, true, scale=max(1.0, float(true.abs().max())), eager=theirs)


@pytest.mark.parametrize("relu", [False, True], ids=["", "relu"])
@pytest.mark.parametrize("shape", STAGES, ids=str)
def test_every_stage_of_resnet_rs_50(shape, relu, device):
    check(*operands(shape, torch.bfloat16, device), relu)


@pytest.mark.parametrize("relu", [False, True], ids=["", "relu"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", ODD, ids=str)
def test_odd_shapes(shape, dtype, relu, device):
    check(*operands(shape, dtype, device), relu)


@pytest.mark.slow_grid
@pytest.mark.parametrize("relu", [False, True], ids=["", "relu"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*STAGES, (2, 256, 56, 56), (128, 2048, 1, 1), (16, 1024, 7, 7)], ids=str)
def test_every_shape_and_dtype(shape, dtype, relu, device):
    check(*operands(shape, dtype, device), relu)


@pytest.mark.parametrize("shape", [(3, 40, 9, 11), (7, 130, 5, 6), (2, 3, 80, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_many_steps_over_rows_and_parts(shape, dtype, device, monkeypatch):
    for name, value in SMALL_STEPS.items():
        monkeypatch.setattr(launchers, name, value)
    monkeypatch.setattr(launchers, "SINGLE_PASS_ELEMENTS", 0)
    chosen = launchers.plan(shape[0] * shape[2] * shape[3], shape[1], dtype)
    assert not chosen.is_single_pass and chosen.splits > SMALL_STEPS["PARTS_AT_ONCE"]
    check(*operands(shape, dtype, device), True)


@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(*(st.integers(1, top) for top in (5, 40, 7, 7))),
    dtype=st.sampled_from(DTYPES),
    is_single_pass=st.booleans(),
    relu=st.booleans(),
    shift=st.sampled_from([0.0, 3.0]),
    steps=st.sampled_from([{}, SMALL_STEPS]),
)
def test_any_shape_in_either_form(shape, dtype, is_single_pass, relu, shift, steps):
    assume(shape[0] * shape[2] * shape[3] > 1)
    device = "cuda" if torch.cuda.is_available() else "cpu"  # hypothesis does not reset fixtures between examples
    x, weight, bias, buffers, dy = operands(shape, dtype, device, shift=shift)
    moved = [t.clone() for t in buffers]
    with pytest.MonkeyPatch.context() as patch:
        for name, value in steps.items():
            patch.setattr(launchers, name, value)
        y, mean, deviation = launchers.forward(x, weight, bias, *moved, MOMENTUM, EPS, relu, is_single_pass)
        gradients = launchers.backward(dy, x, weight, bias, mean, deviation, relu, is_single_pass)
    is_open = y > 0 if relu else torch.ones_like(y)
    exact = [t.double() for t in (x, weight, bias)]
    truth = run(reference.batch_norm, *exact, [t.double() for t in buffers], dy.double(), is_open)
    truth[0] = truth[0].relu() if relu else truth[0]
    assert_close(mean, exact[0].mean((0, 2, 3)), scale=10)
    # Two rows may be as near as the eps lets them: the numbers are multiplied by up to 1 / sqrt(eps), about 32.
    for ours, true in zip([y, *moved, *gradients], truth, strict=True):
        assert_close(ours, true, scale=10 * max(1.0, float(true.abs().max())))


@pytest.mark.parametrize("shape", [(4, 64, 4, 4), (3, 21, 5, 7), (64, 8, 8, 4)], ids=str)
def test_both_forms_agree(shape, device):
    x, weight, bias, buffers, dy = operands(shape, torch.float32, device)
    results = []
    for form in (True, False):
        moved = [t.clone() for t in buffers]
        forward = launchers.forward(x, weight, bias, *moved, MOMENTUM, EPS, True, form)
        results.append([*forward, *moved, *launchers.backward(dy, x, weight, bias, *forward[1:], True, form)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)


def test_the_form_follows_from_the_rows():
    for batch, side in ((128, 1), (512, 1), (128, 2), (512, 2), (128, 4)):
        for channels in (64, 128, 512, 2048):
            assert launchers.plan(batch * side * side, channels, torch.bfloat16).is_single_pass
    assert not launchers.plan(2049, 64, torch.bfloat16).is_single_pass
    assert not launchers.plan(128 * 8 * 8, 64, torch.bfloat16).is_single_pass
    assert launchers.plan(4096, 64, torch.float32).is_single_pass  # of 4 channels, a program holds twice the rows
    assert not launchers.plan(4097, 64, torch.float32).is_single_pass
    assert launchers.plan(1024, 63, torch.bfloat16).is_single_pass  # of rows that are not aligned, half
    assert not launchers.plan(1025, 63, torch.bfloat16).is_single_pass


@given(rows=st.integers(2, 2**31), channel_blocks=st.integers(1, 4096), block_m=st.sampled_from([1, 64, 256, 4096]))
def test_splits_cover_the_rows_and_none_is_empty(rows, channel_blocks, block_m):
    splits, split_rows = row_splits(rows, channel_blocks, block_m)
    assert split_rows % block_m == 0
    assert (splits - 1) * split_rows < rows <= splits * split_rows
    assert splits == 1 or splits * channel_blocks <= MOST_PROGRAMS
    assert splits == 1 or 4 * splits * splits <= rows  # merging costs no more than half the rows


@pytest.mark.parametrize("form", [True, False], ids=["single pass", "two passes"])
def test_a_large_mean_costs_no_more_precision_than_eager(form, device, monkeypatch):
    """Squares of a mean of 100 would leave a variance of 1 three digits in float32."""
    monkeypatch.setattr(launchers, "SINGLE_PASS_ELEMENTS", 2**14 if form else 0)
    x, weight, bias, buffers, dy = operands((8, 16, 8, 8), torch.float32, device, shift=100.0)
    assert launchers.plan(8 * 64, 16, torch.float32).is_single_pass == form
    exact = [t.double() for t in (x, weight, bias)]
    truth = run(reference.batch_norm, *exact, [t.double() for t in buffers], dy.double())
    eager, found = (run(batch_norm, x, weight, bias, buffers, dy, impl=impl) for impl in ("eager", "triton"))
    for ours, true, theirs in zip(found, truth, eager, strict=True):
        assert_close(ours, true, scale=max(1.0, float(true.abs().max())), eager=theirs)


@pytest.mark.parametrize("shape", [(4, 8, 4, 4), (4, 8, 32, 32)], ids=["single pass", "two passes"])
def test_nan_stays_nan_and_infinity_reaches_the_output(shape, device):
    x, _, _, _, dy = operands(shape, torch.bfloat16, device)
    x[0, 3, 1, 1], x[1, 5, 0, 0] = float("nan"), float("inf")
    ones, zeros = torch.ones(8, device=device), torch.zeros(8, device=device)
    moved = zeros.clone(), ones.clone()
    leaf = x.requires_grad_()
    y = batch_norm(leaf, ones, zeros, *moved, relu=True, impl="triton")
    (dx,) = torch.autograd.grad(y, leaf, dy)
    for found in (y, dx, *(t[None, :, None, None] for t in moved)):
        assert found[:, 3].isnan().all() and not found[:, 5].isfinite().all()
        assert found[:, [0, 1, 2, 4, 6, 7]].isfinite().all()


@pytest.mark.parametrize("shape", [(6, 9, 4, 5), (4, 9, 37, 31)], ids=["single pass", "two passes"])
def test_no_gradient_passes_a_relu_at_0(shape, device):
    x, weight, bias, buffers, dy = operands(shape, torch.float32, device)
    found = run(batch_norm, x, 0 * weight, 0 * bias, buffers, dy, relu=True, impl="triton")
    assert not any(t.any() for t in (found[0], *found[3:]))


def test_the_same_input_gives_the_same_bits(device):
    tensors = operands((9, 33, 17, 20), torch.float32, device)
    first, second = (run(batch_norm, *tensors, relu=True, impl="triton") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_other_memory_formats_strides_and_dtypes(device):
    x, weight, bias, buffers, _ = operands((3, 12, 4, 6), torch.bfloat16, device)
    dy = torch.randn(12, 1, 1, generator=torch.Generator().manual_seed(1)).to(device).expand(3, 12, 4, 6)
    expected = run(batch_norm, x, weight, bias, buffers, dy.bfloat16().contiguous(), impl="triton")
    x = x.contiguous()
    assert not x.is_contiguous(memory_format=torch.channels_last)
    found = run(batch_norm, x, weight, bias, buffers, dy.bfloat16(), impl="triton")
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    _, mean, deviation = launchers.forward(x, weight, bias, *(t.clone() for t in buffers), MOMENTUM, EPS, False)
    dx, dweight, dbias = launchers.backward(dy.float(), x, weight, bias, mean, deviation, False)
    assert dx.dtype == torch.bfloat16
    assert all(torch.equal(a, b) for a, b in zip((dx, dweight, dbias), expected[3:], strict=True))


def test_what_triton_cannot_take_is_left_to_eager_or_refused(device):
    ones, zeros = torch.ones(4, device=device), torch.zeros(4, device=device)
    empty = torch.empty(0, 4, 3, 3, device=device)
    with pytest.raises(RuntimeError, match="impl: 'triton' cannot run batch_norm here, because the input is empty"):
        batch_norm(empty, ones, zeros, zeros.clone(), ones.clone(), impl="triton")
    assert batch_norm(empty, ones, zeros, zeros.clone(), ones.clone()).shape == empty.shape
    with pytest.raises(RuntimeError, match="it takes contiguous float32 vectors, and weight is torch.float64"):
        batch_norm(torch.ones(2, 4, 3, 3, device=device), ones.double(), zeros, zeros, ones, impl="triton")
    with pytest.raises(ValueError, match="x: expected more than one value a channel"):
        batch_norm(torch.ones(1, 4, 1, 1, device=device), ones, zeros, zeros, ones, impl="triton")


def test_registration(device):
    x, weight, bias, buffers, dy = operands((2, 8, 3, 3), torch.float32, device)
    for relu in (False, True):
        torch.library.opcheck(torch.ops.rsengine.batch_norm.default, (x, weight, bias, *buffers, MOMENTUM, EPS, relu))
        _, mean, deviation = torch.ops.rsengine.batch_norm(x, weight, bias, *buffers, MOMENTUM, EPS, relu)
        saved = x, weight, bias, mean, deviation
        torch.library.opcheck(torch.ops.rsengine.batch_norm_backward.default, (dy, *saved, relu))
