"""Label-smoothed cross-entropy (Szegedy et al., arXiv 1512.00567) that also counts the correct predictions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import check_memory, choose, is_triton_assumed

REDUCTIONS = ("none", "mean", "sum")
NO_INDEX = -(2**63)  # PyTorch's default, -100, would silently skip such rows
# Gradients divided by N fall below float16's range before a loss scale can lift them. Triton's forward pass therefore
# stores float16 gradients undivided (none exceeds 1) and times this; the backward pass applies what is missing.
FLOAT16_SCALE = 4096.0


def label_smoothed_cross_entropy(
    logits: Tensor, target: Tensor, smoothing: float = 0.0, reduction: str = "mean", *, impl: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Cross-entropy against ``(1 - smoothing) * onehot(target) + smoothing / C``, with the number of correct rows.

    Args:
        logits: (N, C) floating point, C >= 1. The arithmetic is done in float32 at least.
        target: (N,) int64 class indices in [0, C), or (N, C) floating-point class probabilities (mixup, cutmix), which
            get no gradient.
        smoothing: in [0, 1].
        reduction: ``"mean"`` over rows (0 for an empty batch, so that a sum over batches stays finite), ``"sum"``, or
            ``"none"``.
        impl: ``"auto"``, ``"eager"`` or ``"triton"``; :func:`rsengine.kernels.explain` says what ``"auto"`` chooses.

    Returns:
        ``(loss, correct)``: loss is () or, for ``"none"``, (N,), float32 (float64 for float64 logits); ``correct`` is
        () int64, the rows whose largest logit (the first of equal ones) is the target's class, and has no gradient.

    Infinite logits give what ``F.cross_entropy`` gives: -inf is probability 0 and makes the loss +inf where the target
    is positive (NaN for a soft target of 0: 0 * inf); a row with +inf or NaN, or of -inf alone, is NaN in loss and
    gradient. Class indices are checked where data enters the program, not here. One outside [0, C) makes its row's loss
    and gradient NaN and counts as wrong with Triton; eager raises ``IndexError`` on the CPU and fails a device-side
    assertion on a GPU.

    Triton computes the gradient in the forward pass, from a copy of logits that are not contiguous. The backward pass
    scales that gradient in place, so a second one through a retained graph raises ``RuntimeError``; so does
    ``create_graph=True``.

    Raises:
        ValueError: a shape, dtype or number does not fit, or ``target`` requires a gradient.
        RuntimeError: ``impl="triton"`` where it cannot run.
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
    if target.requires_grad:
        raise ValueError("target: expected one that requires no gradient; got one that does (use target.detach())")
    check_memory(logits=logits, target=target)
    if choose("label_smoothed_cross_entropy", impl, logits) == "triton":
        needs_grad = torch.is_grad_enabled() and logits.requires_grad
        loss, correct, _ = torch.ops.rsengine.label_smoothed_cross_entropy(
            logits, target, smoothing, reduction, needs_grad
        )
        return loss, correct

    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    if soft:
        target = target.to(logits.dtype)
    # F.cross_entropy's own mean of an empty batch is NaN.
    inner = "sum" if reduction == "mean" and logits.shape[0] == 0 else reduction
    loss = F.cross_entropy(logits, target, ignore_index=NO_INDEX, label_smoothing=smoothing, reduction=inner)
    labels = target.argmax(dim=1) if soft else target
    correct = (logits.detach().argmax(dim=1) == labels).sum()
    return loss, correct


def _gradient_scales(logits: Tensor, reduction: str) -> tuple[float, float]:
    """``(forward, backward)``: what each pass multiplies the summed loss's gradient by, next to the incoming one."""
    mean = 1.0 / logits.shape[0] if reduction == "mean" and logits.shape[0] else 1.0
    return (FLOAT16_SCALE, mean / FLOAT16_SCALE) if logits.dtype == torch.float16 else (mean, 1.0)


@torch.library.custom_op("rsengine::label_smoothed_cross_entropy", mutates_args=())
def _forward(
    logits: Tensor, target: Tensor, smoothing: float, reduction: str, needs_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """``(loss, correct, gradient)``; the gradient is (0,) when none is needed, and has no gradient itself."""
    from .jit import cross_entropy as jit

    scale = _gradient_scales(logits, reduction)[0] if needs_grad else None
    return jit.forward(logits, target, smoothing, reduction, scale)


@_forward.register_fake
def _(logits, target, smoothing, reduction, needs_grad):
    loss = logits.new_empty(logits.shape[:1] if reduction == "none" else (), dtype=torch.float32)
    return loss, logits.new_empty((), dtype=torch.int64), logits.new_empty(logits.shape if needs_grad else (0,))


@torch.library.custom_op("rsengine::scale_gradient_", mutates_args={"gradient"})
def _scale_gradient_(gradient: Tensor, factor: Tensor, remaining: float) -> None:
    """In place, ``gradient *= factor * remaining``. gradient: (N, C); factor: () or (N,)."""
    from .jit import cross_entropy as jit

    jit.scale_(gradient, factor, remaining)


def _save(ctx, inputs, output):
    logits, _, _, reduction, _ = inputs
    _, correct, gradient = output
    ctx.mark_non_differentiable(correct, gradient)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(gradient)
    ctx.remaining = _gradient_scales(logits, reduction)[1]


def _backward(ctx, grad_loss, _grad_correct, _grad_gradient):
    if torch.is_grad_enabled():
        raise RuntimeError("label_smoothed_cross_entropy: Triton's has no second derivative; use impl='eager'")
    if grad_loss is None:
        return None, None, None, None, None
    (gradient,) = ctx.saved_tensors
    # A tracer's: the program it writes must not change what it saved. One that only watches gets the GPU's operator.
    if type(gradient) is not Tensor and not is_triton_assumed():
        factor = grad_loss * ctx.remaining
        scaled = gradient.float() * (factor if factor.dim() == 0 else factor[:, None])
        return scaled.to(gradient.dtype), None, None, None, None
    torch.ops.rsengine.scale_gradient_(gradient, grad_loss, ctx.remaining)
    return gradient, None, None, None, None


_forward.register_autograd(_backward, setup_context=_save)
