"""The multi-tensor updates against their reference, torch.optim.SGD, and torch's and timm's averages."""

import pytest
import torch
from torch import nn

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
def test_twenty_steps_match_the_reference(dtype, nesterov, averaged):
    ours = [tensors(dtype, seed) for seed in (0, 1)]
    state = [ours[0], [torch.zeros_like(p) for p in ours[0]], ours[1] if averaged else None]
    truth = [None if part is None else [t.double().clone() for t in part] for part in state]
    weight_decay = [0.0, 5e-2, 5e-2, 0.0, 1e-3]
    for step in range(20):
        grads = tensors(dtype, 10 + step)
        lr = torch.tensor(0.1 / (1 + step), dtype=torch.float32)
        decay = torch.tensor(0.9, dtype=torch.float32) if averaged else None
        sgd_ema_step(state[0], grads, *state[1:], lr, 0.9, weight_decay, decay, nesterov)
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


def test_ema_matches_torch_and_timm_over_twenty_steps():
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
        ema_update(shadow, list(model.parameters()), torch.tensor(0.9))
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


ONE = torch.ones(2)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: ema_update([ONE], [], torch.tensor(0.5)), "params: expected 1 tensors"),
        (lambda: ema_update([ONE], [torch.ones(3)], torch.tensor(0.5)), r"params\[0\]: expected the shape"),
        (lambda: ema_update([ONE], [ONE], 0.5), "decay: expected a floating-point tensor"),
        (lambda: ema_update([ONE], [ONE], torch.ones(1)), "decay: expected a floating-point tensor"),
        (lambda: sgd_ema_step([ONE], [], [ONE], None, torch.tensor(0.1), 0.9, 0.0, None), "grads: expected 1"),
        (lambda: sgd_ema_step([ONE], [ONE], [ONE], None, 0.1, 0.9, 0.0, None), "lr: expected"),
        (
            lambda: sgd_ema_step([ONE], [ONE], [ONE], [ONE], torch.tensor(0.1), 0.9, 0.0, None),
            "expected both or neither",
        ),
        (
            lambda: sgd_ema_step([ONE], [ONE], [ONE], None, torch.tensor(0.1), 0.9, [0.0, 0.0], None),
            "weight_decay: expected",
        ),
    ],
)
def test_wrong_arguments_are_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()
