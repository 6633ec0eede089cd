"""The training step against the same step written with stock PyTorch, and what it keeps beside the weights."""

import copy
import os
import platform
import subprocess
import sys
from contextlib import nullcontext

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.datasets import load_digits

from rsengine.config import Recipe
from rsengine.device import Execution, choose_execution
from rsengine.engine.evaluation import EvaluationStep
from rsengine.engine.step import TrainStep, resized
from rsengine.kernels.dispatch import eager_only
from rsengine.model import resnet_rs
from rsengine.model.preprocess import Preprocess
from rsengine.schedule import ema_decay_table

FP32 = Execution(torch.device("cpu"), None, 1, "test")
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
SETTINGS = ["train.epochs=2", "schedule.name=cosine", "optimizer.weight_decay=0.01", "ema.decay=0.8"]


def small(seed=0, **options):
    torch.manual_seed(seed)
    return resnet_rs(**{"blocks": (1, 1), "width_multiplier": 0.125, "stem_width": 8, "dropout": 0.0} | options)


def batches(count, n=8):
    generator = torch.Generator().manual_seed(5)
    for _ in range(count):
        yield (
            torch.randint(0, 256, (n, 16, 16, 3), generator=generator, dtype=torch.uint8),
            torch.randint(0, 10, (n,), generator=generator),
        )


def build(model, *settings, steps_per_epoch=10, execution=FP32, **options):
    recipe = Recipe().with_settings([*SETTINGS, *settings])
    return TrainStep(model, recipe, Preprocess(MEAN, STD), execution, steps_per_epoch, **options)


def test_a_profilers_trace_has_the_stages_of_a_step_in_their_order():
    step, batch = build(small(), "train.micro_batches=2"), next(batches(1))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        step(*batch)
    events = sorted((e for e in profiler.events() if e.is_user_annotation), key=lambda e: e.time_range.start)
    part = ["images", "network", "loss", "backward", "counters"]
    assert [e.name for e in events] == [
        "counters",
        "images",
        "gradients",
        *part,
        *part,
        "update",
        "counters",
        "counters",
    ]


def test_images_are_resized_as_pillow_does():
    images, _ = next(batches(1, n=2))
    small = resized(images.permute(0, 3, 1, 2), (8, 8)).permute(0, 2, 3, 1)
    for found, image in zip(small, images, strict=True):
        expected = np.asarray(Image.fromarray(image.numpy()).resize((8, 8), Image.Resampling.BILINEAR))
        assert np.abs(found.numpy() - expected).max() <= 1  # Pillow rounds after each of the two directions


