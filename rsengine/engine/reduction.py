"""The gradients of several processes as one: a flat buffer whose slices they are, and its all-reduce.

Every process computes the gradient of its part of a batch, already divided by the size of the whole, so their sum is
that of the whole batch, and one all-reduce of one buffer gives it to all of them with the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rsengine.parallel.ranks import Ranks

ALIGNMENT = 256  # bytes at which a slice begins, as PyTorch's own tensors do


class GradientReduction:
    """The gradients of ``leaves``, in one flat buffer a dtype: one in all, or one beside that of 16-bit copies.

    Args:
        leaves: whose ``grad`` become slices of the buffers, with the strides of the leaves.
        buffers: of the batch norms, floating point, float32 as a rule: each process moves its own by the statistics of
            its part of the batch, and :meth:`reduce` makes them the mean over the processes, so that all have the same
            network. Empty where they are the same in any case.
        wire: the dtype in which gradients are sent; None: their own.
    """

    def __init__(
        self, leaves: Sequence[Tensor], buffers: Sequence[Tensor], ranks: Ranks, wire: torch.dtype | None = None
    ) -> None:
        self.leaves, self.buffers, self.ranks, self.wire = list(leaves), list(buffers), ranks, wire
        self.flat: list[Tensor] = []
        self._slices: list[Tensor] = [torch.empty(0)] * len(self.leaves)
        for dtype in dict.fromkeys(leaf.dtype for leaf in self.leaves):
            step = ALIGNMENT // dtype.itemsize
            places, length = {}, 0
            for i, leaf in enumerate(self.leaves):
                if leaf.dtype == dtype:
                    places[i] = length
                    length += -(-leaf.numel() // step) * step
            flat = torch.zeros(length, dtype=dtype, device=self.leaves[0].device)
            for i, start in places.items():
                leaf = self.leaves[i]
                self._slices[i] = flat.as_strided(leaf.shape, leaf.stride(), start)
            self.flat.append(flat)

    @property
    def nbytes(self) -> int:
        """What each process sends and receives the sums of in a step, in bytes, without the batch norms' averages."""
        return sum(flat.numel() * (self.wire or flat.dtype).itemsize for flat in self.flat)

    def clear(self) -> None:
        """Make every gradient zero, so that a backward pass adds to it in place."""
        for flat in self.flat:
            flat.zero_()
        for leaf, piece in zip(self.leaves, self._slices, strict=True):
            leaf.grad = piece

    @torch.no_grad()
    def reduce(self) -> None:
        """Make the gradients those of the whole batch, and the averages of the batch norms those of all processes."""
        for flat in self.flat:
            if self.wire is None or flat.dtype == self.wire:
                self.ranks.sum_(flat)
            else:
                flat.copy_(self.ranks.sum_(flat.to(self.wire)))
        if self.buffers:
            averages = torch.cat([buffer.flatten() for buffer in self.buffers])
            self.ranks.sum_(averages).mul_(1 / self.ranks.size)
            pieces = averages.split([buffer.numel() for buffer in self.buffers])
            torch._foreach_copy_(self.buffers, [p.view_as(b) for p, b in zip(pieces, self.buffers, strict=True)])
