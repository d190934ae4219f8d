"""What the trainer does while a generator works elsewhere: behind a server, on devices of its own.

A generator says by ``concurrent_parts`` into how many parts a batch is cut. All parts are sampled at the same time.
Meanwhile the weight policy learns from the batch before (``Lessons``), because only the next weights need that, and the
rewards judge the parts that have come in. A generator that works in this process has 0 parts; then nothing overlaps.

A generator whose ``ahead`` is 1 does more (``Ahead``): as soon as the responses of batch n are there, it gets the
policy as it is then, and samples batch n + 1 while batch n is scored, judged and trained on. So batch n + 1 comes from
the policy before the optimiser steps of batch n. verl calls this one step off-policy.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol, TypeVar

import torch
from torch import nn

from maestro_fast.generation import SamplingConfig
from maestro_fast.records import Prompts, Rollouts
from maestro_fast.rewards import RewardSet
from maestro_fast.settings import SettingsError
from maestro_fast.specs import PolicyLossConfig
from maestro_fast.training.batches import BatchPlan, Processes
from maestro_fast.training.parts import Sampler
from maestro_fast.training.plan import Method
from maestro_fast.weighting import Outcome, WeightPolicy

logger = logging.getLogger(__name__)
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
        staleness: how many optimiser steps lie between the policy that samples the batch and the one that trains on it
            first; None in runs that sample nothing ahead, where it is 0 and not logged.
    """

    prompts: Prompts
    parts: list[Callable[[], Rollouts]]
    wait: Callable[[], None]
    number: int
    step: int
    staleness: int | None = None

    def responses(self) -> Rollouts:
        """Waits for the responses of all parts. If one part has failed, this raises its error."""
        return Rollouts.joined(self.prompts, [part() for part in self.parts])

    @staticmethod
    def done(rollouts: Rollouts, number: int, step: int, staleness: int | None) -> Started:
        """A batch whose responses are there already."""
        return Started(rollouts.prompts, [lambda: rollouts], lambda: None, number, step, staleness)


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


class Starts(Protocol):
    """What ``Ahead`` reads of a ``Step`` and calls."""

    @property
    def plan(self) -> BatchPlan: ...

    @property
    def sampler(self) -> Sampler: ...

    @property
    def processes(self) -> Processes: ...

    def start(
        self, model: nn.Module, prompts: Prompts, number: int, step: int, refill: int = 0, staleness: int | None = None
    ) -> Started: ...