def test_a_step_trains_on_images_of_the_size_it_is_given():
    step = build(small())
    step.image_size = (8, 8)
    twin, (images, labels) = build(copy.deepcopy(step.model)), next(batches(1))
    pixels = step.preprocess(images)
    twin.preprocess = lambda _: resized(pixels, (8, 8))
    step(images, labels), twin(images, labels)
    for a, b in zip(step.model.parameters(), twin.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_twenty_steps_equal_stock_pytorch():
    step = build(small())
    twin = copy.deepcopy(step.model)
    decayed = [p for p in twin.parameters() if p.dim() > 1]
    exempt = [p for p in twin.parameters() if p.dim() == 1]
    optimizer = torch.optim.SGD(
        [{"params": decayed, "weight_decay": 0.01}, {"params": exempt, "weight_decay": 0.0}],
        0.1,
        momentum=0.9,
        nesterov=True,
    )
    ema = {name: value.clone() for name, value in twin.state_dict().items()}
    losses = 0.0
    for n, (images, labels) in enumerate(batches(20)):
        for group in optimizer.param_groups:
            group["lr"] = float(step.update.lr_table[n])
        x = (images.permute(0, 3, 1, 2).float() / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(
            3, 1, 1
        )
        optimizer.zero_grad()
        loss = F.cross_entropy(twin(x), labels, label_smoothing=0.1)
        loss.backward()
        optimizer.step()
        losses += float(loss.detach()) * len(labels)
        decay = min(0.8, (1 + n) / (10 + n))
        for name, value in twin.state_dict().items():
            if value.is_floating_point():
                ema[name].mul_(decay).add_(value, alpha=1 - decay)
        step(images, labels)
    ours, ours_ema = step.model.state_dict(), step.ema_model.state_dict()
    for name, value in twin.state_dict().items():
        torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=1e-5, msg=name)
        if value.is_floating_point():
            torch.testing.assert_close(ours_ema[name], ema[name], rtol=1e-4, atol=1e-5, msg=name)
    totals = step.read_totals()
    assert totals.loss == pytest.approx(losses, rel=1e-3) and totals.images == 160 and totals.first_bad_step == -1
    assert step.read_totals().images == 0  # reading starts the sums again
    assert int(step.counter) == 20


def test_a_recipe_of_resident_data_needs_them():
    """Without them its images would reach the network as raw pixels: nobody else normalises."""
    with pytest.raises(ValueError, match="resident: expected the data, because train.loader is 'resident'; got None"):
        build(small(), "train.loader=resident")


def test_weight_decay_spares_batch_norm_and_biases_unless_asked():
    by_dimension = {
        p.dim(): d for p, d in zip(build(small()).update.params, build(small()).update.weight_decay, strict=True)
    }
    assert by_dimension == {4: 0.01, 2: 0.01, 1: 0.0}
    assert set(build(small(), "optimizer.decay_bn_and_bias=true").update.weight_decay) == {0.01}


def test_the_ema_is_used_it_differs_and_includes_batch_norm_buffers():
    """The report's EMA was never evaluated, saved or applied, and ignored the buffers."""
    step = build(small())
    start = {name: value.clone() for name, value in step.ema_model.state_dict().items()}
    for images, labels in batches(8):
        step(images, labels)
    for name, value in step.ema_model.state_dict().items():
        if value.is_floating_point():
            assert not torch.equal(value, start[name]), name
            assert not torch.equal(value, step.model.state_dict()[name]), name
    models = {"raw": step.model, "ema": step.ema_model}
    results = EvaluationStep(models, step.preprocess, FP32, 10).measure(batches(2))
    assert results["raw"].loss != results["ema"].loss
    assert "running_mean" in "".join(step.state_dict()["ema"])


def test_without_ema():
    step = build(small(), "ema.enabled=false")
    for images, labels in batches(2):
        step(images, labels)
    assert step.ema_model is None and step.state_dict()["ema"] is None


def test_the_learning_rate_and_the_decay_come_from_tables_by_the_step_counter():
    step = build(small())
    step.update.lr_table[0] = 0.0
    before = [p.detach().clone() for p in step.update.params]
    first, second = batches(2)
    step(*first)
    assert all(torch.equal(a, b) for a, b in zip(before, step.update.params, strict=True))
    step(*second)
    assert not all(torch.equal(a, b) for a, b in zip(before, step.update.params, strict=True))
    assert float(step.update.decay_table[0]) == pytest.approx(float(ema_decay_table(0.8, 1)[0]))


def test_a_bad_loss_is_remembered_with_its_step():
    step = build(small())
    stream = list(batches(4))
    step(*stream[0])
    with torch.no_grad():
        step.model.fc.bias[0] = float("inf")
    for images, labels in stream[1:]:
        step(images, labels)
    assert step.read_totals().first_bad_step == 1
    assert not step.weights_finite()


def test_the_step_makes_no_new_tensors_of_its_state():
    step = build(small())
    addresses = [
        t.data_ptr() for t in [*step.update.params, *step.update.momentum_buffers, *step.update.shadow, step.counter]
    ]
    for images, labels in batches(2):
        step(images, labels)
    assert addresses == [
        t.data_ptr() for t in [*step.update.params, *step.update.momentum_buffers, *step.update.shadow, step.counter]
    ]


def test_state_goes_back_in_place_and_a_foreign_one_is_refused():
    step, other = build(small()), build(small(seed=1))
    for images, labels in batches(3):
        step(images, labels)
    address = other.update.params[0].data_ptr()
    other.load_state_dict(copy.deepcopy(step.state_dict()))
    assert other.update.params[0].data_ptr() == address
    for images, labels in batches(2):
        step(images, labels)
        other(images, labels)
    assert all(torch.equal(a, b) for a, b in zip(step.update.params, other.update.params, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(step.update.shadow, other.update.shadow, strict=True))
    with pytest.raises(ValueError, match="ema: one of state and recipe"):
        build(small(), "ema.enabled=false").load_state_dict(step.state_dict())
    with pytest.raises(ValueError, match="model: "):
        build(small(se_ratio=0.5)).load_state_dict(step.state_dict())


def test_bfloat16_autocast_follows_float32():
    losses = {}
    for dtype in (None, torch.bfloat16):
        step = build(small(), execution=Execution(torch.device("cpu"), dtype, 1, "test"))
        for images, labels in batches(10):
            step(images, labels)
        totals = step.read_totals()
        losses[dtype] = totals.loss / totals.images
        assert all(p.dtype == torch.float32 for p in step.update.params)
    assert losses[torch.bfloat16] == pytest.approx(losses[None], rel=0.03)


def test_preprocessing_normalises_and_is_channels_last():
    images = next(batches(1))[0]
    x = Preprocess(MEAN, STD)(images)
    assert x.shape == (8, 3, 16, 16) and x.is_contiguous(memory_format=torch.channels_last)
    expected = (images[0, 2, 3].double() / 255 - torch.tensor(MEAN).double()) / torch.tensor(STD).double()
    torch.testing.assert_close(x[0, :, 2, 3].double(), expected, rtol=1e-5, atol=1e-6)


def test_execution_says_what_it_chose_and_why():
    chosen = choose_execution("cpu", "auto")
    assert ("bfloat16" in chosen.reason) == (
        chosen.autocast_dtype is torch.bfloat16
    ) and "processor has" in chosen.reason
    assert choose_execution("cpu", "fp32").autocast_dtype is None
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="no usable CUDA GPU; use --device cpu"):
            choose_execution("cuda")


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the memory of other C libraries is left as it is")
def test_memory_of_large_tensors_is_reused_where_that_is_asked_for_and_not_before():
    program = """
import resource, torch
from rsengine.device import choose_execution, keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        torch.empty(64 * 2**20, dtype=torch.uint8).fill_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

choose_execution("cpu")  # evaluation and prediction do no more: how memory is handed out is the process's own matter
cold = faults()
assert keep_freed_memory()
for _ in range(4):  # until freed blocks lie side by side: an aligned block needs a little more than its own size
    faults()
print(cold, faults())
"""
    plain = {name: value for name, value in os.environ.items() if "MALLOC" not in name and name != "LD_PRELOAD"}
    command = [sys.executable, "-c", program]
    cold, warm = map(int, subprocess.run(command, env=plain, capture_output=True, check=True).stdout.split())
    assert warm < 0.1 * cold, (cold, warm)


def losses_of_300_steps(precision):
    """The mean loss of every 50 steps of a training on scikit-learn's digits, 16x16 pixels."""
    digits = load_digits()
    pixels = torch.from_numpy(digits.images * 255 / 16).to(torch.uint8).repeat_interleave(2, 1).repeat_interleave(2, 2)
    labels = torch.from_numpy(digits.target).long()
    generator = torch.Generator().manual_seed(3)
    execution = Execution(torch.device("cpu"), precision, torch.get_num_threads(), "test")
    step = build(small(width_multiplier=0.25), "train.epochs=1", steps_per_epoch=300, execution=execution)
    means = []
    for _ in range(6):
        for _ in range(50):
            chosen = torch.randint(0, len(labels), (64,), generator=generator)
            step(pixels[chosen, :, :, None].expand(-1, -1, -1, 3), labels[chosen])
        totals = step.read_totals()
        means.append(totals.loss / totals.images)
    return means


@pytest.mark.slow
@pytest.mark.thorough
def test_a_changed_precision_trains_as_float32_does():
    """300 steps of matched training loss: bfloat16 autocast, and batch norm in C, against float32 by PyTorch."""
    with eager_only():
        expected = losses_of_300_steps(None)
    assert expected[0] > 1.0 and expected[-1] < 0.62  # it learns: 0.5 is the least with label smoothing 0.1
    for precision, block in [(None, nullcontext), (torch.bfloat16, eager_only), (torch.bfloat16, nullcontext)]:
        with block():
            found = losses_of_300_steps(precision)
        assert found == pytest.approx(expected, rel=0.02), (precision, block)
