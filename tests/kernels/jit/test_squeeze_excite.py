"""The Triton kernels of squeeze-and-excite against the float64 reference and eager's error in the same dtype."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rsengine.kernels import reference, squeeze_excite, squeeze_excite_residual
from rsengine.kernels.jit import squeeze_excite as launchers
from tests.kernels.test_squeeze_excitation import doubled, gradients
from tests.tolerances import assert_close

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# (N, C, H, W, R)
STEM_STRIDE_2 = [(3, 256, 8, 8, 64), (3, 512, 4, 4, 128), (5, 1024, 2, 2, 256), (9, 2048, 1, 1, 512)]  # ResNet-RS-50
STEM_STRIDE_1 = [(1, 256, 16, 16, 64), (1, 512, 8, 8, 128), (3, 1024, 4, 4, 256), (2, 2048, 2, 2, 512)]
BATCHES = [(1, 64, 8, 8, 16), (7, 64, 8, 8, 16), (128, 64, 8, 8, 16), (128, 128, 2, 2, 32)]
IMAGENET = [(1, 256, 28, 56, 64), (1, 1024, 14, 14, 256), (1, 2048, 7, 7, 512)]  # the first cropped to half its height
ODD = [
    (2, 7, 5, 3, 3),  # nothing a multiple of anything
    (3, 257, 3, 11, 65),  # one more than powers of two: the map, padded, is four times its size
    (17, 48, 1, 1, 12),  # one pixel, a batch just over a tile
    (2, 1, 1, 1, 1),  # one of everything
    (2, 130, 11, 13, 33),  # two passes with tails in pixels, channels, hidden and samples
]
EVERY = [*STEM_STRIDE_2, *STEM_STRIDE_1, *IMAGENET, *BATCHES]


def operands(shape, dtype, device, seed=0, weight_dtype=None):
    n, c, h, w, r = shape
    generator = torch.Generator().manual_seed(seed)

    def random(*size, scale=1.0, to=dtype):
        values = scale * torch.randn(*size, generator=generator, dtype=torch.float64)
        return values.to(device, to)

    def maps():
        return random(n, c, h, w).contiguous(memory_format=torch.channels_last)

    to = weight_dtype or dtype
    weights = [
        random(r, c, scale=c**-0.5, to=to),
        random(r, to=to),
        random(c, r, scale=r**-0.5, to=to),
        random(c, to=to),
    ]
    keep_scale = torch.tensor([0.0, 1.25, 2.0], device=device).repeat(n // 3 + 1)[:n]
    return maps(), weights, maps(), keep_scale, maps()


def with_sides(hidden_open, keep_scale):
    """The reference's formula, before the last ReLU and with the first one's side given."""

    def forward(x, w1, b1, w2, b2, shortcut=None):
        hidden = (x.mean((2, 3)).to(w1.dtype) @ w1.T + b1) * hidden_open
        y = x * torch.sigmoid(hidden @ w2.T + b2).to(x.dtype)[:, :, None, None]
        if keep_scale is not None:
            y = y * keep_scale.to(y.dtype)[:, None, None, None]
        return y if shortcut is None else shortcut + y

    return forward


def check(x, weights, upstream, shortcut=None, keep_scale=None):
    """Output and every gradient against the reference, allowing twice the error of eager in the same dtypes."""
    tensors = [t.detach().requires_grad_() for t in [x, *weights] + ([] if shortcut is None else [shortcut])]
    if shortcut is None:
        function, textbook = squeeze_excite, reference.squeeze_excite
    else:
        function, textbook = squeeze_excite_residual, reference.squeeze_excite_residual
    extra = [] if keep_scale is None else [keep_scale]
    with torch.no_grad():
        eager = function(*tensors, *extra, impl="eager")
        truth = textbook(*doubled(tensors), *(k.double() for k in extra))
    # The operator under the public function: it returns the hidden layer too.
    out, _, hidden, _ = torch.ops.rsengine.squeeze_excite(*tensors[:5], *(tensors[5:] or [None]), keep_scale)
    grads = torch.autograd.grad(out, tensors, upstream)
    assert out.dtype == eager.dtype
    assert_close(out, truth, eager=eager)

    # Where a ReLU's input is within rounding of 0 either side is right, and the gradient is that of the side taken.
    hidden_open, is_open = hidden > 0, torch.ones_like(out) if shortcut is None else out > 0
    before = torch.nn.functional.linear(x.double().mean((2, 3)), weights[0].double(), weights[1].double())
    assert (before[(before > 0) != hidden_open].abs() < 5e-3).all()
    formula = with_sides(hidden_open, keep_scale)
    _, eager_grads = gradients(formula, tensors, upstream * is_open)
    _, true_grads = gradients(formula, doubled(tensors), upstream.double() * is_open)
    for tensor, grad, eager_grad, true in zip(tensors, grads, eager_grads, true_grads, strict=True):
        assert grad.dtype == tensor.dtype
        size = float(true.abs().max()) if true.numel() else 1.0
        assert_close(grad, true, scale=max(1.0, size), eager=eager_grad)


def check_residual(shape, dtype, device, keep=True, weight_dtype=None):
    x, weights, shortcut, keep_scale, upstream = operands(shape, dtype, device, weight_dtype=weight_dtype)
    check(x, weights, upstream, shortcut, keep_scale if keep else None)


def check_plain(shape, dtype, device):
    x, weights, _, _, upstream = operands(shape, dtype, device)
    check(x, weights, upstream)


@pytest.mark.parametrize("shape", [*STEM_STRIDE_2, *STEM_STRIDE_1], ids=str)
def test_the_block_epilogue_at_every_stage_of_resnet_rs_50(shape, device):
    check_residual(shape, torch.bfloat16, device, weight_dtype=torch.float32)  # autocast's dtypes


@pytest.mark.parametrize("shape", BATCHES, ids=str)
def test_the_block_epilogue_at_every_batch(shape, device):
    check_residual(shape, torch.bfloat16, device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*ODD, (2, 256, 8, 8, 64)], ids=str)
def test_the_block_epilogue_at_odd_shapes(shape, dtype, device):
    check_residual(shape, dtype, device, keep=shape[0] % 2 == 1)


@pytest.mark.parametrize("shape", IMAGENET, ids=str)
def test_the_block_epilogue_in_two_passes_at_imagenet_shapes(shape, device):
    assert not launchers.plan(shape[2] * shape[3], shape[1], shape[4], torch.bfloat16, torch.bfloat16).is_single_pass
    check_residual(shape, torch.bfloat16, device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*ODD, (2, 256, 8, 8, 64), (1, 64, 16, 20, 16)], ids=str)
def test_the_plain_op(shape, dtype, device):
    check_plain(shape, dtype, device)


@pytest.mark.slow_grid
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("keep", [True, False], ids=["stochastic depth", "every branch kept"])
@pytest.mark.parametrize("shape", EVERY, ids=str)
def test_the_block_epilogue_at_every_shape_and_dtype(shape, keep, dtype, device):
    check_residual(shape, dtype, device, keep)


@pytest.mark.slow_grid
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", EVERY, ids=str)
def test_the_plain_op_at_every_shape_and_dtype(shape, dtype, device):
    check_plain(shape, dtype, device)


@settings(max_examples=25, deadline=None)
@given(
    shape=st.tuples(*(st.integers(1, top) for top in (5, 40, 6, 6, 20))),
    dtype=st.sampled_from(DTYPES),
    is_single_pass=st.booleans(),
    has_shortcut=st.booleans(),
)
def test_any_shape_in_either_form(shape, dtype, is_single_pass, has_shortcut):
    device = "cuda" if torch.cuda.is_available() else "cpu"  # hypothesis does not reset fixtures between examples
    x, weights, shortcut, keep_scale, dy = operands(shape, dtype, device)
    if not has_shortcut:
        shortcut = keep_scale = None
    y, mean, hidden, gate = launchers.forward(x, *weights, shortcut, keep_scale, is_single_pass)
    kept = y if has_shortcut else None
    grads = launchers.backward(
        dy, x, kept, weights[0], weights[2], keep_scale, mean, hidden, gate, dtype, is_single_pass
    )
    inputs = doubled([x, *weights] + ([shortcut] if has_shortcut else []))
    truth = with_sides(hidden > 0, keep_scale)(*inputs)
    is_open = y > 0 if has_shortcut else torch.ones_like(y)
    dx, *others = torch.autograd.grad(truth, inputs, dy.double() * is_open, retain_graph=True)
    truth = truth.relu() if has_shortcut else truth
    assert_close(y, truth, scale=max(1.0, float(truth.detach().abs().max())))
    for ours, true in zip(grads, [dx, others[4] if has_shortcut else None, *others[:4]], strict=True):
        assert (ours is None) == (true is None)
        if true is not None:
            # Twice the term: a weight's gradient has been through two products of half precision, and here is no eager
            # result to measure that by.
            assert_close(ours, true, scale=2 * max(1.0, float(true.abs().max())))


@pytest.mark.parametrize("shape", [(4, 64, 4, 4, 16), (3, 48, 3, 5, 12)], ids=str)
def test_both_forms_agree(shape, device):
    x, weights, shortcut, keep_scale, dy = operands(shape, torch.float32, device)
    one, two = (launchers.forward(x, *weights, shortcut, keep_scale, form) for form in (True, False))
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_one_pass_is_for_maps_that_fit_and_weights_that_are_few():
    for dtype in DTYPES:
        chosen = [launchers.plan(h * w, c, r, dtype, torch.float32).is_single_pass for _, c, h, w, r in STEM_STRIDE_2]
        assert chosen == [True, False, False, False]
    assert launchers.plan(16, 512, 128, torch.bfloat16, torch.bfloat16).is_single_pass  # 256 KiB of weights
    assert not launchers.plan(16, 512, 129, torch.bfloat16, torch.bfloat16).is_single_pass
    assert not launchers.plan(56 * 56, 256, 64, torch.bfloat16, torch.bfloat16).is_single_pass


@pytest.mark.parametrize("is_single_pass", [True, False], ids=["one pass", "two passes"])
@pytest.mark.parametrize("shape", [(17, 72, 1, 1, 40), (3, 200, 2, 2, 70)], ids=str)
def test_few_pixels_in_either_form(shape, is_single_pass, device):
    """Tiles of many channels, and products with tails in samples, outputs and depth."""
    x, weights, shortcut, keep_scale, _ = operands(shape, torch.float32, device)
    y, *_ = launchers.forward(x, *weights, shortcut, keep_scale, is_single_pass)
    truth = reference.squeeze_excite_residual(*doubled([x, *weights, shortcut]), keep_scale.double())
    assert_close(y, truth, scale=max(1.0, float(truth.detach().abs().max())))


@pytest.mark.parametrize("function", [squeeze_excite, squeeze_excite_residual])
def test_an_empty_batch(function, device):
    x, weights, shortcut, _, upstream = operands((0, 8, 4, 4, 2), torch.float32, device)
    tensors = [x, *weights] + ([shortcut] if function is squeeze_excite_residual else [])
    tensors = [t.detach().requires_grad_() for t in tensors]
    out, grads = gradients(lambda *a: function(*a, impl="triton"), tensors, upstream)
    assert out.shape == x.shape
    assert all(not grad.any() and grad.shape == t.shape for grad, t in zip(grads, tensors, strict=True))


def test_other_memory_formats_and_strides(device):
    x, weights, shortcut, keep_scale, upstream = operands((3, 12, 4, 6, 4), torch.float32, device)
    x, shortcut = x.contiguous(), shortcut.contiguous()
    weights = [w.t().contiguous().t() if w.dim() == 2 else w.repeat_interleave(2)[::2] for w in weights]
    keep_scale = keep_scale.repeat_interleave(2)[::2]
    assert not any(t.is_contiguous() for t in [*weights, keep_scale])
    assert not x.is_contiguous(memory_format=torch.channels_last)
    check(x, weights, upstream.contiguous(), shortcut, keep_scale)


def test_a_wider_shortcut_widens_the_output(device):
    x, weights, shortcut, _, upstream = operands((2, 16, 4, 4, 4), torch.bfloat16, device)
    check(x, weights, upstream.float(), shortcut.float())


def test_nan_is_not_hidden_by_the_relu(device):
    x, weights, shortcut, _, _ = operands((3, 16, 4, 4, 4), torch.float32, device)
    x[1, 3, 2, 2] = float("nan")
    y = squeeze_excite_residual(x, *weights, shortcut, impl="triton")
    assert y[1].isnan().all() and not y[0].isnan().any() and not y[2].isnan().any()


def test_a_dropped_branch_leaves_the_shortcut_and_no_gradient(device):
    x, weights, shortcut, _, _ = operands((2, 8, 3, 3, 4), torch.float32, device)
    x.requires_grad_()
    keep_scale = torch.tensor([0.0, 1.0], device=device)
    out = squeeze_excite_residual(x, *weights, shortcut, keep_scale, impl="triton")
    assert torch.equal(out[0], shortcut[0].relu())
    (grad,) = torch.autograd.grad(out.sum(), x)
    assert not grad[0].any() and grad[1].any()


def test_registration(device):
    x, weights, shortcut, keep_scale, dy = operands((2, 8, 3, 3, 4), torch.float32, device)
    tensors = [t.requires_grad_() for t in (x, *weights, shortcut)]
    torch.library.opcheck(torch.ops.rsengine.squeeze_excite.default, (*tensors, keep_scale))
    torch.library.opcheck(torch.ops.rsengine.squeeze_excite.default, (*tensors[:5], None, None))
    y, mean, hidden, gate = torch.ops.rsengine.squeeze_excite(*(t.detach() for t in tensors), keep_scale)
    saved = (x.detach(), y, weights[0].detach(), weights[2].detach(), keep_scale, mean, hidden, gate)
    torch.library.opcheck(torch.ops.rsengine.squeeze_excite_backward.default, (dy, *saved, torch.float32))


def test_a_compiled_graph_has_no_breaks(device):
    x, weights, shortcut, keep_scale, dy = operands((2, 8, 3, 3, 4), torch.float32, device)
    tensors = [t.requires_grad_() for t in (x, *weights, shortcut)]

    def step(*a):
        return squeeze_excite_residual(*a, keep_scale, impl="triton")

    out, grads = gradients(torch.compile(step, fullgraph=True, backend="aot_eager"), tensors, dy)
    plain, plain_grads = gradients(step, tensors, dy)
    assert torch.equal(out, plain) and all(torch.equal(a, b) for a, b in zip(grads, plain_grads, strict=True))
