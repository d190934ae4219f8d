"""Paired comparisons: is one method better than another over the same seeds or prompts?

Two methods that share their seeds share worlds, prompts and random draws, so only their differences are looked at. A
difference has Student's t interval and test, beside it a bootstrap interval and a permutation test that assume no
normal distribution, and its size in standard deviations. Holm's procedure keeps the chance of a single false
discovery among many methods at 5 %.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import gammaln, stdtr, stdtrit
from torch import Tensor

LEVEL = 0.95
MIN_BOOTSTRAP = 8  # Below 8 pairs even the BCa interval holds the truth far less often than it says.
EXACT = 12  # Up to 12 pairs all 2^n signs are tried; above, as many drawn at random as there are for 12.
BETTER, WORSE, NO_EVIDENCE, NO_INTERVAL = "better", "worse", "no evidence of benefit", "no interval"


@dataclass(frozen=True)
class Difference:
    """The mean of n paired differences and its 95 % confidence interval, by Student's t.

    Attributes:
        mean: The mean of the differences.
        half_width: The distance from ``mean`` to either end of the interval; NaN for a single pair.
        n: The number of pairs.
    """

    mean: float
    half_width: float
    n: int

    @property
    def low(self) -> float:
        """The lower end of the interval."""
        return self.mean - self.half_width

    @property
    def high(self) -> float:
        """The upper end of the interval."""
        return self.mean + self.half_width

    @property
    def verdict(self) -> str:
        """What the interval says: "better", "worse", or "no evidence of benefit" where it covers zero."""
        if math.isnan(self.half_width):
            return NO_INTERVAL
        return BETTER if self.low > 0 else WORSE if self.high < 0 else NO_EVIDENCE


@dataclass(frozen=True)
class PairedTest:
    """All that is said of n paired differences.

    Attributes:
        difference: Their mean with the t interval.
        p: The two-sided p-value of the paired t-test; NaN for a single pair.
        p_permutation: The two-sided p-value of the sign-flip permutation test; NaN for a single pair.
        bootstrap: The ends of the BCa bootstrap interval, or None for fewer than ``MIN_BOOTSTRAP`` pairs.
        effect: The mean in standard deviations of the differences, d_z with Hedges' correction; NaN where it is
            undefined.
        p_holm: ``p`` after Holm's procedure over all methods that are compared with the same one.
    """

    difference: Difference
    p: float
    p_permutation: float
    bootstrap: tuple[float, float] | None
    effect: float
    p_holm: float = math.nan

    @property
    def verdict(self) -> str:
        """What the t interval says."""
        return self.difference.verdict

    @property
    def holds(self) -> bool:
        """Whether the verdict is "better" or "worse" and survives Holm's procedure."""
        return self.verdict in (BETTER, WORSE) and self.p_holm <= 1 - LEVEL


def mean_interval(values_S: ArrayLike) -> Difference:
    """The mean of S values, and its interval over them.

    The half width is t * std / sqrt(S) with the sample standard deviation and the 97.5 % quantile t of Student's
    distribution with S - 1 degrees of freedom. A single value has no interval, so its half width is NaN.

    Raises:
        ValueError: The values are not a vector, or there is none.
    """
    values_S = _vector(values_S, "values_S")
    n = len(values_S)
    return Difference(float(values_S.mean()), _quantile(n) * _standard_error(values_S), n)


def paired_difference(ours_S: Tensor, theirs_S: Tensor) -> Difference:
    """Compares two results, each [S], over the same S seeds, by the interval of ``mean_interval``.

    Raises:
        ValueError: The results are not two vectors of the same length of at least 2.
    """
    if ours_S.ndim != 1 or ours_S.shape != theirs_S.shape or len(ours_S) < 2:
        raise ValueError(
            f"ours_S, theirs_S: shapes {tuple(ours_S.shape)} and {tuple(theirs_S.shape)}, expected [S] twice, S >= 2"
        )
    return mean_interval((ours_S.double() - theirs_S.double()).numpy())


def paired_test(ours_S: ArrayLike, theirs_S: ArrayLike) -> PairedTest:
    """Compares two results, each [S], over the same S seeds.

    Raises:
        ValueError: The results are not two vectors of the same length of at least 1.
    """
    ours, theirs = _vector(ours_S, "ours_S"), _vector(theirs_S, "theirs_S")
    if ours.shape != theirs.shape:
        raise ValueError(f"ours_S, theirs_S: {len(ours)} and {len(theirs)} values, expected as many of each")
    gaps_S = ours - theirs
    return PairedTest(
        mean_interval(gaps_S), t_test(gaps_S), permutation_test(gaps_S), bootstrap_interval(gaps_S), effect_size(gaps_S)
    )


