"""The layers against ``torch.nn``: outputs and every gradient, to rounding in float64, as close as its own in bf16."""

import copy

import pytest
import torch
from torch import nn

from rsengine.model.layers import BatchNorm, Conv3x3, PointwiseConv, use_products

SIZES = [(1, 1), (1, 2), (2, 1), (2, 2), (3, 2), (4, 4), (5, 3), (7, 7), (8, 8), (9, 16), (17, 17)]


def plain(layer):
    """The layer of torch.nn with the same weights."""
    kind = nn.Conv2d if isinstance(layer, nn.Conv2d) else nn.BatchNorm2d
    twin = copy.deepcopy(layer)
    twin.__class__ = kind
    return twin


def results(layer, x, dy):
    """Output, gradients of the input and of the parameters, and buffers."""
    x = x.clone().requires_grad_()
    y = layer(x)
    y.backward(dy)
    return {"y": y, "x": x.grad} | {n: p.grad for n, p in layer.named_parameters()} | dict(layer.named_buffers())


def assert_equal(layer, x, **tolerance):
    twin = plain(layer)
    dy = torch.randn(twin(x).shape, generator=torch.Generator().manual_seed(2)).to(x.dtype)
    twin = plain(layer)  # the call above moved its buffers
    expected = results(twin, x, dy)
    found = results(layer, x, dy)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype and found[name].shape == value.shape, name
        torch.testing.assert_close(found[name], value, msg=lambda text, name=name: f"{name}: {text}", **tolerance)


def images(count, channels, size, dtype, memory_format=torch.channels_last):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, channels, *size, generator=generator, dtype=torch.float64)
    return x.to(dtype).contiguous(memory_format=memory_format)


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_a_3x3_convolution_is_torchs(size, stride, memory_format):
    layer = Conv3x3(5, 7, stride).double().to(memory_format=memory_format)
    assert_equal(layer, images(3, 5, size, torch.float64, memory_format), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("size", [(1, 1), (4, 6)], ids=str)
def test_a_1x1_convolution_is_torchs(size):
    assert_equal(PointwiseConv(5, 7).double(), images(3, 5, size, torch.float64), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("choice", "kinds"), [
    ("auto", {"cpu": "_WholeMapBackward PermuteBackward0", "meta": "ConvolutionBackward0"}),
    ("products", {"cpu": "_WholeMapBackward PermuteBackward0", "meta": "_WholeMapBackward PermuteBackward0"}),
    ("library", {"cpu": "ConvolutionBackward0", "meta": "ConvolutionBackward0"}),
])  # fmt: skip
def test_where_convolutions_are_products_is_a_choice(choice, kinds):
    for device, expected in kinds.items():
        layers = nn.Sequential(Conv3x3(4, 4), PointwiseConv(4, 4)).to(device)
        use_products(layers, choice)
        x = torch.ones(2, 4, 2, 2, device=device)
        found = {layer(x).grad_fn.name() for layer in layers}
        assert found == set(expected.split())


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_under_autocast_the_errors_are_those_of_bfloat16(size, stride):
    """Against float64, at most twice the error of torch's own layer under autocast, and a rounding of bfloat16."""
    torch.manual_seed(0)
    exact = Conv3x3(32, 48, stride).to(memory_format=torch.channels_last)
    x = images(4, 32, size, torch.float32)
    dy = torch.randn(plain(exact)(x).shape)
    truth = results(plain(exact).double(), x.double(), dy.double())
    errors = []
    for layer in (plain(exact), exact):
        with torch.autocast("cpu", torch.bfloat16):
            x_leaf = x.clone().requires_grad_()
            y = layer(x_leaf)
        assert y.dtype == torch.bfloat16
        y.backward(dy.bfloat16())
        assert layer.weight.grad.dtype == torch.float32 and x_leaf.grad.dtype == torch.float32
        found = {"y": y, "x": x_leaf.grad, "weight": layer.weight.grad}
        errors.append({k: (v.double() - truth[k]).abs().max() / truth[k].abs().max() for k, v in found.items()})
    for name, theirs in errors[0].items():
        # oneDNN 3.x at times leaves unwritten the weight gradient of taps that meet only padding (stride 2, one pixel).
        assert errors[1][name] <= (2 * theirs + 2**-8 if theirs.isfinite() else 2**-7), name


def test_an_input_that_needs_no_gradient_gets_none():
    for size in ((2, 2), (4, 4), (9, 9)):
        layer = Conv3x3(3, 4)
        x = torch.randn(2, 3, *size)
        layer(x).sum().backward()
        expected = plain(layer)
        expected.weight.grad = None
        expected(x).sum().backward()
        torch.testing.assert_close(layer.weight.grad, expected.weight.grad)
    frozen = Conv3x3(3, 4).requires_grad_(False)
    x = torch.randn(2, 3, 2, 2, requires_grad=True)
    frozen(x).sum().backward()
    assert x.grad is not None and frozen.weight.grad is None


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("size", [(1, 1), (3, 2)], ids=str)
def test_batch_norm_is_torchs_buffers_and_all(size, training):
    layer = BatchNorm(6).double().train(training)
    nn.init.normal_(layer.weight), nn.init.normal_(layer.bias)
    assert_equal(layer, images(4, 6, size, torch.float64), rtol=1e-10, atol=1e-12)


def test_batch_norm_refuses_other_shapes():
    with pytest.raises(ValueError, match=r"expected floating point \(N, C, H, W\)"):
        BatchNorm(3)(torch.randn(2, 3, 4))


@pytest.mark.parametrize("layer", [Conv3x3(3, 4), PointwiseConv(3, 4), BatchNorm(3)], ids=lambda v: type(v).__name__)
@pytest.mark.parametrize("size", [(1, 1), (2, 2), (4, 4)], ids=str)
def test_no_images_give_no_images(layer, size):
    if isinstance(layer, BatchNorm):
        layer = layer.eval()
    x = torch.randn(0, 3, *size, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert y.shape[0] == 0 and x.grad.shape == x.shape
    weight = layer.weight.grad
    assert weight is None or not weight.any()
