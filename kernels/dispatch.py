"""Which implementation of an op runs, and why. The only place in this room that decides it."""

from __future__ import annotations

OPS = ("squeeze_excite", "squeeze_excite_residual", "label_smoothed_cross_entropy", "ema_update", "sgd_ema_step")
IMPLEMENTATIONS = ("auto", "eager")


def explain(op: str) -> str:
    """Say which implementation ``impl="auto"`` chooses for ``op``, and why.

    Raises:
        ValueError: ``op`` is not one of :data:`OPS`.
    """
    if op not in OPS:
        raise ValueError(f"op: expected one of {', '.join(OPS)}; got {op!r}")
    return f"{op}: eager, because it is the only implementation in this version"


def choose(op: str, impl: str) -> str:
    """The implementation to run for ``op``: raises ``ValueError`` for an ``impl`` that cannot run."""
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl: expected one of {', '.join(IMPLEMENTATIONS)}; got {impl!r} ({explain(op)})")
    return "eager"
