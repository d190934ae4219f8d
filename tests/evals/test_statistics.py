"""Paired differences: their intervals, p-values and sizes, against scipy, published figures and counts by hand."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import stats

from maestro_fast.evals.statistics import (
    BETTER,
    MIN_BOOTSTRAP,
    NO_EVIDENCE,
    NO_INTERVAL,
    WORSE,
    Difference,
    adjusted,
    bootstrap_interval,
    effect_size,
    holm,
    mean_interval,
    paired_difference,
    paired_test,
    permutation_test,
    t_test,
)

# Student's own data (Biometrika 1908): the extra hours of sleep that two drugs gave the same ten patients.
SLEEP_1 = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
SLEEP_2 = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]


@pytest.mark.parametrize(
    ("freedom", "published"),
    [(1, 12.706205), (2, 4.302653), (4, 2.776445), (9, 2.262157), (30, 2.042272), (1000, 1.962339)],
)
def test_half_widths_have_the_quantiles_of_the_tables(freedom: int, published: float) -> None:
    """The half width in units of the standard error is the 97.5 % quantile of Student's t."""
    gaps = torch.randn(freedom + 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = paired_difference(gaps, torch.zeros_like(gaps))
    error = gaps.std().item() / (freedom + 1) ** 0.5
    assert found.half_width / error == pytest.approx(published, rel=1e-6)


def test_a_difference_by_hand() -> None:
    """The gaps 1, 2 and 3 have mean 2 and standard error 1 / sqrt(3)."""
    found = paired_difference(torch.tensor([2.0, 4.0, 6.0]), torch.tensor([1.0, 2.0, 3.0]))
    assert found.mean == 2.0 and found.n == 3
    assert found.half_width == pytest.approx(4.302653 / 3**0.5, rel=1e-6)
    assert (found.low, found.high) == (found.mean - found.half_width, found.mean + found.half_width)


@pytest.mark.parametrize("shape", [(1,), (2, 2)])
def test_bad_shapes_are_named(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"^ours_S, theirs_S: shapes"):
        paired_difference(torch.zeros(shape), torch.zeros(shape))
    with pytest.raises(ValueError, match=r"^ours_S, theirs_S: 2 and 3 values"):
        paired_test([1, 2], [1, 2, 3])
    with pytest.raises(ValueError, match=r"^values_S: shape \(0,\)"):
        mean_interval([])


def test_students_sleep_data_give_the_published_figures() -> None:
    """They are t = 4.0621 with 9 degrees of freedom, p = 0.002833, mean 1.58 and the interval 0.70 to 2.46."""
    found = paired_test(SLEEP_2, SLEEP_1)
    assert found.p == pytest.approx(0.002833, abs=5e-7)
    assert found.difference.mean == pytest.approx(1.58)
    assert (found.difference.low, found.difference.high) == pytest.approx((0.7001142, 2.4598858), abs=1e-6)
    assert found.effect == pytest.approx(4.062128 / math.sqrt(10) * (1 - 3 / (4 * 9 - 1)), rel=1e-3)
    assert found.verdict == BETTER


def test_p_values_are_those_of_scipy() -> None:
    generator = np.random.default_rng(0)
    for n in (2, 3, 10, 40):
        ours, theirs = generator.normal(0.3, 1, (2, n))
        assert t_test(ours - theirs) == pytest.approx(stats.ttest_rel(ours, theirs).pvalue, rel=1e-9)
        low, high = stats.ttest_rel(ours, theirs).confidence_interval()
        found = paired_test(ours, theirs).difference
        assert (found.low, found.high) == pytest.approx((low, high))


@pytest.mark.parametrize("n", [1, 3, 6, 10])
def test_the_permutation_test_counts_all_signs(n: int) -> None:
    gaps = np.random.default_rng(n).normal(0.4, 1, n)
    if n == 1:
        assert math.isnan(permutation_test(gaps))
        return
    means = [abs(np.mean(gaps * signs)) for signs in itertools.product((1, -1), repeat=n)]
    by_hand = np.mean(np.array(means) >= abs(gaps.mean()) - 1e-12)
    assert permutation_test(gaps) == pytest.approx(by_hand)


def test_many_signs_are_drawn_at_random_and_always_the_same_ones() -> None:
    gaps = np.random.default_rng(3).normal(0.35, 1, 30)
    assert permutation_test(gaps) == permutation_test(gaps)
    assert permutation_test(gaps) == pytest.approx(t_test(gaps), abs=0.02)


def test_the_bootstrap_interval_is_scipys_and_close_to_students_for_many() -> None:
    gaps = np.random.default_rng(0).normal(0.2, 1, 200)
    low, high = bootstrap_interval(gaps) or (0, 0)
    found = mean_interval(gaps)
    assert (low, high) == pytest.approx((found.low, found.high), abs=0.01)
    assert bootstrap_interval(gaps) == (low, high)
    skewed = np.random.default_rng(0).exponential(1, 60)
    bca = stats.bootstrap((skewed,), np.mean, n_resamples=4999, method="BCa", rng=np.random.default_rng(0))
    assert bootstrap_interval(skewed) == pytest.approx(tuple(bca.confidence_interval))


def test_few_or_equal_differences_have_no_bootstrap_interval_of_their_own() -> None:
    gaps = np.random.default_rng(0).normal(size=MIN_BOOTSTRAP)
    assert bootstrap_interval(gaps[:-1]) is None and bootstrap_interval(gaps) is not None
    assert bootstrap_interval([0.5] * 10) == (0.5, 0.5)


def test_holm_adjusts_as_in_a_worked_example() -> None:
    """Of 0.01, 0.04, 0.03 and 0.005 the smallest is times 4, the next times 3, and none may be below one before it."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    found = holm([0.01, math.nan, 0.02])
    assert found[0] == pytest.approx(0.02) and math.isnan(found[1]) and found[2] == pytest.approx(0.02)


def test_holm_is_what_decides_whether_a_verdict_holds() -> None:
    """A p-value of 0.045 holds alone, not beside a second one."""
    gaps = np.array([-1.0, 1.0, 3.0, 2.0, 1.0, -0.5, 2.0, 0.5]) + 0.15
    one = paired_test(gaps, np.zeros(8))
    assert 0.025 < one.p < 0.05 and one.verdict == BETTER
    assert adjusted([one])[0].holds
    assert not any(test.holds for test in adjusted([one, one]))
    worse = adjusted([paired_test(-gaps, np.zeros(8))])[0]
    assert worse.verdict == WORSE and worse.holds


def test_hedges_correction_makes_the_effect_size_unbiased() -> None:
    """Over many samples of 5, the mean of d_z is the true one; without the correction it is a quarter too large."""
    gaps = np.random.default_rng(0).normal(0.8, 1, (3000, 5))
    assert np.mean([effect_size(row) for row in gaps]) == pytest.approx(0.8, abs=0.03)
    assert np.mean(gaps.mean(1) / gaps.std(1, ddof=1)) > 0.95
    assert math.isnan(effect_size([1.0, 2.0])) and math.isnan(effect_size([1.0, 1.0, 1.0]))


@pytest.mark.parametrize("n", [3, 10])
def test_intervals_hold_the_truth_in_95_of_100_samples(n: int) -> None:
    gaps = np.random.default_rng(n).normal(0.7, 2, (4000, n))
    held = [found.low <= 0.7 <= found.high for found in map(mean_interval, gaps)]
    assert np.mean(held) == pytest.approx(0.95, abs=0.01)


def test_what_has_no_spread_or_no_pair_is_said_to_be_so() -> None:
    same = paired_test([0.5, 0.6, 0.7], [0.5, 0.6, 0.7])
    assert (same.p, same.verdict, same.difference.half_width) == (1.0, NO_EVIDENCE, 0.0)
    always = paired_test([1.5, 2.5, 3.5], [1.0, 2.0, 3.0])
    assert (always.p, always.verdict) == (0.0, BETTER)
    single = paired_test([0.5], [0.4])
    assert single.verdict == NO_INTERVAL and math.isnan(single.p) and not adjusted([single])[0].holds
    assert Difference(0.1, 0.2, 5).verdict == NO_EVIDENCE and Difference(-0.3, 0.2, 5).verdict == WORSE
