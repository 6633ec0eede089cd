"""The training step: one tensor program of forward, loss, backward, SGD + EMA and metric accumulators.

What changes from step to step is a table on the device indexed by a step counter on the device, which the step itself
increments; nothing in the step reads a tensor's value on the host.
"""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor, nn

from rsengine.config import Recipe
from rsengine.device import Execution
from rsengine.kernels import ema_update, label_smoothed_cross_entropy, sgd_ema_step
from rsengine.preprocess import Preprocess
from rsengine.schedule import ema_decay_table, learning_rate_table


@dataclass(frozen=True)
class Totals:
    """Sums over the steps since the last reading."""

    loss: float  # sum over images of the smoothed training loss
    correct: int
    images: int
    first_bad_step: int  # the first step ever whose loss was not finite, or -1


class TrainStep:
    """One optimiser step of a recipe. ``step(images, labels)`` takes (N, H, W, 3) uint8 and (N,) int64.

    Attributes:
        model: the trained network.
        ema_model: the same network holding the averages of its weights and BN buffers, in evaluation mode; or ``None``.
        counter: () int64, the steps done.
    """

    def __init__(
        self, model: nn.Module, recipe: Recipe, preprocess: Preprocess, execution: Execution, steps_per_epoch: int
    ) -> None:
        device = execution.device
        self.model = model.to(device, memory_format=torch.channels_last).train()
        self.preprocess, self.execution = preprocess, execution
        self.label_smoothing = recipe.train.label_smoothing
        self.momentum, self.nesterov = recipe.optimizer.momentum, recipe.optimizer.nesterov
        self.learning_rates = _schedule(recipe, steps_per_epoch)

        self.params = list(self.model.parameters())
        self.momentum_buffers = [torch.zeros_like(p) for p in self.params]
        decay = recipe.optimizer.weight_decay
        # Convolution and linear weights have two dimensions or more; BN parameters and biases have one.
        exempt = not recipe.optimizer.decay_bn_and_bias
        self.weight_decay = [0.0 if exempt and p.dim() < 2 else decay for p in self.params]

        self.ema_model: nn.Module | None = None
        self.shadow: list[Tensor] | None = None
        if recipe.ema.enabled:
            self.ema_model = copy.deepcopy(self.model).requires_grad_(False).eval()
            self.shadow = list(self.ema_model.parameters())
            # num_batches_tracked stays out: it has no effect while BN has a fixed momentum.
            self.buffers = [b for b in self.model.buffers() if b.is_floating_point()]
            self.shadow_buffers = [b for b in self.ema_model.buffers() if b.is_floating_point()]

        self.lr_table = torch.tensor(self.learning_rates, dtype=torch.float32, device=device)
        decays = ema_decay_table(recipe.ema.decay, len(self.learning_rates), warmup=recipe.ema.warmup)
        self.decay_table = torch.tensor(decays, dtype=torch.float32, device=device)
        self.counter = torch.zeros((), dtype=torch.int64, device=device)
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=device)
        self.correct_sum = torch.zeros((), dtype=torch.int64, device=device)
        self.image_count = torch.zeros((), dtype=torch.int64, device=device)
        self.first_bad = torch.full((), -1, dtype=torch.int64, device=device)

    def __call__(self, images: Tensor, labels: Tensor) -> None:
        for p in self.params:
            p.grad = None
        with self.execution.autocast():
            logits = self.model(self.preprocess(images))
        loss, correct = label_smoothed_cross_entropy(logits, labels, self.label_smoothing)
        loss.backward()

        lr = self.lr_table.gather(0, self.counter)
        decay = self.decay_table.gather(0, self.counter) if self.shadow is not None else None
        grads = [p.grad for p in self.params]
        sgd_ema_step(
            self.params,
            grads,
            self.momentum_buffers,
            self.shadow,
            lr,
            self.momentum,
            self.weight_decay,
            decay,
            self.nesterov,
        )
        if decay is not None:
            ema_update(self.shadow_buffers, self.buffers, decay)

        loss = loss.detach()
        self.first_bad.copy_(torch.where((self.first_bad < 0) & ~loss.isfinite(), self.counter, self.first_bad))
        self.loss_sum.add_(loss.double() * labels.shape[0])
        self.correct_sum.add_(correct)
        self.image_count.add_(labels.shape[0])
        self.counter.add_(1)

    def read_totals(self) -> Totals:
        """Read the accumulators and start them again from zero. The only place where the host waits for the device."""
        totals = Totals(float(self.loss_sum), int(self.correct_sum), int(self.image_count), int(self.first_bad))
        for accumulator in (self.loss_sum, self.correct_sum, self.image_count):
            accumulator.zero_()
        return totals

    def weights_finite(self) -> bool:
        """Whether every weight is a finite number. Waits for the device."""
        return bool(torch.stack(torch._foreach_norm(self.params)).isfinite().all())

    def state_dict(self) -> dict[str, object]:
        """Everything a resumed run needs besides random number generators; tensors are the live ones, not copies."""
        return {
            "model": self.model.state_dict(),
            "ema": self.ema_model.state_dict() if self.ema_model is not None else None,
            "momentum": self.momentum_buffers,
            "counter": self.counter,
            "first_bad": self.first_bad,
        }

    def load_state_dict(self, state: dict) -> None:
        """Restore in place, so that every address stays. Raises ``ValueError`` for the state of another network."""
        if (state["ema"] is None) != (self.ema_model is None):
            raise ValueError("ema: one of state and recipe has an average, the other none")
        try:
            self.model.load_state_dict(state["model"])
            if self.ema_model is not None:
                self.ema_model.load_state_dict(state["ema"])
        except RuntimeError as error:
            raise ValueError(f"model: {str(error).splitlines()[0]}") from error
        for buffer, saved in zip(self.momentum_buffers, state["momentum"], strict=True):
            buffer.copy_(saved)
        self.counter.copy_(state["counter"])
        self.first_bad.copy_(state["first_bad"])


def _schedule(recipe: Recipe, steps_per_epoch: int) -> np.ndarray:
    return learning_rate_table(**asdict(recipe.schedule), epochs=recipe.train.epochs, steps_per_epoch=steps_per_epoch)
