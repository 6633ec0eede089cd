"""Confidence intervals of a mean over runs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence


def student_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float] | None:
    """That of the mean of normally distributed ``values``, by Student's t; None for fewer than two."""
    from scipy.special import stdtrit

    n = len(values)
    if n < 2:
        return None
    half = float(stdtrit(n - 1, (1 + level) / 2)) * statistics.stdev(values) / math.sqrt(n)
    mean = statistics.fmean(values)
    return mean - half, mean + half
