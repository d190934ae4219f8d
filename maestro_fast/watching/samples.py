"""Which responses of a batch are shown while a run goes on, and in which steps.

The choice depends on the step alone: it draws from no random state that training uses, and a resumed run shows what
the uninterrupted one does.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

from maestro_fast.records import StepRecord, plain_text


@dataclass(frozen=True)
class ConsoleConfig:
    """Samples on the console, above the progress bar.

    Attributes:
        every: the number of optimiser steps between two of them, from the first step on.
        samples: the number of responses, by turns the best and the worst of a random group by their advantage.
    """

    every: int = 10
    samples: int = 2

    def __post_init__(self) -> None:
        _check(self.every, self.samples)


@dataclass(frozen=True)
class TrackersConfig:
    """What TensorBoard and Weights & Biases get beside the figures of the log, where ``trainer.report_to`` names them.

    These are histograms of rewards, weights and advantages, and a table of samples. The table holds texts of your
    data.

    Attributes:
        every: the number of optimiser steps between two of them, from the first step on.
        samples: the number of responses in the table, chosen as for the console; 0 sends no texts.
    """

    every: int = 10
    samples: int = 8

    def __post_init__(self) -> None:
        _check(self.every, self.samples, least=0)


def _check(every: int, samples: int, least: int = 1) -> None:
    if every < 1:
        raise ValueError(f"every: {every}, expected at least 1")
    if samples < least:
        raise ValueError(f"samples: {samples}, expected at least {least}")


@dataclass(frozen=True)
class Sample:
    """One response as it is shown.

    Attributes:
        group: the number of its group in the batch, from 0.
        rank: "best" or "worst" of the group by advantage.
        prompt, completion: their texts.
        rewards: by name; None where a reward abstained.
        weights: by the name of the reward.
        advantage: its advantage.
        length: its number of tokens.
        truncated: whether the token limit ended it.
    """

    group: int
    rank: str
    prompt: str
    completion: str
    rewards: dict[str, float | None]
    weights: dict[str, float]
    advantage: float
    length: int
    truncated: bool


def is_due(step: int, every: int, updates: int) -> bool:
    """Whether a batch is shown whose ``updates`` optimiser steps begin with ``step``: in steps 1, 1 + every, ..."""
    return any((step + update - 1) % every == 0 for update in range(updates))


def pick_samples(record: StepRecord, group_size: int, count: int) -> list[Sample]:
    """Picks at most ``count`` responses: of random groups, keyed by the step, the best and the worst by advantage.

    Args:
        record: a batch, whose groups stand one after another.
        group_size: the number of responses to a prompt.
        count: how many; an odd one leaves out the worst of the last group.
    """
    groups = len(record.completions) // group_size
    chosen = random.Random(record.step).sample(range(groups), min(groups, math.ceil(count / 2)))
    picked: list[Sample] = []
    for group in chosen:
        rows = range(group * group_size, (group + 1) * group_size)
        ascending = sorted(rows, key=lambda row: float(record.advantages_B[row]))
        picked.append(_sample(record, ascending[-1], group, "best"))
        if group_size > 1:
            picked.append(_sample(record, ascending[0], group, "worst"))
    return picked[:count]


def _sample(record: StepRecord, row: int, group: int, rank: str) -> Sample:
    rewards, weights = record.rewards_BK[row].tolist(), record.weights_BK[row].tolist()
    return Sample(
        group,
        rank,
        plain_text(record.prompts[row]),
        plain_text(record.completions[row]),
        {n: None if math.isnan(r) else r for n, r in zip(record.reward_names, rewards, strict=True)},
        dict(zip(record.reward_names, weights, strict=True)),
        float(record.advantages_B[row]),
        int(record.lengths_B[row]),
        bool(record.truncated_B[row]),
    )
