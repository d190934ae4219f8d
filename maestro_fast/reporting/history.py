"""The lines of a metrics file as columns: what the plots read."""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]

_REWARD_KEYS = re.compile(r"rewards/(.+)/(?:mean|std|abstained)|weights/(.+)|families/.*/(?:weights|rewards)/(.+)")
_FAMILY_KEYS = re.compile(r"families/(.*)/(?:(?:weights|rewards)/.+|completion_length)")


@dataclass(frozen=True)
class History:
    """S logged steps.

    Attributes:
        steps: float64 [S], ascending.
        columns: by key, float64 [S], NaN where a line lacks the key or has null there; ``step`` is not among them.
    """

    steps: FloatArray
    columns: dict[str, FloatArray]

    @staticmethod
    def of(lines: Iterable[Mapping[str, Any]]) -> History:
        """Gathers the numbers of the lines; values of other types are left out.

        Raises:
            ValueError: a line has no step.
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
        """float64 [S], all NaN where no line has the key."""
        return self.columns.get(key, np.full(len(self), np.nan))

    def has(self, key: str) -> bool:
        """Whether any line has a number there."""
        return key in self.columns and bool(np.isfinite(self.columns[key]).any())

    @property
    def rewards(self) -> tuple[str, ...]:
        """Names of the rewards, in the order of their first appearance."""
        return self._names(_REWARD_KEYS)

    @property
    def families(self) -> tuple[str, ...]:
        """Names of the task families, in alphabetical order."""
        return tuple(sorted(self._names(_FAMILY_KEYS)))

    def _names(self, pattern: re.Pattern[str]) -> tuple[str, ...]:
        matches = (pattern.fullmatch(key) for key in self.columns)
        names = (next(group for group in m.groups() if group is not None) for m in matches if m)
        return tuple(dict.fromkeys(names))
