"""Given weights in every kind of step."""

import copy

import pytest
import torch

from tests.engine.test_step import FP32, build
from tests.engine.test_step_options import BF16, assert_same_bits, random_small, run, state_of

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


def other_weights(seed=3):
    """Weights as after training: of other lengths than new ones have, with averages of their own."""
    torch.manual_seed(seed)
    state = random_small(seed).state_dict()
    return {
        name: value * 0.3 + 0.1 * torch.rand_like(value) if value.is_floating_point() else value + 5
        for name, value in state.items()
    }


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
    settings = ["optimizer.name=muon"]
    step, weights = build(random_small(), *settings), other_weights()
    step.start_from(weights)
    run(step, 3)
    for name, p in step.model.named_parameters():
        if p.dim() == 4:
            assert p.norm().item() == pytest.approx(weights[name].norm().item(), rel=1e-5), name
            assert not torch.equal(p, weights[name]), name
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
