"""The Triton kernels of the block epilogue against the float64 reference and eager's error in the same dtype."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from rsengine.kernels import batch_norm_squeeze_excite_residual, reference
from rsengine.kernels.jit import block_epilogue as launchers
from tests.kernels.test_squeeze_excitation import doubled
from tests.tolerances import ABSOLUTE, assert_close

FLOAT, BF16, HALF = torch.float32, torch.bfloat16, torch.float16
DTYPES = [FLOAT, BF16, HALF]
EPS, MOMENTUM = 1e-3, 0.3
OP = torch.ops.rsengine.batch_norm_squeeze_excite_residual
# (N, C, H, W, R)
STAGES = [(3, 256, 8, 8, 64), (3, 512, 4, 4, 128), (5, 1024, 2, 2, 256), (9, 2048, 1, 1, 512)]  # ResNet-RS-50
ODD = [
    (2, 7, 5, 3, 3),  # nothing a multiple of anything
    (3, 257, 3, 11, 65),  # one more than powers of two
    (17, 48, 1, 1, 12),  # one pixel, a batch just over a tile
    (2, 1, 1, 1, 1),  # one of everything but images
    (1, 3, 1, 2, 1),  # one image
    (5, 130, 11, 13, 33),  # tails in pixels, channels and hidden, over several tiles of each
]
FORMS = [
    (32, 48, 8, 8, 12),  # the most rows that one program holds ...
    (33, 48, 8, 8, 12),  # ... and one image more: splits, each of one image
    (129, 40, 4, 4, 10),  # splits of three images
    (130, 64, 1, 1, 16),  # two images a program, that share the weights ...
    (129, 64, 2, 2, 70),  # ... of which the last has one; more hidden channels than others
    (1030, 8, 1, 1, 40),  # sixteen images a program, the last with six
]
# Of w1, b1, w2, b2: the first is the products'.
MIXED = [(BF16, FLOAT, BF16, FLOAT), (FLOAT, BF16, HALF, BF16), (HALF, FLOAT, FLOAT, BF16)]


def operands(shape, dtype, device, weight_dtypes=None, seed=0, shift=0.5):
    """(x, weight, bias, w1, b1, w2, b2, shortcut), keep_scale, the gradient of y."""
    n, c, h, w, r = shape
    generator = torch.Generator().manual_seed(seed)

    def random(*size, scale=1.0, shift=0.0, to=FLOAT):
        values = scale * torch.randn(*size, generator=generator, dtype=torch.float64) + shift
        values = values.to(device, to)
        return values.contiguous(memory_format=torch.channels_last) if len(size) == 4 else values

    to = weight_dtypes or (dtype,) * 4
    x, shortcut, dy = (
        random(n, c, h, w, scale=2.0, shift=shift, to=dtype),
        *(random(n, c, h, w, to=dtype) for _ in "12"),
    )
    weights = [
        random(r, c, scale=c**-0.5, to=to[0]),
        random(r, to=to[1]),
        random(c, r, scale=r**-0.5, to=to[2]),
        random(c, to=to[3]),
    ]
    keep_scale = torch.tensor([0.0, 1.25, 2.0], device=device).repeat(n // 3 + 1)[:n]
    return [x, random(c), random(c), *weights, shortcut], keep_scale, dy


def buffers(tensors, dtype=FLOAT):
    return [tensors[1].new_full(tensors[1].shape, value, dtype=dtype) for value in (0.25, 2.0)]


def formula(hidden_open, keep_scale):
    """The op before its last ReLU, with the side of the first one given: the gradient is that of the side taken."""

    def forward(x, weight, bias, w1, b1, w2, b2, shortcut):
        b1, w2, b2 = (t.to(w1.dtype) for t in (b1, w2, b2))
        z = F.batch_norm(x, None, None, weight, bias, True, MOMENTUM, EPS)
        hidden = F.linear(z.mean((2, 3)).to(w1.dtype), w1, b1) * hidden_open
        z = z * torch.sigmoid(F.linear(hidden, w2, b2)).to(x.dtype)[:, :, None, None]
        return shortcut + (z if keep_scale is None else z * keep_scale.to(z.dtype)[:, None, None, None])

    return forward


def launch(tensors, keep_scale, dy, chosen=None):
    """``(y, buffers, gradients, hidden)`` of the launchers, the gradients in the order of ``tensors``."""
    x, weight, bias, w1, b1, w2, b2, shortcut = tensors
    moved = buffers(tensors)
    y, *saved = launchers.forward(x, shortcut, weight, bias, *moved, w1, b1, w2, b2, keep_scale, MOMENTUM, EPS, chosen)
    gradients = launchers.backward(dy, x, y, weight, bias, w1, w2, keep_scale, *saved, b1.dtype, b2.dtype, chosen)
    dx, dshortcut, *others = gradients
    return y, moved, [dx, *others, dshortcut], saved[4]


def run(tensors, keep_scale, dy, impl):
    """``(y, buffers, gradients)`` of the public function."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    moved = buffers(tensors)
    y = batch_norm_squeeze_excite_residual(*leaves[:3], *moved, *leaves[3:], keep_scale, MOMENTUM, EPS, impl=impl)
    return y.detach(), moved, torch.autograd.grad(y, leaves, dy)


