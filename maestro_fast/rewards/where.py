"""A reward for some prompts only, by the columns of the data: it abstains on the others."""

from __future__ import annotations

from collections.abc import Awaitable, Mapping, Sequence
from typing import Any

from maestro_fast.records import RewardBatch
from maestro_fast.rewards.partial import on_rows
from maestro_fast.rewards.reward import Reward, RewardValues


class Where:
    """``reward`` where its mask holds. Weights of the other rewards make up for an abstention as the profile says.

    Args:
        reward: what is masked, and lends its name.
        mask: a column, of which true values (non-empty text, non-zero numbers) let a row through, or a mapping of
            columns to the value, or list of values, that they must have.

    Raises:
        ValueError: an empty mask; when called, a column that the data lacks.
    """

    def __init__(self, reward: Reward, mask: str | Mapping[str, Any]) -> None:
        if not mask or not isinstance(mask, str | Mapping):
            raise ValueError(f"where: {mask!r}, expected a column, or a mapping of columns to values")
        self.reward, self.mask = reward, mask
        self.name = reward.name
        self.needs_entropy, self.needs_policy = reward.needs_entropy, reward.needs_policy

    def __call__(self, batch: RewardBatch) -> RewardValues | Awaitable[RewardValues]:
        return on_rows(self.reward, batch, [row for row in range(len(batch)) if self._holds(batch, row)], None)

    def _holds(self, batch: RewardBatch, row: int) -> bool:
        if isinstance(self.mask, str):
            return bool(self._column(batch, self.mask)[row])
        return all(self._column(batch, name)[row] in _options(wanted) for name, wanted in self.mask.items())

    def _column(self, batch: RewardBatch, name: str) -> list[Any]:
        if name not in batch.columns:
            raise ValueError(f"where: no column {name!r}, the columns are {', '.join(sorted(batch.columns)) or 'none'}")
        return batch.columns[name]


def _options(wanted: Any) -> Sequence[Any]:
    return wanted if isinstance(wanted, list | tuple) else (wanted,)
