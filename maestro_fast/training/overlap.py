"""What the trainer does while a generator works elsewhere: behind a server, on devices of its own.

A generator says by ``concurrent_parts`` into how many parts a batch is cut. All parts are sampled at the same time.
Meanwhile the weight policy learns from the batch before (``Lessons``), because only the next weights need that, and the
rewards judge the parts that have come in. A generator that works in this process has 0 parts; then nothing overlaps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch

from maestro_fast.records import Prompts, Rollouts
from maestro_fast.rewards import RewardSet
from maestro_fast.weighting import Outcome, WeightPolicy

T = TypeVar("T")


@dataclass(frozen=True)
class Started:
    """A generation batch of one process that is being sampled.

    Attributes:
        prompts: one entry for each response.
        parts: callables that each wait for the responses of one part, which holds whole groups.
        wait: a callable that returns once no part is being sampled any more, whether or not one has failed.
        number: the number of the generation batch, from 0.
        step: the number of the first optimiser step that trains on the batch, from 1.
    """

    prompts: Prompts
    parts: list[Callable[[], Rollouts]]
    wait: Callable[[], None]
    number: int
    step: int


def run_together(
    calls: Sequence[Callable[[], T]], device: torch.device
) -> tuple[list[Callable[[], T]], Callable[[], None]]:
    """Starts each call in a thread of its own.

    Args:
        calls: the functions to run.
        device: the device that the threads use by default; without this it would be the first one.

    Returns:
        Callables that wait for one result each, in the order of ``calls``, and one that waits until all calls have
        ended, even if some have failed.
    """
    use_device = partial(torch.cuda.set_device, device) if device.type == "cuda" else None
    executor = ThreadPoolExecutor(len(calls), "generate", use_device)
    futures = [executor.submit(call) for call in calls]
    executor.shutdown(wait=False)
    return [future.result for future in futures], executor.shutdown


class Lessons:
    """Keeps the outcome, at most one, from which the weight policy has still to learn."""

    def __init__(self, weights: WeightPolicy) -> None:
        self.weights = weights
        self._waiting: list[Outcome] = []

    def add(self, outcome: Outcome, *, postpone: bool) -> None:
        """Lets the policy learn from ``outcome`` now, or, if ``postpone``, at the next ``learn``."""
        self._waiting.append(outcome)
        if not postpone:
            self.learn()

    @property
    def waiting(self) -> tuple[Outcome, ...]:
        return tuple(self._waiting)

    def restore(self, outcomes: Sequence[Outcome] = ()) -> None:
        """Lets ``outcomes``, or nothing, wait in place of what does."""
        self._waiting = [*outcomes]

    def learn(self) -> dict[str, float]:
        """Lets the policy learn from the waiting outcome, if any. This comes before the next weights and before saving.

        Returns:
            The policy's metrics that it did not have before.
        """
        if not self._waiting:
            return {}
        known = self.weights.metrics()
        self.weights.observe(self._waiting.pop())
        return {name: value for name, value in self.weights.metrics().items() if name not in known}


def check_parts(parts: int, prompts: int, rewards: RewardSet, anchor: RewardSet | None) -> None:
    """Checks that a batch can be sampled and judged in ``parts``.

    Args:
        parts: the generator's ``concurrent_parts``.
        prompts: the number of prompts that a process has in a batch.
        rewards, anchor: the rewards and the utility that judge the responses.

    Raises:
        ValueError: the prompts do not divide into parts, or a reward needs the whole batch.
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
