"""A reward on some rows of a batch: what gates, masks and labels have in common."""

from __future__ import annotations

from collections.abc import Awaitable, Sequence
from inspect import isawaitable

from maestro_fast.records import RewardBatch
from maestro_fast.rewards.reward import Reward, RewardValues


def on_rows(
    reward: Reward, batch: RewardBatch, rows: Sequence[int], otherwise: float | None
) -> RewardValues | Awaitable[RewardValues]:
    """``reward`` on ``rows`` of a batch, ``otherwise`` on the rest; asynchronous if the reward is.

    The reward sees these rows alone, so nothing is computed for the others. Without any it is not called, except one
    that needs the policy: its forwards are made on all processes together.
    """
    if not rows and not reward.needs_policy:
        return [otherwise] * len(batch)
    found = reward(batch.select(rows))
    if not isawaitable(found):
        return _spread(found, rows, len(batch), otherwise)

    async def later() -> RewardValues:
        return _spread(await found, rows, len(batch), otherwise)

    return later()


def _spread(values: RewardValues, rows: Sequence[int], count: int, otherwise: float | None) -> list[float | None]:
    items = values.tolist() if hasattr(values, "tolist") else list(values)
    if len(items) != len(rows):
        raise ValueError(f"returned {len(items)} values for {len(rows)} completions")
    out: list[float | None] = [otherwise] * count
    for row, item in zip(rows, items, strict=True):
        out[row] = item
    return out
