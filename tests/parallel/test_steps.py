"""Steps of several processes against steps of one on the same whole batches: weights, averages, sums and evaluation."""

import numpy as np
import pytest
import torch

from rsengine.config import Recipe
from rsengine.device import Execution
from rsengine.engine.build import build_evaluation, build_step
from rsengine.engine.graph import CapturedStep
from rsengine.kernels.dispatch import eager_only
from rsengine.parallel.ranks import ALONE
from tests.engine.graph_simulator import ReplayRecorder
from tests.parallel.processes import processes

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
CLASSES, BATCH, SIZE = 10, 24, 16
SMALL = ["model.blocks=[1, 1]", "model.width_multiplier=0.125", "model.stem_width=8", "train.epochs=2"]
SMALL += [f"train.batch_size={BATCH}", "schedule.learning_rate=0.05", "ema.decay=0.9"]
DRAWS = ["model.dropout=0.25", "model.drop_path=0.2"]
STEPS = 20


def recipe_of(*settings):
    return Recipe().with_settings([*SMALL, *settings])


def whole_batches(count, n=BATCH, labels_below=CLASSES):
    generator = torch.Generator().manual_seed(5)
    for _ in range(count):
        yield (
            torch.randint(0, 256, (n, SIZE, SIZE, 3), generator=generator, dtype=torch.uint8),
            torch.randint(0, labels_below, (n,), generator=generator),
        )


def made(ranks, settings, double=False, autocast=None):
    recipe = recipe_of(*settings)
    execution = Execution(torch.device("cpu"), autocast, 1, "test")
    torch.manual_seed(3)
    step = build_step(recipe, CLASSES, MEAN, STD, execution, 20, ranks=ranks)
    if double:
        in_double(step, recipe, execution, ranks)
    return step, recipe


def in_double(step, recipe, execution, ranks):
    """Make everything of ``step`` float64: its parameters keep their values."""
    model = step.model.double()
    step.__init__(model, recipe, step.preprocess, execution, 20, ranks=ranks)
    single = step.preprocess
    step.preprocess = lambda images: single(images).double()
    step.part = torch.full((), 1 / (step.micro_batches * ranks.size), dtype=torch.float64)


def trained(ranks, settings, count=STEPS, double=False, autocast=None):
    """Everything that a step keeps after ``count`` steps, and the sums of all of them."""
    step, _ = made(ranks, settings, double, autocast)
    for images, labels in whole_batches(count):
        step(ranks.part(images), ranks.part(labels))
    totals = step.read_totals()
    return [t.clone() for t in step.state_tensors()], totals, torch.get_rng_state()


@pytest.fixture(scope="module")
def two():
    with processes(2) as run:
        yield run


@pytest.fixture(scope="module")
def three():
    with processes(3) as run:
        yield run


def assert_same_everywhere(results):
    first, *others = results
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first[0], other[0], strict=True))
        assert other[1] == first[1]
        assert torch.equal(other[2], first[2])


def compare_in_float64(run, settings):
    settings = [*settings, "train.batch_norm=sync"]
    results = run(trained, settings, STEPS, True)
    assert_same_everywhere(results)
    state, totals, generator = trained(ALONE, settings, double=True)
    for got, expected in zip(results[0][0], state, strict=True):
        # Muon's products are float32 in any case: its directions are rounded to that.
        bound = 1e-4 if "optimizer.name=muon" in settings else 1e-10
        torch.testing.assert_close(got, expected, rtol=bound, atol=bound)
    assert results[0][1].correct == totals.correct and results[0][1].images == totals.images == STEPS * BATCH
    assert results[0][1].loss == pytest.approx(totals.loss, rel=1e-6)
    assert torch.equal(results[0][2], generator)  # whatever was drawn was drawn for the whole batch


@pytest.mark.parametrize(
    "settings",
    [
        [],
        [*DRAWS, "train.micro_batches=2", "optimizer.clip_norm=0.5"],
        [*DRAWS, "augment.mixup_alpha=0.4", "augment.cutmix_alpha=1.0"],
        ["optimizer.name=muon"],
    ],
    ids=["plain", "draws, micro-batches and clipping", "mixup and cutmix", "muon"],
)
def test_weights_equal_those_of_one_process_in_float64(two, settings):
    compare_in_float64(two, settings)


def test_weights_of_three_processes_equal_those_of_one(three):
    compare_in_float64(three, [*DRAWS, "train.micro_batches=2"])


def test_weights_equal_in_float32_to_rounding(two):
    settings = [*DRAWS, "train.batch_norm=sync"]
    results = two(trained, settings, 5)
    state, *_ = trained(ALONE, settings, 5)
    for got, expected in zip(results[0][0], state, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)


