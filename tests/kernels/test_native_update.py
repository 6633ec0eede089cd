"""SGD and the EMA in C: against PyTorch's operators, at every number of threads, and what it refuses."""

import pytest
import torch

from rsengine.kernels import ema_update, explain, reference, sgd_ema_step
from rsengine.kernels.native.library import load
from tests.tolerances import assert_close

pytestmark = pytest.mark.skipif(load()[0] is None, reason=load()[1])

# A thread's share begins and ends inside tensors, before and behind the vectors of a processor, and with a tensor.
SHAPES = [(1,), (1009,), (64, 16, 3, 3), (0,), (33, 5), (), (40, 24, 1, 1), (7,), (512,)]
NAMES = "params", "momentum_buffers", "shadow"


@pytest.fixture(params=[1, 2, 3, 7], ids="{} threads".format)
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def tensors(seed):
    generator = torch.Generator().manual_seed(seed)
    options = {"dtype": torch.float32, "device": "cpu"}
    return [laid_out(torch.randn(shape, generator=generator, **options)) for shape in SHAPES]


def laid_out(tensor):
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor


def step(impl, averaged=True, nesterov=True, decay=0.9, grads=None):
    params, momentum, shadow = (tensors(seed) for seed in range(3))
    rates = torch.tensor([0.1, decay], dtype=torch.float32, device="cpu").unbind()
    decays = [0.01 * (i % 3) for i in range(len(SHAPES))]
    average = (shadow, rates[1]) if averaged else (None, None)
    grads = tensors(3) if grads is None else grads
    sgd_ema_step(params, grads, momentum, average[0], rates[0], 0.9, decays, average[1], nesterov, impl=impl)
    return params, momentum, shadow


