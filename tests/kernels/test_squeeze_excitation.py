"""Squeeze-and-excite against its reference in float64 and against timm's module."""

import pytest
import torch

from rsengine.kernels import explain, reference, squeeze_excite, squeeze_excite_residual
from tests.tolerances import assert_close

# (N, C, H, W, R): the first stages of a ResNet-RS at 32x32, then shapes that are odd on purpose.
SHAPES = [
    (2, 256, 8, 8, 64),
    (2, 64, 1, 1, 16),  # the last stage with a stride-2 stem sees one pixel
    (1, 7, 5, 3, 3),  # one image, nothing a multiple of anything
    (3, 8, 2, 9, 1),  # one hidden channel
    (0, 8, 4, 4, 2),  # an empty batch
]
DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def inputs(shape, dtype, seed=0):
    n, c, h, w, r = shape
    generator = torch.Generator().manual_seed(seed)

    def random(*size, scale=1.0):
        return (scale * torch.randn(*size, generator=generator, dtype=torch.float64)).to(dtype).requires_grad_()

    x = random(n, c, h, w)
    weights = [random(r, c, scale=c**-0.5), random(r), random(c, r, scale=r**-0.5), random(c)]
    return x, weights, random(n, c, h, w)


def gradients(function, tensors, upstream):
    out = function(*tensors)
    return out.detach(), torch.autograd.grad(out, tensors, upstream.to(out.dtype), allow_unused=True)


