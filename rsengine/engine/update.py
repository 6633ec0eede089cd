"""What a step does with its gradients: SGD, or Muon for the convolutions, then the EMA of weights and buffers.

Parameters that take no gradients, and buffers of layers in evaluation mode, are left alone, and their EMA too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from rsengine.config import Recipe
from rsengine.engine.muon import Muon
from rsengine.engine.reduction import GradientReduction
from rsengine.kernels import ema_update, sgd_ema_step
from rsengine.model import HEAD
from rsengine.parallel.ranks import ALONE, Ranks
from rsengine.schedule import ema_decay_table, learning_rate_table

# What train.all_reduce may be: the dtype in which gradients are sent.
WIRE_DTYPES = {"auto": None, "fp32": torch.float32, "bf16": torch.bfloat16}


class Group(NamedTuple):
    """Parameters that are updated together. Each list has one entry for each of them, or is empty."""

    params: list[Tensor]
    leaves: list[Tensor]  # what gets the gradients: the copies if there are any, else the parameters
    momentum_buffers: list[Tensor]
    weight_decay: list[float]
    shadow: list[Tensor]
    copies: list[Tensor]

    @property
    def grads(self) -> list[Tensor]:
        return [leaf.grad for leaf in self.leaves]


class Update:
    """The optimiser step of a recipe, and its EMA. Every rate is read from a table on the device.

    Args:
        ema_model: the same network, to hold the EMA; ``None`` for none.
        dtype: of Muon's Newton-Schulz products.
        copy_dtype: the dtype in which to keep a copy of each weight and bias of the convolutions and linear layers, for
            the forward pass to use; ``None`` for no copies.
        ranks: the processes that share each batch. The gradients are those of all of them together.

    Attributes:
        names, params, momentum_buffers, weight_decay: of every parameter of ``model`` that takes a gradient, in its
            order.
        copies: by the name of the parameter; empty for none. The backward pass leaves their gradients on them.
        shadow: the EMA of ``params``, or ``None``.
        reduction: of the gradients over the processes; ``None`` for one process.
        learning_rates: (steps,) float64, SGD's, on the host; ``lr_table`` is its copy on the device.
    """

    def __init__(
        self,
        model: nn.Module,
        ema_model: nn.Module | None,
        recipe: Recipe,
        steps_per_epoch: int,
        *,
        dtype: torch.dtype,
        copy_dtype: torch.dtype | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        optimizer, schedule = recipe.optimizer, recipe.schedule
        self.momentum, self.nesterov, self.clip_norm = optimizer.momentum, optimizer.nesterov, optimizer.clip_norm
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.names, self.params = list(trained), list(trained.values())
        self.momentum_buffers = [torch.zeros_like(p) for p in self.params]
        # Convolution and linear weights have two dimensions or more; BN parameters and biases have one.
        exempt = not optimizer.decay_bn_and_bias
        self.weight_decay = [0.0 if exempt and p.dim() < 2 else optimizer.weight_decay for p in self.params]
        self.copies: dict[str, Tensor] = {}
        if copy_dtype is not None:
            kinds = (nn.Conv2d, nn.Linear)
            copied = {p for module in model.modules() if isinstance(module, kinds) for p in module.parameters()}
            self.copies = {
                name: p.detach().to(copy_dtype).requires_grad_(p.requires_grad)
                for name, p in model.named_parameters()
                if p in copied
            }
        self._copied = [p for name, p in model.named_parameters() if name in self.copies]

        # num_batches_tracked stays out: it has no effect while BN has a fixed momentum. So do frozen layers.
        moving = [name for name, module in model.named_modules() if module.training]
        self._buffers = _averages(model, moving)
        self.shadow: list[Tensor] | None = None
        if ema_model is not None:
            self.shadow = [ema_model.get_parameter(name) for name in trained]
            self._shadow_buffers = _averages(ema_model, moving)

        # Picked once: the lists that each optimiser works on. A call of the SGD step has one rate, and copies or none.
        self._leaves = [self.copies.get(name, p) for name, p in trained.items()]
        self.reduction: GradientReduction | None = None
        if ranks.size > 1:
            averages = self._buffers if recipe.train.batch_norm == "local" else []
            wire = WIRE_DTYPES[recipe.train.all_reduce]
            self.reduction = GradientReduction(self._leaves, averages, ranks, wire)
        is_muons = [optimizer.name == "muon" and p.dim() == 4 for p in self.params]
        has_copy = [leaf is not p for leaf, p in zip(self._leaves, self.params, strict=True)]
        is_slow = [optimizer.body_rate != 1 and name.partition(".")[0] != HEAD for name in trained]
        kinds = list(zip(is_muons, is_slow, has_copy, strict=True))
        self._by_muon = self._group([i for i, chosen in enumerate(is_muons) if chosen])
        self._by_sgd = [
            (slow, self._group([i for i, kind in enumerate(kinds) if kind == (False, slow, copied)]))
            for slow in (False, True)
            for copied in (False, True)
            if (False, slow, copied) in kinds
        ]
        self.muon = Muon(
            self._by_muon.params, self._by_muon.momentum_buffers, optimizer.muon_momentum, self.nesterov, dtype
        )

        self.learning_rates = learning_rate_table(
            **asdict(schedule), epochs=recipe.train.epochs, steps_per_epoch=steps_per_epoch
        )
        body_rates = self.learning_rates * optimizer.body_rate
        muon_rates = body_rates * (
            optimizer.muon_learning_rate / schedule.learning_rate if schedule.learning_rate else 0.0
        )
        decays = ema_decay_table(recipe.ema.decay, len(self.learning_rates), warmup=recipe.ema.warmup)
        device = self.params[0].device
        self.lr_table, self.body_lr_table, self.muon_lr_table, self.decay_table = (
            torch.tensor(table, dtype=torch.float32, device=device)
            for table in (self.learning_rates, body_rates, muon_rates, decays)
        )

    def _group(self, places: Sequence[int]) -> Group:
        return Group(
            params=[self.params[i] for i in places],
            leaves=[self._leaves[i] for i in places],
            momentum_buffers=[self.momentum_buffers[i] for i in places],
            weight_decay=[self.weight_decay[i] for i in places],
            shadow=[self.shadow[i] for i in places] if self.shadow is not None else [],
            copies=[self._leaves[i].detach() for i in places if self._leaves[i] is not self.params[i]],
        )

    def clear_gradients(self) -> None:
        """Drop every gradient, so that the backward pass writes each one once, into new memory.

        A captured step writes each gradient to the same memory at every replay.
        """
        for leaf in self._leaves:
            leaf.grad = None

    def __call__(self, now: Tensor) -> None:
        """Update every parameter by its gradient. ``now``: () int64, the step's place in the tables."""
        if self.reduction is not None:
            with record_function("all-reduce"):
                self.reduction.reduce()
        if self.clip_norm:
            clip_by_global_norm_([leaf.grad for leaf in self._leaves], self.clip_norm)
        with record_function("counters"):
            lr = self.lr_table.gather(0, now)
            body_lr = self.body_lr_table.gather(0, now) if any(slow for slow, _ in self._by_sgd) else lr
            decay = None if self.shadow is None else self.decay_table.gather(0, now)
            muon_lr = self.muon_lr_table.gather(0, now) if self._by_muon.params else None
        for slow, group in self._by_sgd:
            sgd_ema_step(
                group.params,
                group.grads,
                group.momentum_buffers,
                group.shadow if decay is not None else None,
                body_lr if slow else lr,
                self.momentum,
                group.weight_decay,
                decay,
                self.nesterov,
                copies=group.copies or None,
            )
        if muon_lr is not None:
            self._muon_step(self._by_muon, muon_lr, decay)
        if decay is not None:
            ema_update(self._shadow_buffers, self._buffers, decay)

    def _muon_step(self, group: Group, lr: Tensor, decay: Tensor | None) -> None:
        grads = group.grads
        if group.copies:
            grads = [torch.empty_like(p) for p in group.params]
            torch._foreach_copy_(grads, group.grads)
        self.muon(grads, lr)
        if group.copies:
            torch._foreach_copy_(group.copies, [p.detach() for p in group.params])
        if decay is not None:
            ema_update(group.shadow, group.params, decay)

    def without_gradient(self) -> list[str]:
        """The names of the parameters whose gradient in the last step was exactly zero. Waits for the device.

        The gradients stay where the step wrote them until the next one; those of a captured step are in its graph's
        memory, which each replay writes anew.
        """
        largest = torch._foreach_norm([leaf.grad for leaf in self._leaves], torch.inf)
        is_zero = (torch.stack([norm.float() for norm in largest]) == 0).tolist()
        return [name for name, zero in zip(self.names, is_zero, strict=True) if zero]

    @torch.no_grad()
    def refresh_copies(self) -> None:
        """Update the copies after something else has changed the parameters."""
        if self.copies:
            torch._foreach_copy_([copy.detach() for copy in self.copies.values()], self._copied)

    def state_tensors(self) -> list[Tensor]:
        """The tensors that an update changes and keeps, beside the parameters and the EMA: momentum and copies."""
        return [*self.momentum_buffers, *(copy.detach() for copy in self.copies.values())]


