"""What differences between paired trials are worth: intervals, a one-sided p, and the seeds that would resolve them.

Trials of two variants with the same seed see the same images in the same order and begin with the same weights where
shapes agree, so what counts is the difference of each pair (a paired t-test; Student, "The probable error of a mean",
1908).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from rsengine.run.intervals import deviation, student_interval

ALPHA, POWER = 0.05, 0.8
FEW = 10  # pairs below which the interval is Student's t, and the bootstrap's stands beside it
RESAMPLES = 10_000
MOST_SEEDS = 10_000


@dataclass(frozen=True)
class Summary:
    """Results of one variant over its seeds. ``interval``: 95 %, of the mean, by Student's t; None for one seed, and
    for results that are all equal."""

    n: int
    mean: float
    deviation: float | None
    interval: tuple[float, float] | None


@dataclass(frozen=True)
class Difference:
    """A variant against its reference, over the seeds that both have.

    Attributes:
        n, mean, deviation: of the differences of the pairs.
        student, bootstrap: 95 % confidence intervals of the mean; None for one pair, and for pairs that are all equal.
        p: one-sided, of Student's paired test: how likely a mean so high or higher would be if the variant were no
            better. None where it is not defined: fewer than two pairs, or pairs that are all equal.
        is_resolved: whether there is an interval that leaves 0 out.
        needed: the pairs with which a paired test at level 0.05, two-sided, would find a difference like this one with
            power 0.8, if its mean and deviation are the true ones; None where it is resolved, or none would do.
    """

    n: int
    mean: float
    deviation: float | None
    student: tuple[float, float] | None
    bootstrap: tuple[float, float] | None
    p: float | None
    is_resolved: bool
    needed: int | None

    @property
    def interval(self) -> tuple[float, float] | None:
        """Student's for fewer than ten pairs, otherwise the bootstrap's."""
        return self.student if self.n < FEW else self.bootstrap


def summary(values: Sequence[float], bounds: tuple[float, float] = (-math.inf, math.inf)) -> Summary:
    """``values``: one a seed, one or more, all within ``bounds``."""
    interval = student_interval(values, bounds=bounds)
    return Summary(len(values), statistics.fmean(values), deviation(values), interval)


def paired(values: Mapping[int, float], reference: Mapping[int, float]) -> Difference | None:
    """Compare results by seed. None where no seed has both."""
    differences = [values[seed] - reference[seed] for seed in sorted(values.keys() & reference.keys())]
    if not differences:
        return None
    known, student = summary(differences), student_interval(differences)
    bootstrap = bootstrap_interval(differences)
    interval = student if known.n < FEW else bootstrap
    is_resolved = interval is not None and not interval[0] <= 0 <= interval[1]
    needed = None
    if known.deviation and not is_resolved:
        needed = seeds_needed(known.mean, known.deviation)
    return Difference(
        known.n, known.mean, known.deviation, student, bootstrap, _one_sided(differences), is_resolved, needed
    )


def bootstrap_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float] | None:
    """The percentile bootstrap interval of the mean (Efron, 1979), the same for the same values; None where
    :func:`student_interval` is. With few values it is too narrow."""
    if not deviation(values):
        return None
    sample = np.asarray(values, np.float64)
    rng = np.random.default_rng(0)
    means = sample[rng.integers(0, len(sample), (RESAMPLES, len(sample)))].mean(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def power_of(n: int, mean: float, deviation: float, alpha: float = ALPHA) -> float:
    """The probability that a two-sided paired t-test of ``n`` >= 2 pairs at level ``alpha`` finds a true difference."""
    from scipy.special import stdtrit
    from scipy.stats import nct  # whose sf() is a number for every shift; scipy.special.nctdtr is not for some

    critical, shift = stdtrit(n - 1, 1 - alpha / 2), math.sqrt(n) * abs(mean) / deviation
    # Of a large shift the other tail is less than 1e-9, and cdf() is not a number there.
    other = nct.cdf(-critical, n - 1, shift) if shift < 6 else 0.0
    return float(nct.sf(critical, n - 1, shift) + other)


def seeds_needed(mean: float, deviation: float, power: float = POWER, alpha: float = ALPHA) -> int | None:
    """The fewest pairs, two at least, with that power; None where 10,000 have less. ``deviation`` > 0."""
    if power_of(MOST_SEEDS, mean, deviation, alpha) < power:
        return None
    low, high = 2, MOST_SEEDS
    while low < high:
        middle = (low + high) // 2
        if power_of(middle, mean, deviation, alpha) >= power:
            high = middle
        else:
            low = middle + 1
    return low


def _one_sided(differences: Sequence[float]) -> float | None:
    from scipy.special import stdtr

    n, spread = len(differences), deviation(differences)
    return float(stdtr(n - 1, -statistics.fmean(differences) / spread * math.sqrt(n))) if spread else None
