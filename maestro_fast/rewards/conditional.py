"""Rewards that count on some responses only: behind a gate, where a column says so, or on labelled prompts.

    Gate      r where another reward reaches a threshold      style of correct answers, a judge of valid formats
    Where     r where a column of the data has a value        rhyme in poems
    Labelled  r for a share of the prompts                    a utility that is costly to know

Elsewhere the reward abstains, or has a fixed value behind a gate. Where it abstains, the response is judged by its
other rewards, and the advantage profile says whether their weights make up for it. A fixed value, such as 0, ranks the
response below those that passed the gate. Nothing is computed for the responses that are left out.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Awaitable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from inspect import isawaitable
from typing import Any

import torch

from maestro_fast.records import RewardBatch
from maestro_fast.rewards.first_batches import Look, own_reason
from maestro_fast.rewards.guarded import Guarded
from maestro_fast.rewards.reward import Reward, RewardValues, blame, column_of, figures, judge, plain_call
from maestro_fast.settings import SettingsError

SHOWN = 12  # how many values of a column a message lists
_LARGEST = torch.finfo(torch.float32).max


class Gate:
    """Counts ``reward`` only where another reward reaches a threshold. The gate is closed where the other one abstains.

    Gates were asked for in https://github.com/huggingface/trl/issues/4853.

    Args:
        reward: the reward behind the gate, whose name the gate takes.
        on: the reward that opens the gate. It is computed for the gate, even if it is also a reward of the run.
        threshold: the least value of ``on`` that opens the gate.
        closed: the value where the gate is closed. With None the reward abstains there.
    """

    reads_only = True

    def __init__(self, reward: Reward, *, on: Reward, threshold: float, closed: float | None = None) -> None:
        for field, given in (("reward", reward), ("on", on)):
            if isinstance(given, type) or not isinstance(given, Reward):
                raise TypeError(f"{field}: got {type(given).__name__}, expected a Reward")
        for name, value in (("threshold", threshold), ("closed", closed)):
            if not isinstance(value, int | float) and (name == "threshold" or value is not None):
                raise TypeError(f"{name}: got {type(value).__name__}, expected a number")
        if threshold != threshold:
            raise ValueError("threshold: nan, expected a number")
        if closed is not None and not abs(closed) <= _LARGEST:
            raise ValueError(f"closed: {closed}, expected a finite number, or null to abstain")
        self.reward, self.on, self.threshold, self.closed = reward, on, threshold, closed
        self.name = reward.name
        self.needs_entropy = reward.needs_entropy or on.needs_entropy
        self.needs_policy = reward.needs_policy or on.needs_policy

    def __call__(self, batch: RewardBatch) -> RewardValues | Awaitable[RewardValues]:
        role = f", the gate of {self.name!r}"
        with blame(self.on.name, role):
            condition = judge(self.on, batch)
        if not isawaitable(condition):
            return _on_rows(self.reward, batch, self._open_rows(condition, batch), self.closed)

        async def later() -> RewardValues:
            with blame(self.on.name, role):
                values = await condition
            with plain_call():
                found = _on_rows(self.reward, batch, self._open_rows(values, batch), self.closed)
            return await found if isawaitable(found) else found

        return later()

    def why_silent(self, look: Look) -> str:
        """The likely reason why it taught nothing, see ``first_batches``."""
        if not (look.abstained if self.closed is None else look.value == self.closed):
            return own_reason(self.reward, look)
        return (
            f"its gate never opened ({self.on.name!r} stayed below {self.threshold:g}), or the same came from behind it"
        )

    def metrics(self) -> dict[str, float]:
        """The figures of the reward, and those of the reward that opens the gate behind ``gate/``."""
        on = {f"gate/{figure}": value for figure, value in figures(self.on).items()}
        return figures(self.reward) | on

    def _open_rows(self, values: RewardValues, batch: RewardBatch) -> list[int]:
        column_B = column_of(self.on.name, values, len(batch), batch.prompts)
        # Rewards are float32, in which 0.7 is a little less than the threshold 0.7 of the config.
        threshold = column_B.new_tensor(self.threshold)
        return (column_B >= threshold).nonzero().flatten().tolist()  # not where the other one abstains with a NaN


def gate(reward: Reward, *, on: Reward, threshold: float, closed: float | None = None) -> Gate:
    """Makes a ``Gate``, which has the same arguments."""
    return Gate(reward, on=on, threshold=threshold, closed=closed)


class Where:
    """Counts ``reward`` only for the responses to some prompts, which the columns of the data select.

    Args:
        reward: the reward that is masked, whose name the mask takes.
        mask: a column that is true (non-empty text, a number other than 0) where the reward counts, or a mapping of
            columns to the value, or the list of values, that they have there.

    Raises:
        ValueError: the mask is empty. When called: the data lack a column.
    """

    reads_only = True

    def __init__(self, reward: Reward, mask: str | Mapping[str, Any]) -> None:
        check_mask(mask)
        self.reward, self.mask = reward, mask
        self.name = reward.name
        self.needs_entropy, self.needs_policy = reward.needs_entropy, reward.needs_policy

    def __call__(self, batch: RewardBatch) -> RewardValues | Awaitable[RewardValues]:
        for name in self.columns:
            if name not in batch.columns:
                listed = ", ".join(sorted(batch.columns)) or "none"
                raise ValueError(f"where: no column {name!r}, the columns are {listed}")
        values = {name: batch.columns[name] for name in self.columns}
        rows = [i for i in range(len(batch)) if self._counts({name: values[name][i] for name in values})]
        return _on_rows(self.reward, batch, rows, None)

    def why_silent(self, look: Look) -> str:
        """The likely reason why it taught nothing, see ``first_batches``."""
        reason = own_reason(self.reward, look)
        if not look.abstained:
            return reason
        return f"no prompt of these batches has {self.mask!r}{', or ' + reason if reason else ''}"

    def metrics(self) -> dict[str, float]:
        """The figures of the reward that is masked."""
        return figures(self.reward)

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that the mask reads."""
        return (self.mask,) if isinstance(self.mask, str) else tuple(self.mask)

    def _counts(self, row: Mapping[str, Any]) -> bool:
        """Whether the reward counts in a row of the data, given by column."""
        if isinstance(self.mask, str):
            return bool(row.get(self.mask))
        return all(row.get(name) in _options(wanted) for name, wanted in self.mask.items())

    def check_rows(self, rows: Sequence[Mapping[str, Any]], path: str) -> None:
        """Checks that the mask fits the data; otherwise the reward would abstain for ever, without a word.

        Args:
            rows: all rows of a run, those of training and the held-out ones, without their prompts.
            path: the dotted name of the mask, for messages.

        Raises:
            SettingsError: a value is in no row, or no row has all of them together.
        """
        if isinstance(self.mask, Mapping):
            for name, wanted in self.mask.items():
                _check_values(_options(wanted), [row.get(name) for row in rows], f"{path}.{name}")
        if not any(self._counts(row) for row in rows):
            raise SettingsError(
                f"{path}: {self.mask!r} is met by none of the {len(rows)} rows of the data, expected at least one: the "
                "reward would always abstain"
            )


