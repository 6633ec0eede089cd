"""One table of tolerances: a kernel may err twice as much as eager in the same dtype, plus this absolute term.

The terms are a few units in the last place of numbers around 1 in each dtype.
"""

import torch
from torch import Tensor

ABSOLUTE = {torch.float64: 1e-14, torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def assert_close(actual: Tensor, truth: Tensor, *, scale: float = 1.0, eager: Tensor | None = None) -> None:
    """Compare with the float64 ``truth``; ``scale`` is the size of the numbers, ``eager`` another result to beat."""
    actual, truth = actual.detach(), truth.detach()
    eager = eager if eager is None else eager.detach()
    assert actual.shape == truth.shape
    assert truth.dtype == torch.float64
    allowed = ABSOLUTE[actual.dtype] * scale
    if eager is not None and eager.numel():
        allowed += 2 * float((eager.double() - truth).abs().max())
    error = float((actual.double() - truth).abs().max()) if truth.numel() else 0.0
    assert error <= allowed, f"error {error:.3e}, allowed {allowed:.3e}"
