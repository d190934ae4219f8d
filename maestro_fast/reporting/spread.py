"""Do the weights differ between task families? One number and the table behind it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from maestro_fast.reporting.history import FloatArray, History
from maestro_fast.reporting.tables import Table


@dataclass(frozen=True)
class FamilySpread:
    """F families, K rewards.

    Attributes:
        spread: the between-family spread, dimensionless; 0 where every family has the same weights.
        families, rewards: F and K names.
        means_FK: float64 [F, K], each family's mean weight; NaN where no line gives one.
        first_step, last_step: the bounds of the lines that went in.
    """

    spread: float
    families: tuple[str, ...]
    rewards: tuple[str, ...]
    means_FK: FloatArray
    first_step: int
    last_step: int

    def table(self, caption: str | None = None) -> Table:
        """The family means as a table, the standard deviation over the families as its last row."""
        one = self.first_step == self.last_step
        steps = f"step {self.last_step}" if one else f"steps {self.first_step} to {self.last_step}"
        caption = caption or f"Mean weight by task family, {steps}; between-family spread {self.spread:.4f}"
        rows = [(f or "(no family)", *_cells(r)) for f, r in zip(self.families, self.means_FK, strict=True)]
        rows.append(("std over families", *_cells(_std_over_families(self.means_FK))))
        return Table(caption, ("family", *self.rewards), tuple(rows))


def family_spread(records: Iterable[Mapping[str, Any]] | History) -> FamilySpread:
    """The between-family spread of the expected weights in the last third of a run.

    Of all S lines that hold a ``families/<family>/weights/<name>``, the last ceil(S / 3) count. Over these lines,
    w[f, k] is the plain mean of the weights of reward k in family f; lines that lack the key or hold null do not enter
    it. With sd_k = sqrt(mean_f (w[f, k] - mean_f w[f, k])^2), the population standard deviation over the families that
    have a w[f, k],

        spread = mean over the K rewards of sd_k.

    It is 0 for equal weights, for a single family, and for weights that ignore the family. Noise in the family means
    adds to it, so it is to be read against the same number of a control run (shuffled contexts).

    Args:
        records: the lines of metrics.jsonl in ascending order of steps, or the ``History`` of them.

    Raises:
        ValueError: no line holds a weight of a family.
    """
    history = records if isinstance(records, History) else History.of(records)
    families, rewards = history.families, history.rewards
    values_FKS = np.array([[history.get(f"families/{f}/weights/{k}") for k in rewards] for f in families])
    live_S = np.flatnonzero(np.isfinite(values_FKS).any(axis=(0, 1))) if values_FKS.size else np.array([])
    if not live_S.size:
        raise ValueError("records: no line holds a families/<family>/weights/<name>")
    last_third = live_S[-math.ceil(live_S.size / 3) :]
    means_FK = _mean(values_FKS[:, :, last_third], axis=2)
    deviations_K = _std_over_families(means_FK)
    steps = history.steps[last_third]
    return FamilySpread(float(_mean(deviations_K, axis=0)), families, rewards, means_FK, int(steps[0]), int(steps[-1]))


def _std_over_families(means_FK: FloatArray) -> FloatArray:
    variance_K = _mean((means_FK - _mean(means_FK, axis=0)) ** 2, axis=0)
    return np.asarray(np.sqrt(variance_K), dtype=np.float64)


def _mean(values: FloatArray, axis: int) -> FloatArray:
    """The mean of the numbers along an axis, NaN (and no warning) where there are none."""
    known = np.isfinite(values)
    total = np.where(known, values, 0.0).sum(axis=axis)
    count = known.sum(axis=axis)
    return np.asarray(np.where(count > 0, total / np.maximum(count, 1), np.nan))


def _cells(values: FloatArray) -> tuple[float | None, ...]:
    return tuple(float(value) if np.isfinite(value) else None for value in values)