def test_frozen_batch_norm_needs_no_statistics(two):
    settings = ["train.freeze=stem,stage1,stage2"]
    results = two(trained, settings, STEPS, True)
    state, *_ = trained(ALONE, settings, double=True)
    for got, expected in zip(results[0][0], state, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("wire", ["auto", "fp32", "bf16"])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["fp32", "bf16"])
def test_local_batch_norm_keeps_one_network(two, autocast, wire):
    """All processes have the same bits, running averages included, which are the mean of theirs."""
    results = two(trained, [*DRAWS, f"train.all_reduce={wire}"], 4, False, autocast)
    assert_same_everywhere(results)


def first_averages(ranks):
    step, _ = made(ranks, [])
    images, labels = next(whole_batches(1))
    step(ranks.part(images), ranks.part(labels))
    return step.model.stem.bn1.running_mean


def test_running_averages_are_the_mean_over_processes(two):
    averaged, _ = two(first_averages)
    step, _ = made(ALONE, [])
    images, labels = next(whole_batches(1))
    found = []
    for part in (0, 1):
        alone, _ = made(ALONE, [])
        alone(images[part::2], labels[part::2])
        found.append(alone.model.stem.bn1.running_mean)
    torch.testing.assert_close(averaged, (found[0] + found[1]) / 2, rtol=1e-5, atol=1e-6)


def slices(ranks):
    step, _ = made(ranks, DRAWS)
    images, labels = next(whole_batches(1))
    step(ranks.part(images), ranks.part(labels))
    reduction = step.update.reduction
    (flat,) = reduction.flat
    places = [p.grad.data_ptr() - flat.data_ptr() for p in step.update.params]
    inside = all(0 <= place < flat.nbytes and place % 256 == 0 for place in places)
    strides = all(p.grad.stride() == p.stride() for p in step.update.params)
    return (
        inside and len(set(places)) == len(places),
        strides,
        reduction.nbytes >= 4 * sum(p.numel() for p in step.update.params),
    )


def test_gradients_are_slices_of_one_buffer(two):
    assert two(slices) == [(True, True, True)] * 2


def losses_turn_bad_in_one(ranks):
    step, _ = made(ranks, [])
    for number, (images, labels) in enumerate(whole_batches(4)):
        if number == 2 and ranks.rank == 1:
            with torch.no_grad():
                step.model.fc.bias.fill_(float("nan"))
        step(ranks.part(images), ranks.part(labels))
    return step.read_totals().first_bad_step


def test_a_bad_loss_in_one_process_is_seen_in_all(two):
    assert two(losses_turn_bad_in_one) == [2, 2]


# --- evaluation -------------------------------------------------------------------------------------------------------


def measured(ranks, count, size, predictions=True):
    step, recipe = made(ranks, [])
    with torch.no_grad():
        step.model.fc.weight.normal_()  # so that the network says more than one class
    evaluation = build_evaluation(step, recipe, CLASSES, MEAN, STD)
    images, labels = next(whole_batches(1, n=count))
    images, labels = ranks.part(images), ranks.part(labels)
    batches = [(images[i : i + size], labels[i : i + size]) for i in range(0, len(images), size)]
    return evaluation.measure(batches, predictions=predictions)["raw"]


@pytest.mark.parametrize("count", [1, 2, 7, 41])
def test_a_shared_evaluation_is_the_whole_one(two, three, count):
    whole = measured(ALONE, count, 8)
    for result in [*two(measured, count, 8), *three(measured, count, 8)]:
        np.testing.assert_array_equal(result.confusion, whole.confusion)
        assert result.images == count and result.accuracy == whole.accuracy
        assert result.loss == pytest.approx(whole.loss, rel=1e-5)
        np.testing.assert_array_equal(result.predictions.labels, whole.predictions.labels)
        np.testing.assert_array_equal(result.predictions.predicted, whole.predictions.predicted)
        np.testing.assert_allclose(result.predictions.probability, whole.predictions.probability, rtol=1e-4)
    assert all(result.predictions is None for result in two(measured, count, 8, False))


# --- captured ---------------------------------------------------------------------------------------------------------


def plain_and_replayed(ranks):
    """The state after six plain steps, and after a warm-up, a capture and six replays."""
    batch = next(whole_batches(1))
    found = []
    for captured in (False, True):  # eagerly: passes in C are no operators that could be recorded
        step, _ = made(ranks, [*DRAWS, "train.batch_norm=sync"])
        inputs = [ranks.part(each).clone() for each in batch]
        with eager_only():
            call = CapturedStep(step, inputs, ReplayRecorder()) if captured else step
            for images, labels in whole_batches(6):
                call(ranks.part(images).contiguous(), ranks.part(labels).contiguous())
        found.append(step.state_tensors())
    return found


def test_replays_equal_plain_steps(two):
    for plain, replayed in two(plain_and_replayed):
        for a, b in zip(plain, replayed, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
