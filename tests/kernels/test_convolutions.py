"""The C convolutions against PyTorch's in float64, on inputs that bfloat16 holds: every output, gradient and sum."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from rsengine.kernels.native import convolutions, epilogue
from rsengine.kernels.native.convolutions import Affine, Gradient, Spread

_, AVAILABLE, REASON = convolutions.available()
pytestmark = pytest.mark.skipif(not AVAILABLE, reason=f"bfloat16 convolutions in C: {REASON}")

# images, inputs, outputs, height, width, kernel, stride: what is read in place and what is copied, whole and broken
# blocks of rows and of channels, maps of up to 2x2 pixels, weights that threads have sums of and those that they share.
CASES = [
    (5, 64, 64, 16, 16, 1, 1),
    (3, 48, 96, 8, 8, 1, 1),
    (7, 3, 32, 32, 32, 3, 1),
    (3, 32, 64, 16, 16, 3, 1),
    (3, 64, 64, 32, 32, 3, 2),
    (4, 40, 24, 8, 8, 3, 2),
    (9, 64, 64, 2, 2, 3, 1),
    (9, 64, 64, 2, 2, 3, 2),
    (33, 64, 96, 1, 1, 3, 1),
    (3, 64, 48, 7, 5, 3, 2),
    (3, 64, 32, 4, 4, 1, 2),
    (2, 16, 16, 1, 1, 1, 1),
    (2, 64, 256, 5, 7, 1, 1),
    (1, 1, 1, 3, 2, 3, 1),
    (40, 256, 64, 4, 4, 1, 1),
    (30, 256, 288, 2, 2, 3, 1),
    (6, 544, 32, 3, 3, 1, 1),
]


def random(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def maps(*shape, seed):
    return random(*shape, seed=seed).bfloat16().to(memory_format=torch.channels_last)


def vector(size, seed):
    return random(size, seed=seed).float()


@pytest.fixture(params=[1, 2, 3], ids="{} threads".format)
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


class Case:
    """A convolution of ``relu(x * scale + shift)``, or of x as it is, in C and in float64."""

    def __init__(self, case, has_norm):
        images, inputs, outputs, height, width, kernel, self.stride = case
        self.x = maps(images, inputs, height, width, seed=1)
        self.weight = (random(outputs, inputs, kernel, kernel, seed=2) / (inputs * kernel**2) ** 0.5).float()
        self.before, self.read = None, self.x.double()
        if has_norm:
            scale, shift, mean = vector(inputs, 3).abs() + 0.5, vector(inputs, 4), vector(inputs, 5)
            self.before = Affine(scale, shift, mean, scale, 1)
            self.argument = torch.addcmul(shift.view(-1, 1, 1), self.x.float(), scale.view(-1, 1, 1))
            self.read = self.argument.relu().bfloat16().double()
        self.read.requires_grad_()
        self.exact = self.weight.bfloat16().double().requires_grad_()
        self.y = F.conv2d(self.read, self.exact, stride=self.stride, padding=kernel // 2)
        self.packed = convolutions.pack(self.weight, back=True)


def near(actual, expected, tolerance):
    """As far as ``tolerance`` of the largest number."""
    expected = expected.detach()
    assert actual.shape == expected.shape
    assert float((actual.double() - expected).abs().max()) <= tolerance * max(1e-3, float(expected.abs().max()))


# bfloat16 rounds by up to 2 ** -9 of a number, after and before; sums are in float32, of numbers whose rounding may
# differ in the last place.
ROUNDED, SUMMED = 1.2 * 2**-8, 5e-4


@pytest.mark.parametrize("has_norm", [False, True], ids=["as it is", "through batch norm"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward(case, has_norm, threads):
    this = Case(case, has_norm)
    y, sums = convolutions.forward(this.x, this.packed, this.stride, this.before, image_sums=True)
    assert y.dtype == torch.bfloat16 and y.is_contiguous(memory_format=torch.channels_last)
    near(y, this.y, ROUNDED)
    near(sums.mean, this.y.mean((0, 2, 3)), SUMMED)
    near(sums.variance, this.y.var((0, 2, 3), correction=0), SUMMED)
    near(sums.images, this.y.sum((2, 3)), SUMMED)


@pytest.mark.parametrize("has_norm", [False, True], ids=["as it is", "through batch norm"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_backward(case, has_norm, threads):
    """With a batch norm before it, the gradient is that of a block's end: of each image, and only where bits are."""
    this = Case(case, has_norm)
    images, outputs = this.y.shape[:2]
    g, y = maps(*this.y.shape, seed=6), maps(*this.y.shape, seed=7)
    shape = (images, outputs) if has_norm else (outputs,)
    of_y = Gradient(random(*shape, seed=8).float(), random(*shape, seed=9).float(), vector(outputs, 10))
    counts = random(*this.y.shape, seed=11) > 0
    gain, offset = (v.double().view(*(v.shape if has_norm else (1, outputs)), 1, 1) for v in of_y[:2])
    slope = of_y.slope.double().view(-1, 1, 1)
    past = None
    if has_norm:
        made = g.double() * counts
    else:
        past = Affine(vector(outputs, 12), vector(outputs, 13), *[vector(outputs, 14)] * 2, 1)
        made = g.double() * (y.double() * past.scale.view(-1, 1, 1) + past.shift.view(-1, 1, 1) > 0)
    this.y.backward((made * gain + offset + y.double() * slope).bfloat16().double())

    options = {"bits": bits(counts)} if has_norm else {"past": past}
    expected = this.read.grad
    if not has_norm:
        add, add_counts = maps(*this.x.shape, seed=15), random(*this.x.shape, seed=16) > 0
        options |= {"add": add, "add_bits": bits(add_counts)}
        expected = expected + add.double() * add_counts
    else:
        expected = expected * (this.argument > 0)
    of_x, dweight = convolutions.backward(this.x, this.packed, this.stride, this.before, g, y, of_y, **options)
    near(of_x.map, expected, ROUNDED)
    near(dweight, this.exact.grad, SUMMED)
    if has_norm:
        size = float(expected.abs().sum((0, 2, 3)).max())
        centred = this.x.double() - this.before.mean.double().view(-1, 1, 1)
        assert float((of_x.total - expected.sum((0, 2, 3))).abs().max()) <= 1e-4 * size
        assert float((of_x.product - (expected * centred).sum((0, 2, 3))).abs().max()) <= 3e-4 * size


