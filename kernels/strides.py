"""How the elements of tensors lie in memory: for code that walks the memory of several tensors together."""

from __future__ import annotations

import torch
from torch import Tensor


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill their storage without a gap, in one of the two orders that weights have."""
    return tensor.is_contiguous() or (tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last))


def same_order(*tensors: Tensor) -> bool:
    """Whether elements at equal indices lie at equal places, in tensors of one shape."""
    strides = [tensor.stride() for tensor in tensors]
    return all(each == strides[0] for each in strides) or all(
        size == 1 or len(set(along)) == 1
        for size, along in zip(tensors[0].shape, zip(*strides, strict=True), strict=True)
    )