def compare(tensors, keep_scale, dy, found, hidden, scale=1.0):
    """Output, buffers and every gradient against float64, allowing twice the error of eager in the same dtypes."""
    y, moved, gradients = found
    exact = doubled(tensors)
    keep64 = None if keep_scale is None else keep_scale.double()
    true_buffers, eager_buffers = buffers(tensors, torch.float64), buffers(tensors)
    with torch.no_grad():
        truth = reference.batch_norm_squeeze_excite_residual(
            *exact[:3], *true_buffers, *exact[3:], keep64, MOMENTUM, EPS
        )
        products = [t.to(tensors[3].dtype) for t in tensors[3:7]]
        eager = batch_norm_squeeze_excite_residual(
            *tensors[:3], *eager_buffers, *products, tensors[7], keep_scale, MOMENTUM, EPS, impl="eager"
        )

    # What products in fewer bits err reaches the maps through the gate, whose slope is a quarter at most.
    coarse = ABSOLUTE[tensors[3].dtype] / 4

    def close(ours, true, theirs):
        size = max(1.0, float(true.detach().abs().max())) * max(1.0, coarse / ABSOLUTE[ours.dtype])
        assert_close(ours, true, scale=scale * size, eager=theirs)

    assert y.dtype == tensors[0].dtype and y.is_contiguous(memory_format=torch.channels_last)
    close(y, truth, eager)
    for ours, true, theirs in zip(moved, true_buffers, eager_buffers, strict=True):
        close(ours, true, theirs)

    is_open, hidden_open = y > 0, hidden > 0
    leaves = [t.detach().requires_grad_() for t in tensors]
    eager_gradients = torch.autograd.grad(formula(hidden_open, keep_scale)(*leaves), leaves, dy * is_open)
    true_gradients = torch.autograd.grad(formula(hidden_open, keep64)(*exact), exact, dy.double() * is_open)
    for tensor, ours, theirs, true in zip(tensors, gradients, eager_gradients, true_gradients, strict=True):
        assert ours.dtype == tensor.dtype and ours.shape == tensor.shape
        close(ours, true, theirs)


def check(shape, dtype, device, keep=True, weight_dtypes=None, chosen=None):
    tensors, keep_scale, dy = operands(shape, dtype, device, weight_dtypes)
    keep_scale = keep_scale if keep else None
    *found, hidden = launch(tensors, keep_scale, dy, chosen)
    compare(tensors, keep_scale, dy, found, hidden)


def forms(shape, dtype, products=None):
    n, c, h, w, r = shape
    for is_whole in (True, False):
        for is_fused in (True, False):
            yield launchers.plan(n, h * w, c, r, dtype, products or dtype, is_whole, is_fused)


