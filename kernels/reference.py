"""Textbook versions of the ops, with the signatures of the public functions: the truth in tests, in any dtype.

Written from the formulas, from elementary operations only, with nothing shared with the implementations they judge.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .conv_norm import ConvNorm


def squeeze_excite(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    """Hu et al., arXiv 1709.01507, equations 2 to 4. Must move: read x, write y."""
    n, c, h, w = x.shape
    squeezed = x.sum(dim=3).sum(dim=2) / (h * w)
    hidden = (squeezed @ w1.T + b1).clamp_min(0)
    gate = 1 / (1 + torch.exp(-(hidden @ w2.T + b2)))
    return x * gate.reshape(n, c, 1, 1)


def squeeze_excite_residual(
    x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, shortcut: Tensor, keep_scale: Tensor | None = None
) -> Tensor:
    """``relu(shortcut + keep_scale[n] * squeeze_excite(x))``. Must move: read x and shortcut, write y."""
    branch = squeeze_excite(x, w1, b1, w2, b2)
    if keep_scale is not None:
        branch = branch * keep_scale.reshape(-1, 1, 1, 1)
    return (shortcut + branch).clamp_min(0)


def batch_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    momentum: float = 0.1,
    eps: float = 1e-5,
    relu: bool = False,
) -> Tensor:
    """Ioffe & Szegedy, arXiv 1502.03167, algorithm 1. Must move: read x, write y; to read x once it would have to fit
    a cache, so twice."""
    n, c, h, w = x.shape
    count = n * h * w
    mean = x.sum(dim=(0, 2, 3)) / count
    centred = x - mean.reshape(1, c, 1, 1)
    variance = (centred * centred).sum(dim=(0, 2, 3)) / count
    with torch.no_grad():
        running_mean.copy_((1 - momentum) * running_mean + momentum * mean)
        running_var.copy_((1 - momentum) * running_var + momentum * variance * count / (count - 1))
    y = centred * (weight / torch.sqrt(variance + eps)).reshape(1, c, 1, 1) + bias.reshape(1, c, 1, 1)
    return y.clamp_min(0) if relu else y


def batch_norm_squeeze_excite_residual(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    shortcut: Tensor,
    keep_scale: Tensor | None = None,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """The two in turn. Must move: read x (twice, as batch norm) and shortcut, write y."""
    x = batch_norm(x, weight, bias, running_mean, running_var, momentum, eps)
    return squeeze_excite_residual(x, w1, b1, w2, b2, shortcut, keep_scale)


def label_smoothed_cross_entropy(
    logits: Tensor, target: Tensor, smoothing: float = 0.0, reduction: str = "mean"
) -> tuple[Tensor, Tensor]:
    """Szegedy et al., arXiv 1512.00567, section 7. Must move: read the logits, write their gradient."""
    n, c = logits.shape
    if target.is_floating_point():
        probabilities, labels = target.to(logits.dtype), target.max(dim=1).indices if n else target.new_zeros(0).long()
    else:
        classes = torch.arange(c, device=logits.device)
        probabilities, labels = (target[:, None] == classes).to(logits.dtype), target
    smoothed = (1 - smoothing) * probabilities + smoothing / c
    log_normaliser = torch.log(torch.exp(logits - logits.amax(dim=1, keepdim=True)).sum(dim=1, keepdim=True))
    log_probabilities = logits - logits.amax(dim=1, keepdim=True) - log_normaliser
    rows = -(smoothed * log_probabilities).sum(dim=1)
    predicted = logits.max(dim=1).indices if n else labels
    correct = (predicted == labels).sum()
    if reduction == "none":
        return rows, correct
    return rows.sum() / (max(n, 1) if reduction == "mean" else 1), correct


def ema_update(shadow: Sequence[Tensor], params: Sequence[Tensor], decay: Tensor) -> None:
    """``shadow = decay * shadow + (1 - decay) * param``. Must move 12 bytes a float32 parameter."""
    for s, p in zip(shadow, params, strict=True):
        s.copy_(decay * s + (1 - decay) * p)


def sgd_ema_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    shadow: Sequence[Tensor] | None,
    lr: Tensor,
    momentum: float,
    weight_decay: float | Sequence[float],
    decay: Tensor | None,
    nesterov: bool = True,
    *,
    copies: Sequence[Tensor] | None = None,
) -> None:
    """Sutskever et al. 2013 in the form of ``torch.optim.SGD``. Must move 28 bytes a float32 parameter; with bfloat16
    copies, whose gradients are bfloat16, 28 too."""
    decays = [weight_decay] * len(params) if isinstance(weight_decay, int | float) else weight_decay
    for p, g, m, wd in zip(params, grads, momentum_buffers, decays, strict=True):
        g = g + wd * p
        m.copy_(momentum * m + g)
        p.copy_(p - lr * (g + momentum * m if nesterov else m))
    if shadow is not None and decay is not None:
        ema_update(shadow, params, decay)
    for c, p in zip(copies or [], params, strict=copies is not None):
        c.copy_(p)


def conv_batch_norm_relu(x: Tensor, layers: Sequence[ConvNorm], momentum: float = 0.1, eps: float = 1e-5) -> Tensor:
    """``relu(batch_norm(conv(x)))`` for each layer. Must move: read x, write the last y, if all between fits a cache,
    which it does not: so each convolution's output once each way."""
    for layer in layers:
        x = batch_norm(_conv(x, layer), *layer[1:5], momentum, eps, relu=True)
    return x


def bottleneck(
    x: Tensor,
    layers: Sequence[ConvNorm],
    squeeze_excite: Sequence[Tensor] | None = None,
    shortcut: ConvNorm | None = None,
    pool: int = 1,
    keep_scale: Tensor | None = None,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """He et al., arXiv 1512.03385, figure 5, with He et al., arXiv 1812.01187, figure 2 c (ResNet-D)."""
    branch = _conv(conv_batch_norm_relu(x, layers[:2], momentum, eps), layers[2])
    other = x
    if shortcut is not None:
        n, c, h, w = x.shape
        rows, columns = -(-h // pool), -(-w // pool)
        squares = [
            x[:, :, i * pool : (i + 1) * pool, j * pool : (j + 1) * pool].mean(dim=(2, 3))
            for i in range(rows)
            for j in range(columns)
        ]
        other = torch.stack(squares, dim=2).reshape(n, c, rows, columns)
        other = batch_norm(_conv(other, shortcut), *shortcut[1:5], momentum, eps)
    if squeeze_excite is not None:
        return batch_norm_squeeze_excite_residual(
            branch, *layers[2][1:5], *squeeze_excite, other, keep_scale, momentum, eps
        )
    branch = batch_norm(branch, *layers[2][1:5], momentum, eps)
    if keep_scale is not None:
        branch = branch * keep_scale.reshape(-1, 1, 1, 1)
    return (other + branch).clamp_min(0)


def _conv(x: Tensor, layer: ConvNorm) -> Tensor:
    """A sum over the taps of shifted maps."""
    n, _, h, w = x.shape
    outputs, _, kernel, _ = layer.weight.shape
    reach, stride = kernel // 2, layer.stride
    rows, columns = (h - 1) // stride + 1, (w - 1) // stride + 1
    padded = torch.nn.functional.pad(x, (reach,) * 4)
    y = torch.zeros(n, outputs, rows, columns, dtype=x.dtype)
    for i in range(kernel):
        for j in range(kernel):
            seen = padded[:, :, i : i + stride * (rows - 1) + 1 : stride, j : j + stride * (columns - 1) + 1 : stride]
            y = y + torch.einsum("nchw,oc->nohw", seen, layer.weight[:, :, i, j])
    return y
