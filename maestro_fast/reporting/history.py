"""The lines of metrics.jsonl as columns, and the spread of the weights between task families computed from them."""

from __future__ import annotations

import math
import re
from array import array
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from maestro_fast.reporting.tables import Table

FloatArray = NDArray[np.float64]

_REWARD_KEYS = re.compile(r"rewards/(.+)/(?:mean|std|abstained)|weights/(.+)|families/.*/(?:weights|rewards)/(.+)")
_FAMILY_KEYS = re.compile(r"families/(.*)/(?:(?:weights|rewards)/.+|completion_length)")


@dataclass(frozen=True)
class History:
    """The numbers of S logged steps.

    Attributes:
        steps: float64 [S], ascending.
        columns: Maps each key to float64 [S], with NaN where a line lacks the key or has null there. ``step`` is not
            among the keys.
    """

    steps: FloatArray
    columns: dict[str, FloatArray]

    @staticmethod
    def of(lines: Iterable[Mapping[str, Any]]) -> History:
        """Gathers the numbers of the lines; values of other types are left out.

        Raises:
            ValueError: A line has no step.
        """
        steps = array("d")
        columns: dict[str, array[float]] = {}
        for line in lines:
            if not isinstance(line.get("step"), int):
                raise ValueError(f"lines: line {len(steps) + 1} has no step")
            for key, value in line.items():
                if key != "step" and isinstance(value, (int, float)):
                    column = columns.setdefault(key, array("d"))
                    column.extend([np.nan] * (len(steps) - len(column)))
                    column.append(value)
            steps.append(line["step"])
        for column in columns.values():
            column.extend([np.nan] * (len(steps) - len(column)))
        return History(np.array(steps), {key: np.array(column) for key, column in columns.items()})

    def __len__(self) -> int:
        return len(self.steps)

    def get(self, key: str) -> FloatArray:
        """The column of a key, float64 [S]; it is all NaN if no line has the key."""
        return self.columns.get(key, np.full(len(self), np.nan))

    def has(self, key: str) -> bool:
        """Whether any line has a finite number under the key."""
        return key in self.columns and bool(np.isfinite(self.columns[key]).any())

    @property
    def rewards(self) -> tuple[str, ...]:
        """The names of the rewards, in the order in which they first appear."""
        return self._names(_REWARD_KEYS)

    @property
    def families(self) -> tuple[str, ...]:
        """The names of the task families, in alphabetical order."""
        return tuple(sorted(self._names(_FAMILY_KEYS)))

    def _names(self, pattern: re.Pattern[str]) -> tuple[str, ...]:
        matches = (pattern.fullmatch(key) for key in self.columns)
        names = (next(group for group in m.groups() if group is not None) for m in matches if m)
        return tuple(dict.fromkeys(names))


@dataclass(frozen=True)
class FamilySpread:
    """How far the weights of F task families lie apart, for K rewards.

    Attributes:
        spread: The between-family spread, a mean of ``stds_K``. It is 0 if every family has the same weights.
        families: The F names of the families.
        rewards: The K names of the rewards.
        means_FK: float64 [F, K], the mean weight of each reward in each family; NaN if no line gives one.
        stds_K: float64 [K], the population standard deviation of each column of ``means_FK``.
        first_step: The first step of the lines that were used.
        last_step: The last step of these lines.
    """

    spread: float
    families: tuple[str, ...]
    rewards: tuple[str, ...]
    means_FK: FloatArray
    stds_K: FloatArray
    first_step: int
    last_step: int

    def table(self, caption: str | None = None) -> Table:
        """A table of the family means; its last row is the standard deviation over the families."""
        one = self.first_step == self.last_step
        steps = f"step {self.last_step}" if one else f"steps {self.first_step} to {self.last_step}"
        caption = caption or f"Mean weight by task family, {steps}; between-family spread {self.spread:.4f}"
        rows = [(f or "(no family)", *_cells(r)) for f, r in zip(self.families, self.means_FK, strict=True)]
        rows.append(("std over families", *_cells(self.stds_K)))
        return Table(caption, ("family", *self.rewards), tuple(rows))


def family_spread(records: Iterable[Mapping[str, Any]] | History) -> FamilySpread:
    """Measures the between-family spread of the expected weights in the last third of a run.

    S lines hold a ``families/<family>/weights/<name>``; the last ceil(S / 3) of them are used. Over these,
    w[f, k] is the plain mean of the weight of reward k in family f. Lines that lack the key or hold null are left out
    of that mean. With sd_k = sqrt(mean_f (w[f, k] - mean_f w[f, k])^2), the population standard deviation over the
    families that have a w[f, k],

        spread = mean over the K rewards of sd_k.

    It is 0 for equal weights, for a single family, and for weights that ignore the family. Noise in the family means
    adds to it, so compare it with the same number of a control run that had shuffled contexts.

    Args:
        records: The lines of metrics.jsonl in ascending order of steps, or the ``History`` of them.

    Raises:
        ValueError: No line holds the weight of a family.
    """
    history = records if isinstance(records, History) else History.of(records)
    families, rewards = history.families, history.rewards
    values_FKS = np.array([[history.get(f"families/{f}/weights/{k}") for k in rewards] for f in families])
    live_S = np.flatnonzero(np.isfinite(values_FKS).any(axis=(0, 1))) if values_FKS.size else np.array([])
    if not live_S.size:
        raise ValueError("records: no line holds a families/<family>/weights/<name>")
    last_third = live_S[-math.ceil(live_S.size / 3) :]
    means_FK = _mean(values_FKS[:, :, last_third], axis=2)
    variances_K = _mean((means_FK - _mean(means_FK, axis=0)) ** 2, axis=0)
    stds_K = np.asarray(np.sqrt(variances_K), dtype=np.float64)
    first, last = (int(history.steps[i]) for i in last_third[[0, -1]])
    return FamilySpread(float(_mean(stds_K, axis=0)), families, rewards, means_FK, stds_K, first, last)


def _mean(values: FloatArray, axis: int) -> FloatArray:
    """The mean of the finite numbers along an axis. Where there are none it is NaN, without NumPy's warning."""
    known = np.isfinite(values)
    total = np.where(known, values, 0.0).sum(axis=axis)
    count = known.sum(axis=axis)
    return np.asarray(np.where(count > 0, total / np.maximum(count, 1), np.nan))


def _cells(values: FloatArray) -> tuple[float | None, ...]:
    return tuple(float(value) if np.isfinite(value) else None for value in values)