def _averages(model: nn.Module, names: Sequence[str]) -> list[Tensor]:
    """The floating-point buffers of the modules ``names``: running averages of batch norms."""
    found = [b for name in names for b in model.get_submodule(name).buffers(recurse=False)]
    return [b for b in found if b.is_floating_point()]


@torch.no_grad()
def clip_by_global_norm_(grads: Sequence[Tensor], limit: float) -> None:
    """Scale ``grads`` in place by ``min(1, limit / (norm + 1e-6))``, norm the length of all of them as one vector.

    What :func:`torch.nn.utils.clip_grad_norm_` does, in the same few operations on every device; the host reads
    nothing. As there, a gradient that is not finite stays or becomes NaN, and the weights with it.

    Args:
        grads: floating-point tensors on one device, at least one. Their norms are computed in float32 at least.
        limit: more than 0.
    """
    by_dtype = [[g for g in grads if g.dtype == dtype] for dtype in dict.fromkeys(g.dtype for g in grads)]
    norms = [torch._foreach_norm(same, 2, torch.promote_types(same[0].dtype, torch.float32)) for same in by_dtype]
    norm = torch.linalg.vector_norm(torch.stack([n for each in norms for n in each]))
    for same in by_dtype:
        torch._foreach_mul_(same, (limit / (norm + 1e-6)).clamp(max=1.0))
