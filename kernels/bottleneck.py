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
from .dispatch import check_memory, choose_blocks
from .squeeze_excitation import check_kind, check_weights


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
        layers: the three convolutions of the branch.
        squeeze_excite: ``w1, b1, w2, b2`` as in :func:`rsengine.kernels.squeeze_excite_residual`; ``None``: none.
        shortcut: a convolution with batch norm; ``None``: x itself, which then has the shape of the branch.
        pool: the convolution of the shortcut reads the means of squares of ``pool`` x ``pool`` pixels, at the edges of
            what is there.
        keep_scale: (N,) floating point, of stochastic depth; ``None``: 1.
        momentum, eps, impl: as in :func:`conv_batch_norm_relu`.

    Returns:
        (N, outputs, H', W') in the dtype of ``x``, or of autocast.

    Raises:
        ValueError, RuntimeError: as :func:`conv_batch_norm_relu` does; branch and shortcut differ in shape.
    """
    all_layers = [*layers, shortcut] if shortcut else list(layers)
    _check_bottleneck(x, layers, squeeze_excite, shortcut, pool, keep_scale)
    squeeze_excite = squeeze_excite or None
    tensors = [t for layer in all_layers for t in layer[:5]] + list(squeeze_excite or ())
    if choose_blocks("bottleneck", impl, x, tensors) == "native":
        from .native.blocks import Bottleneck

        flat = [t for layer in all_layers for t in layer[:3]] + list(squeeze_excite or ())
        return Bottleneck.apply(x, all_layers, squeeze_excite, pool, keep_scale, momentum, eps, *flat)
    last = layers[2]
    branch = _conv(conv_batch_norm_relu(x, layers[:2], momentum, eps, impl="eager"), last)
    if shortcut:
        other = batch_norm(_conv(pooled(x, pool), shortcut), *shortcut[1:5], momentum, eps)
    else:
        other = x.to(branch.dtype)
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


def _check_bottleneck(
    x: Tensor,
    layers: Sequence[ConvNorm],
    squeeze_excite: Sequence[Tensor] | None,
    shortcut: ConvNorm | None,
    pool: int,
    keep_scale: Tensor | None,
) -> None:
    """C would read and write beside the tensors where these do not fit together."""
    if len(layers) != 3:
        raise ValueError(f"layers: expected three; got {len(layers)}")
    _check(x, layers)
    if type(pool) is not int or pool < 1:
        raise ValueError(f"pool: expected an integer >= 1; got {pool!r}")
    shape, other = _outputs(tuple(x.shape), layers), tuple(x.shape)
    if shortcut is not None:
        _check_layers(x.shape[1], [shortcut], "shortcut")
        pooled_size = (-(-size // pool) for size in other[2:])
        other = _outputs((*other[:2], *pooled_size), [shortcut])
    if other != shape:
        raise ValueError(f"shortcut: expected the shape of the branch, {shape}; got {other}")
    if keep_scale is not None:
        if tuple(keep_scale.shape) != shape[:1]:
            raise ValueError(f"keep_scale: expected ({shape[0]},); got {tuple(keep_scale.shape)}")
        check_kind(x, keep_scale=keep_scale)
    if squeeze_excite:
        if len(squeeze_excite) != 4:
            raise ValueError(f"squeeze_excite: expected w1, b1, w2 and b2; got {len(squeeze_excite)} tensors")
        check_weights(x, shape[1], *squeeze_excite)


def _outputs(shape: tuple[int, ...], layers: Sequence[ConvNorm]) -> tuple[int, ...]:
    """The shape of what ``layers`` make of maps of this shape."""
    for layer in layers:
        shape = (shape[0], layer.weight.shape[0], *((size - 1) // layer.stride + 1 for size in shape[2:]))
    return shape


def _check(x: Tensor, layers: Sequence[ConvNorm]) -> None:
    if x.dim() != 4 or not x.is_floating_point():
        raise ValueError(f"x: expected floating point (N, C, H, W); got {x.dtype} {tuple(x.shape)}")
    check_memory(x=x)
    if not layers:
        raise ValueError("layers: expected at least one; got none")
    _check_layers(x.shape[1], layers)


def _check_layers(channels: int, layers: Sequence[ConvNorm], name: str = "") -> None:
    """Refuse layers that do not follow each other from maps of so many channels. ``name``: of the only one."""
    for i, layer in enumerate(layers):
        place = name or f"layers[{i}]"
        if not isinstance(layer, ConvNorm):
            raise ValueError(f"{place}: expected a ConvNorm; got {type(layer).__name__}")
        shape = tuple(layer.weight.shape)
        fits = len(shape) == 4 and shape[0] and shape[1] == channels and shape[2:] in ((1, 1), (3, 3))
        if not fits or layer.stride not in (1, 2):
            raise ValueError(
                f"{place}: expected a weight (outputs, {channels}, k, k) with k 1 or 3, and stride 1 or 2; "
                f"got {shape} and {layer.stride}"
            )
        channels = shape[0]
        for vector, tensor in zip(ConvNorm._fields[1:5], layer[1:5], strict=True):
            shape = tuple(tensor.shape) if isinstance(tensor, Tensor) else tensor
            if shape != (channels,):
                raise ValueError(f"{place}.{vector}: expected ({channels},); got {shape}")
