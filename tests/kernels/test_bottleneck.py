"""Whole parts of the network, in C under autocast: as near to the textbook in float64 as PyTorch's layers are."""

import itertools
import math

import pytest
import torch

from rsengine.kernels import ConvNorm, bottleneck, conv_batch_norm_relu, explain, joins, reference
from rsengine.kernels.dispatch import eager_only
from rsengine.kernels.native import convolutions

FASTER, AVAILABLE, REASON = convolutions.available()
native = pytest.mark.skipif(not AVAILABLE, reason=f"bfloat16 convolutions in C: {REASON}")


def random(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def layer(inputs, outputs, kernel=1, stride=1, seed=0):
    weight = random(outputs, inputs, kernel, kernel, seed=seed) / (inputs * kernel**2) ** 0.5
    gamma, beta = random(outputs, seed=seed + 1).abs() + 0.5, random(outputs, seed=seed + 2)
    return ConvNorm(weight, gamma, beta, torch.full_like(beta, 0.25), torch.full_like(beta, 2.0), stride)


def excite(channels, hidden):
    shapes = (hidden, channels), (hidden,), (channels, hidden), (channels,)
    return [0.3 * random(*shape, seed=50 + i) for i, shape in enumerate(shapes)]


def run(function, dtype, x, layers, weights=(), **options):
    """Output, gradients and averages, by name, of copies in ``dtype``; ``function(x, layers, weights, **options)``."""
    leaves = [x.detach().to(dtype).clone().requires_grad_(x.requires_grad)]
    copies = []
    for one in layers:
        parameters = [tensor.to(dtype).clone().requires_grad_() for tensor in one[:3]]
        copies.append(
            ConvNorm(*parameters, one.running_mean.to(dtype).clone(), one.running_var.to(dtype).clone(), one.stride)
        )
        leaves += parameters
    weights = [tensor.to(dtype).clone().requires_grad_() for tensor in weights]
    y = function(leaves[0], copies, weights, **options)
    y.backward(random(*y.shape, seed=90).to(y.dtype))
    found = {"y": y.detach()} | {
        f"gradient {i}": leaf.grad for i, leaf in enumerate(leaves + weights) if leaf.requires_grad
    }
    averages = itertools.chain.from_iterable(one[3:5] for one in copies)
    return found | {f"average {i}": average for i, average in enumerate(averages)}


def compare(function, truth, *arguments):
    """The distance of each result, as a whole, to the truth: in C at most half as far again as in PyTorch's layers."""
    exact = run(truth, torch.float64, *arguments)
    with torch.autocast("cpu", torch.bfloat16):
        fused, eager = (run(function, torch.float32, *arguments, impl=impl) for impl in ("native", "eager"))
    assert fused.keys() == exact.keys()
    for name, value in exact.items():
        assert fused[name].dtype == (torch.bfloat16 if name == "y" else torch.float32), name
        size = float(value.norm()) + 1e-9
        near, far = (float((found[name].double() - value).norm()) / size for found in (fused, eager))
        far = far if math.isfinite(far) else 0.2  # oneDNN's convolutions of maps of few pixels are NaN at times
        assert near <= 1.5 * far + 0.02, (name, near, far)


def chain(x, layers, _, **options):
    return conv_batch_norm_relu(x, layers, 0.3, 1e-3, **options)


@native
@pytest.mark.parametrize("has_gradient", [False, True], ids=["images", "maps"])
@pytest.mark.parametrize("size", [(16, 16), (9, 7), (8, 8)], ids=str)
def test_a_chain(size, has_gradient):
    layers = [layer(3, 24, 3, 2, 1), layer(24, 40, 3, 1, 11), layer(40, 40, 1, 1, 21), layer(40, 64, 3, 2, 31)]
    x = random(24, 3, *size, seed=0).requires_grad_(has_gradient)
    truth = lambda x, layers, _: reference.conv_batch_norm_relu(x, layers, 0.3, 1e-3)  # noqa: E731
    compare(chain, truth, x, layers)


# pixels a side, stride, whether the shortcut is a convolution, of means of pixels, squeeze-and-excite, stochastic depth
BLOCKS = [
    (8, 1, False, False, True, False),
    (8, 1, True, False, True, True),
    (16, 2, True, True, True, True),
    (7, 2, True, True, False, True),
    (6, 2, True, False, True, False),
    (1, 1, False, False, False, False),
    (1, 2, True, True, True, False),
]


@native
@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_a_bottleneck(block):
    side, stride, projects, pools, has_excite, drops = block
    outputs = 96 if projects else 40
    layers = [layer(40, 24, seed=1), layer(24, 24, 3, stride, 11), layer(24, outputs, seed=21)]
    if projects:
        layers.append(layer(40, outputs, 1, 1 if pools else stride, 31))
    weights = excite(outputs, 16) if has_excite else []
    keep = torch.tensor([0.0, 1.25, 1.25] * 8) if drops else None

    def of(function):
        def run_block(x, layers, weights, **options):
            shortcut, pool = layers[3] if projects else None, stride if pools else 1
            scale = None if keep is None else keep.to(x.dtype)
            return function(x, layers[:3], weights or None, shortcut, pool, scale, 0.3, 1e-3, **options)

        return run_block

    compare(
        of(bottleneck),
        of(reference.bottleneck),
        random(24, 40, side, side, seed=0).relu().requires_grad_(),
        layers,
        weights,
    )


def plain(*arguments, **changes):
    """A layer of float32 tensors."""
    one = layer(*arguments)
    return ConvNorm(*(tensor.float() for tensor in one[:5]), one.stride)._replace(**changes)


def floats(*arguments):
    return [tensor.float() for tensor in excite(*arguments)]


@native
def test_a_second_backward_pass_and_one_without_all_gradients():
    x, layers = torch.randn(4, 16, 5, 5, requires_grad=True), [plain(16, 8), plain(8, 8, 3), plain(8, 16)]
    layers[1].weight.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = bottleneck(x, layers, impl="native")
    y.sum().backward(retain_graph=True)
    first = x.grad.clone(), layers[1].weight.grad.clone()
    x.grad = layers[1].weight.grad = None
    y.sum().backward()
    assert torch.equal(x.grad, first[0]) and torch.equal(layers[1].weight.grad, first[1])
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        y.sum().backward()


@native
def test_its_saved_tensors_are_seen_by_autograd():
    """Hooks, as those that keep activations elsewhere, get every map, and a change in place is an error."""
    x, layers = torch.randn(4, 16, 5, 5), [plain(16, 8), plain(8, 8, 3), plain(8, 16)]
    layers[0].weight.requires_grad_()
    saved = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t)
    with hooks, torch.autocast("cpu", torch.bfloat16):
        bottleneck(x, layers, impl="native")
    assert saved.count((4, 8, 5, 5)) == 4 and (4, 16, 5, 5) in saved  # each map as made, and as the next one's input