def bits(counts):
    """(rows, ceil(C / 32)) int32, as the C passes write them."""
    rows = counts.permute(0, 2, 3, 1).reshape(-1, counts.shape[1])
    rows = F.pad(rows, (0, -rows.shape[1] % 32)).reshape(len(rows), -1, 32).long()
    words = (rows << torch.arange(32)).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


@pytest.mark.parametrize("wanted", ["input", "weight"])
def test_either_gradient_alone_is_the_same(wanted):
    this = Case((5, 24, 40, 9, 6, 3, 2), True)
    g, y = maps(*this.y.shape, seed=6), maps(*this.y.shape, seed=7)
    of_y = Gradient(*(vector(40, seed) for seed in (8, 9, 10)))
    arguments = this.x, this.packed, this.stride, this.before, g, y, of_y
    both, dweight = convolutions.backward(*arguments)
    of_x, alone = convolutions.backward(*arguments, wants_input=wanted == "input", wants_weight=wanted == "weight")
    if wanted == "input":
        assert alone is None and torch.equal(of_x.map, both.map)
        for found, expected in zip(of_x[1:], both[1:], strict=True):  # the order in which images are added up differs
            near(found, expected.double(), 1e-5)
    else:
        assert of_x.map is None and torch.equal(alone, dweight)


