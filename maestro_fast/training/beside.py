"""What the trainer does while a generator works elsewhere: behind a server, on devices of its own.

A generator says by ``concurrent_parts`` into how many parts a batch may be asked for at once. All parts are under way
together. Meanwhile the weight policy learns from the batch before (``Lessons``), which only the next weights wait for,
and the rewards judge the parts that have come in. A generator that works in this process has 0: then nothing overlaps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import torch

from maestro_fast.rewards import RewardSet
from maestro_fast.weighting import Outcome, WeightPolicy

T = TypeVar("T")


def under_way(
    calls: Sequence[Callable[[], T]], device: torch.device
) -> tuple[list[Callable[[], T]], Callable[[], None]]:
    """Starts each call in a thread of its own. Returns the callables that wait for the results, in order, and one that
    waits until all have ended, whatever came of them.

    ``device``: becomes the current one of the threads, which would be the first otherwise.
    """
    here = partial(torch.cuda.set_device, device) if device.type == "cuda" else None
    executor = ThreadPoolExecutor(len(calls), "generate", here)
    futures = [executor.submit(call) for call in calls]
    executor.shutdown(wait=False)
    return [future.result for future in futures], executor.shutdown


@dataclass
class Lessons:
    """Outcomes that the weight policy has still to learn from, one at most."""

    weights: WeightPolicy
    _waiting: list[Outcome] = field(default_factory=list)

    def add(self, outcome: Outcome, *, postpone: bool) -> None:
        self._waiting.append(outcome)
        if not postpone:
            self.learn()

    @property
    def waiting(self) -> bool:
        return bool(self._waiting)

    def forget(self) -> None:
        self._waiting.clear()

    def learn(self) -> dict[str, float]:
        """Catches up, before the next weights and before anything is saved. Returns the figures that are new."""
        known = self.weights.metrics()
        if not self._waiting:
            return {}
        self.weights.observe(self._waiting.pop())
        return {name: value for name, value in self.weights.metrics().items() if name not in known}


def check_parts(parts: int, prompts: int, rewards: RewardSet, anchor: RewardSet | None) -> None:
    """
    Args:
        prompts: of one process in a batch.

    Raises:
        ValueError: they do not divide into parts, or a reward needs the whole batch.
    """
    if parts < 2:
        return
    if prompts % parts:
        raise ValueError(
            f"generation.parts: {parts}, expected a divisor of the {prompts} prompts that a process has in a batch"
        )
    for reward in (*rewards.rewards, *(anchor.rewards if anchor is not None else ())):
        if reward.needs_entropy or reward.needs_policy:
            raise ValueError(
                f"generation.parts: {parts}, but reward {reward.name!r} reads the policy's own forward over the whole "
                "batch, expected 1"
            )
