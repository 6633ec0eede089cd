"""What a step does with its gradients: SGD, or Muon for the convolutions, then the EMA of weights and buffers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

import torch
from torch import Tensor, nn

from rsengine.config import Recipe
from rsengine.engine.muon import Muon
from rsengine.kernels import ema_update, sgd_ema_step
from rsengine.schedule import ema_decay_table, learning_rate_table


class Update:
    """The optimiser step of a recipe, and its EMA. Every rate is read from a table on the device.

    Args:
        ema_model: the same network, to hold the EMA; ``None`` for none.
        keep_gradients: keep the same gradient tensors from step to step, so that their addresses last.
        dtype: of Muon's Newton-Schulz products.

    Attributes:
        params, momentum_buffers, weight_decay: of every parameter of ``model``, in its order.
        shadow: the EMA of ``params``, or ``None``.
        learning_rates: (steps,) float64, SGD's, on the host; ``lr_table`` is its copy on the device.
    """

    def __init__(
        self,
        model: nn.Module,
        ema_model: nn.Module | None,
        recipe: Recipe,
        steps_per_epoch: int,
        *,
        keep_gradients: bool,
        dtype: torch.dtype,
    ) -> None:
        optimizer, schedule = recipe.optimizer, recipe.schedule
        self.keep_gradients = keep_gradients
        self.momentum, self.nesterov, self.clip_norm = optimizer.momentum, optimizer.nesterov, optimizer.clip_norm
        self.params = list(model.parameters())
        self.momentum_buffers = [torch.zeros_like(p) for p in self.params]
        # Convolution and linear weights have two dimensions or more; BN parameters and biases have one.
        exempt = not optimizer.decay_bn_and_bias
        self.weight_decay = [0.0 if exempt and p.dim() < 2 else optimizer.weight_decay for p in self.params]
        for p in self.params:
            p.grad = torch.zeros_like(p) if keep_gradients else None

        self.shadow: list[Tensor] | None = None
        if ema_model is not None:
            self.shadow = list(ema_model.parameters())
            # num_batches_tracked stays out: it has no effect while BN has a fixed momentum.
            self._buffers = [b for b in model.buffers() if b.is_floating_point()]
            self._shadow_buffers = [b for b in ema_model.buffers() if b.is_floating_point()]

        # Picked once: the lists that each optimiser works on.
        is_muons = [optimizer.name == "muon" and p.dim() == 4 for p in self.params]
        by_muon = [i for i, chosen in enumerate(is_muons) if chosen]
        by_sgd = [i for i, chosen in enumerate(is_muons) if not chosen]
        self._sgd_params, self._sgd_buffers, self._sgd_decays = (
            [values[i] for i in by_sgd] for values in (self.params, self.momentum_buffers, self.weight_decay)
        )
        self._muon_params, muon_buffers = (
            [values[i] for i in by_muon] for values in (self.params, self.momentum_buffers)
        )
        self._sgd_shadow, self._muon_shadow = (
            None if self.shadow is None else [self.shadow[i] for i in places] for places in (by_sgd, by_muon)
        )
        self.muon = Muon(self._muon_params, muon_buffers, optimizer.muon_momentum, self.nesterov, dtype)

        self.learning_rates = learning_rate_table(
            **asdict(schedule), epochs=recipe.train.epochs, steps_per_epoch=steps_per_epoch
        )
        muon_rates = self.learning_rates * (
            optimizer.muon_learning_rate / schedule.learning_rate if schedule.learning_rate else 0.0
        )
        decays = ema_decay_table(recipe.ema.decay, len(self.learning_rates), warmup=recipe.ema.warmup)
        device = self.params[0].device
        self.lr_table, self.muon_lr_table, self.decay_table = (
            torch.tensor(table, dtype=torch.float32, device=device)
            for table in (self.learning_rates, muon_rates, decays)
        )

    def clear_gradients(self) -> None:
        if self.keep_gradients:
            torch._foreach_zero_([p.grad for p in self.params])
        else:
            for p in self.params:
                p.grad = None

    def __call__(self, now: Tensor) -> None:
        """Update every parameter by its gradient. ``now``: () int64, the step's place in the tables."""
        if self.clip_norm:
            clip_by_global_norm_([p.grad for p in self.params], self.clip_norm)
        lr = self.lr_table.gather(0, now)
        decay = None if self.shadow is None else self.decay_table.gather(0, now)
        sgd_ema_step(
            self._sgd_params,
            [p.grad for p in self._sgd_params],
            self._sgd_buffers,
            self._sgd_shadow,
            lr,
            self.momentum,
            self._sgd_decays,
            decay,
            self.nesterov,
        )
        if self._muon_params:
            self.muon([p.grad for p in self._muon_params], self.muon_lr_table.gather(0, now))
            if decay is not None:
                ema_update(self._muon_shadow, self._muon_params, decay)
        if decay is not None:
            ema_update(self._shadow_buffers, self._buffers, decay)

    def state_tensors(self) -> list[Tensor]:
        """What it changes and keeps beside the parameters and the EMA: momentum, and gradients that are kept."""
        return [*self.momentum_buffers, *([p.grad for p in self.params] if self.keep_gradients else [])]


@torch.no_grad()
def clip_by_global_norm_(grads: Sequence[Tensor], limit: float) -> None:
    """Scale ``grads`` in place by ``min(1, limit / (norm + 1e-6))``, norm the length of all of them as one vector.

    What :func:`torch.nn.utils.clip_grad_norm_` does, in the same few operations on every device; the host reads
    nothing. As there, a gradient that is not finite stays or becomes NaN, and the weights with it.

    Args:
        grads: floating-point tensors on one device, at least one.
        limit: more than 0.
    """
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
    torch._foreach_mul_(grads, (limit / (norm + 1e-6)).clamp(max=1.0))
