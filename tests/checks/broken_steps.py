"""Training steps that cannot be captured, each broken in one line, which ends in ``# planted``."""

import random

import torch
import torch.nn.functional as F
from torch import nn

from rsengine.checks.findings import ADDRESS, COPY, FAILURE, HOST_TENSOR, LEAK, NUMBER, SEQUENCE, SYNCHRONISATION
from rsengine.engine.step import TrainStep

EXPECTED = {}  # class -> the kind of finding, and the line where it is not a planted one


def caught_as(kind, line="# planted"):
    def note(cls):
        EXPECTED[cls] = (kind, line)
        return cls

    return note


class After(TrainStep):
    """A sound step with something after it."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.number = 0
        self.prepare()

    def __call__(self, images, labels):
        super().__call__(images, labels)
        self.number += 1
        self.after(images, labels)

    def prepare(self):
        pass


class Sound(After):
    """What looks suspicious and is not: nothing here is to be found."""

    def after(self, images, labels):
        loss = torch.where(self.loss_sum > 3.0, 0.0, self.loss_sum)
        loss.masked_fill_(~loss.isfinite(), 1.0)
        self.last = loss.mul(0.5).add(torch.full((), 2.0, dtype=torch.float64, device=labels.device))
        F.one_hot(labels, 10).sum().add_(labels.index_select(0, labels[:1]).sum())
        images[torch.arange(2, device=images.device)].sum()
        circle = [loss]
        circle.append(circle)  # alive until the garbage collector comes, and no longer


@caught_as(SYNCHRONISATION)
class Item(After):
    def after(self, images, labels):
        self.last = self.loss_sum.item()  # planted


@caught_as(SYNCHRONISATION)
class Branch(After):
    def after(self, images, labels):
        if self.finite_count >= 0:  # planted
            self.loss_sum.zero_()


@caught_as(SYNCHRONISATION)
class FormattedLoss(After):
    def after(self, images, labels):
        self.line = f"{self.loss_sum:.3f}"  # planted


@caught_as(SYNCHRONISATION)
class PrintedLoss(After):
    def after(self, images, labels):
        print(self.loss_sum)  # planted


@caught_as(SYNCHRONISATION)
class Nonzero(After):
    def after(self, images, labels):
        labels.nonzero()  # planted


@caught_as(SYNCHRONISATION)
class BooleanMask(After):
    def after(self, images, labels):
        self.correct_sum.add_(labels[labels > 3].sum())  # planted


@caught_as(SYNCHRONISATION)
class BooleanMaskAssignment(After):
    def after(self, images, labels):
        labels.clone()[labels > 3] = labels[0]  # planted


@caught_as(SYNCHRONISATION)
class Unique(After):
    def after(self, images, labels):
        labels.unique()  # planted


@caught_as(SYNCHRONISATION)
class Equal(After):
    def after(self, images, labels):
        torch.equal(labels, labels)  # planted


@caught_as(SYNCHRONISATION)
class OneHotOfUnknownWidth(After):
    def after(self, images, labels):
        F.one_hot(labels)  # planted


@caught_as(SYNCHRONISATION)
class RepeatByTensor(After):
    def after(self, images, labels):
        labels.repeat_interleave(labels)  # planted


@caught_as(SYNCHRONISATION)
class Inverse(After):
    def after(self, images, labels):
        torch.linalg.inv(self.update.params[-2][:, :10] @ self.update.params[-2][:, :10].T)  # planted


@caught_as(SYNCHRONISATION)
class Synchronise(After):
    def after(self, images, labels):
        torch.accelerator.synchronize()  # planted


@caught_as(SYNCHRONISATION)
class OptimiserWithTensorRate(After):
    def prepare(self):
        self.optimizer = torch.optim.SGD(self.update.params, lr=0.1, foreach=True)
        self.optimizer.param_groups[0]["lr"] = self.update.lr_table[0]

    def after(self, images, labels):
        self.optimizer.step()  # planted


@caught_as(SYNCHRONISATION)
class CheckedClipping(After):
    def after(self, images, labels):
        nn.utils.clip_grad_norm_(self.update.params, 1.0, error_if_nonfinite=True)  # planted


@caught_as(SYNCHRONISATION)
class HookInBackward(After):
    def prepare(self):
        self.model.stem.bn1.weight.register_hook(self.look)

    def look(self, gradient):
        self.norm = float(gradient.norm())  # planted

    def after(self, images, labels):
        pass


@caught_as(SYNCHRONISATION, "y = super().forward(x)")  # of BatchNorm in layers.py
class CumulativeBatchNorm(After):
    def prepare(self):
        self.model.stem.bn1.momentum = None  # PyTorch then computes 1 / count on the host

    def after(self, images, labels):
        pass


@caught_as(COPY)
class ToTheHost(After):
    def after(self, images, labels):
        self.labels = labels.cpu()  # planted


@caught_as(COPY)
class FromTheHost(After):
    def after(self, images, labels):
        labels.add(torch.arange(8).to(labels.device))  # planted


@caught_as(COPY)
class TensorFromNumber(After):
    def after(self, images, labels):
        self.loss_sum.mul_(torch.tensor(0.5, device=labels.device))  # planted


@caught_as(COPY)
class ListAsIndex(After):
    def after(self, images, labels):
        images[[0, 1]].sum()  # planted


@caught_as(COPY)
class HostIndex(After):
    def prepare(self):
        self.order = torch.arange(8)

    def after(self, images, labels):
        images[self.order].sum()  # planted


@caught_as(HOST_TENSOR)
class HostScalar(After):
    def after(self, images, labels):
        self.loss_sum.mul_(torch.tensor(0.5))  # planted


@caught_as(HOST_TENSOR)
class HostRate(After):
    def prepare(self):
        self.rate = torch.full((), 0.1)

    def after(self, images, labels):
        torch._foreach_mul_(self.update.momentum_buffers, self.rate)  # planted


@caught_as(LEAK)
class History(After):
    def prepare(self):
        self.losses = []

    def after(self, images, labels):
        self.losses.append(self.loss_sum.clone())  # planted


@caught_as(LEAK)
class MaskDrawnOnce(After):
    mask = None

    def after(self, images, labels):
        if self.mask is None:
            self.mask = torch.rand(8, device=images.device)  # planted
        self.loss_sum.add_(self.mask.sum())


@caught_as(LEAK)
class KeptGraph(After):
    def prepare(self):
        self.outputs = []

    def after(self, images, labels):
        self.outputs.append(self.update.params[0] * 2)  # planted


@caught_as(NUMBER)
class FloatRate(After):
    def after(self, images, labels):
        rate = float(self.update.learning_rates[self.number])
        torch._foreach_add_(self.update.momentum_buffers, self.update.shadow, alpha=-rate)  # planted


@caught_as(NUMBER)
class HostRandom(After):
    def after(self, images, labels):
        self.loss_sum.add_(random.random())  # planted


@caught_as(NUMBER)
class ShrinkingBatch(After):
    def after(self, images, labels):
        self.image_count.add_(labels[: 8 - self.number].sum())  # planted


@caught_as(SEQUENCE)
class EveryThirdStep(After):
    def after(self, images, labels):
        if self.number % 3 == 0:
            self.loss_sum.neg_()  # planted


@caught_as(SEQUENCE)
class Alternating(After):
    def after(self, images, labels):
        operation = (torch.sin, torch.cos)[self.number % 2]
        operation(self.loss_sum)  # planted


@caught_as(SEQUENCE)
class GrowingShape(After):
    def prepare(self):
        self.seen = [torch.zeros(n, device=self.counter.device) for n in range(4)]

    def after(self, images, labels):
        self.seen[self.number].sum()  # planted


@caught_as(LEAK, "loss.backward(self.part)")
class GradientsNeverCleared(After):
    def prepare(self):
        self.update.clear_gradients = lambda: None

    def after(self, images, labels):
        pass


@caught_as(ADDRESS, "loss.backward(self.part)")
class GradientsOfTheStepBefore(After):
    def prepare(self):
        self.before = None

    def after(self, images, labels):
        if self.before is not None:
            torch._foreach_norm(self.before)
        self.before = [leaf.grad for leaf in self.update.copies.values()]


@caught_as(ADDRESS)
class NewMomentum(After):
    def after(self, images, labels):
        self.update.momentum_buffers[2] = self.update.momentum_buffers[2] * 0.9  # planted


@caught_as(ADDRESS)
class NewBuffer(After):
    def after(self, images, labels):
        norm = self.model.stem.bn1
        norm.running_mean = norm.running_mean * 0.9  # planted


@caught_as(ADDRESS)
class NewCounter(After):
    def after(self, images, labels):
        self.counter = self.counter + 0  # planted


@caught_as(ADDRESS)
class TwoSlots(After):
    def prepare(self):
        self.slots = [torch.zeros(8, device=self.counter.device) for _ in range(2)]

    def after(self, images, labels):
        self.slots[self.number % 2].sum()  # planted


@caught_as(FAILURE)
class Failing(After):
    def after(self, images, labels):
        raise RuntimeError("not today")  # planted


@caught_as(FAILURE)
class WrongShape(After):
    def after(self, images, labels):
        with torch.no_grad():
            self.update.params[0].add_(labels)  # planted
