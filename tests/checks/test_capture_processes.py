"""The check of the step's rules, where the step is one of several processes.

The group is one that sends nothing (PyTorch's ``fake`` backend). As the fake device, it lasts for the rest of a
process, so all of it happens in one other process.
"""

import multiprocessing

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.testing._internal.distributed.fake_pg import FakeStore

from rsengine.checks.capture import check_recipe, check_step, tracing
from rsengine.checks.findings import SEQUENCE, SYNCHRONISATION
from rsengine.config import load_recipe
from rsengine.model import resnet_rs
from rsengine.model.layers import BatchNorm, use_sync_batch_norm
from rsengine.parallel.ranks import Ranks

GATHER, SUM, WAIT = (f"_c10d_functional.{name}" for name in ("all_gather_into_tensor", "all_reduce_", "wait_tensor"))


@pytest.fixture(scope="module")
def elsewhere():
    """Runs a function in the process that has the fake device and the fake group."""
    with multiprocessing.get_context("spawn").Pool(1, join_fake_group) as pool:
        yield lambda function, *arguments: pool.apply_async(function, arguments).get(timeout=120)


# --- run in the other process -----------------------------------------------------------------------------------------


def join_fake_group():
    dist.init_process_group("fake", rank=1, world_size=2, store=FakeStore())


class SharedStep:
    """Gradients of a network with batch norm over both processes, in one buffer that is summed over them."""

    def __init__(self, device):
        self.ranks = Ranks(1, 2, 1, 2, "fake")
        with torch._subclasses.fake_tensor.unset_fake_temporarily(), torch.device("meta"):
            model = resnet_rs(blocks=(1, 1), stem_width=8, width_multiplier=0.125)
        self.model = model.to(device, memory_format=torch.channels_last)
        use_sync_batch_norm(self.model, self.ranks)
        self.parameters = list(self.model.parameters())
        self.flat = torch.zeros(sum(p.numel() for p in self.parameters), device=device)
        for p, piece in zip(self.parameters, self.flat.split([p.numel() for p in self.parameters]), strict=True):
            p.grad = piece.as_strided(p.shape, p.stride())
        self.steps = 0

    def state_tensors(self):
        return [self.flat, *self.parameters, *self.model.buffers()]

    def __call__(self, images, labels):
        self.steps += 1
        self.flat.zero_()
        images = torch.lerp(images, self.ranks.previous(images), 0.25)
        with torch.autocast(images.device.type, torch.bfloat16):
            logits = self.model(images)
        F.cross_entropy(logits, labels).backward()
        self.ranks.sum_(self.flat)
        self.after()

    def after(self):
        pass


class PlainCollective(SharedStep):
    def after(self):
        dist.all_reduce(self.flat)


class ReadSum(SharedStep):
    def after(self):
        self.norm = float(self.ranks.sum_(self.flat.norm()))


class AskedOthers(SharedStep):
    def after(self):
        self.ranks.most(self.steps)


class SometimesSummed(SharedStep):
    def after(self):
        if self.steps % 2:
            self.ranks.sum_(self.flat)


def check(kind):
    with tracing() as device:
        images = torch.zeros(4, 3, 16, 16, device=device).to(memory_format=torch.channels_last)
        step = kind(device)
        report = check_step(step, (images, torch.zeros(4, dtype=torch.int64, device=device)))
        layers = sum(isinstance(module, BatchNorm) for module in step.model.modules())
    return str(report), [finding.kind for finding in report.findings], report.operations, layers


# --- tests ------------------------------------------------------------------------------------------------------------


def test_a_step_of_several_processes_can_be_captured(elsewhere):
    text, _, operations, layers = elsewhere(check, SharedStep)
    assert text.startswith("can be captured: the same"), text
    names = [operation.name for operation in operations]
    # Each batch norm gathers statistics, and sums for its gradient; beside them the images before, and the gradients.
    assert names.count(GATHER) == names.count(SUM) == layers + 1
    launches = {name: {each.launches for each in operations if each.name == name} for name in (GATHER, SUM, WAIT)}
    assert launches == {GATHER: {True}, SUM: {True}, WAIT: {False}}
    assert not any("squeeze_excite" in name and "batch_norm" in name for name in names)


def test_what_torch_distributed_sends_is_no_change(elsewhere):
    text, _, _, _ = elsewhere(check, PlainCollective)
    assert text.startswith("can be captured: the same"), text


@pytest.mark.parametrize(
    ("kind", "expected"), [(ReadSum, SYNCHRONISATION), (AskedOthers, SYNCHRONISATION), (SometimesSummed, SEQUENCE)]
)
def test_what_a_replay_would_not_repeat_is_found(elsewhere, kind, expected):
    text, kinds, _, _ = elsewhere(check, kind)
    assert kinds == [expected], text


def found_in_recipe(*settings):
    """What the check finds in the steps of quickstart, and which collectives the training step calls, how often."""
    reports = check_recipe(load_recipe("quickstart").with_settings(settings), ranks=Ranks(1, 2, 1, 2, "fake"))
    names = [operation.name for operation in reports["training step"].operations]
    return [str(f) for report in reports.values() for f in report.findings], names.count(SUM), names.count(GATHER)


@pytest.mark.parametrize(
    ("settings", "sums", "gathers"),
    [
        ([], 3, 0),  # of the gradients of copies in bfloat16 and of the rest, and of the running averages
        (["train.all_reduce=bf16", "train.micro_batches=2", "train.loader=resident"], 2, 0),
        (["augment.mixup_alpha=0.2"], 3, 2),  # of images and labels
    ],
)
def test_the_steps_of_a_recipe_can_be_captured(elsewhere, settings, sums, gathers):
    assert elsewhere(found_in_recipe, *settings) == ([], sums, gathers)
