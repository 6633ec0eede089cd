"""Label-smoothed cross-entropy (Szegedy et al., arXiv 1512.00567) that also counts the correct predictions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import choose

REDUCTIONS = ("none", "mean", "sum")


def label_smoothed_cross_entropy(
    logits: Tensor, target: Tensor, smoothing: float = 0.0, reduction: str = "mean", *, impl: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Cross-entropy against ``(1 - smoothing) * onehot(target) + smoothing / C``, with the number of correct rows.

    Args:
        logits: (N, C) floating point, C >= 1. The arithmetic is done in float32 at least.
        target: (N,) int64 class indices in [0, C), or (N, C) floating-point class probabilities (mixup, cutmix).
        smoothing: in [0, 1].
        reduction: ``"mean"`` over rows (0 for an empty batch, so that a sum over batches stays finite), ``"sum"``, or
            ``"none"``.

    Returns:
        ``(loss, correct)``: loss is () or, for ``"none"``, (N,), float32 (float64 for float64 logits); ``correct`` is
        () int64, the rows whose largest logit is the target's class, and has no gradient.

    Raises:
        ValueError: a shape, dtype or number does not fit. Class indices are checked where data enters the program,
            not here; one outside [0, C) raises ``IndexError`` on the CPU.
    """
    if logits.dim() != 2 or logits.shape[1] < 1 or not logits.is_floating_point():
        raise ValueError(
            f"logits: expected floating point (N, C) with C >= 1; got {logits.dtype} {tuple(logits.shape)}"
        )
    soft = target.is_floating_point()
    expected = logits.shape if soft else logits.shape[:1]
    if target.shape != expected or not (soft or target.dtype == torch.int64):
        raise ValueError(
            f"target: expected int64 ({logits.shape[0]},) or floating point {tuple(logits.shape)}; "
            f"got {target.dtype} {tuple(target.shape)}"
        )
    if not 0.0 <= smoothing <= 1.0:
        raise ValueError(f"smoothing: expected a number in [0, 1]; got {smoothing}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: expected one of {', '.join(REDUCTIONS)}; got {reduction!r}")
    choose("label_smoothed_cross_entropy", impl)

    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    if soft:
        target = target.to(logits.dtype)
    # F.cross_entropy's own mean of an empty batch is NaN.
    inner = "sum" if reduction == "mean" and logits.shape[0] == 0 else reduction
    loss = F.cross_entropy(logits, target, label_smoothing=smoothing, reduction=inner)
    labels = target.argmax(dim=1) if soft else target
    correct = (logits.detach().argmax(dim=1) == labels).sum()
    return loss, correct
