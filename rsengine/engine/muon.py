"""Muon for convolution weights: orthogonalised momentum, with the weights kept on spheres.

A weight is a matrix with a row for each output channel. Its momentum is replaced by the nearest orthogonal matrix,
which Newton-Schulz iterations approximate (Jordan et al., "Muon", 2024, https://kellerjordan.github.io/posts/muon), and
moves the weight by a given fraction of its length; the weight is then put back on the sphere where it was initialised.
Every convolution of this family is followed by batch norm, so the length of its weight has no effect on the output:
held constant, it makes the learning rate the angle of a step, and needs no weight decay.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# The authors' coefficients, and three iterations instead of five, which cost less and were no worse in a trial
# (docs/speedrun.md, attempt 35). Singular values from 0.018 to 1 of the length of a matrix end between 0.68 and 1.21;
# smaller ones grow 41 times at most.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 3


class Muon:
    """The update of some convolution weights: ``muon(grads, lr)``. A tensor program: nothing waits for the device.

    Args:
        params: (out, in, height, width) float32 weights on one device, changed in place.
        buffers: the momentum of each, zero at first, changed in place.
        momentum: in [0, 1).
        nesterov: look ahead by one step of momentum.
        dtype: of the Newton-Schulz products.

    Attributes:
        lengths: (params,) float32, the radii of the spheres; those of a new network until :meth:`set_lengths`.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        buffers: Sequence[Tensor],
        momentum: float,
        nesterov: bool = True,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.params, self.buffers = list(params), list(buffers)
        self.momentum, self.nesterov, self.dtype = momentum, nesterov, dtype
        groups: dict[tuple[int, int], list[int]] = {}  # weights of one shape are orthogonalised together
        for i, p in enumerate(self.params):
            groups.setdefault(tuple(sorted(matrix(p).shape)), []).append(i)
        self._groups = list(groups.values())
        # He initialisation by fan-out: variance 2 / (out * height * width), so a length of sqrt(2 * in).
        lengths = [(2 * p.shape[1]) ** 0.5 for p in self.params]
        device = self.params[0].device if self.params else None
        self.lengths = torch.tensor(lengths, dtype=torch.float32, device=device)
        self._group_lengths = [
            torch.tensor([lengths[i] for i in members], dtype=torch.float32, device=device)[:, None, None]
            for members in self._groups
        ]

    @torch.no_grad()
    def set_lengths(self, lengths: Tensor | None = None) -> None:
        """Keep each weight at one of ``lengths``, (params,) float32; without them at the length that it has now."""
        if lengths is not None:
            self.lengths.copy_(lengths)
        elif self.params:
            self.lengths.copy_(torch.stack(torch._foreach_norm(self.params)))
        for members, group in zip(self._groups, self._group_lengths, strict=True):
            group.copy_(self.lengths[members][:, None, None])

    @torch.no_grad()
    def __call__(self, grads: Sequence[Tensor], lr: Tensor) -> None:
        """One step. ``lr``: () or (1,) float32, the length of the step over the length of the weight."""
        torch._foreach_mul_(self.buffers, self.momentum)
        torch._foreach_add_(self.buffers, list(grads))
        directions = self.buffers
        if self.nesterov:
            directions = torch._foreach_mul(self.buffers, self.momentum)
            torch._foreach_add_(directions, list(grads))
        updates: list[Tensor] = [torch.empty(0)] * len(self.params)
        for members, lengths in zip(self._groups, self._group_lengths, strict=True):
            matrices = [matrix(directions[i]) for i in members]
            matrices = [m if m.shape[0] <= m.shape[1] else m.T for m in matrices]
            stacked = orthogonalised(torch.stack(matrices).to(self.dtype)).float()
            norms = torch.linalg.vector_norm(stacked, dim=(1, 2), keepdim=True).clamp(min=1e-12)
            for i, update in zip(members, stacked * (lr * lengths / norms), strict=True):
                updates[i] = _like(update, self.params[i])
        torch._foreach_sub_(self.params, updates)
        norms = torch.stack(torch._foreach_norm(self.params)).clamp(min=1e-12)
        torch._foreach_mul_(self.params, (self.lengths / norms).unbind())


def matrix(weight: Tensor) -> Tensor:
    """(out, in, height, width) as (out, height * width * in): no copy where the weight is channels_last."""
    return weight.permute(0, 2, 3, 1).reshape(weight.shape[0], -1)


def orthogonalised(matrices: Tensor, iterations: int = ITERATIONS) -> Tensor:
    """The orthogonal factor U V' of each matrix U S V', approximately: U T V' with the T that COEFFICIENTS makes of S.

    Args:
        matrices: (N, rows, columns) floating point, rows <= columns.
    """
    a, b, c = COEFFICIENTS
    x = matrices / (torch.linalg.vector_norm(matrices, dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(iterations):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x


def _like(update: Tensor, weight: Tensor) -> Tensor:
    """The matrix of a weight, or its transpose where that has fewer rows, in the shape of the weight."""
    out, channels, height, width = weight.shape
    if out > channels * height * width:
        update = update.T
    return update.reshape(out, height, width, channels).permute(0, 3, 1, 2)
