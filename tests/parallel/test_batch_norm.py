"""Batch norm over several processes against torch's on the whole batch in one, and networks with it against one."""

import contextlib
import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rsengine.kernels.dispatch import eager_only
from rsengine.model import resnet_rs
from rsengine.model.layers import BatchNorm, use_sync_batch_norm
from rsengine.model.network import Bottleneck
from rsengine.parallel.batch_norm import sync_batch_norm
from rsengine.parallel.ranks import ALONE
from tests.parallel.processes import processes
from tests.tolerances import assert_close

# The whole batch: maps of one pixel, of which one process has a single value; odd everything; more rows than a block.
SHAPES = {2: [(2, 6, 1, 1), (8, 5, 1, 1), (6, 7, 3, 5), (16, 33, 9, 16)], 3: [(3, 4, 1, 1), (9, 17, 4, 3)]}
MOMENTUM, EPS = 0.3, 1e-3


@pytest.fixture(scope="module")
def run():
    """By the number of processes, what runs a function in so many."""
    with processes(2) as two, processes(3) as three:
        yield {2: two, 3: three}


# --- run in each process, and in this one with the whole batch --------------------------------------------------------


def numbers(shape, seed, dtype):
    """Of values that ``dtype`` holds exactly."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def whole_batch(shape, dtype, mean=0.5, deviation=2.0):
    """Parameters, map and gradient. Each image has a mean of its own, so that the parts' statistics differ."""
    x = mean + deviation * (numbers(shape, 1, torch.float64) + torch.arange(shape[0]).view(-1, 1, 1, 1) % 3)
    wide = torch.promote_types(dtype, torch.float32)
    weight, bias = numbers(shape[1], 2, wide), numbers(shape[1], 3, wide)
    x = x.to(dtype).contiguous(memory_format=torch.channels_last)
    return {"x": x, "weight": weight, "bias": bias}, numbers(shape, 4, dtype)


def results(function, tensors, dy, relu):
    """Output, gradients and buffers of a batch norm."""
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
    buffers = [torch.full_like(tensors["bias"], value) for value in (0.25, 2.0)]
    y = function(leaves["x"], leaves["weight"], leaves["bias"], *buffers, MOMENTUM, EPS, relu)
    y.backward(dy)
    found = {"y": y.detach(), "running_mean": buffers[0], "running_var": buffers[1]}
    return found | {"d" + name: leaf.grad for name, leaf in leaves.items()}


def torchs(x, weight, bias, running_mean, running_var, momentum, eps, relu):
    y = F.batch_norm(x, running_mean, running_var, weight, bias, True, momentum, eps)
    return F.relu(y) if relu else y


def part(ranks, tensors, dy, relu, eager=False):
    """The results of this process's part of a batch."""
    mine = tensors | {"x": ranks.part(tensors["x"]).contiguous(memory_format=torch.channels_last)}
    with eager_only() if eager else contextlib.nullcontext():
        found = results(lambda *a: sync_batch_norm(*a, ranks), mine, ranks.part(dy), relu)
    assert found["y"].is_contiguous(memory_format=torch.channels_last)
    assert found["dx"].is_contiguous(memory_format=torch.channels_last)
    return found


def joined(parts):
    """The results of the whole batch from those of its parts."""
    found = {}
    for name, first in parts[0].items():
        values = [each[name] for each in parts]
        if name in ("y", "dx"):
            found[name] = torch.stack(values, 1).flatten(0, 1)  # part r of N has the images r, r + N, r + 2N, ...
        elif name in ("dweight", "dbias"):
            found[name] = torch.stack(values).sum(0)
        else:
            assert all(torch.equal(value, first) for value in values), f"{name} is not the same in all processes"
            found[name] = first
    return found


def block(width=8):
    torch.manual_seed(0)
    return nn.Sequential(Bottleneck(12, width, 2, 0.25, 0.0, True), Bottleneck(4 * width, width, 1, 0.25, 0.0, True))


def network():
    torch.manual_seed(0)
    return resnet_rs(blocks=(1, 2), num_classes=5, stem_width=8, width_multiplier=0.125, dropout=0.0)


def step(ranks, build, images, labels, compiled=False):
    """Output of this process's part; buffers and summed gradients of a loss that is the mean over the whole batch."""
    model = build().double().to(memory_format=torch.channels_last).train()
    for module in model.modules():
        if isinstance(module, BatchNorm):
            nn.init.normal_(module.weight), nn.init.normal_(module.bias)  # no branch whose scale is zero
    use_sync_batch_norm(model, ranks)
    x = ranks.part(images).contiguous(memory_format=torch.channels_last).requires_grad_()
    y = (torch.compile(model, backend="aot_eager") if compiled else model)(x)
    F.cross_entropy(y.flatten(2).mean(2) if y.dim() == 4 else y, ranks.part(labels), reduction="sum").div(
        len(labels)
    ).backward()
    sums = {
        f"d{name}": ranks.sum_(p.grad.clone(memory_format=torch.contiguous_format))
        for name, p in model.named_parameters()
    }
    return {"y": y.detach(), "dx": x.grad} | sums | dict(model.named_buffers())


