"""What a recipe may add to the step: micro-batches, clipping, mixing; and what a captured step needs of it."""

import copy
import gc

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rsengine.config import load_recipe
from rsengine.device import Execution
from rsengine.engine.build import build_step
from rsengine.engine.update import clip_by_global_norm_
from rsengine.input.resident import ResidentData
from rsengine.model import resnet_rs
from rsengine.model.layers import use_products
from tests.augment.test_mixup import mix_by_hand
from tests.engine.test_step import FP32, MEAN, STD, batches, build, small

BF16 = Execution(torch.device("cpu"), torch.bfloat16, 1, "test")
MIXING = ["augment.mixup_alpha=0.4", "augment.cutmix_alpha=1.0"]
EVERYTHING = [*MIXING, "train.micro_batches=2", "optimizer.clip_norm=0.5"]


def random_small(seed=0):
    torch.manual_seed(seed)
    return resnet_rs(blocks=(1, 1), width_multiplier=0.125, stem_width=8, dropout=0.3, drop_path=0.3)


class Plain(nn.Module):
    """Neither batch norm nor dropout, and float64: parts of a batch know nothing of each other."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.fc = nn.Conv2d(3, 6, 3).double(), nn.Linear(6, 10).double()

    def forward(self, x):
        return self.fc(F.relu(self.conv(x.double())).mean(dim=(2, 3)))


def run(step, count=5, seed=7):
    torch.manual_seed(seed)
    for images, labels in batches(count):
        step(images, labels)
    return step


def state_of(step):
    """Copies of all that a run depends on and reports."""
    tensors = [*step.model.state_dict().values(), *step.update.momentum_buffers, step.counter, step.loss_sum]
    if step.ema_model is not None:
        tensors += step.ema_model.state_dict().values()
    return [t.clone() for t in [*tensors, step.correct_sum, step.image_count, step.finite_count]]


def assert_same_bits(first, second):
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def normalised(images):
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    return (images.permute(0, 3, 1, 2).float() / 255 - mean) / std


# --- micro-batches --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [[], MIXING, ["optimizer.clip_norm=0.05"]], ids=["plain", "mixed", "clipped"])
@pytest.mark.parametrize("k", [2, 4, 8])
def test_micro_batches_equal_one_whole_batch(k, more):
    whole, parts = run(build(Plain(), *more)), run(build(Plain(), *more, f"train.micro_batches={k}"))
    start = Plain().state_dict()
    for name, value in whole.model.state_dict().items():
        # Float32 only in the normalised pixels, which are the same, and in the rates.
        torch.testing.assert_close(parts.model.state_dict()[name], value, rtol=1e-9, atol=1e-11)
        assert not torch.equal(value, start[name])
    a, b = whole.read_totals(), parts.read_totals()
    assert (a.correct, a.images, a.first_bad_step) == (b.correct, b.images, b.first_bad_step) == (a.correct, 40, -1)
    assert a.loss == pytest.approx(b.loss, rel=1e-12)


def test_batch_norm_sees_one_part_at_a_time():
    step = build(small(), "train.micro_batches=2")
    twin = copy.deepcopy(step.model)
    images, labels = next(batches(1))
    losses = [
        F.cross_entropy(twin(normalised(x)), y, label_smoothing=0.1)
        for x, y in zip(images.split(4), labels.split(4), strict=True)
    ]
    (sum(losses) / 2).backward()
    step(images, labels)
    assert step.read_totals().loss == pytest.approx(float(sum(losses).detach()) * 4, rel=1e-5)
    for ours, theirs in zip(step.update.params, twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)
    for (name, ours), theirs in zip(step.model.named_buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6, msg=name)
    assert int(step.model.stem.bn1.num_batches_tracked) == 2


def test_a_bad_loss_in_any_part_is_remembered():
    step = run(build(Plain(), "train.micro_batches=4"), 2)
    images, labels = next(batches(1))
    handle = step.model.fc.register_forward_hook(
        lambda module, args, out: out * torch.where(args[0].sum() == sums[2], torch.nan, 1.0)
    )
    with torch.no_grad():
        sums = [F.relu(step.model.conv(step.preprocess(x).double())).mean(dim=(2, 3)).sum() for x in images.split(2)]
    step(images, labels)
    handle.remove()
    assert step.read_totals().first_bad_step == 2


def test_a_batch_that_does_not_divide_is_refused():
    step = build(small(), "train.micro_batches=4")
    with pytest.raises(ValueError, match=r"multiple of train.micro_batches \(4\); got torch.uint8 \(6, 16, 16, 3\)"):
        step(*next(batches(1, n=6)))
    assert int(step.counter) == 0


# --- clipping -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0.0, 1e-8, 1.0, 1e4, float("inf"), float("nan")])
@pytest.mark.parametrize("limit", [0.3, 1e3])
def test_clipping_is_torchs(size, limit):
    torch.manual_seed(0)
    params = [nn.Parameter(torch.zeros(shape)) for shape in [(5, 3), (7,), (1,), (4, 3, 3, 3)]]
    for p in params:
        p.grad = torch.randn_like(p)
    params[1].grad *= size
    params[3].grad *= 0 if size == 0 else 1
    ours = [p.grad.clone() for p in params]
    addresses = [g.data_ptr() for g in ours]
    torch.nn.utils.clip_grad_norm_(params, limit)
    clip_by_global_norm_(ours, limit)
    for p, g in zip(params, ours, strict=True):
        torch.testing.assert_close(g, p.grad, rtol=1e-6, atol=0, equal_nan=True)
    assert addresses == [g.data_ptr() for g in ours]


def test_clipping_bounds_what_reaches_the_weights():
    loose, tight = build(small(), "optimizer.clip_norm=1e6"), build(small(), "optimizer.clip_norm=0.01")
    assert_same_bits(state_of(run(loose)), state_of(run(build(small()))))  # under the limit nothing changes
    run(tight, 1)
    norm = torch.cat([p.grad.flatten() for p in tight.update.params]).norm()
    assert float(norm) == pytest.approx(0.01, rel=1e-3)


# --- gradients that stay, and the state -----------------------------------------------------------------------------


WHOLE = [setting for setting in EVERYTHING if "micro_batches" not in setting]


@pytest.mark.parametrize("settings", [[], WHOLE], ids=["default", "everything"])
def test_copies_of_the_weights_change_no_bit_but_where_gradients_are_scaled(settings):
    """What a step casts is what the update has written, and what it casts back is what the update reads."""
    models = random_small(), random_small()
    for model in models:
        use_products(model, "products")  # whole blocks in C take no copies
    plain = run(build(models[0], *settings, execution=BF16), 4)
    copies = run(build(models[1], *settings, execution=BF16, weight_copies=True), 4)
    assert copies.update.copies.keys() == {name for name, p in copies.model.named_parameters() if "bn" not in name}
    for name, copy_ in copies.update.copies.items():
        assert torch.equal(copy_, copies.model.get_parameter(name).bfloat16()), name
    compare = torch.equal if "optimizer.clip_norm" not in str(settings) else nearly_equal
    assert all(compare(a, b) for a, b in zip(state_of(plain), state_of(copies), strict=True))


def nearly_equal(a, b):
    """Clipping rounds the gradients of copies once more."""
    return torch.allclose(a.double(), b.double(), rtol=0.02, atol=0.01)


@pytest.mark.parametrize(("execution", "settings"), [(FP32, []), (BF16, ["train.micro_batches=2"])], ids=str)
def test_copies_are_refused_where_they_cannot_be(execution, settings):
    with pytest.raises(ValueError, match="weight_copies: expected autocast and train.micro_batches = 1; got"):
        build(random_small(), *settings, execution=execution, weight_copies=True)


def test_all_state_keeps_its_addresses_and_each_gradient_is_new():
    step = build(random_small(), *WHOLE, execution=BF16, weight_copies=True)
    addresses = [t.data_ptr() for t in step.state_tensors()]
    assert {copy_.data_ptr() for copy_ in step.update.copies.values()} <= set(addresses)
    for images, labels in batches(3):
        step(images, labels)
        assert [t.data_ptr() for t in step.state_tensors()] == addresses
        assert all(c.grad.dtype == torch.bfloat16 for c in step.update.copies.values())
        step.update.clear_gradients()
        assert all(leaf.grad is None for leaf in (*step.update.params, *step.update.copies.values()))


@pytest.mark.parametrize("settings", [["ema.enabled=false"], EVERYTHING], ids=["no EMA", "everything"])
def test_steps_leave_no_trace_once_the_state_is_copied_back(settings):
    step = run(build(random_small(), *settings), 2)
    addresses = [t.data_ptr() for t in step.state_tensors()]
    saved, rng = [t.clone() for t in step.state_tensors()], torch.get_rng_state()
    first = state_of(run(step, 3, seed=9))
    for t, value in zip(step.state_tensors(), saved, strict=True):
        t.copy_(value)
    torch.set_rng_state(rng)
    assert_same_bits(saved, step.state_tensors())
    assert_same_bits(first, state_of(run(step, 3, seed=9)))
    assert addresses == [t.data_ptr() for t in step.state_tensors()]


def test_the_state_is_every_lasting_tensor_that_a_step_changes():
    def tensors():
        return [t for t in gc.get_objects() if type(t) in (torch.Tensor, nn.Parameter)]

    gc.collect()
    older = tensors()  # of other tests; held, so that no id is used again
    older_ids = {id(t) for t in older}
    step = run(build(random_small(), *EVERYTHING), 1)
    gc.collect()
    lasting = [t.detach() for t in tensors() if id(t) not in older_ids and t.numel() and t.device.type == "cpu"]
    known = {t.data_ptr() for t in step.state_tensors()}
    assert known <= {t.data_ptr() for t in lasting}
    before = [t.clone() for t in lasting]
    step(*next(batches(1)))
    changed = {
        t.data_ptr()
        for t, value in zip(lasting, before, strict=True)
        if not torch.equal(t.flatten().view(torch.uint8), value.flatten().view(torch.uint8))  # NaN equals NaN
    }
    assert changed <= known
    seen = [
        step.model.fc.weight,
        step.update.shadow[0],
        step.update.momentum_buffers[0],
        step.loss_sum,
        step.finite_count,
    ]
    assert {t.data_ptr() for t in seen} <= changed  # the search does find what changes


def test_a_warm_up_may_run_past_the_end_of_the_run():
    step = build(small(), steps_per_epoch=1)  # two steps
    run(step, 5)
    assert int(step.counter) == 5
    learning_rate = float(step.update.lr_table[-1])
    step.update.momentum, before = 0.0, step.model.fc.bias.detach().clone()
    run(step, 1)
    torch.testing.assert_close(before - learning_rate * step.model.fc.bias.grad, step.model.fc.bias.detach())


def test_a_resumed_step_goes_on_with_the_same_bits_in_the_same_places():
    step = run(build(random_small(), *EVERYTHING), 3)
    step.read_totals()
    saved = copy.deepcopy(step.state_dict())
    other = run(build(random_small(1), *EVERYTHING), 2)
    addresses = [t.data_ptr() for t in other.state_tensors()]
    other.load_state_dict(saved)
    assert addresses == [t.data_ptr() for t in other.state_tensors()]
    assert_same_bits(state_of(run(step, 3, seed=9)), state_of(run(other, 3, seed=9)))
    assert set(saved) == {"model", "ema", "momentum", "counter"}  # checkpoints in the world hold a first_bad besides


# --- resident data --------------------------------------------------------------------------------------------------


def test_resident_batches_come_by_the_counter():
    stored = list(batches(4))
    images, labels = (torch.stack(column) for column in zip(*stored, strict=True))

    def resident(counter):
        return images.index_select(0, counter.view(1))[0], labels.index_select(0, counter.view(1))[0]

    step = build(random_small(), *EVERYTHING, resident=resident)
    torch.manual_seed(7)
    for _ in stored:
        step()
    assert_same_bits(state_of(step), state_of(run(build(random_small(), *EVERYTHING), 4)))
    with pytest.raises(ValueError, match="step: expected nothing: the data are resident; got torch.uint8"):
        step(*stored[0])
    with pytest.raises(ValueError, match="step: expected images and labels; got none and none"):
        build(small())()


def test_resident_data_of_another_number_of_steps_are_refused():
    recipe = load_recipe("quickstart").with_settings(["train.loader=resident", "train.batch_size=4", "train.epochs=1"])
    images, labels = torch.zeros((8, 32, 32, 3), dtype=torch.uint8), torch.zeros(8, dtype=torch.int64)
    data = ResidentData(recipe, images, labels, MEAN, STD, FP32, 2)
    with pytest.raises(ValueError, match="resident: expected data of 3 steps an epoch; got those of 2"):
        build_step(recipe, 10, MEAN, STD, FP32, 3, resident=data)


# --- all of it ------------------------------------------------------------------------------------------------------


def test_twenty_steps_with_everything_equal_stock_pytorch():
    step = build(random_small(), *EVERYTHING, "optimizer.decay_bn_and_bias=true")
    twin = copy.deepcopy(step.model)
    optimizer = torch.optim.SGD(twin.parameters(), 0.1, momentum=0.9, nesterov=True, weight_decay=0.01)
    ema = {name: value.clone() for name, value in twin.state_dict().items() if value.is_floating_point()}
    losses, correct, clipped = 0.0, 0, 0
    torch.manual_seed(11)
    for n, (images, labels) in enumerate(batches(20)):
        optimizer.param_groups[0]["lr"] = float(step.update.lr_table[n])
        mixed, targets = mix_by_hand(images, labels, 0.4, 1.0)
        optimizer.zero_grad()
        for x, y in zip(normalised(mixed).split(4), targets.split(4), strict=True):
            logits = twin(x)
            loss = F.cross_entropy(logits, y, label_smoothing=0.1)
            (loss / 2).backward()
            losses += float(loss.detach()) * 4
            correct += int((logits.argmax(1) == y.argmax(1)).sum())
        clipped += float(torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.5)) > 0.5
        optimizer.step()
        decay = min(0.8, (1 + n) / (10 + n))
        for name, value in twin.state_dict().items():
            if name in ema:
                ema[name].mul_(decay).add_(value, alpha=1 - decay)
    torch.manual_seed(11)
    for images, labels in batches(20):
        step(images, labels)
    ours, ours_ema = step.model.state_dict(), step.ema_model.state_dict()
    for name, value in twin.state_dict().items():
        torch.testing.assert_close(ours[name], value, rtol=1e-3, atol=1e-4, msg=name)
        if name in ema:
            torch.testing.assert_close(ours_ema[name], ema[name], rtol=1e-3, atol=1e-4, msg=name)
    totals = step.read_totals()
    assert (
        totals.loss == pytest.approx(losses, rel=1e-3) and totals.images == 160 and abs(totals.correct - correct) <= 1
    )
    assert clipped > 5  # clipping was at work
