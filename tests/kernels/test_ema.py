"""The multi-tensor updates against their reference, torch.optim.SGD, and torch's and timm's averages.

On the CPU: in PyTorch's operators and as an ordinary process chooses, which is C for float32. What is C's alone is in
``test_native_update.py``, and Triton's kernels in ``jit/test_ema.py``.
"""

import os

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from rsengine.kernels import ema_update, reference, sgd_ema_step
from tests.tolerances import assert_close

# Sizes on purpose: a single element, a prime, a convolution weight, an empty tensor.
SHAPES = [(1,), (1009,), (8, 4, 3, 3), (0,), (33, 5)]


def tensors(dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype) for shape in SHAPES]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("nesterov", [True, False], ids=["nesterov", "plain"])
@pytest.mark.parametrize("averaged", [True, False], ids=["ema", "no ema"])
@pytest.mark.parametrize("impl", ["auto", "eager"])
def test_twenty_steps_match_the_reference(dtype, nesterov, averaged, impl):
    ours = [tensors(dtype, seed) for seed in (0, 1)]
    state = [ours[0], [torch.zeros_like(p) for p in ours[0]], ours[1] if averaged else None]
    truth = [None if part is None else [t.double().clone() for t in part] for part in state]
    weight_decay = [0.0, 5e-2, 5e-2, 0.0, 1e-3]
    for step in range(20):
        grads = tensors(dtype, 10 + step)
        lr = torch.tensor(0.1 / (1 + step), dtype=torch.float32)
        decay = torch.tensor(0.9, dtype=torch.float32) if averaged else None
        sgd_ema_step(state[0], grads, *state[1:], lr, 0.9, weight_decay, decay, nesterov, impl=impl)
        reference.sgd_ema_step(
            truth[0],
            [g.double() for g in grads],
            *truth[1:],
            lr.double(),
            0.9,
            weight_decay,
            None if decay is None else decay.double(),
            nesterov,
        )
    for part, true_part in zip(state, truth, strict=True):
        if part is not None:
            for tensor, true_tensor in zip(part, true_part, strict=True):
                assert_close(tensor, true_tensor, scale=20)


def test_matches_torch_sgd_over_twenty_steps():
    torch.manual_seed(0)
    model = nn.Linear(7, 3).double()
    twin = nn.Linear(7, 3).double()
    twin.load_state_dict(model.state_dict())
    optimizer = torch.optim.SGD(twin.parameters(), 0.1, momentum=0.9, nesterov=True, weight_decay=1e-2)
    params = list(model.parameters())
    momentum = [torch.zeros_like(p) for p in params]
    for step in range(20):
        x = torch.randn(5, 7, dtype=torch.float64)
        for net in (model, twin):
            net.zero_grad()
            net(x).square().sum().backward()
        optimizer.param_groups[0]["lr"] = 0.1 / (step + 1)
        optimizer.step()
        lr = torch.tensor(0.1 / (step + 1), dtype=torch.float64)
        sgd_ema_step(params, [p.grad for p in params], momentum, None, lr, 0.9, 1e-2, None, True)
    for p, q in zip(params, twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-12)