def of_no_gradient(ranks, tensors, dy):
    """The gradients of weight and bias of a map that needs none."""
    x = ranks.part(tensors["x"])
    weight, bias = (tensors[name].clone().requires_grad_() for name in ("weight", "bias"))
    buffers = torch.zeros_like(bias), torch.ones_like(bias)
    sync_batch_norm(x, weight, bias, *buffers, MOMENTUM, EPS, False, ranks).backward(ranks.part(dy))
    return {"dweight": weight.grad, "dbias": bias.grad}


def copies(ranks):
    """A network's summary and, of a copy, whether it belongs to the same processes."""
    model = network()
    before = model.summary()
    use_sync_batch_norm(model, ranks)
    twin = copy.deepcopy(model)
    return before == model.summary(), [m.ranks is ranks for m in twin.modules() if isinstance(m, BatchNorm)]


# --- tests ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("relu", [False, True], ids=["", "relu"])
@pytest.mark.parametrize(("count", "shape"), [(n, shape) for n, shapes in SHAPES.items() for shape in shapes], ids=str)
class TestOneProcess:
    def test_float64(self, run, count, shape, relu):
        tensors, dy = whole_batch(shape, torch.float64)
        found, truth = joined(run[count](part, tensors, dy, relu)), results(torchs, tensors, dy, relu)
        for name, value in truth.items():
            torch.testing.assert_close(
                found[name], value, rtol=1e-10, atol=1e-10, msg=lambda t, name=name: f"{name}: {t}"
            )

    @pytest.mark.parametrize("eager", [False, True], ids=["", "eager"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_lower_precision(self, run, count, shape, relu, dtype, eager):
        tensors, dy = whole_batch(shape, dtype)
        compare(run[count](part, tensors, dy, relu, eager), tensors, dy, relu)


def compare(parts, tensors, dy, relu, digits=1.0):
    """With the truth in float64: as close as torch in one process, up to ``digits`` times the rounding of its dtype."""
    truth = results(torchs, {name: t.double() for name, t in tensors.items()}, dy.double(), relu)
    theirs = results(torchs, tensors, dy, relu)
    for name, value in joined(parts).items():
        assert value.dtype == theirs[name].dtype, name
        scale = max(1.0, float(truth[name].abs().max()))
        assert_close(value, truth[name], scale=scale * digits, eager=theirs[name])


@pytest.mark.parametrize("eager", [False, True], ids=["", "eager"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_large_mean_leaves_a_small_variance_its_digits(run, dtype, eager):
    """The squares have ten digits in common, and float32 has seven: they would leave nothing of the variance. The
    values have five in common, which every way of computing loses."""
    tensors, dy = whole_batch((8, 16, 8, 8), dtype, mean=1e4, deviation=0.1)
    compare(run[2](part, tensors, dy, False, eager), tensors, dy, False, digits=1e5 if dtype == torch.float64 else 1e4)


@pytest.mark.parametrize("eager", [False, True], ids=["", "eager"])
def test_a_constant_map_becomes_the_bias(run, eager):
    tensors, dy = whole_batch((6, 5, 3, 3), torch.float32)
    tensors["x"] = torch.full_like(tensors["x"], 3.25)
    parts = run[2](part, tensors, dy, False, eager)
    compare(parts, tensors, dy, False)
    found = joined(parts)
    assert torch.equal(found["running_var"], torch.full_like(found["running_var"], 2.0 * (1 - MOMENTUM)))
    assert_close(found["y"], tensors["bias"].double().view(1, -1, 1, 1).expand(found["y"].shape), scale=100)


def test_a_map_that_needs_no_gradient_gets_none(run):
    tensors, dy = whole_batch((6, 7, 3, 5), torch.float64)
    found, truth = joined(run[2](of_no_gradient, tensors, dy)), results(torchs, tensors, dy, False)
    for name, value in found.items():
        torch.testing.assert_close(value, truth[name], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("count", "build", "compiled"),
    [
        *((n, build, False) for n in (2, 3) for build in (block, network)),
        pytest.param(2, network, True, marks=pytest.mark.thorough),
    ],
)
def test_a_step_of_a_network_is_that_of_one_process(run, count, build, compiled):
    channels, classes = (12, 32) if build is block else (3, 5)
    images = numbers((12, channels, 16, 16), 5, torch.float64) + torch.arange(12).view(-1, 1, 1, 1) % 5
    labels = torch.arange(12) % classes
    found = joined(run[count](step, build, images, labels, compiled))
    truth = step(ALONE, build, images, labels)
    assert found.keys() == truth.keys()
    assert {int(value) for name, value in found.items() if name.endswith("num_batches_tracked")} == {1}
    for name, value in truth.items():
        torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-10, msg=lambda t, name=name: f"{name}: {t}")


def test_a_network_can_be_copied_and_measured(run):
    for same, belongs in run[2](copies):
        assert same and belongs and all(belongs)


def test_one_process_takes_its_own_statistics():
    layer = BatchNorm(3)
    use_sync_batch_norm(layer, ALONE)
    assert not layer.is_synchronised
    tensors, _ = whole_batch((4, 3, 2, 2), torch.float32)
    with pytest.raises(ValueError, match="ranks: expected more than one process"):
        sync_batch_norm(*tensors.values(), torch.zeros(3), torch.ones(3), MOMENTUM, EPS, False, ALONE)


def test_statistics_of_all_processes_need_a_momentum():
    model = network()
    model.stem.bn2.momentum = None
    with pytest.raises(ValueError, match=r"^stem\.bn2\.momentum: expected a number"):
        use_sync_batch_norm(model, ALONE)
