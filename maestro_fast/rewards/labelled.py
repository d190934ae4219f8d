"""Utilities for some of the prompts: which ones are labelled, by step.

    early steps   every prompt
    later         each prompt with the chance  (share * over - early) / (over - early),  so that a run of ``over``
                  batches has labelled ``share`` of its prompts in all; without ``over`` with the chance ``share``

Labels are worth most at the start, before the policy has moved where nobody has looked.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable
from dataclasses import dataclass
from hashlib import blake2b

from maestro_fast.records import RewardBatch
from maestro_fast.rewards.partial import on_rows
from maestro_fast.rewards.reward import Reward, RewardValues


@dataclass(frozen=True)
class LabelsConfig:
    """Options of ``labels``, see the module.

    Attributes:
        share: of the prompts, in (0, 1].
        early: generation batches that are labelled throughout; over: batches of the run.
        seed: of the choice, which follows from it, the batch and the prompt alone.
    """

    share: float = 1.0
    early: int = 0
    over: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"share: {self.share}, expected 0 < share <= 1")
        if self.early < 0:
            raise ValueError(f"early: {self.early}, expected at least 0")
        if self.over is not None and self.over <= self.early:
            raise ValueError(f"over: {self.over}, expected more than early, {self.early}")

    def chance(self, step: int) -> float:
        """Probability that a prompt of generation batch ``step`` is labelled; all are in evaluations, below 0."""
        if step < max(0, self.early):
            return 1.0
        if self.over is None:
            return self.share
        return max(0.0, (self.share * self.over - self.early) / (self.over - self.early))

    def chosen(self, step: int, prompt: object) -> bool:
        """The same for every response to a prompt, on every process."""
        key = json.dumps([self.seed, step, prompt], sort_keys=True).encode()
        return int.from_bytes(blake2b(key, digest_size=8).digest(), "big") < self.chance(step) * 2**64


class Labelled:
    """``reward`` for the prompts that are chosen; it abstains on the others, for which it is not computed.

    Raises:
        ValueError: when called, a batch without a step.
    """

    def __init__(self, reward: Reward, labels: LabelsConfig) -> None:
        self.reward, self.labels = reward, labels
        self.name = reward.name
        self.needs_entropy, self.needs_policy = reward.needs_entropy, reward.needs_policy

    def __call__(self, batch: RewardBatch) -> RewardValues | Awaitable[RewardValues]:
        if batch.step is None:
            raise ValueError("batch.step: missing, expected the number of the generation batch")
        rows = [row for row in range(len(batch)) if self.labels.chosen(batch.step, batch.prompts[row])]
        return on_rows(self.reward, batch, rows, None)