def doubled(tensors):
    return [t.detach().double().requires_grad_() for t in tensors]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_matches_the_reference_in_output_and_every_gradient(shape, dtype, memory_format):
    x, weights, upstream = inputs(shape, dtype)
    x = x.detach().contiguous(memory_format=memory_format).requires_grad_()
    out, grads = gradients(squeeze_excite, [x, *weights], upstream)
    truth, true_grads = gradients(reference.squeeze_excite, doubled([x, *weights]), upstream.double())
    assert out.dtype == dtype
    assert_close(out, truth, scale=4)
    for grad, true_grad in zip(grads, true_grads, strict=True):
        assert_close(grad, true_grad, scale=4 * max(1.0, float(true_grad.abs().max()) if true_grad.numel() else 1.0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("keep", [None, "some"], ids=["every branch kept", "stochastic depth"])
def test_the_block_epilogue_matches_the_reference(shape, dtype, keep):
    x, weights, shortcut = inputs(shape, dtype)
    upstream = inputs(shape, dtype, seed=1)[0].detach()
    scale = None if keep is None else torch.tensor([0.0, 1.25, 2.0])[: shape[0]]

    def ours(x, w1, b1, w2, b2, s):
        return squeeze_excite_residual(x, w1, b1, w2, b2, s, scale)

    def theirs(x, w1, b1, w2, b2, s):
        return reference.squeeze_excite_residual(x, w1, b1, w2, b2, s, None if scale is None else scale.double())

    tensors = [x, *weights, shortcut]
    out, grads = gradients(ours, tensors, upstream)
    truth, true_grads = gradients(theirs, doubled(tensors), upstream.double())
    assert_close(out, truth, scale=8)
    if dtype != torch.bfloat16:  # rounding a sum near 0 to bfloat16 can switch the ReLU, and with it a gradient
        for grad, true_grad in zip(grads, true_grads, strict=True):
            assert_close(
                grad, true_grad, scale=8 * max(1.0, float(true_grad.abs().max()) if true_grad.numel() else 1.0)
            )


def test_a_dropped_branch_leaves_the_shortcut_and_no_gradient():
    x, weights, shortcut = inputs((2, 8, 3, 3, 4), torch.float64)
    out = squeeze_excite_residual(x, *weights, shortcut, torch.tensor([0.0, 1.0]))
    assert torch.equal(out[0], shortcut[0].relu())
    (grad,) = torch.autograd.grad(out.sum(), x)
    assert not grad[0].any() and grad[1].any()


def test_equals_timm():
    from timm.layers import SEModule

    torch.manual_seed(0)
    module = SEModule(32, rd_channels=8).double()
    x = torch.randn(4, 32, 5, 5, dtype=torch.float64)
    ours = squeeze_excite(
        x, module.fc1.weight.flatten(1), module.fc1.bias, module.fc2.weight.flatten(1), module.fc2.bias
    )
    torch.testing.assert_close(ours, module(x), rtol=0, atol=1e-14)


def test_gradcheck():
    x, weights, shortcut = inputs((2, 3, 2, 2, 2), torch.float64)
    assert torch.autograd.gradcheck(squeeze_excite, (x, *weights))
    assert torch.autograd.gradcheck(
        lambda *a: squeeze_excite_residual(*a, torch.tensor([0.5, 2.0], dtype=torch.float64)), (x, *weights, shortcut)
    )


def test_bf16_activations_with_float32_weights_under_autocast():
    x, weights, shortcut = inputs((2, 16, 4, 4, 4), torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = squeeze_excite_residual(x.bfloat16(), *weights, shortcut.bfloat16())
    assert out.dtype == torch.bfloat16
    truth = reference.squeeze_excite_residual(*(t.detach().double() for t in (x, *weights, shortcut)))
    assert_close(out, truth, scale=8)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x": torch.zeros(2, 8, 4)}, "x: expected floating point"),
        ({"x": torch.zeros(2, 8, 4, 4, dtype=torch.uint8)}, "x: expected floating point"),
        ({"w1": torch.zeros(4, 9)}, r"w1: expected \(R, 8\)"),
        ({"b1": torch.zeros(5)}, r"b1: expected \(4,\); got \(5,\)"),
        ({"w2": torch.zeros(4, 8)}, r"w2: expected \(8, 4\)"),
        ({"b2": torch.zeros(4)}, r"b2: expected \(8,\)"),
        ({"shortcut": torch.zeros(2, 8, 4, 5)}, "shortcut: expected the shape of x"),
        ({"keep_scale": torch.zeros(3)}, r"keep_scale: expected \(2,\)"),
        ({"w2": torch.zeros(8, 4, device="meta")}, "w2: expected floating point on cpu; got torch.float32 on meta"),
        ({"b2": torch.zeros(8, dtype=torch.int64)}, "b2: expected floating point on cpu; got torch.int64"),
        ({"impl": "cuda"}, "impl: expected one of auto, triton, eager"),
    ],
)
def test_wrong_arguments_are_named(change, words):
    good = {
        "x": torch.zeros(2, 8, 4, 4),
        "w1": torch.zeros(4, 8),
        "b1": torch.zeros(4),
        "w2": torch.zeros(8, 4),
        "b2": torch.zeros(8),
        "shortcut": torch.zeros(2, 8, 4, 4),
    }
    squeeze_excite_residual(**good)
    with pytest.raises(ValueError, match=words):
        squeeze_excite_residual(**(good | change))


def test_triton_where_it_cannot_run_says_why():
    x, weights, shortcut = inputs((2, 8, 3, 3, 4), torch.float32)
    with pytest.raises(RuntimeError, match="'triton' cannot run squeeze_excite here, because Triton compiles for GPUs"):
        squeeze_excite(x, *weights, impl="triton")
    with pytest.raises(RuntimeError, match="cannot run squeeze_excite_residual here"):
        squeeze_excite_residual(x, *weights, shortcut, impl="triton")


@pytest.mark.parametrize("keep", [None, "some"], ids=["every branch kept", "stochastic depth"])
def test_a_compiled_graph_has_no_breaks(keep):
    x, weights, shortcut = inputs((2, 8, 3, 3, 4), torch.float32)
    upstream = torch.ones_like(x)
    scale = None if keep is None else torch.tensor([0.0, 1.25])

    def step(*a):
        return squeeze_excite_residual(*a, scale)

    out, grads = gradients(torch.compile(step, fullgraph=True), [x, *weights, shortcut], upstream)
    plain, plain_grads = gradients(step, [x, *weights, shortcut], upstream)
    torch.testing.assert_close(out, plain)
    torch.testing.assert_close(grads, plain_grads)


@pytest.mark.parametrize("has_shortcut", [True, False])
def test_fake_outputs_have_the_shapes_dtypes_and_layout_of_real_ones(has_shortcut):
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        x = torch.empty(2, 8, 3, 3, dtype=torch.bfloat16).requires_grad_()
        weights = [torch.empty(shape).requires_grad_() for shape in [(4, 8), (4,), (8, 4), (8,)]]
        shortcut = torch.empty(2, 8, 3, 3).requires_grad_() if has_shortcut else None
        y, mean, hidden, gate = torch.ops.rsengine.squeeze_excite(x, *weights, shortcut, None)
        assert y.dtype == (torch.float32 if has_shortcut else torch.bfloat16)
        assert y.is_contiguous(memory_format=torch.channels_last)
        assert [(t.shape, t.dtype) for t in (mean, hidden, gate)] == [((2, c), torch.float32) for c in (8, 4, 8)]
        tensors = [x, *weights] + ([shortcut] if has_shortcut else [])
        grads = torch.autograd.grad(y.sum(), tensors)
        assert [(g.shape, g.dtype) for g in grads] == [(t.shape, t.dtype) for t in tensors]


def test_explain_names_the_choice_and_refuses_unknown_ops():
    assert "eager" in explain("squeeze_excite")
    with pytest.raises(ValueError, match="op: expected one of"):
        explain("conv")