@pytest.mark.parametrize("nesterov", [True, False], ids=["nesterov", "plain"])
@pytest.mark.parametrize("averaged", [True, False], ids=["ema", "no ema"])
def test_a_step_is_that_of_pytorchs_operators(threads, averaged, nesterov):
    ours, theirs = step("native", averaged, nesterov), step("eager", averaged, nesterov)
    for name, part, other in zip(NAMES, ours, theirs, strict=True):
        for i, (a, b) in enumerate(zip(part, other, strict=True)):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6, msg=lambda text, at=f"{name}[{i}]": f"{at}: {text}")


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.5, 0.999, 1.0])
def test_an_average_is_that_of_pytorchs_operators(threads, decay):
    ours, theirs = tensors(0), tensors(0)
    ema_update(ours, tensors(1), torch.tensor(decay), impl="native")
    ema_update(theirs, tensors(1), torch.tensor(decay), impl="eager")
    for a, b, p in zip(ours, theirs, tensors(1), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
        assert decay or torch.equal(a, p)
        assert decay < 1 or torch.equal(a, b)


def test_any_number_of_threads_gives_the_same_bits(threads):
    alone = torch.get_num_threads()
    many = step("native")
    torch.set_num_threads(1)
    one = step("native")
    torch.set_num_threads(alone)
    assert all(
        torch.equal(a, b) for part, other in zip(many, one, strict=True) for a, b in zip(part, other, strict=True)
    )


@pytest.mark.parametrize(
    "changed",
    [torch.Tensor.bfloat16, torch.Tensor.double, torch.Tensor.contiguous, lambda g: torch.stack([g, g], -1)[..., 0]],
    ids=["bfloat16", "float64", "another order", "gaps"],
)
def test_gradients_of_any_kind_are_taken(changed):
    grads = [changed(g) for g in tensors(3)]
    plain = step("native", grads=[laid_out(g.float().clone()) for g in grads])
    for part, other in zip(step("native", grads=grads), plain, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(part, other, strict=True))


@pytest.mark.parametrize("decay", [0.3, 0.9])
def test_what_does_not_move_stays_as_it_is(decay):
    shadow, params = tensors(0), tensors(0)
    for _ in range(50):
        ema_update(shadow, params, torch.tensor(decay), impl="native")
    assert all(torch.equal(a, b) for a, b in zip(shadow, params, strict=True))


def test_nan_and_infinity_stay_where_they_belong():
    lists = [[torch.ones(100)] for _ in range(4)]
    lists[1][0][17], lists[1][0][40] = float("nan"), float("inf")
    sgd_ema_step(*lists, torch.tensor(0.1), 0.9, 0.0, torch.tensor(0.9), impl="native")
    for part in (lists[0], lists[2], lists[3]):
        finite = part[0].isfinite()
        assert finite.sum() == 98 and part[0][17].isnan() and part[0][40].isinf()


@pytest.mark.parametrize("impl", ["native", "eager"])
def test_autograd_sees_what_is_written(impl):
    """A graph that saved the weights refuses to go back through the new ones."""
    weight, momentum, shadow = torch.randn(3, requires_grad=True), torch.zeros(3), torch.ones(3)
    loss = (weight * weight).sum()
    sgd_ema_step([weight], [torch.ones(3)], [momentum], None, torch.tensor(0.1), 0.9, 0.0, None, impl=impl)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    ema_update([shadow], [weight.detach()], torch.tensor(0.5), impl=impl)
    assert momentum._version == shadow._version == 1


@pytest.mark.parametrize("impl", ["auto", "eager"])
def test_a_tensor_that_stands_twice_is_updated_twice(impl):
    shadow, params = torch.ones(200_003), torch.full((200_003,), 2.0)
    ema_update([shadow] * 4, [params] * 4, torch.tensor(0.5), impl=impl)
    assert shadow.eq(1.9375).all()
    with pytest.raises(RuntimeError, match="two tensors of the lists share memory"):
        ema_update([shadow[:9], shadow[8:]], [params[:9], params[8:]], torch.tensor(0.5), impl="native")


def test_a_gradient_in_the_memory_of_a_weight_is_refused():
    """One thread could write the weight before another has read it as a gradient."""
    weights, momentum = [torch.ones(9), torch.ones(9)], [torch.zeros(9), torch.zeros(9)]
    rates = torch.tensor(0.1), 0.9, 0.0, None
    with pytest.raises(RuntimeError, match="two tensors of the lists share memory"):
        sgd_ema_step(weights, [torch.ones(9), weights[0]], momentum, None, *rates, impl="native")


@pytest.mark.parametrize("impl", ["native", "eager"])
def test_an_infinite_weight_that_does_not_decay_has_no_part_in_its_gradient(impl):
    weight, momentum = torch.full((5,), float("inf")), torch.zeros(5)
    sgd_ema_step([weight], [torch.ones(5)], [momentum], None, torch.tensor(0.1), 0.9, 0.0, None, impl=impl)
    assert momentum.eq(1).all() and weight.isinf().all()


def test_neither_the_default_dtype_nor_the_default_device_matters():
    expected = step("native")
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            found = step("native")
    finally:
        torch.set_default_dtype(torch.float32)
    for part, other in zip(found, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(part, other, strict=True))


@pytest.mark.parametrize(
    ("shadow", "params", "because"),
    [
        (torch.ones(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64), "it is written for float32, and .*64"),
        (torch.ones(2), torch.ones(2).bfloat16(), "it is written for float32, and a tensor is torch.bfloat16"),
        (torch.ones(2, 3, 2, 2), laid_out(torch.ones(2, 3, 2, 2)), "lie in memory in different orders"),
        (torch.ones(4)[::2], torch.ones(4)[::2], "a tensor is neither contiguous nor in channels_last"),
        (torch.ones(2, device="meta"), torch.ones(2, device="meta"), "the device type is 'meta'"),
    ],
    ids=["float64", "bfloat16", "order", "gaps", "device"],
)
def test_it_says_what_it_cannot_take(shadow, params, because):
    decay = torch.tensor(0.5, device=shadow.device)
    with pytest.raises(RuntimeError, match=f"'native' cannot run ema_update here, because .*{because}"):
        ema_update([shadow], [params], decay, impl="native")
    ema_update([shadow], [params], decay)


def test_tensors_of_inference_mode_are_written_in_it_alone():
    with torch.inference_mode():
        shadow, params, decay = torch.zeros(2), torch.ones(2), torch.tensor(0.5)
        ema_update([shadow], [params], decay, impl="native")
    assert shadow.eq(0.5).all()
    with pytest.raises(RuntimeError, match="outside of which nothing may write to it"):
        ema_update([shadow], [params], decay, impl="native")
    with pytest.raises(RuntimeError, match="Inplace update to inference tensor outside InferenceMode"):
        ema_update([shadow], [params], decay)


def test_without_momentum_it_is_eager():
    p, g, m = ([torch.ones(3)] for _ in range(3))
    with pytest.raises(RuntimeError, match="'native' cannot run sgd_ema_step here, because it is written for SGD with"):
        sgd_ema_step(p, g, m, None, torch.tensor(0.1), 0.0, 0.0, None, impl="native")


def test_copies_are_of_the_new_weights():
    lists = [tensors(seed) for seed in range(4)]
    copies = [laid_out(t.bfloat16()) for t in tensors(9)]
    sgd_ema_step(*lists, torch.tensor(0.1), 0.9, 0.0, torch.tensor(0.9), copies=copies, impl="native")
    assert all(torch.equal(c, p.bfloat16()) for c, p in zip(copies, lists[0], strict=True))


def test_it_is_explained():
    for op in ("ema_update", "sgd_ema_step"):
        assert explain(op, "cpu").startswith(f"{op}: native on cpu, because")
        assert "not float32" in explain(op, "cpu")


def test_the_average_of_the_reference():
    ours, truth = tensors(0), [t.double() for t in tensors(0)]
    for i in range(20):
        ema_update(ours, tensors(i), torch.tensor(0.9), impl="native")
        reference.ema_update(truth, [t.double() for t in tensors(i)], torch.tensor(0.9).double())
    for a, b in zip(ours, truth, strict=True):
        assert_close(a, b, scale=4)