class Ahead:
    """Begins the generation batches of a run, the next one early where the generator samples ahead.

    Attributes:
        on: whether it does. Otherwise every batch is begun when it is needed.
        started: the batch that was begun early and has not been followed by another yet. It stays here while it is
            judged, so that a run saved before its first training step holds its responses.
    """

    def __init__(
        self,
        step: Starts,
        rows_of: Callable[[int], list[int]],
        prompts_of: Callable[[list[int]], Prompts],
        method: Method,
    ) -> None:
        """
        Args:
            step: begins a batch.
            rows_of: gives the rows of a generation batch by its number, over all processes.
            prompts_of: gives the prompts in some rows.
            method: says how responses are sampled and which loss trains on them.

        Raises:
            SettingsError: the loss cannot train on responses that were sampled ahead, see ``check_ahead``; or the
                generator samples ahead in several parts, or in this process.
        """
        ahead: int = getattr(step.sampler.generator, "ahead", 0)  # A user's own generator may not know of it.
        parts = step.sampler.generator.concurrent_parts if ahead else 1
        if parts != 1:
            raise SettingsError(f"generation.ahead: {ahead} with concurrent_parts {parts}, expected 1")
        check_ahead(ahead, method.sampling, method.loss)
        self.on = ahead > 0
        self._step, self._rows_of, self._prompts_of = step, rows_of, prompts_of
        self.started: Started | None = None
        self._running: list[Callable[[], None]] = []

    def batch(self, model: nn.Module, prompts: Prompts, number: int) -> Started:
        """Gives generation batch ``number``, which is begun now unless it was begun early.

        Args:
            model: the policy.
            prompts: this process's prompts, each once.
        """
        started, first = self.started, number * self._step.plan.updates + 1
        if started is not None and started.number == number:
            if started.prompts.token_ids != prompts.repeat(self._step.sampler.group_size).token_ids:
                raise RuntimeError(f"generation.ahead: other prompts were sampled for batch {number} than are due")
            return started
        if started is not None:  # The run goes on with another ``updates_per_batch``.
            logger.warning(
                "batch %d was sampled ahead, but batch %d is due, which is sampled now", started.number, number
            )
        self.started = None
        return self._step.start(model, prompts, number, first, staleness=0 if self.on else None)

    def begin(self, model: nn.Module, number: int, max_steps: int, *, stops: bool) -> None:
        """Has batch ``number`` sampled from now on by the policy as it is, unless the run ends before it.

        The weights are sent and probed when this returns, so the policy may then change.

        Args:
            model: the policy.
            max_steps: the number of optimiser steps of the run.
            stops: whether the run stops after its next optimiser step.
        """
        self.started, updates = None, self._step.plan.updates
        if self.on and not stops and number * updates < max_steps:
            prompts, first = self._own_prompts(number), number * updates + 1
            self.started = self._step.start(model, prompts, number, first, staleness=updates)
            self._running = [self.started.wait]

    def restore(self, started: Started | None) -> None:
        """Goes on with a batch that a checkpoint holds; on all processes together.

        A batch that does not belong to this run any more is sampled anew. So is one that only some processes hold,
        since they would send the weights without the others.
        """
        own = None if started is None else self._still_due(started)
        held = [True] if not self.on else self._step.processes.gather_objects([own is not None])
        if own is not None and not all(held):
            logger.warning("batch %d is sampled anew: another process has no responses of it any more", own.number)
        self.started = own if all(held) else None

    def _still_due(self, started: Started) -> Started | None:
        """The batch with the prompts of the data; None, with a warning, if the run samples another one in its place."""
        prompts = self._own_prompts(started.number).repeat(self._step.sampler.group_size)
        why = "generation.ahead is 0 now" if not self.on else "the prompts of the run have changed"
        if not self.on or prompts.token_ids != started.prompts.token_ids:
            logger.warning("the responses of batch %d, sampled ahead, are not used: %s", started.number, why)
            return None
        return replace(started, prompts=prompts, parts=[lambda: replace(started.responses(), prompts=prompts)])

    def _own_prompts(self, number: int) -> Prompts:
        """This process's prompts of batch ``number``, each once, as the data loader deals them."""
        share, rank = self._step.plan.prompts, self._step.processes.rank
        return self._prompts_of(self._rows_of(number)[rank * share : (rank + 1) * share])

    def __enter__(self) -> Ahead:
        return self

    def __exit__(self, *error: object) -> None:
        """Gives up the batch that was begun early, once it is not being sampled any more."""
        for wait in self._running:
            wait()
        self.started, self._running = None, []


def check_ahead(ahead: int, sampling: SamplingConfig, loss: object) -> None:
    """Refuses to sample ahead for a loss that takes the responses for those of the policy that it trains.

    A loss of the user's own gets the sampler's log-probs and may correct by them, if the sampler does not truncate.

    Raises:
        SettingsError: the loss does not correct, or cannot.
    """
    if not ahead:
        return
    if isinstance(loss, PolicyLossConfig):
        if loss.sampler_correction == "none":
            raise SettingsError(
                f"generation.ahead: {ahead} with loss.sampler_correction: none: each batch is sampled by the policy of "
                "the batch before, expected a correction such as token_truncate"
            )
    elif sampling.truncation is not None:
        raise SettingsError(
            f"generation.ahead: {ahead} with {sampling.truncation} and a loss of your own: it gets no log-probs of the "
            "sampler to correct by, expected top_p: 1.0 and top_k: 0, or ahead: 0"
        )


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
