"""The gradients of several processes as one: a flat buffer whose slices they are, and its all-reduce.

Every process computes the gradient of its part of a batch, already divided by the size of the whole, so their sum is
that of the whole batch, and one all-reduce of one buffer gives it to all of them with the same bits.

The backward pass writes each gradient once, into new memory, and one operation copies all of them into the buffer. Were
they slices of it beforehand, the buffer would have to be zeroed and every gradient added to it: an operation for each
parameter, and twice the bytes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rsengine.parallel.ranks import Ranks
from rsengine.parallel.shared import SharedSum, shared_sum

ALIGNMENT = 256  # bytes at which a slice begins, as PyTorch's own tensors do


class GradientReduction:
    """The gradients of ``leaves``, in one flat buffer a dtype: one in all, or one beside that of 16-bit copies.

    On the CPU of one machine the buffers are in memory that the processes share, and are summed there; otherwise gloo
    or NCCL sends them.

    Args:
        leaves: whose ``grad`` :meth:`reduce` makes slices of the buffers, with the strides of the leaves.
        buffers: of the batch norms, floating point, float32 as a rule: each process moves its own by the statistics of
            its part of the batch, and :meth:`reduce` makes them the mean over the processes, so that all have the same
            network. Empty where they are the same in any case.
        wire: the dtype in which gradients are sent; None: their own.
    """

    def __init__(
        self, leaves: Sequence[Tensor], buffers: Sequence[Tensor], ranks: Ranks, wire: torch.dtype | None = None
    ) -> None:
        self.buffers, self.ranks = list(buffers), ranks
        self._parts = [
            _Flat([leaf for leaf in leaves if leaf.dtype == dtype], ranks, wire or dtype)
            for dtype in dict.fromkeys(leaf.dtype for leaf in leaves)
        ]

    @property
    def flat(self) -> list[Tensor]:
        """The buffers."""
        return [part.tensor for part in self._parts]

    @property
    def nbytes(self) -> int:
        """What each process gives to the sums of a step, in bytes, without the batch norms' averages."""
        return sum(part.tensor.numel() * part.wire.itemsize for part in self._parts)

    @property
    def is_shared(self) -> bool:
        """Whether gradients are summed in memory that the processes share."""
        return all(part.shared is not None for part in self._parts)

    @torch.no_grad()
    def reduce(self) -> None:
        """Make the gradients those of the whole batch, and the averages of the batch norms those of all processes."""
        for part in self._parts:
            part.reduce()
        if self.buffers:
            averages = torch.cat([buffer.flatten() for buffer in self.buffers])
            self.ranks.sum_(averages).mul_(1 / self.ranks.size)
            pieces = averages.split([buffer.numel() for buffer in self.buffers])
            torch._foreach_copy_(self.buffers, [p.view_as(b) for p, b in zip(pieces, self.buffers, strict=True)])


class _Flat:
    """The gradients of ``leaves``, all of one dtype, in one buffer.

    Attributes:
        tensor: the buffer. Between the slices, and behind the last one, it is zero.
        shared: where the processes of one machine sum it; None: they send it, in the dtype ``wire``.
    """

    def __init__(self, leaves: list[Tensor], ranks: Ranks, wire: torch.dtype) -> None:
        self.leaves, self.ranks, self.wire = leaves, ranks, wire
        dtype, device = leaves[0].dtype, leaves[0].device
        step = ALIGNMENT // dtype.itemsize
        starts, length = [], 0
        for leaf in leaves:
            starts.append(length)
            length += -(-leaf.numel() // step) * step
        self.shared: SharedSum | None = None
        if device.type == "cpu" and ranks.backend == "gloo" and wire == dtype:
            self.shared = shared_sum(length, dtype, ranks)
        self.tensor = torch.zeros(length, dtype=dtype, device=device) if self.shared is None else self.shared.tensor
        self._slices = [
            self.tensor.as_strided(leaf.shape, leaf.stride(), start) for leaf, start in zip(leaves, starts, strict=True)
        ]

    def reduce(self) -> None:
        torch._foreach_copy_(self._slices, [leaf.grad for leaf in self.leaves])
        if self.shared is not None:
            self.shared.sum_()
        elif self.wire == self.tensor.dtype:
            self.ranks.sum_(self.tensor)
        else:
            self.tensor.copy_(self.ranks.sum_(self.tensor.to(self.wire)))
        for leaf, piece in zip(self.leaves, self._slices, strict=True):
            leaf.grad = piece