@native
def test_where_it_cannot_run_it_says_why_and_auto_is_eager():
    x, layers = torch.randn(2, 16, 4, 4), [plain(16, 8), plain(8, 8, 3), plain(8, 16)]
    halves = [ConvNorm(*(tensor.bfloat16() for tensor in one[:5])) for one in layers]
    strided = [layers[0]._replace(beta=torch.zeros(16)[::2]), *layers[1:]]
    for arguments, cast, reason in [
        ((x, layers), False, "autocast in bfloat16, which is off"),
        ((x.half(), layers), True, "the input is torch.float16"),
        ((x[:0], layers), True, "the input is empty"),
        ((x, halves), True, "one is torch.bfloat16"),
        ((x, strided), True, r"one is torch.float32 \(8,\) with strides \(2,\) on cpu"),
        ((x.to("meta"), layers), True, "device type is 'meta'"),
    ]:
        with torch.autocast("cpu", torch.bfloat16, enabled=cast):
            with pytest.raises(RuntimeError, match=f"impl: 'native' cannot run bottleneck here, because .*{reason}"):
                bottleneck(*arguments, impl="native")
            assert not joins(*arguments)
    with torch.autocast("cpu", torch.bfloat16):
        assert joins(x, layers) == FASTER
        with eager_only():
            assert not joins(x, layers)
        with pytest.raises(ValueError, match="impl: expected one of auto, native, eager; got 'triton'"):
            bottleneck(x, layers, impl="triton")
    assert torch.equal(bottleneck(x, layers), bottleneck(x, layers, impl="eager"))


@pytest.mark.parametrize("impl", ["eager", "auto"])
def test_what_has_no_meaning_is_refused(impl):
    x, layers = torch.randn(2, 16, 4, 4), [plain(16, 8), plain(8, 8, 3), plain(8, 16)]
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(
            ValueError, match=r"layers\[1\]: expected a weight \(outputs, 8, k, k\) .* got \(8, 16, 3, 3\)"
        ):
            bottleneck(x, [layers[0], plain(16, 8, 3), layers[2]], impl=impl)
        with pytest.raises(ValueError, match=r"layers\[0\].beta: expected \(8,\); got \(4,\)"):
            bottleneck(x, [layers[0]._replace(beta=torch.zeros(4)), *layers[1:]], impl=impl)
        with pytest.raises(ValueError, match="x: expected floating point"):
            conv_batch_norm_relu(x[0], layers, impl=impl)
        with pytest.raises(ValueError, match="more than one value a channel"):
            conv_batch_norm_relu(x[:1, :, :1, :1], layers, impl=impl)
        with pytest.raises(ValueError, match="layers: expected at least one"):
            conv_batch_norm_relu(x, [], impl=impl)
        with pytest.raises(ValueError, match=r"layers\[0\]: expected a ConvNorm; got tuple"):
            conv_batch_norm_relu(x, [tuple(layers[0])], impl=impl)


