"""Confidence intervals of a mean over runs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence


def deviation(values: Sequence[float]) -> float | None:
    """The standard deviation; 0 where values differ by no more than rounding does, and None for fewer than two."""
    if len(values) < 2:
        return None
    found = statistics.stdev(values)
    return found if found > 1e-12 * max(map(abs, values)) else 0.0


def student_interval(
    values: Sequence[float], level: float = 0.95, bounds: tuple[float, float] = (-math.inf, math.inf)
) -> tuple[float, float] | None:
    """That of the mean of normally distributed ``values``, by Student's t, cut off at ``bounds``.

    None for fewer than two values, and for values that are all equal: they tell nothing of others.
    """
    from scipy.special import stdtrit

    n, spread = len(values), deviation(values)
    if not spread:
        return None
    half = float(stdtrit(n - 1, (1 + level) / 2)) * spread / math.sqrt(n)
    mean = statistics.fmean(values)
    return max(bounds[0], mean - half), min(bounds[1], mean + half)
