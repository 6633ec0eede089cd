"""Frozen parts, a lower rate for the body, and given weights, in every kind of step."""

import copy

import pytest
import torch
import torch.nn.functional as F

from rsengine.model import body_parts, resnet_rs
from tests.engine.test_step import FP32, batches, build, small
from tests.engine.test_step_options import BF16, assert_same_bits, normalised, random_small, run, state_of

DECAYING = ["optimizer.weight_decay=0.1", "optimizer.decay_bn_and_bias=true"]
STEPS = {
    "sgd": ([], FP32, False),
    "sgd, micro-batches and clipping": (["train.micro_batches=2", "optimizer.clip_norm=0.5"], FP32, False),
    "muon": (["optimizer.name=muon"], FP32, False),
    "copies of the weights": ([], BF16, True),
    "muon and copies of the weights": (["optimizer.name=muon"], BF16, True),
}


@pytest.fixture(params=STEPS)
def built(request):
    """Builds a step of one kind; settings may be added."""
    settings, execution, weight_copies = STEPS[request.param]
    return lambda *more: build(
        random_small(), *DECAYING, *settings, *more, execution=execution, weight_copies=weight_copies
    )


def copied(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def other_weights(seed=3):
    """Weights as after training: of other lengths than new ones have, with averages of their own."""
    torch.manual_seed(seed)
    state = random_small(seed).state_dict()
    return {
        name: value * 0.3 + 0.1 * torch.rand_like(value) if value.is_floating_point() else value + 5
        for name, value in state.items()
    }


# --- frozen parts ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", ["stem", "stem, stage1", "stage2", "stem,stage1,stage2"])
def test_frozen_parts_and_their_ema_keep_every_bit_and_the_rest_is_trained(built, parts):
    step = built(f"train.freeze={parts}")
    before = {"model": copied(step.model), "ema": copied(step.ema_model)}
    run(step)
    frozen = {"stem.": "stem", "stages.0.": "stage1", "stages.1.": "stage2"}
    seen = set()
    for kind, model in (("model", step.model), ("ema", step.ema_model)):
        for name, value in model.state_dict().items():
            part = next((part for start, part in frozen.items() if name.startswith(start)), "head")
            kept = torch.equal(value, before[kind][name])
            if part in parts:
                assert kept, (kind, name)
                seen.add(part)
            elif value.is_floating_point():
                assert not kept, (kind, name)
    assert seen == {part.strip() for part in parts.split(",")}
    assert len(step.update.momentum_buffers) == sum(p.requires_grad for p in step.model.parameters())
    assert all(p.grad is None for p in step.model.parameters() if not p.requires_grad)
    assert all(c.grad is None for name, c in step.update.copies.items() if not c.requires_grad)


def test_nothing_is_computed_backwards_below_what_is_trained():
    step, whole = build(small(), "train.freeze=stem,stage1"), build(small())
    for each, trained in ((step, False), (whole, True)):
        reached = []
        each.model.stages[0].register_forward_hook(lambda module, args, out, kept=reached: kept.append(out))
        each(*next(batches(1)))
        assert reached[0].requires_grad == trained


def test_gradients_pass_through_a_frozen_part_to_one_below():
    step = build(small(), "train.freeze=stage1")
    torch.nn.init.ones_(step.model.stages[0][0].bn3.weight)
    torch.nn.init.ones_(step.model.stages[1][0].bn3.weight)
    twin = copy.deepcopy(step.model)
    images, labels = next(batches(1))
    F.cross_entropy(twin(normalised(images)), labels, label_smoothing=0.1).backward()
    step(images, labels)
    for name, p in twin.stem.named_parameters():
        assert p.grad.abs().max() > 0
        torch.testing.assert_close(step.model.stem.get_parameter(name).grad, p.grad, rtol=1e-4, atol=1e-6)


def test_frozen_parts_stay_in_evaluation_mode():
    model = small(drop_path=0.5)
    model.freeze(["stem", "stage2"])
    for mode in (True, False, True):
        model.train(mode)
        assert not any(m.training for part in (model.stem, model.stages[1]) for m in part.modules())
        assert all(m.training == mode for part in (model.stages[0], model.fc) for m in part.modules())
    twin = copy.deepcopy(model).train()  # as the EMA is made
    assert not twin.stem.training and twin.fc.training
    with pytest.raises(ValueError, match="parts: expected some of stem, stage1, stage2; got 'stage3'"):
        model.freeze(["stem", "stage3"])
    assert body_parts(4) == ("stem", "stage1", "stage2", "stage3", "stage4")


# --- a lower rate for the body --------------------------------------------------------------------------------------


@pytest.mark.parametrize("freeze", ["", "stem", "stage1"])
def test_twenty_steps_equal_stock_pytorch_with_groups_of_parameters(freeze):
    step = build(small(), "optimizer.body_rate=0.2", f"train.freeze={freeze}", "optimizer.decay_bn_and_bias=true")
    twin = copy.deepcopy(step.model)
    groups = [
        {"params": [p for name, p in twin.named_parameters() if p.requires_grad and name.startswith("fc.") == head]}
        for head in (True, False)
    ]
    optimizer = torch.optim.SGD(groups, 0.1, momentum=0.9, nesterov=True, weight_decay=0.01)
    ema = copied(twin)
    for n, (images, labels) in enumerate(batches(20)):
        for group, factor in zip(optimizer.param_groups, (1.0, 0.2), strict=True):
            group["lr"] = float(step.update.learning_rates[n]) * factor
        optimizer.zero_grad()
        F.cross_entropy(twin(normalised(images)), labels, label_smoothing=0.1).backward()
        optimizer.step()
        decay = min(0.8, (1 + n) / (10 + n))
        for name, value in twin.state_dict().items():
            if value.is_floating_point():
                ema[name].mul_(decay).add_(value, alpha=1 - decay)
        step(images, labels)
    for name, value in twin.state_dict().items():
        torch.testing.assert_close(step.model.state_dict()[name], value, rtol=1e-4, atol=1e-5, msg=name)
        if value.is_floating_point():
            torch.testing.assert_close(step.ema_model.state_dict()[name], ema[name], rtol=1e-4, atol=1e-5, msg=name)


def test_a_rate_of_zero_moves_the_classifier_alone(built):
    step = built("optimizer.body_rate=0", "ema.enabled=false")
    step.update.muon.set_lengths()
    before = [p.detach().clone() for p in step.update.params]
    run(step, 3)
    for (name, p), old in zip(step.model.named_parameters(), before, strict=True):
        if name.startswith("fc."):
            assert not torch.equal(p, old)
        else:  # Muon puts a weight back at its length, and may err in the last bit
            torch.testing.assert_close(p.detach(), old, rtol=1e-6, atol=1e-7)


def test_muons_steps_shrink_with_the_bodys_rate():
    angles = []
    for rate in (1.0, 0.25):
        step = build(small(), "optimizer.name=muon", "optimizer.muon_learning_rate=0.04", f"optimizer.body_rate={rate}")
        torch.nn.init.ones_(step.model.stages[0][0].bn3.weight)
        p = step.model.stem.conv2.weight
        old = p.detach().clone()
        step(*next(batches(1)))
        angles.append(float(torch.nn.functional.cosine_similarity(p.detach().flatten(), old.flatten(), dim=0).acos()))
    assert angles[0] == pytest.approx(4 * angles[1], rel=0.02) and angles[0] == pytest.approx(0.04, rel=0.1)


def test_parameters_are_grouped_by_rate_only_where_rates_differ():
    for rate, rates in (("1.0", [False, False]), ("0.5", [False, True, True])):
        step = build(random_small(), f"optimizer.body_rate={rate}", execution=BF16, weight_copies=True)
        assert [slow for slow, _ in step.update._by_sgd] == rates
        assert sum(len(group.params) for _, group in step.update._by_sgd) == len(step.update.params)


# --- given weights --------------------------------------------------------------------------------------------------


def test_a_step_begins_with_given_weights_in_place(built):
    step, weights = built(), other_weights()
    addresses = [t.data_ptr() for t in step.state_tensors()]
    step.start_from(weights)
    assert addresses == [t.data_ptr() for t in step.state_tensors()]
    for model in (step.model, step.ema_model):
        for name, value in model.state_dict().items():
            assert torch.equal(value, weights[name]), name
    for name, copy_ in step.update.copies.items():
        assert torch.equal(copy_, weights[name].bfloat16()), name


def test_muon_keeps_the_lengths_of_given_weights_and_a_resumed_step_too():
    settings = ["optimizer.name=muon", "train.freeze=stem", "optimizer.body_rate=0.5"]
    step, weights = build(random_small(), *settings), other_weights()
    step.start_from(weights)
    run(step, 3)
    for name, p in step.model.named_parameters():
        if p.dim() == 4:
            assert p.norm().item() == pytest.approx(weights[name].norm().item(), rel=1e-5), name
            assert name.startswith("stem.") == torch.equal(p, weights[name])
    step.read_totals()
    other = build(random_small(1), *settings)
    other.given_weights = True
    other.load_state_dict(copy.deepcopy(step.state_dict()))
    assert_same_bits(state_of(run(step, 3, seed=9)), state_of(run(other, 3, seed=9)))


def test_only_a_run_that_began_with_given_weights_keeps_muons_lengths():
    """The state of any other is what it was in checkpoints before."""
    usual = {"model", "ema", "momentum", "counter"}
    for settings, more in (([], set()), (["optimizer.name=muon"], {"muon_lengths"})):
        step = build(random_small(), *settings)
        assert set(step.state_dict()) == usual
        step.start_from(other_weights())
        assert set(step.state_dict()) == usual | more


def test_frozen_parts_and_two_rates_resume_bit_for_bit(built):
    settings = ["train.freeze=stem", "optimizer.body_rate=0.1"]
    step = built(*settings)
    step.start_from(other_weights())
    run(step, 3)
    step.read_totals()
    other = built(*settings)
    other.given_weights = True
    other.load_state_dict(copy.deepcopy(step.state_dict()))
    assert_same_bits(state_of(run(step, 3, seed=9)), state_of(run(other, 3, seed=9)))
    for name, copy_ in other.update.copies.items():
        assert torch.equal(copy_, other.model.get_parameter(name).bfloat16()), name


def test_a_network_without_parts_cannot_be_frozen():
    with pytest.raises(ValueError, match="parts: expected some of stem, stage1; got 'stage2'"):
        build(resnet_rs(blocks=(1,), width_multiplier=0.125, stem_width=8), "train.freeze=stage2")
