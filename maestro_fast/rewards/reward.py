"""What a reward is, and a named set of rewards: one [B, K] tensor from one batch.

A reward judges all completions of a batch at once. It returns one finite number per completion, or None where
it abstains: what it measures does not apply to that completion. In the tensor an abstention is NaN, and
nothing else is: a reward that computes NaN or inf is at fault and stops the run.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Iterator, Sequence
from contextlib import contextmanager
from inspect import isawaitable, iscoroutine
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from maestro_fast.records import RewardBatch
from maestro_fast.rewards import event_loop

RewardValues = Sequence[float | None] | Tensor

logger = logging.getLogger(__name__)

_LARGEST = torch.finfo(torch.float32).max


@runtime_checkable
class Reward(Protocol):
    """One reward over a batch.

    Attributes:
        name: unique within a run.
        needs_entropy: reads ``batch.mean_entropies_B``.
        needs_policy: calls ``batch.score_texts``.
    """

    @property
    def name(self) -> str: ...

    @property
    def needs_entropy(self) -> bool: ...

    @property
    def needs_policy(self) -> bool: ...

    def __call__(self, batch: RewardBatch) -> RewardValues | Awaitable[RewardValues]:
        """B finite numbers, None to abstain; a tensor [B] cannot abstain. The set awaits an awaitable."""
        ...


class RewardSet:
    """K rewards with unique names, in order.

    Attributes:
        rewards: the K rewards; names: theirs.
        needs_entropy, needs_policy: True if any of the rewards needs it.

    Raises:
        ValueError: no reward, an empty name, or a name twice.
        TypeError: an entry that is not a ``Reward``.
    """

    def __init__(self, rewards: Sequence[Reward]) -> None:
        if not rewards:
            raise ValueError("rewards: none given, expected at least one")
        for i, reward in enumerate(rewards):
            if isinstance(reward, type) or not isinstance(reward, Reward):
                got = f"the class {reward.__name__}" if isinstance(reward, type) else type(reward).__name__
                raise TypeError(f"rewards[{i}]: got {got}, expected a Reward (FunctionReward wraps a function)")
            if not isinstance(reward.name, str) or not reward.name:
                raise ValueError(f"rewards[{i}]: the name is {reward.name!r}, expected a non-empty string")
        self.rewards = tuple(rewards)
        self.names = tuple(reward.name for reward in rewards)
        repeated = sorted({name for name in self.names if self.names.count(name) > 1})
        if repeated:
            raise ValueError(f"rewards: the name {repeated[0]!r} stands for more than one, expected unique names")
        self.needs_entropy = any(reward.needs_entropy for reward in rewards)
        self.needs_policy = any(reward.needs_policy for reward in rewards)
        self._warned = False

    def __len__(self) -> int:
        return len(self.rewards)

    def __call__(self, batch: RewardBatch) -> Tensor:
        """All rewards of a batch; the asynchronous ones run concurrently, after the others.

        Returns:
            float32 [B, K] on the CPU, NaN exactly where a reward returned None.

        Raises:
            ValueError: a reward returned the wrong number of values, or NaN or inf.
            TypeError: a reward returned something else than numbers.
            Exception: whatever a reward raised, with a note that names the reward.
        """
        values = _await_all(self.names, self._call_all(batch))
        columns = [_column(name, value, len(batch)) for name, value in zip(self.names, values, strict=True)]
        rewards_BK = torch.stack(columns, dim=1)
        if len(batch) and not self._warned and bool(rewards_BK.isnan().all()):
            self._warned = True
            logger.warning(
                "every reward (%s) abstained on all %d completions of a batch, so nothing is learnt: are the "
                "columns that they read empty, or is the wanted format out of reach? This is said once.",
                ", ".join(self.names),
                len(batch),
            )
        return rewards_BK

    def _call_all(self, batch: RewardBatch) -> list[object]:
        """What each reward returned; not yet awaited."""
        values: list[object] = []
        try:
            for reward in self.rewards:
                with _blame(reward.name):
                    values.append(reward(batch))
        except BaseException:
            for value in values:  # else Python warns of coroutines that nobody awaited
                if iscoroutine(value):
                    value.close()
            raise
        return values


def _await_all(names: Sequence[str], values: list[object]) -> list[object]:
    """``values`` with the results of the awaitable ones in their places."""

    async def awaited(name: str, value: Awaitable[object]) -> object:
        with _blame(name):
            return await value

    pending = {i: awaited(names[i], value) for i, value in enumerate(values) if isawaitable(value)}
    if pending:
        results = event_loop.gather(list(pending.values()))
        for i, result in zip(pending, results, strict=True):
            values[i] = result
    return values


@contextmanager
def _blame(name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        error.add_note(f"raised by reward {name!r}")
        raise


def _column(name: str, values: object, batch: int) -> Tensor:
    """float32 [B] on the CPU from what a reward returned: a list, a tuple, a tensor or a numpy array."""
    items = values.tolist() if hasattr(values, "tolist") else values
    if not isinstance(items, Sequence) or isinstance(items, (str, bytes)):
        got = f"a tensor of shape {tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
        raise TypeError(f"reward {name!r}: returned {got}, expected {batch} numbers, one per completion")
    if len(items) != batch:
        raise ValueError(f"reward {name!r}: returned {len(items)} values for {batch} completions")
    numbers = [math.nan if item is None else _number(name, row, item) for row, item in enumerate(items)]
    return torch.tensor(numbers, dtype=torch.float32)


def _number(name: str, row: int, item: object) -> float:
    wrong = f"reward {name!r}: row {row} is {item!r}, expected a finite number, or None to abstain"
    if isinstance(item, (str, bytes)):  # float() would read them
        raise TypeError(wrong)
    try:
        value = float(item)  # type: ignore[arg-type]
    except OverflowError as error:
        raise ValueError(wrong) from error
    except Exception as error:  # whatever its __float__ raises
        raise TypeError(wrong) from error
    if not abs(value) <= _LARGEST:  # also what overflows in float32
        raise ValueError(wrong)
    return value
