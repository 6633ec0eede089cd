"""Intervals, paired tests and powers against scipy's."""

import itertools

import numpy as np
import pytest
from scipy import stats

from rsengine.run.intervals import student_interval
from rsengine.study.statistics import FEW, bootstrap_interval, paired, power_of, seeds_needed, summary


def sample(n, seed=0, mean=0.002, deviation=0.004):
    return list(np.random.default_rng(seed).normal(mean, deviation, n))


@pytest.mark.parametrize("n", [2, 3, 5, 30])
def test_the_interval_of_a_mean_is_scipys(n):
    values = sample(n, mean=0.8)
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert student_interval(values) == pytest.approx((expected.low, expected.high), rel=1e-12)
    found = summary(values)
    assert (found.n, found.mean, found.deviation) == (n, *map(pytest.approx, (np.mean(values), np.std(values, ddof=1))))
    wide = stats.ttest_1samp(values, 0).confidence_interval(0.99)
    assert student_interval(values, 0.99) == pytest.approx((wide.low, wide.high), rel=1e-12)
    low, high = student_interval(values, bounds=(values[0] - 1e-9, values[0] + 1e-9))
    assert (low, high) == (max(expected.low, values[0] - 1e-9), min(expected.high, values[0] + 1e-9))
    assert student_interval(values[:1]) is None and summary(values[:1]).deviation is None


@pytest.mark.parametrize("n", [2, 3, 5, 12])
@pytest.mark.parametrize("mean", [-0.004, 0.0, 0.004])
def test_a_paired_difference_is_scipys(n, mean):
    reference = dict(enumerate(sample(n, 1, 0.8, 0.02)))
    values = {seed: each + change for (seed, each), change in zip(reference.items(), sample(n, 2, mean), strict=True)}
    found = paired(values | {98: 0.5}, reference | {99: 0.1})  # seeds that only one has are no pair
    ordered = [[each[seed] for seed in range(n)] for each in (values, reference)]
    one_sided = stats.ttest_rel(*ordered, alternative="greater")
    two_sided = stats.ttest_rel(*ordered)
    interval = two_sided.confidence_interval(0.95)
    assert found.n == n and found.mean == pytest.approx(np.mean(ordered[0]) - np.mean(ordered[1]))
    assert found.p == pytest.approx(one_sided.pvalue, rel=1e-9)
    assert found.student == pytest.approx((interval.low, interval.high), rel=1e-9)
    assert found.interval == (found.student if n < FEW else found.bootstrap)
    if n < FEW:
        assert found.is_resolved == (two_sided.pvalue < 0.05)
    assert (found.needed is None) == found.is_resolved or found.needed is None


def test_the_bootstrap_interval_is_scipys():
    values = sample(20)
    expected = stats.bootstrap(
        (values,), np.mean, n_resamples=10_000, method="percentile", vectorized=True, rng=np.random.default_rng(5)
    ).confidence_interval
    spread = np.std(values, ddof=1) / np.sqrt(20)
    assert bootstrap_interval(values) == pytest.approx((expected.low, expected.high), abs=0.05 * spread)
    assert bootstrap_interval(values) == bootstrap_interval(values) and bootstrap_interval(values[:1]) is None


@pytest.mark.parametrize("n", [2, 3, 8, 40])
@pytest.mark.parametrize("effect", [-0.5, 0.2, 1.5])
def test_the_power_is_that_of_the_noncentral_t_distribution(n, effect):
    critical = stats.t.ppf(0.975, n - 1)
    distribution = stats.nct(n - 1, effect * np.sqrt(n))
    expected = np.nansum([distribution.sf(critical), distribution.cdf(-critical)])  # SciPy has no number for some tails
    assert power_of(n, 3 * effect, 3.0) == pytest.approx(expected, abs=1e-9)


def test_the_seeds_needed_are_the_fewest_with_the_power_and_a_simulation_agrees():
    needed = seeds_needed(0.5, 1.0)
    assert needed == 34  # Cohen's tables: d = 0.5, paired, two-sided 0.05, power 0.8
    assert power_of(needed, 0.5, 1.0) >= 0.8 > power_of(needed - 1, 0.5, 1.0)
    draws = np.random.default_rng(0).normal(0.5, 1.0, (20_000, needed))
    assert (stats.ttest_1samp(draws, 0, axis=1).pvalue < 0.05).mean() == pytest.approx(0.8, abs=0.015)
    assert seeds_needed(-0.5, 1.0) == 34 and seeds_needed(100.0, 1.0) == 2 and seeds_needed(1e-6, 1.0) is None


@pytest.mark.parametrize("effect", [*(i / 50 for i in range(1, 160)), 5.0, 50.0, 1e5])
def test_more_seeds_never_have_less_power_and_the_search_finds_the_fewest(effect):
    powers = [power_of(n, effect, 1.0) for n in [*range(2, 40), *(40 * 2**i // 10 * 10 for i in range(1, 8)), 10_000]]
    assert all(0 <= a <= b + 1e-9 <= 1 + 1e-8 for a, b in itertools.pairwise(powers))
    needed = seeds_needed(effect, 1.0)
    assert needed is None or needed == 2 or power_of(needed - 1, effect, 1.0) < 0.8 <= power_of(needed, effect, 1.0)


def test_pairs_that_are_all_equal_and_single_pairs():
    values = {0: 0.5, 1: 0.6}
    same = paired(values, values)
    assert (same.mean, same.deviation, same.p, same.is_resolved, same.needed) == (0.0, 0.0, None, False, None)
    gained = paired({0: 0.8, 1: 0.6}, {0: 0.7, 1: 0.5})  # by 0.1 each, but for rounding: as likely chance as certainty
    assert gained.mean == pytest.approx(0.1) and gained.deviation == 0.0
    assert (gained.interval, gained.bootstrap, gained.p, gained.is_resolved, gained.needed) == (
        *[None] * 3,
        False,
        None,
    )
    single = paired({0: 0.75}, {0: 0.5, 1: 0.6})
    assert (single.n, single.mean, single.student, single.p) == (1, 0.25, None, None) and not single.is_resolved
    assert paired({0: 0.5}, {1: 0.5}) is None