@pytest.mark.parametrize("shape", STAGES, ids=str)
def test_every_stage_of_resnet_rs_50(shape, device):
    check(shape, BF16, device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", ODD, ids=str)
def test_odd_shapes(shape, dtype, device):
    check(shape, dtype, device, keep=shape[0] % 2 == 1)


@pytest.mark.parametrize("dtype", [pytest.param(FLOAT, marks=pytest.mark.thorough), BF16], ids=str)
@pytest.mark.parametrize("shape", FORMS, ids=str)
def test_forms_at_their_boundaries(shape, dtype, device):
    check(shape, dtype, device)


@pytest.mark.parametrize("weight_dtypes", MIXED, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights_of_other_dtypes(dtype, weight_dtypes, device):
    shape = (5, 40, 3, 3, 10)
    for chosen in forms(shape, dtype, weight_dtypes[0]):
        check(shape, dtype, device, weight_dtypes=weight_dtypes, chosen=chosen)


@pytest.mark.slow_grid
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("keep", [True, False], ids=["stochastic depth", "every branch kept"])
@pytest.mark.parametrize("shape", [*STAGES, *ODD, *FORMS], ids=str)
def test_every_shape_in_every_form(shape, keep, dtype, device):
    for chosen in forms(shape, dtype):
        check(shape, dtype, device, keep, chosen=chosen)


@settings(max_examples=15, deadline=None)
@given(
    shape=st.tuples(st.integers(2, 6), *(st.integers(1, top) for top in (40, 6, 6, 20))),
    dtypes=st.tuples(st.sampled_from(DTYPES), st.sampled_from(DTYPES)),
    is_whole=st.booleans(),
    is_fused=st.booleans(),
    keep=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_shape_in_any_form(shape, dtypes, is_whole, is_fused, keep, seed):
    device = "cuda" if torch.cuda.is_available() else "cpu"  # hypothesis does not reset fixtures between examples
    n, c, h, w, r = shape
    chosen = launchers.plan(n, h * w, c, r, *dtypes, is_whole, is_fused)
    tensors, keep_scale, dy = operands(shape, dtypes[0], device, (dtypes[1],) * 4, seed)
    keep_scale = keep_scale if keep else None
    *found, hidden = launch(tensors, keep_scale, dy, chosen)
    # Twice the term: at two values a channel batch norm amplifies what rounding there is.
    compare(tensors, keep_scale, dy, found, hidden, scale=2.0)


@pytest.mark.parametrize("shape", [(4, 64, 4, 4, 16), (3, 48, 3, 5, 12), (7, 20, 9, 8, 5)], ids=str)
def test_all_forms_agree(shape, device):
    tensors, keep_scale, dy = operands(shape, FLOAT, device)
    first, *others = (launch(tensors, keep_scale, dy, chosen) for chosen in forms(shape, FLOAT))
    for other in others:
        for a, b in zip([first[0], *first[1], *first[2]], [other[0], *other[1], *other[2]], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-5)


def test_the_forms_of_a_step():
    """ResNet-RS-50 at 32x32, batch 128, in bfloat16."""
    chosen = [launchers.plan(128, h * w, c, r, BF16, BF16) for _, c, h, w, r in STAGES]
    assert [each.is_whole for each in chosen] == [False, True, True, True]
    assert [each.is_fused for each in chosen] == [True, True, False, False]
    assert [each.fused_images for each in chosen[:2]] == [1, 2]
    # A byte of weights more than a program may read; maps of an image that would keep one busy.
    assert not launchers.plan(128, 16, 512, 129, BF16, BF16).is_fused
    assert not launchers.plan(128, 16, 512, 128, BF16, FLOAT).is_fused
    assert not launchers.plan(128, 256, 256, 64, BF16, BF16).is_fused
    assert launchers.plan(32, 64, 48, 12, BF16, BF16).is_whole
    assert not launchers.plan(33, 64, 48, 12, BF16, BF16).is_whole
    assert not launchers.plan(32, 64, 48, 12, FLOAT, FLOAT).is_whole


@pytest.mark.parametrize("is_whole", [True, False], ids=["whole", "split"])
def test_a_large_mean_costs_no_more_precision_than_eager(is_whole, device):
    """Squares of a mean of 100 would leave a variance of 4 three digits in float32."""
    shape = (8, 16, 8, 8, 4)
    tensors, keep_scale, dy = operands(shape, FLOAT, device, shift=100.0)
    chosen = launchers.plan(8, 64, 16, 4, FLOAT, FLOAT, is_whole)
    *found, hidden = launch(tensors, keep_scale, dy, chosen)
    compare(tensors, keep_scale, dy, found, hidden)


def test_the_same_bits_each_time(device):
    shape = (9, 40, 5, 4, 10)
    tensors, keep_scale, dy = operands(shape, BF16, device)
    for chosen in forms(shape, BF16):
        first, second = (launch(tensors, keep_scale, dy, chosen) for _ in range(2))
        for a, b in zip([first[0], *first[1], *first[2]], [second[0], *second[1], *second[2]], strict=True):
            assert torch.equal(a, b)


def test_the_public_function_is_the_launchers(device):
    tensors, keep_scale, dy = operands((5, 24, 3, 4, 6), BF16, device)
    y, moved, gradients, _ = launch(tensors, keep_scale, dy)
    found = run(tensors, keep_scale, dy, "triton")
    for a, b in zip([found[0], *found[1], *found[2]], [y, *moved, *gradients], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("is_fused", [True, False], ids=["fused", "library"])
def test_autocast_changes_nothing(is_fused, device):
    shape = (4, 24, 3, 4, 6)
    tensors, keep_scale, dy = operands(shape, BF16, device, (FLOAT,) * 4)
    chosen = launchers.plan(4, 12, 24, 6, BF16, FLOAT, is_fused=is_fused)
    y, moved, gradients, _ = launch(tensors, keep_scale, dy, chosen)
    with torch.autocast(device.type, BF16):
        again = launch(tensors, keep_scale, dy, chosen)
    for a, b in zip([again[0], *again[1], *again[2]], [y, *moved, *gradients], strict=True):
        assert torch.equal(a, b)


def test_other_memory_formats_and_strides(device):
    tensors, keep_scale, dy = operands((3, 12, 4, 6, 4), FLOAT, device)
    expected = run(tensors, keep_scale, dy, "triton")
    x, weight, bias, w1, b1, w2, b2, shortcut = tensors
    w1, w2 = (w.t().contiguous().t() for w in (w1, w2))
    b1, b2 = (b.repeat_interleave(2)[::2] for b in (b1, b2))
    assert not any(t.is_contiguous() for t in (w1, w2, b1, b2))
    tensors = [x.contiguous(), weight, bias, w1, b1, w2, b2, shortcut.contiguous()]
    found = run(tensors, keep_scale.repeat_interleave(2)[::2], dy.contiguous(), "triton")
    for a, b in zip([found[0], *found[1], *found[2]], [expected[0], *expected[1], *expected[2]], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_nan_is_not_hidden_by_the_relu(device):
    tensors, _, dy = operands((3, 16, 4, 4, 4), FLOAT, device)
    tensors[0][1, 3, 2, 2] = float("nan")
    for chosen in forms((3, 16, 4, 4, 4), FLOAT):
        y, moved, _, _ = launch(tensors, None, dy, chosen)
        assert y.isnan().all()  # of every image, through the batch's mean; of every channel, through the gate
        assert all(each[3].isnan() and each.isnan().sum() == 1 for each in moved)


def test_a_dropped_branch_leaves_the_shortcut(device):
    tensors, _, dy = operands((2, 8, 3, 3, 4), FLOAT, device)
    y, _, gradients, _ = launch(tensors, torch.tensor([0.0, 1.0], device=device), dy)
    assert torch.equal(y[0], tensors[7][0].relu())
    assert torch.equal(gradients[7][0], dy[0] * (y[0] > 0))


def test_without_gradients_the_buffers_move(device):
    tensors, keep_scale, dy = operands((4, 8, 2, 2, 4), FLOAT, device)
    moved = buffers(tensors)
    before = [each._version for each in moved]
    with torch.no_grad():
        batch_norm_squeeze_excite_residual(*tensors[:3], *moved, *tensors[3:], keep_scale, 1.0, EPS, impl="triton")
    torch.testing.assert_close(moved[0], tensors[0].mean((0, 2, 3)))
    torch.testing.assert_close(moved[1], tensors[0].var((0, 2, 3)))
    assert all(each._version > version for each, version in zip(moved, before, strict=True))


def test_registration(device):
    tensors, keep_scale, dy = operands((2, 8, 3, 3, 4), FLOAT, device, (BF16, FLOAT, BF16, FLOAT))
    x, weight, bias, w1, b1, w2, b2, shortcut = tensors
    arguments = x, shortcut, weight, bias, *buffers(tensors), w1, b1, w2, b2
    for keep in (keep_scale, None):
        torch.library.opcheck(OP.default, (*arguments, keep, MOMENTUM, EPS))
    y, *saved = OP(*arguments, keep_scale, MOMENTUM, EPS)
    backward = torch.ops.rsengine.batch_norm_squeeze_excite_residual_backward.default
    torch.library.opcheck(backward, (dy, x, y, weight, bias, w1, w2, keep_scale, *saved, FLOAT, FLOAT))
