"""What the operations on whole parts of the network are given: convolutions, each with a batch norm after it."""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor


class ConvNorm(NamedTuple):
    """A convolution and the batch norm after it.

    Attributes:
        weight: (outputs, inputs, kernel, kernel), kernel 1 or 3; the padding is ``kernel // 2``.
        gamma, beta, running_mean, running_var: (outputs,), the batch norm's; the last two are moved in place.
        stride: of the convolution, 1 or 2.
    """

    weight: Tensor
    gamma: Tensor
    beta: Tensor
    running_mean: Tensor
    running_var: Tensor
    stride: int = 1


def pooled(x: Tensor, pool: int) -> Tensor:
    """The means of squares of ``pool`` x ``pool`` pixels, and at the edges of what is there."""
    # ceil_mode keeps a 1-pixel map alive and count_include_pad=False keeps its mean right.
    return x if pool == 1 else F.avg_pool2d(x, pool, pool, ceil_mode=True, count_include_pad=False)
