"""A reward that counts only where another one says so: style only of correct answers, a judge only of valid formats.

    r_gated = r where  on >= threshold,  else abstained, or a fixed value

An abstention leaves the response to its other rewards; a fixed value, such as 0, ranks it below what passed. Asked for
in https://github.com/huggingface/trl/issues/4853.
"""

from __future__ import annotations

from collections.abc import Awaitable
from inspect import isawaitable

from maestro_fast.records import RewardBatch
from maestro_fast.rewards.partial import on_rows
from maestro_fast.rewards.reward import Reward, RewardValues


class Gate:
    """``reward``, gated. It is computed only for the responses that pass; where ``on`` abstains, none passes.

    Args:
        reward: what is gated, and lends its name.
        on: the condition; computed for it, also if it is a reward of the run as well.
        threshold: least value of ``on`` that passes.
        closed: the value of the others; None: they abstain.
    """

    def __init__(self, reward: Reward, *, on: Reward, threshold: float, closed: float | None = None) -> None:
        for field, given in (("reward", reward), ("on", on)):
            if isinstance(given, type) or not isinstance(given, Reward):
                raise TypeError(f"{field}: got {type(given).__name__}, expected a Reward")
        if threshold != threshold:
            raise ValueError("threshold: nan, expected a number")
        self.reward, self.on, self.threshold, self.closed = reward, on, threshold, closed
        self.name = reward.name
        self.needs_entropy = reward.needs_entropy or on.needs_entropy
        self.needs_policy = reward.needs_policy or on.needs_policy

    def __call__(self, batch: RewardBatch) -> RewardValues | Awaitable[RewardValues]:
        condition = self.on(batch)
        if not isawaitable(condition):
            return on_rows(self.reward, batch, self._passing(condition), self.closed)

        async def later() -> RewardValues:
            found = on_rows(self.reward, batch, self._passing(await condition), self.closed)
            return await found if isawaitable(found) else found

        return later()

    def _passing(self, values: RewardValues) -> list[int]:
        items = values.tolist() if hasattr(values, "tolist") else values
        return [i for i, item in enumerate(items) if item is not None and item >= self.threshold]


def gate(reward: Reward, *, on: Reward, threshold: float, closed: float | None = None) -> Gate:
    """See ``Gate``."""
    return Gate(reward, on=on, threshold=threshold, closed=closed)
