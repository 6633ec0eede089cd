"""Whole parts of the network, for the CPU: a chain of convolutions, each with batch norm and ReLU, and a bottleneck.

In C (``native``), for bfloat16 on processors that multiply matrices of it (AMX, AVX512_BF16), only the outputs of the
convolutions are ever in memory. Each convolution reads its input through the batch norm and ReLU before it and takes
the statistics of the batch norm after it, and its gradients likewise. Maps read or written by a 3x3 convolution with
batch norm and ReLU: forward 2, backward 4; by the library's convolution and the passes of batch norm 5 and 9.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from .batch_normalization import batch_norm
from .block_epilogue import batch_norm_squeeze_excite_residual
from .conv_norm import ConvNorm, pooled
from .dispatch import choose_blocks


def conv_batch_norm_relu(
    x: Tensor, layers: Sequence[ConvNorm], momentum: float = 0.1, eps: float = 1e-5, *, impl: str = "auto"
) -> Tensor:
    """``relu(batch_norm(conv(x)))`` for each layer in turn, in training.

    Args:
        x: (N, C, H, W) floating point.
        layers: at least one. Native takes float32, and runs under autocast in bfloat16.
        momentum, eps: as in :func:`rsengine.kernels.batch_norm`.
        impl: ``"auto"``, ``"native"`` or ``"eager"``.

    Returns:
        (N, outputs, H', W') in the dtype of ``x``, or of autocast.

    Raises:
        ValueError: a shape or ``impl`` does not fit.
        RuntimeError: ``impl="native"`` where it cannot run.
    """
    _check(x, layers)
    if choose_blocks("conv_batch_norm_relu", impl, x, [t for layer in layers for t in layer[:5]]) == "native":
        from .native.blocks import Chain

        return Chain.apply(x, list(layers), momentum, eps, *(t for layer in layers for t in layer[:3]))
    for layer in layers:
        x = batch_norm(_conv(x, layer), *layer[1:5], momentum, eps, relu=True)
    return x


def bottleneck(
    x: Tensor,
    layers: tuple[ConvNorm, ConvNorm, ConvNorm],
    squeeze_excite: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
    shortcut: ConvNorm | None = None,
    pool: int = 1,
    keep_scale: Tensor | None = None,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    impl: str = "auto",
) -> Tensor:
    """The bottleneck of a ResNet-RS in training: ``relu(shortcut(x) + keep_scale * squeeze_excite(branch(x)))``, where
    the branch is three convolutions with batch norm, the first two with ReLU.

    Args:
        x: (N, C, H, W) floating point.
        layers: the convolutions of the branch.
        squeeze_excite: ``w1, b1, w2, b2`` as in :func:`rsengine.kernels.squeeze_excite_residual`; ``None``: none.
        shortcut: a convolution with batch norm; ``None``: x itself.
        pool: the shortcut reads the means of squares of ``pool`` x ``pool`` pixels, at the edges of what is there.
        keep_scale: (N,) float32, of stochastic depth; ``None``: 1.
        momentum, eps, impl: as in :func:`conv_batch_norm_relu`.

    Raises:
        ValueError, RuntimeError: as :func:`conv_batch_norm_relu` does.
    """
    all_layers = [*layers, shortcut] if shortcut else list(layers)
    _check(x, layers)
    tensors = [t for layer in all_layers for t in layer[:5]] + list(squeeze_excite or ())
    if choose_blocks("bottleneck", impl, x, tensors) == "native":
        from .native.blocks import Bottleneck

        flat = [t for layer in all_layers for t in layer[:3]] + list(squeeze_excite or ())
        return Bottleneck.apply(x, all_layers, squeeze_excite, pool, keep_scale, momentum, eps, *flat)
    branch = conv_batch_norm_relu(x, layers[:2], momentum, eps, impl="eager")
    other, last = x, layers[2]
    if shortcut:
        other = batch_norm(_conv(pooled(x, pool), shortcut), *shortcut[1:5], momentum, eps)
    branch = _conv(branch, last)
    if squeeze_excite:
        arguments = *last[1:5], *squeeze_excite, other, keep_scale, momentum, eps
        return batch_norm_squeeze_excite_residual(branch, *arguments)
    branch = batch_norm(branch, *last[1:5], momentum, eps)
    if keep_scale is not None:
        branch = branch * keep_scale.to(branch.dtype)[:, None, None, None]
    return F.relu(branch + other)


def joins(x: Tensor, layers: Sequence[ConvNorm]) -> bool:
    """Whether ``impl="auto"`` chooses ``"native"`` for the functions above, with this input and these layers."""
    return choose_blocks("bottleneck", "auto", x, [t for layer in layers for t in layer[:5]]) == "native"


def _conv(x: Tensor, layer: ConvNorm) -> Tensor:
    return F.conv2d(x, layer.weight, stride=layer.stride, padding=layer.weight.shape[2] // 2)


def _check(x: Tensor, layers: Sequence[ConvNorm]) -> None:
    if x.dim() != 4 or not x.is_floating_point():
        raise ValueError(f"x: expected floating point (N, C, H, W); got {x.dtype} {tuple(x.shape)}")
    channels = x.shape[1]
    for i, layer in enumerate(layers):
        shape = tuple(layer.weight.shape)
        if len(shape) != 4 or shape[1] != channels or shape[2:] not in ((1, 1), (3, 3)) or layer.stride not in (1, 2):
            raise ValueError(
                f"layers[{i}]: expected a weight (outputs, {channels}, k, k) with k 1 or 3, and stride 1 or 2; "
                f"got {shape} and {layer.stride}"
            )
        channels = shape[0]
        for name, tensor in zip(ConvNorm._fields[1:5], layer[1:5], strict=True):
            if tuple(tensor.shape) != (channels,):
                raise ValueError(f"layers[{i}].{name}: expected ({channels},); got {tuple(tensor.shape)}")