def test_a_smaller_map_is_spread_over_the_gradient():
    this = Case((3, 40, 16, 5, 4, 1, 1), False)
    g, y, add = maps(*this.y.shape, seed=6), maps(*this.y.shape, seed=7), maps(3, 40, 2, 1, seed=8)
    of_y = Gradient(vector(16, 9), torch.zeros(16), torch.zeros(16))
    source, factor = torch.arange(20, dtype=torch.int32) % 2, vector(20, 10)
    arguments = this.x, this.packed, this.stride, None, g, y, of_y
    plain = convolutions.backward(*arguments)[0].map.double()
    found = convolutions.backward(*arguments, add=add, spread=Spread(source, factor))[0].map
    spread = add.double().flatten(2)[:, :, source.long()] * factor.double()
    near(found, plain + spread.view(3, 40, 5, 4), 2 * ROUNDED)


@pytest.mark.parametrize("has_norm", [False, True])
@pytest.mark.parametrize("shape", [(3, 8, 1, 1), (5, 33, 3, 2), (2, 64, 8, 8)], ids=str)
def test_the_end_of_a_block_and_its_sums(shape, has_norm, threads):
    images, channels = shape[:2]
    x, other, dy = (maps(*shape, seed=seed) for seed in (1, 2, 3))
    gain, offset, mean = random(*shape[:2], seed=4).float(), random(*shape[:2], seed=5).float(), vector(channels, 6)
    norm = Affine(*(vector(channels, seed) for seed in (7, 8, 9, 10)), 1) if has_norm else None
    y, found = epilogue.join(x, gain, offset, other, norm)
    shortcut = other.double()
    if norm:
        shortcut = shortcut * norm.scale.double().view(-1, 1, 1) + norm.shift.double().view(-1, 1, 1)
    expected = F.relu(x.double() * gain.double()[:, :, None, None] + offset.double()[:, :, None, None] + shortcut)
    near(y, expected, ROUNDED)
    assert torch.equal(found, bits(y > 0))

    total, product, side = epilogue.join_sums(dy, found, x, mean, other if norm else None, norm)
    g = dy.double() * (y > 0)
    near(total, g.sum((2, 3)), 1e-5)
    near(product, (g * (x.double() - mean.double().view(-1, 1, 1))).sum((2, 3)), 1e-5)
    if norm:
        near(side, (g * (other.double() - norm.mean.double().view(-1, 1, 1))).sum((0, 2, 3)), 1e-5)


def test_a_large_mean_leaves_the_variance_its_digits():
    """Squares of a mean of 1,000 would leave a variance of 1 none in float32."""
    x = torch.ones(64, 32, 4, 4).bfloat16().to(memory_format=torch.channels_last)
    x[::2, 0] = -1
    weight = torch.full((32, 32, 1, 1), 32.0)
    weight[:, 0] = 1.0
    _, sums = convolutions.forward(x, convolutions.pack(weight, back=False), 1, None)
    torch.testing.assert_close(sums.mean, torch.full((32,), 31 * 32.0))
    torch.testing.assert_close(sums.variance, torch.ones(32))


def test_nan_and_infinity_stay_where_they_belong():
    this = Case((2, 32, 32, 4, 4, 1, 1), True)
    this.x[0, 3, 1, 1], this.x[1, 5, 2, 2] = float("nan"), float("inf")
    y, _ = convolutions.forward(this.x, this.packed, 1, this.before)
    assert y[0, :, 1, 1].isnan().all() and not y[1, :, 2, 2].isfinite().any()
    rest = torch.ones(2, 4, 4, dtype=torch.bool)
    rest[0, 1, 1] = rest[1, 2, 2] = False
    assert y.permute(0, 2, 3, 1)[rest].isfinite().all()