def _options(wanted: Any) -> Sequence[Any]:
    return wanted if isinstance(wanted, list | tuple) else (wanted,)


def _check_values(options: Sequence[Any], held: Sequence[Any], path: str) -> None:
    """Raises SettingsError if one of ``options`` is not among ``held``, the values of a column of the data."""
    for option in options:
        if option in held:
            continue
        counts = Counter(map(repr, held))
        listed = ", ".join(value for value, _ in counts.most_common(SHOWN))
        listed += f" and {len(counts) - SHOWN} more" if len(counts) > SHOWN else ""
        alike = next((value for value in held if str(value) == str(option)), None)
        hint = "" if alike is None else f"; write {alike!r} ({type(alike).__name__}) for {option!r}"
        raise SettingsError(
            f"{path}: {option!r} ({type(option).__name__}) is in no row of the data, expected one of {listed}{hint}"
        )


def needed_columns(reward: Reward, rows: Sequence[Mapping[str, Any]]) -> set[str]:
    """The columns without which a reward, or one inside it, could not be called on some rows of the data."""
    own = {*getattr(reward, "needs_columns", ())}
    if isinstance(reward, Where):
        own |= {*reward.columns}
        rows = [row for row in rows if reward._counts(row)]
        if not rows and not reward.needs_policy:
            return own  # What it masks is never called.
    if isinstance(reward, Gate):
        own |= needed_columns(reward.on, rows)
    return own | (needed_columns(reward.reward, rows) if isinstance(reward, _AROUND_ANOTHER) else set())