BRANCH = [(16, 8), (8, 8, 3), (8, 16)]  # of 16 channels, as x has
WIDER, STRIDED = [*BRANCH[:2], (8, 24)], [BRANCH[0], (8, 8, 3, 2), BRANCH[2]]


@pytest.mark.parametrize("impl", [pytest.param("native", marks=native), "eager", "auto"])
@pytest.mark.parametrize(
    ("branch", "options", "words"),
    [
        (BRANCH[:2], {}, "layers: expected three; got 2"),
        ([*BRANCH, (16, 16)], {}, "layers: expected three; got 4"),
        (WIDER, {}, r"shortcut: expected the shape of the branch, \(2, 24, 5, 5\); got \(2, 16, 5, 5\)"),
        (STRIDED, {}, r"shortcut: expected the shape of the branch, \(2, 16, 3, 3\); got \(2, 16, 5, 5\)"),
        (WIDER, {"shortcut": plain(16, 1)}, r"got \(2, 1, 5, 5\)"),
        (BRANCH, {"shortcut": plain(1, 16)}, r"shortcut: expected a weight \(outputs, 16, k, k\)"),
        (BRANCH, {"shortcut": plain(16, 16, 1, 3)}, "shortcut: expected a weight .* stride 1 or 2; got .* and 3"),
        (BRANCH, {"shortcut": plain(16, 16)._replace(beta=torch.zeros(4))}, r"shortcut.beta: expected \(16,\)"),
        (STRIDED, {"shortcut": plain(16, 16), "pool": 3}, r"got \(2, 16, 2, 2\)"),
        (BRANCH, {"shortcut": plain(16, 16), "pool": 2}, r"got \(2, 16, 3, 3\)"),
        (BRANCH, {"pool": 0}, "pool: expected an integer >= 1; got 0"),
        (BRANCH, {"keep_scale": torch.ones(1)}, r"keep_scale: expected \(2,\); got \(1,\)"),
        (BRANCH, {"keep_scale": torch.ones(2, 1)}, r"keep_scale: expected \(2,\); got \(2, 1\)"),
        (BRANCH, {"keep_scale": torch.ones(2).long()}, "keep_scale: expected floating point"),
        (BRANCH, {"squeeze_excite": floats(16, 4)[:3]}, "squeeze_excite: expected w1, b1, w2 and b2; got 3"),
        (BRANCH, {"squeeze_excite": floats(8, 4)}, r"w1: expected \(R, 16\); got \(4, 8\)"),
        (BRANCH, {"squeeze_excite": [*floats(16, 4)[:2], *floats(16, 8)[2:]]}, r"w2: expected \(16, 4\)"),
    ],
)
def test_parts_that_do_not_fit_together_are_refused(branch, options, words, impl):
    """In C they would be read beyond their ends."""
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match=words):
        bottleneck(torch.randn(2, 16, 5, 5), [plain(*arguments) for arguments in branch], impl=impl, **options)


@pytest.mark.parametrize("impl", [pytest.param("native", marks=native), "eager"])
def test_the_output_has_the_dtype_of_autocast_whatever_the_shortcut(impl):
    for shortcut in (None, plain(16, 16)):
        with torch.autocast("cpu", torch.bfloat16):
            y = bottleneck(torch.randn(2, 16, 5, 5), [plain(*a) for a in BRANCH], None, shortcut, impl=impl)
        assert y.dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):  # as good as None
        bottleneck(torch.randn(2, 16, 5, 5), [plain(*a) for a in BRANCH], (), impl=impl)
    y = bottleneck(torch.randn(2, 16, 5, 5), [plain(*a) for a in BRANCH], floats(16, 4))
    assert y.dtype == torch.float32


@native
def test_memory_that_was_freed_is_refused():
    x, layers = torch.randn(2, 16, 5, 5), [plain(*a) for a in BRANCH]
    with torch.autocast("cpu", torch.bfloat16):
        other = plain(16, 8)
        other.weight.untyped_storage().resize_(0)
        with pytest.raises(TypeError, match="weight: its memory was freed"):
            bottleneck(x, [other, *layers[1:]], impl="native")
        x.untyped_storage().resize_(0)
        with pytest.raises(ValueError, match="x: expected a tensor with memory"):
            bottleneck(x, layers, impl="native")


def test_it_is_explained():
    answer = explain("bottleneck", "cpu")
    assert answer.startswith(
        "bottleneck: native on cpu, because the processor has AMX" if FASTER else "bottleneck: eager"
    )
    assert explain("bottleneck", "meta").startswith("bottleneck: eager on meta, because the functions are for the CPU")