def test_the_same_bits_each_time(threads):
    this = Case((7, 64, 64, 8, 8, 3, 1), True)
    g, y = maps(*this.y.shape, seed=6), maps(*this.y.shape, seed=7)
    of_y = Gradient(*(vector(64, seed) for seed in (8, 9, 10)))
    first, second = (convolutions.backward(this.x, this.packed, 1, this.before, g, y, of_y) for _ in range(2))
    assert torch.equal(first[1], second[1]) and all(torch.equal(a, b) for a, b in zip(first[0], second[0], strict=True))
    first, second = (convolutions.forward(this.x, this.packed, 1, this.before, True) for _ in range(2))
    assert torch.equal(first[0], second[0]) and all(torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True))


@pytest.mark.slow
def test_without_tiles_it_computes_the_same(tmp_path):
    """As it is compiled for a processor with AVX512_BF16 and no AMX."""
    if not convolutions.number("convolution_has_tiles"):
        pytest.skip("the processor has no AMX: that is what the other tests run")
    environment = os.environ | {"CC": "cc -mno-amx-tile -mno-amx-bf16 -mno-amx-int8", "RSENGINE_CACHE": str(tmp_path)}
    tests = [__file__, __file__.replace("convolutions", "bottleneck"), "-k", "not without_tiles"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-3000:]
    code = "from rsengine.kernels import explain; print(explain('bottleneck', 'cpu'))"
    said = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True).stdout
    assert said.startswith("bottleneck: eager on cpu, because the processor has AVX512_BF16 and no AMX")


@pytest.mark.parametrize("inputs", [32, 512], ids=["chunks of each thread", "a chunk shared by all"])
def test_fewer_threads_than_asked_for_compute_the_same(inputs):
    """As OpenMP may give, for a limit or for the load of the machine."""
    code = f"""
import torch
from rsengine.kernels.bottleneck import conv_batch_norm_relu
from rsengine.kernels.conv_norm import ConvNorm
torch.manual_seed(0)
x, weight = torch.randn(40, {inputs}, 2, 2).requires_grad_(), torch.randn(512, {inputs}, 1, 1).requires_grad_()
layer = ConvNorm(weight, *(torch.rand(512).requires_grad_() for _ in range(2)), torch.zeros(512), torch.ones(512))
results = []
for threads in (1, 3):
    torch.set_num_threads(threads)
    with torch.autocast("cpu", torch.bfloat16):
        y = conv_batch_norm_relu(x, [layer], impl="native")
    results.append([y.detach(), *torch.autograd.grad(y.float().square().sum(), [x, *layer[:3]])])
for one, other in zip(*results, strict=True):
    torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-2 * one.abs().max().item())
"""
    environment = os.environ | {"OMP_THREAD_LIMIT": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("has_keep", [False, True])
def test_a_gate_is_the_sigmoid_of_what_is_excited(has_keep):
    extremes = [
        0.0,
        -0.0,
        1e-30,
        1.0,
        -1.0,
        17.0,
        -17.0,
        87.0,
        -87.5,
        1e4,
        -1e4,
        float("inf"),
        float("-inf"),
        float("nan"),
    ]
    excited = torch.cat([torch.tensor(extremes), torch.linspace(-20, 20, 500)]).repeat(3, 1).bfloat16()
    channels = excited.shape[1]
    bias, scale, shift = (vector(channels, seed) for seed in (1, 2, 3))
    bias[: len(extremes)] = 0
    keep = torch.tensor([0.0, 1.25, 1.0]) if has_keep else None
    gate, gain, offset = epilogue.opened(excited, bias, keep, Affine(scale, shift, shift, scale, 1), 3)
    expected = torch.sigmoid(excited.double() + bias.double())
    torch.testing.assert_close(gate.double(), expected, rtol=1e-6, atol=1e-37, equal_nan=True)
    kept = gate * keep[:, None] if has_keep else gate
    torch.testing.assert_close(gain, kept * scale, equal_nan=True)
    torch.testing.assert_close(offset, kept * shift, equal_nan=True)
