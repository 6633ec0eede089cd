"""The training step: one tensor program of forward, loss, backward, SGD + EMA and metric accumulators.

Values that change from step to step come from tables on the device, indexed by a step counter that the step itself
increments. Nothing in the step reads a tensor's value on the host.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.profiler import record_function

from rsengine.augment.mixup import Mix, soft_targets
from rsengine.config import Recipe
from rsengine.device import Execution
from rsengine.engine.update import Update
from rsengine.kernels import label_smoothed_cross_entropy
from rsengine.model.preprocess import Preprocess
from rsengine.parallel.ranks import ALONE, Ranks
from rsengine.schedule import image_size_table


@dataclass(frozen=True)
class Totals:
    """Sums over the steps since the last reading."""

    loss: float  # sum over images of the smoothed training loss
    correct: int  # with mixup or cutmix: agreement with the label of the larger share
    images: int
    first_bad_step: int  # the first of these steps whose loss was not finite, or -1


class TrainStep:
    """One optimiser step of a recipe. ``step(images, labels)`` takes (N, H, W, 3) uint8 and (N,) int64.

    With ``train.micro_batches`` = k the batch goes through the network in k equal parts, one backward pass each, and
    the gradient is that of the mean loss over the whole batch. Batch norm normalises by the statistics of each part,
    and its running averages move k times a step; mixup and cutmix pair images over the whole batch.

    In a trace of PyTorch's profiler the stages of a step are labelled ``images``, ``gradients``, ``network``, ``loss``,
    ``backward``, ``update`` and ``counters``.

    Args:
        resident: returns the batch of a step for the () int64 counter, on the device; ``step()`` then takes no
            arguments. Its images are normalised already if ``recipe.batches_are_normalised``.
        weight_copies: train on copies of the weights in autocast's dtype, which the update writes beside the float32
            weights: no weight is cast in a step, and gradients are written and read in that dtype.
        ranks: the processes that share each batch. A step takes this process's part of it, and does what a step on the
            whole batch does: all of them keep the same weights and state.

    Attributes:
        image_size: height and width to which images are resized before the network; ``None``: they stay as they are. A
            captured step keeps the size it was captured with.
        model: the trained network.
        update: its optimiser step, with the parameters' momentum and the tables of rates.
        ema_model: the same network holding the EMA of its weights and BN buffers, in evaluation mode; or ``None``.
        counter: () int64, the steps done.
        given_weights: whether the run began with given weights, which decides what belongs to the step's state.

    Raises:
        ValueError: the recipe uses resident data and ``resident`` is None: images would never be normalised. Or
            ``weight_copies`` without autocast, or with micro-batches, whose gradients are summed in float32.
    """

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        preprocess: Preprocess,
        execution: Execution,
        steps_per_epoch: int,
        *,
        resident: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None,
        weight_copies: bool = False,
        ranks: Ranks = ALONE,
    ) -> None:
        if recipe.batches_are_normalised and resident is None:
            raise ValueError("resident: expected the data, because train.loader is 'resident'; got None")
        if weight_copies and (execution.autocast_dtype is None or recipe.train.micro_batches > 1):
            raise ValueError(
                "weight_copies: expected autocast and train.micro_batches = 1; got "
                f"{execution.precision} and {recipe.train.micro_batches}"
            )
        device = execution.device
        if recipe.train.frozen_parts:
            model.freeze(recipe.train.frozen_parts)
        self.model = model.to(device, memory_format=torch.channels_last).train()
        self.preprocess = None if recipe.batches_are_normalised else preprocess
        self.execution, self.resident, self.ranks = execution, resident, ranks
        self.image_size: tuple[int, int] | None = None
        self.micro_batches, self.label_smoothing = recipe.train.micro_batches, recipe.train.label_smoothing
        self.mix = Mix(recipe.augment.mixup_alpha, recipe.augment.cutmix_alpha) if recipe.augment.mixes else None
        self.ema_model: nn.Module | None = None
        if recipe.ema.enabled:
            self.ema_model = copy.deepcopy(self.model).requires_grad_(False).eval()
        self.update = Update(
            self.model,
            self.ema_model,
            recipe,
            steps_per_epoch,
            dtype=execution.autocast_dtype or torch.float32,
            copy_dtype=execution.autocast_dtype if weight_copies else None,
            ranks=ranks,
        )
        # A part's share of the whole batch: the gradient that its backward pass begins with.
        self.part = torch.full((), 1 / (self.micro_batches * ranks.size), dtype=torch.float32, device=device)
        self.counter = torch.zeros((), dtype=torch.int64, device=device)
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=device)
        self.correct_sum = torch.zeros((), dtype=torch.int64, device=device)
        self.image_count = torch.zeros((), dtype=torch.int64, device=device)
        self.finite_count = torch.zeros((), dtype=torch.int64, device=device)  # of micro-batches before a bad loss
        self._counted_from = 0  # the step with which the sums began
        self.given_weights = False

    def __call__(self, images: Tensor | None = None, labels: Tensor | None = None) -> None:
        # Past the end of the run the last entries are used: a warm-up may begin at any step, and is undone.
        with record_function("counters"):
            now = self.counter.clamp(max=len(self.update.learning_rates) - 1)
        with record_function("images"):
            images, labels = self._batch(images, labels, now)
            others, share = labels, None
            if self.mix is not None:
                others, (images, share) = self.ranks.previous(labels), self.mix(images, self.ranks.previous(images))
            parts = zip(*(whole.chunk(self.micro_batches) for whole in (images, labels, others)), strict=True)
        with record_function("gradients"):
            self.update.clear_gradients()
        for part in parts:
            self._accumulate(*part, share)
        with record_function("update"):
            self.update(now)
        with record_function("counters"):
            self.counter.add_(1)

    def _accumulate(self, images: Tensor, labels: Tensor, others: Tensor, share: Tensor | None) -> None:
        """Add one part's gradient and metrics."""
        with record_function("images"):
            if self.preprocess is not None:
                images = self.preprocess(images)
            if self.image_size is not None:
                images = resized(images, self.image_size)
        with record_function("network"), self.execution.autocast():
            logits = self._logits(images)
        with record_function("loss"):
            target = labels if share is None else soft_targets(labels, others, share, logits.shape[1])
            loss, correct = label_smoothed_cross_entropy(logits, target, self.label_smoothing)
        with record_function("backward"):
            loss.backward(self.part)
        with record_function("counters"):
            count = labels.shape[0]
            self.loss_sum.add_(loss.detach(), alpha=count)
            self.finite_count.add_(self.loss_sum < torch.inf)  # no loss is negative, and NaN is less than nothing
            self.correct_sum.add_(correct)
            self.image_count.add_(count)

    def _logits(self, images: Tensor) -> Tensor:
        copies = self.update.copies
        return functional_call(self.model, copies, (images,)) if copies else self.model(images)

    def _batch(self, images: Tensor | None, labels: Tensor | None, now: Tensor) -> tuple[Tensor, Tensor]:
        if (self.resident is None) == (images is None or labels is None):
            expected = "images and labels" if self.resident is None else "nothing: the data are resident"
            raise ValueError(f"step: expected {expected}; got {_shape(images)} and {_shape(labels)}")
        if self.resident is not None:
            images, labels = self.resident(now)
        if images.shape[0] % self.micro_batches:
            raise ValueError(
                f"images: expected a multiple of train.micro_batches ({self.micro_batches}); got {_shape(images)}"
            )
        return images, labels

    def read_totals(self) -> Totals:
        """Read the accumulators, of all processes, and reset them. Waits for the device."""
        steps = int(self.counter) - self._counted_from
        # Of processes that see a bad loss in different steps, the first counts.
        (bad,) = self.ranks.most(steps - int(self.finite_count) // self.micro_batches)
        first_bad = self._counted_from + steps - bad if bad else -1
        for accumulator in (self.loss_sum, self.correct_sum, self.image_count):
            self.ranks.sum_(accumulator)
        totals = Totals(float(self.loss_sum), int(self.correct_sum), int(self.image_count), first_bad)
        self._start_sums()
        return totals

    def _start_sums(self) -> None:
        self._counted_from = int(self.counter)
        for accumulator in self._accumulators():
            accumulator.zero_()

    def weights_finite(self) -> bool:
        """Whether every weight is a finite number. Waits for the device."""
        return bool(torch.stack(torch._foreach_norm(self.update.params)).isfinite().all())

    def state_tensors(self) -> list[Tensor]:
        """Every tensor that a step changes and keeps. Saving them and copying them back undoes a step.

        Besides these, only the device's default generator changes, if the recipe draws random numbers.
        """
        models = [self.model] if self.ema_model is None else [self.model, self.ema_model]
        held = [t.detach() for model in models for t in (*model.parameters(), *model.buffers())]
        return held + [*self.update.state_tensors(), *self._accumulators(), self.counter]

    def _accumulators(self) -> tuple[Tensor, ...]:
        return self.loss_sum, self.correct_sum, self.image_count, self.finite_count

    def start_from(self, weights: Mapping[str, Tensor]) -> None:
        """Begin with ``weights``, a state dict of the network, in place; the EMA begins with them too.

        Muon then keeps each convolution at the length that it has in them.
        """
        self.model.load_state_dict(weights)
        if self.ema_model is not None:
            self.ema_model.load_state_dict(weights)
        self.given_weights = True
        self.update.muon.set_lengths()
        self.update.refresh_copies()

    def state_dict(self) -> dict[str, object]:
        """Everything a resumed run needs besides random number generators; tensors are the live ones, not copies."""
        lengths = {"muon_lengths": self.update.muon.lengths} if self._keeps_lengths() else {}
        return {
            "model": self.model.state_dict(),
            "ema": self.ema_model.state_dict() if self.ema_model is not None else None,
            "momentum": self.update.momentum_buffers,
            "counter": self.counter,
            **lengths,
        }

    def _keeps_lengths(self) -> bool:
        return self.given_weights and bool(self.update.muon.params)  # those of a new network are known

    def load_state_dict(self, state: dict) -> None:
        """Restore in place, so that addresses do not change. Unread sums are discarded: they belong to other steps.

        Raises:
            ValueError: the state of another network.
        """
        if (state["ema"] is None) != (self.ema_model is None):
            raise ValueError("ema: one of state and recipe has an EMA, the other none")
        try:
            self.model.load_state_dict(state["model"])
            if self.ema_model is not None:
                self.ema_model.load_state_dict(state["ema"])
        except RuntimeError as error:
            raise ValueError(f"model: {str(error).splitlines()[0]}") from error
        for buffer, saved in zip(self.update.momentum_buffers, state["momentum"], strict=True):
            buffer.copy_(saved)
        if self._keeps_lengths():
            self.update.muon.set_lengths(state["muon_lengths"])
        self.update.refresh_copies()
        self.counter.copy_(state["counter"])
        self._start_sums()


def image_sizes(recipe: Recipe, full: tuple[int, int]) -> list[tuple[int, int] | None]:
    """The size to which the step resizes the images of each epoch; ``None`` where it is their ``full`` size."""
    train = recipe.train
    table = image_size_table(full, train.epochs, start_scale=train.start_scale, full_from=train.full_scale_from)
    return [None if size == full else size for size in table]


def resized(images: Tensor, size: tuple[int, int]) -> Tensor:
    """(N, C, H, W) floating point to ``size``, height and width: bilinear, antialiased. The result is float32."""
    small = F.interpolate(images.float(), size=size, mode="bilinear", antialias=True)
    return small.contiguous(memory_format=torch.channels_last)


def _shape(tensor: Tensor | None) -> str:
    return "none" if tensor is None else f"{tensor.dtype} {tuple(tensor.shape)}"