def masks(reward: Reward, path: str) -> Iterator[tuple[str, Where]]:
    """The masks of a reward and of the rewards inside it, each with its dotted name in a config."""
    if isinstance(reward, Where):
        yield f"{path}.where", reward
    if isinstance(reward, Gate):
        yield from masks(reward.on, f"{path}.gate.on")
    if isinstance(reward, _AROUND_ANOTHER):
        yield from masks(reward.reward, path)


def check_mask(mask: object) -> None:
    """Raises ValueError unless ``mask`` names at least one column."""
    if not mask or not isinstance(mask, str | Mapping):
        raise ValueError(f"where: {mask!r}, expected a column, or a mapping of columns to values")


@dataclass(frozen=True)
class LabelsConfig:
    """Says for which prompts a utility is known.

    Labels are worth most at the start, before the policy has moved to responses that nobody has judged. So the first
    ``early`` generation batches are labelled throughout. After them each prompt is labelled with the chance
    (share * over - early) / (over - early), so that a run of ``over`` batches has labelled ``share`` of its prompts in
    all. Without ``over`` that chance is ``share``.

    Attributes:
        share: the share of the prompts that are labelled, in (0, 1].
        early: the number of generation batches at the start that are labelled throughout.
        over: the number of generation batches of the run, over which the share is reached.
        seed: the seed of the choice, which follows from it, the batch and the prompt alone.
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
        """The probability that a prompt of generation batch ``step`` is labelled. Evaluations, below 0, label all."""
        if step < max(0, self.early):
            return 1.0
        if self.over is None:
            return self.share
        return max(0.0, (self.share * self.over - self.early) / (self.over - self.early))

    def chosen(self, step: int, prompt: object) -> bool:
        """Whether a prompt is labelled. It is the same for every response to the prompt, on every process."""
        key = json.dumps([self.seed, step, prompt], sort_keys=True).encode()
        return int.from_bytes(blake2b(key, digest_size=8).digest(), "big") < self.chance(step) * 2**64


class Labelled:
    """Counts ``reward`` only for labelled prompts. It abstains on the others, for which it is not computed.

    Raises:
        ValueError: when called with a batch that has no step.
    """

    reads_only = True

    def __init__(self, reward: Reward, labels: LabelsConfig) -> None:
        self.reward, self.labels = reward, labels
        self.name = reward.name
        self.needs_entropy, self.needs_policy = reward.needs_entropy, reward.needs_policy

    def __call__(self, batch: RewardBatch) -> RewardValues | Awaitable[RewardValues]:
        if batch.step is None:
            raise ValueError("batch.step: missing, expected the number of the generation batch")
        rows = [row for row in range(len(batch)) if self.labels.chosen(batch.step, batch.prompts[row])]
        return _on_rows(self.reward, batch, rows, None)

    def metrics(self) -> dict[str, float]:
        """The figures of the reward that is labelled."""
        return figures(self.reward)


_AROUND_ANOTHER = (Where, Gate, Labelled, Guarded)  # what has another reward as its ``reward``


def _on_rows(
    reward: Reward, batch: RewardBatch, rows: Sequence[int], otherwise: float | None
) -> RewardValues | Awaitable[RewardValues]:
    """Gives the values of ``reward`` on ``rows`` of a batch, and ``otherwise`` on the rest.

    The result is an awaitable if the reward returns one. The reward sees these rows alone, so nothing is computed for
    the others. Without any row it is not called, unless it needs the policy, whose forwards are made on all processes
    together.
    """
    if not rows and not reward.needs_policy:
        return [otherwise] * len(batch)
    selected = batch.select(rows)
    found = judge(reward, selected)

    def spread(values: RewardValues) -> list[float | None]:
        out: list[float | None] = [otherwise] * len(batch)
        for row, item in zip(rows, column_of(reward.name, values, len(rows), selected.prompts).tolist(), strict=True):
            out[row] = None if math.isnan(item) else item
        return out

    if not isawaitable(found):
        return spread(found)

    async def later() -> RewardValues:
        return spread(await found)

    return later()