@pytest.mark.parametrize("impl", ["auto", "eager"])
def test_ema_matches_torch_and_timm_over_twenty_steps(impl):
    from timm.utils import ModelEmaV3
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    torch.manual_seed(0)
    model = nn.Linear(7, 3)
    shadow = [p.detach().clone() for p in model.parameters()]
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    averaged.update_parameters(model)  # its first update copies
    timm_average = ModelEmaV3(model, decay=0.9)
    for _ in range(20):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p))
        ema_update(shadow, list(model.parameters()), torch.tensor(0.9), impl=impl)
        averaged.update_parameters(model)
        timm_average.update(model)
    for ours, torchs, timms in zip(shadow, averaged.module.parameters(), timm_average.module.parameters(), strict=True):
        torch.testing.assert_close(ours, torchs.detach(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(ours, timms.detach(), rtol=1e-5, atol=1e-6)


def test_the_decay_is_read_at_each_call():
    shadow, params, decay = [torch.zeros(3)], [torch.ones(3)], torch.tensor(1.0)
    ema_update(shadow, params, decay)
    assert not shadow[0].any()
    decay.fill_(0.0)
    ema_update(shadow, params, decay)
    assert shadow[0].eq(1).all()


def test_empty_lists():
    ema_update([], [], torch.tensor(0.5))
    sgd_ema_step([], [], [], [], torch.tensor(0.1), 0.9, 0.0, torch.tensor(0.5))


def test_parameters_that_require_grad_and_channels_last_are_updated_in_place():
    p = torch.randn(4, 3, 3, 3).to(memory_format=torch.channels_last).requires_grad_()
    address, before = p.data_ptr(), p.detach().clone()
    sgd_ema_step([p], [torch.ones_like(p)], [torch.zeros_like(p)], None, torch.tensor(0.5), 0.0, 0.0, None, False)
    assert p.data_ptr() == address and p.grad_fn is None
    torch.testing.assert_close(p.detach(), before - 0.5)


def channels_last(tensor):
    return tensor.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("impl", ["auto", "eager"])
@pytest.mark.parametrize("momentum", [0.9, 0.0])
@pytest.mark.parametrize(
    ("p_kind", "g_kind", "m_kind", "dtype", "grad_dtype"),
    [
        (channels_last, torch.Tensor.contiguous, channels_last, torch.float32, torch.float32),
        (torch.Tensor.contiguous, channels_last, channels_last, torch.float32, torch.float32),
        (channels_last, channels_last, torch.Tensor.contiguous, torch.float32, torch.float32),
        (lambda t: t.repeat(2, 1, 1, 1)[::2], torch.Tensor.contiguous, channels_last, torch.float32, torch.float32),
        (channels_last, channels_last, channels_last, torch.bfloat16, torch.bfloat16),
        (channels_last, torch.Tensor.contiguous, channels_last, torch.bfloat16, torch.float32),
    ],
    ids=["gradient", "parameter", "momentum", "gaps", "bfloat16", "bfloat16, float32 gradient"],
)
def test_strides_and_dtypes_that_differ_between_the_lists(impl, momentum, p_kind, g_kind, m_kind, dtype, grad_dtype):
    """PyTorch's fused operator on the CPU walks storages, and would update the wrong elements without a word."""
    torch.manual_seed(0)
    p, g, m, s = (torch.randn(4, 3, 2, 2) for _ in range(4))
    lists = [[p_kind(p).to(dtype)], [g_kind(g).to(grad_dtype)], [m_kind(m.clone())], [s]]
    truth, s_start = [[t.double() for t in part] for part in lists], s.double()
    lr, decay = torch.tensor(0.1), torch.tensor(0.9)
    sgd_ema_step(*lists, lr, momentum, 1e-2, decay, impl=impl)
    reference.sgd_ema_step(*truth, lr.double(), momentum, 1e-2, decay.double())
    assert_close(lists[0][0], truth[0][0])
    assert_close(lists[2][0], truth[2][0] if momentum else m.double())  # without momentum it is left alone
    assert_close(lists[3][0], (0.9 * s_start + 0.1 * lists[0][0].double()))  # of the parameter as it is stored


@pytest.mark.parametrize("momentum", [0.9, 0.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_list_but_the_average_in_fewer_bits(dtype, momentum):
    """Several processor vectors long: that is where PyTorch's fused operator went wrong before version 2.14."""
    lists = [*(tensors(dtype, seed) for seed in range(3)), tensors(torch.float32, 3)]
    truth = [[t.double() for t in part] for part in lists]
    starts = [[t.clone() for t in each] for each in zip(*truth, strict=True)]
    lr, decay = torch.tensor(0.1), torch.tensor(0.9)
    sgd_ema_step(*lists, lr, momentum, 1e-2, decay)
    reference.sgd_ema_step(*truth, lr.double(), momentum, 1e-2, decay.double())
    for i, start in enumerate(starts):
        assert_close(lists[0][i], truth[0][i])
        assert_close(lists[2][i], truth[2][i] if momentum else start[2])
        assert_close(lists[3][i], 0.9 * start[3] + 0.1 * lists[0][i].double(), scale=4)


def test_without_momentum_autograd_sees_the_weights_change_and_not_the_buffers():
    p, m = torch.ones(3), torch.zeros(3)
    sgd_ema_step([p], [torch.ones(3)], [m], None, torch.tensor(0.1), 0.0, 0.0, None)
    assert (p._version, m._version) == (1, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_float32_average_of_parameters_in_fewer_bits(dtype):
    params, shadow = tensors(dtype, 0), tensors(torch.float32, 1)
    truth = [s.double() for s in shadow]
    for _ in range(20):
        ema_update(shadow, params, torch.tensor(0.9))
        reference.ema_update(truth, [p.double() for p in params], torch.tensor(0.9).double())
    for ours, true in zip(shadow, truth, strict=True):
        assert_close(ours, true)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_copies_and_gradients_in_fewer_bits(dtype):
    """As a step that casts the gradients to float32 first, and the parameters to the dtype of the copies after it."""
    lists, plain, copies = *([tensors(torch.float32, seed) for seed in range(4)] for _ in range(2)), tensors(dtype, 4)
    lists[1] = [g.to(dtype) for g in lists[1]]
    plain[1] = [g.float() for g in lists[1]]
    sgd_ema_step(*lists, LR, 0.9, 1e-2, DECAY, copies=copies)
    sgd_ema_step(*plain, LR, 0.9, 1e-2, DECAY)
    for i in (0, 2, 3):
        for ours, theirs in zip(lists[i], plain[i], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    assert all(torch.equal(c, p.to(dtype)) for c, p in zip(copies, lists[0], strict=True))


def call_step(lists, lr, decay, **options):
    sgd_ema_step(*lists, lr, 0.9, [0.0, 1e-2, 1e-2, 0.0, 0.1], decay, **options)
    ema_update(lists[3], lists[0], decay, **options)


def test_compiled_in_one_graph():
    plain, compiled = ([tensors(torch.float32, seed) for seed in range(4)] for _ in range(2))
    lr, decay = torch.tensor(0.1), torch.tensor(0.9)
    run = torch.compile(call_step, fullgraph=True)
    for _ in range(3):
        call_step(plain, lr, decay)
        run(compiled, lr, decay)
        lr.mul_(0.5)  # read at each call, compiled or not
        decay.mul_(0.9)
    for part, other in zip(plain, compiled, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(part, other, strict=True))


def test_on_fake_tensors():
    with FakeTensorMode():
        lists = [[torch.empty(shape) for shape in SHAPES] for _ in range(4)]
        call_step(lists, torch.empty(()), torch.empty(()))
        torch.ops.rsengine.ema_update(lists[3], lists[0], torch.empty(()), "triton")


def test_opcheck():
    lists = [tensors(torch.float32, seed) for seed in range(4)]
    lr, decay = torch.tensor(0.1), torch.tensor(0.9)
    torch.library.opcheck(torch.ops.rsengine.ema_update, (lists[3], lists[0], decay, "eager"))
    for shadow, rate in ((lists[3], decay), ([], None)):
        copies = tensors(torch.bfloat16, 4)
        arguments = (*lists[:3], shadow, lr, 0.9, [0.1] * len(SHAPES), rate, True, copies, "eager")
        torch.library.opcheck(torch.ops.rsengine.sgd_ema_step, arguments)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="Triton runs on the CPU in its interpreter")
def test_triton_on_the_cpu_is_refused_with_the_reason():
    with pytest.raises(RuntimeError, match="'triton' cannot run ema_update here, because Triton"):
        ema_update([ONE], [ONE], torch.tensor(0.5), impl="triton")
    with pytest.raises(RuntimeError, match="'triton' cannot run sgd_ema_step here, because Triton"):
        sgd_ema_step([ONE], [ONE], [ONE], None, torch.tensor(0.1), 0.9, 0.0, None, impl="triton")


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")
def test_no_value_and_no_address_of_a_scalar_makes_another_kernel():
    pytest.importorskip("triton")
    from rsengine.kernels.jit import ema
    from rsengine.kernels.proof.offline import compiling_for

    lists, table = [tensors(torch.float32, seed) for seed in range(4)], torch.rand(8)
    with compiling_for("sm_90") as launches:
        for i, momentum, weight_decay in ((0, 0.9, 0.0), (1, 0.8, 1e-4), (2, 1.0, 1.0)):
            ema.sgd_ema_step(*lists, table[i], momentum, [weight_decay] * len(SHAPES), table[7 - i], True)
    assert len(launches) == 3 and len({launch.kernel.hash for launch in launches}) == 1


@pytest.fixture
def triton_chosen(monkeypatch):
    """As on a machine with a GPU: the checks come before anything is launched."""
    monkeypatch.setattr("rsengine.kernels.ema.choose_update", lambda op, impl, tensor: "triton")


LR, DECAY = torch.tensor(0.1), torch.tensor(0.5)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: ema_update([ONE.bfloat16()], [ONE], DECAY), r"shadow\[0\]: expected torch.float32.*bfloat16"),
        (lambda: ema_update([ONE], [ONE.double()], DECAY), r"params\[0\]: expected .*float32 or .*got torch.float64"),
        (lambda: ema_update([ONE], [ONE], DECAY.double()), "decay: expected torch.float32 .*got torch.float64"),
        (
            lambda: sgd_ema_step([ONE], [ONE], [ONE], None, LR.double(), 0.9, 0.0, None),
            "lr: expected torch.float32 .*got torch.float64",
        ),
        (
            lambda: sgd_ema_step([ONE, ONE], [ONE, ONE.half()], [ONE, ONE], None, LR, 0.9, 0.0, None),
            r"grads\[1\]: expected torch.float32 for .*got torch.float16",
        ),
        (
            lambda: sgd_ema_step([ONE], [ONE], [ONE], None, LR, 0.9, 0.0, None, copies=[ONE]),
            r"copies\[0\]: expected torch.bfloat16 or torch.float16 for .*got torch.float32",
        ),
        (
            lambda: sgd_ema_step([ONE.half()], [ONE.half()], [ONE.half()], None, LR, 0.9, 0.0, None),
            r"momentum_buffers\[0\]: expected torch.float32.*got torch.float16",
        ),
    ],
)
def test_dtypes_that_the_kernels_do_not_take_are_named(triton_chosen, call, words):
    with pytest.raises(ValueError, match=words):
        call()


ONE = torch.ones(2)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: ema_update([ONE], [], torch.tensor(0.5)), "params: expected 1 tensors"),
        (lambda: ema_update([ONE], [torch.ones(3)], torch.tensor(0.5)), r"params\[0\]: expected the shape"),
        (lambda: ema_update([ONE], [None], torch.tensor(0.5)), r"params\[0\]: expected a tensor; got None"),
        (lambda: ema_update([ONE], [ONE.int()], torch.tensor(0.5)), r"params\[0\]: expected a floating.*torch.int32"),
        (
            lambda: ema_update([ONE], [ONE.to("meta")], torch.tensor(0.5)),
            r"params\[0\]: expected the device.*cpu; got m",
        ),
        (
            lambda: ema_update([ONE], [ONE], torch.empty((), device="meta")),
            "decay: expected a tensor on cpu; got .* meta",
        ),
        (
            lambda: ema_update([ONE, torch.ones(1).expand(3, 2)], [ONE, torch.ones(3, 2)], torch.tensor(0.5)),
            r"shadow\[1\]: expected a tensor whose elements do not share memory; got shape \(3, 2\) .*strides \(0, 0\)",
        ),
        (
            lambda: sgd_ema_step(
                [torch.ones(4).as_strided((2, 3), (1, 1))], *[[torch.ones(2, 3)]] * 2, None, LR, 0.9, 0, None
            ),
            r"params\[0\]: expected a tensor whose elements do not share memory.*strides \(1, 1\)",
        ),
        (
            lambda: sgd_ema_step([ONE], [ONE.to_sparse()], [ONE], None, LR, 0.9, 0.0, None),
            r"grads\[0\]: expected a dense tensor; got one of layout torch.sparse_coo",
        ),
        (lambda: ema_update([ONE], [ONE], 0.5), "decay: expected a floating-point tensor"),
        (lambda: ema_update([ONE], [ONE], torch.ones(1)), "decay: expected a floating-point tensor"),
        (lambda: sgd_ema_step([ONE], [], [ONE], None, torch.tensor(0.1), 0.9, 0.0, None), "grads: expected 1"),
        (lambda: sgd_ema_step([ONE], [ONE], [ONE], None, 0.1, 0.9, 0.0, None), "lr: expected"),
        (
            lambda: sgd_ema_step([ONE] * 2, [ONE] * 2, [ONE] * 2, None, LR, 0.9, 0.0, None, copies=[ONE]),
            "copies: expected 2 tensors, as many as params; got 1",
        ),
        (
            lambda: sgd_ema_step([ONE], [ONE], [ONE], [ONE], torch.tensor(0.1), 0.9, 0.0, None),
            "expected both or neither",
        ),
        (
            lambda: sgd_ema_step([ONE], [ONE], [ONE], None, torch.tensor(0.1), 0.9, [0.0, 0.0], None),
            "weight_decay: expected",
        ),
        (lambda: sgd_ema_step([ONE], [ONE], [ONE], None, LR, 1.0, 0.0, None), r"momentum: expected .* 1\); got 1.0"),
        (
            lambda: sgd_ema_step([ONE] * 2, [ONE] * 2, [ONE] * 2, None, LR, 0.9, [0.0, -0.1], None),
            "weight_decay: expected finite numbers of at least 0; got -0.1 to 0.0",
        ),
        (
            lambda: sgd_ema_step([ONE], [ONE], [ONE], None, LR, 0.9, float("inf"), None),
            "weight_decay: expected finite numbers",
        ),
    ],
)
def test_wrong_arguments_are_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()