def t_test(gaps_S: ArrayLike) -> float:
    """The two-sided p-value of Student's t-test that the mean of the differences is 0.

    If all differences are equal, it is 0, or 1 where they are 0. For a single one it is NaN.
    """
    gaps_S = _vector(gaps_S, "gaps_S")
    n = len(gaps_S)
    if n == 1:
        return math.nan
    mean, error = abs(float(gaps_S.mean())), _standard_error(gaps_S)
    if error == 0:
        return float(mean == 0)
    return float(2 * stdtr(n - 1, -mean / error))


def permutation_test(gaps_S: ArrayLike, *, seed: int = 0) -> float:
    """The two-sided p-value of the sign-flip permutation test: how often random signs give as large a mean.

    It is exact for up to ``EXACT`` differences, and assumes only that their distribution is symmetric. With n
    differences it cannot be below 2^(1 - n). For a single one it is NaN.
    """
    from scipy import stats

    gaps_S = _vector(gaps_S, "gaps_S")
    if len(gaps_S) == 1:
        return math.nan
    found = stats.permutation_test(
        (gaps_S,),
        lambda x, axis: x.mean(axis=axis),
        permutation_type="samples",
        n_resamples=2**EXACT,
        vectorized=True,
        rng=np.random.default_rng(seed),
    )
    return float(found.pvalue)


def bootstrap_interval(gaps_S: ArrayLike, *, seed: int = 0) -> tuple[float, float] | None:
    """The ends of the 95 % bootstrap interval of the mean, bias-corrected and accelerated (BCa; Efron 1987).

    With fewer than ``MIN_BOOTSTRAP`` differences there is no such interval, and None is returned. If all differences
    are equal, both ends are that value.
    """
    from scipy import stats

    gaps_S = _vector(gaps_S, "gaps_S")
    if len(gaps_S) < MIN_BOOTSTRAP:
        return None
    if np.ptp(gaps_S) == 0:
        return float(gaps_S[0]), float(gaps_S[0])
    with warnings.catch_warnings():
        # scipy warns where the resamples are too few kinds for BCa. Its interval is NaN then, which is checked below.
        warnings.simplefilter("ignore")
        interval = stats.bootstrap(
            (gaps_S,), np.mean, n_resamples=4999, confidence_level=LEVEL, method="BCa", rng=np.random.default_rng(seed)
        ).confidence_interval
    low, high = float(interval.low), float(interval.high)
    return (low, high) if math.isfinite(low) and math.isfinite(high) else None


def effect_size(gaps_S: ArrayLike) -> float:
    """Cohen's d_z, the mean of the differences in their standard deviations, with Hedges' correction for few of them.

    The correction is J = gamma(m / 2) / (sqrt(m / 2) gamma((m - 1) / 2)) with m = S - 1 degrees of freedom (Hedges
    1981). It is NaN for fewer than 3 differences, and where they do not differ from one another.
    """
    gaps_S = _vector(gaps_S, "gaps_S")
    m = len(gaps_S) - 1
    if m < 2 or np.ptp(gaps_S) == 0:
        return math.nan
    correction = math.exp(gammaln(m / 2) - gammaln((m - 1) / 2)) / math.sqrt(m / 2)
    return float(gaps_S.mean() / gaps_S.std(ddof=1)) * correction


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusts p-values for their number by the step-down procedure of Holm (1979).

    In ascending order, p_i becomes the largest (M - j + 1) p_j of all j <= i, at most 1. NaN does not count among the M
    and stays.
    """
    known = sorted((p, i) for i, p in enumerate(p_values) if not math.isnan(p))
    adjusted, largest = [math.nan] * len(p_values), 0.0
    for rank, (p, i) in enumerate(known):
        largest = max(largest, min(1.0, (len(known) - rank) * p))
        adjusted[i] = largest
    return adjusted


def adjusted(tests: Sequence[PairedTest]) -> list[PairedTest]:
    """The tests with ``p_holm``, over all of them."""
    return [replace(test, p_holm=p) for test, p in zip(tests, holm([t.p for t in tests]), strict=True)]


def _vector(values: ArrayLike, name: str) -> NDArray[np.float64]:
    found = np.asarray(values, dtype=np.float64)
    if found.ndim != 1 or not len(found):
        raise ValueError(f"{name}: shape {found.shape}, expected [S] with S >= 1")
    return found


def _quantile(n: int) -> float:
    return float(stdtrit(n - 1, (1 + LEVEL) / 2)) if n > 1 else math.nan


def _standard_error(values_S: NDArray[np.float64]) -> float:
    if len(values_S) == 1:
        return math.nan
    if np.ptp(values_S) == 0:  # The mean of equal values may be off by a rounding error, and they would spread by it.
        return 0.0
    return float(values_S.std(ddof=1)) / math.sqrt(len(values_S))
