"""Paired comparisons over seeds."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Difference:
    """Mean of n paired differences and its 95 % confidence interval, mean +- half_width, by Student's t."""

    mean: float
    half_width: float
    n: int

    @property
    def low(self) -> float:
        return self.mean - self.half_width

    @property
    def high(self) -> float:
        return self.mean + self.half_width


def paired_difference(ours_S: Tensor, theirs_S: Tensor) -> Difference:
    """Of two [S] results over the same S seeds.

    Raises:
        ValueError: not two vectors of one length of at least 2.
    """
    if ours_S.ndim != 1 or ours_S.shape != theirs_S.shape or len(ours_S) < 2:
        raise ValueError(
            f"ours_S, theirs_S: shapes {tuple(ours_S.shape)} and {tuple(theirs_S.shape)}, expected [S] twice, S >= 2"
        )
    gaps_S = ours_S.double() - theirs_S.double()
    n = len(gaps_S)
    return Difference(gaps_S.mean().item(), t_quantile(0.975, n - 1) * gaps_S.std().item() / math.sqrt(n), n)


def t_quantile(probability: float, freedom: int) -> float:
    """Quantile of Student's t with ``freedom`` degrees, for probabilities of at least 0.5; to about 1e-6.

    Bisection on its distribution function, which is integrated after t = sqrt(freedom) tan(u): there the density is
    cos(u)^(freedom - 1), and the range is finite.
    """
    if not 0.5 <= probability < 1 or freedom < 1:
        raise ValueError(
            f"probability: {probability}, freedom: {freedom}, expected 0.5 <= probability < 1, freedom >= 1"
        )
    u = torch.linspace(0, math.pi / 2, 200_001, dtype=torch.float64)
    mass = torch.cumulative_trapezoid(u.cos() ** (freedom - 1), u)
    at = int(torch.searchsorted(mass, mass[-1] * (2 * probability - 1)))
    return math.sqrt(freedom) * math.tan(u[at + 1].item())
