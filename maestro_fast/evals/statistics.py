"""Paired comparisons: is one method better than another over the same seeds or prompts?"""

from __future__ import annotations

import math
from dataclasses import dataclass

from scipy.special import stdtrit
from torch import Tensor


@dataclass(frozen=True)
class Difference:
    """The mean of n paired differences and its 95 % confidence interval, by Student's t.

    Attributes:
        mean: The mean of the differences.
        half_width: The distance from ``mean`` to either end of the interval.
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


def paired_difference(ours_S: Tensor, theirs_S: Tensor) -> Difference:
    """Compares two results, each [S], over the same S seeds.

    The half width is t * std / sqrt(S) with the sample standard deviation of the differences and the 97.5 % quantile t
    of Student's distribution with S - 1 degrees of freedom.

    Raises:
        ValueError: The results are not two vectors of the same length of at least 2.
    """
    if ours_S.ndim != 1 or ours_S.shape != theirs_S.shape or len(ours_S) < 2:
        raise ValueError(
            f"ours_S, theirs_S: shapes {tuple(ours_S.shape)} and {tuple(theirs_S.shape)}, expected [S] twice, S >= 2"
        )
    gaps_S = ours_S.double() - theirs_S.double()
    n = len(gaps_S)
    return Difference(gaps_S.mean().item(), float(stdtrit(n - 1, 0.975)) * gaps_S.std().item() / math.sqrt(n), n)
