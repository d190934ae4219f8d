"""Which responses are shown, and when."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch

from maestro_fast.records import StepRecord
from maestro_fast.settings import SettingsError, build
from maestro_fast.watching import ConsoleConfig, TrackersConfig, is_due, pick_samples


def record(step: int, groups: int, group_size: int) -> StepRecord:
    rows = groups * group_size
    torch.manual_seed(step)
    rewards, empty = torch.randn(rows, 2), torch.zeros(rows)
    rewards[0, 1] = math.nan
    texts = [f"answer {row}" for row in range(rows)]
    prompts: Any = [f"prompt {row // group_size}" for row in range(rows)]
    weights = torch.rand(rows, 2)
    advantages = torch.randn(rows)
    lengths, flags = torch.arange(rows), torch.arange(rows) % 2 == 0
    columns = (rewards, weights, weights, advantages, empty, flags, lengths, flags)
    return StepRecord(step, ("a", "b"), ["f"] * rows, prompts, texts, *columns)


def test_they_are_the_best_and_the_worst_of_random_groups() -> None:
    seen = set()
    for step in range(1, 40):
        batch = record(step, groups=4, group_size=3)
        best, worst, other = pick_samples(batch, 3, 3)
        own = batch.advantages_B.view(4, 3)
        assert best.group == worst.group != other.group
        assert (best.advantage, worst.advantage) == (own[best.group].max(), own[best.group].min())
        assert other.advantage == own[other.group].max() and [best.rank, worst.rank] == ["best", "worst"]
        assert best.prompt == f"prompt {best.group}"
        row = int(best.completion.split()[1])
        assert best.length == row and best.truncated == (row % 2 == 0)
        assert best.weights == dict(zip("ab", batch.weights_BK[row].tolist(), strict=True))
        seen.add(best.group)
    assert seen == {0, 1, 2, 3}


def test_the_choice_is_a_function_of_the_step_that_draws_from_nothing_else() -> None:
    random.seed(1)
    before = random.getstate()
    batch = record(5, groups=8, group_size=2)
    first = pick_samples(batch, 2, 6)
    assert random.getstate() == before
    random.random()
    assert pick_samples(batch, 2, 6) == first


def test_there_may_be_fewer_than_asked_for() -> None:
    assert len(pick_samples(record(1, groups=2, group_size=4), 4, 9)) == 4
    assert [sample.rank for sample in pick_samples(record(1, groups=2, group_size=1), 1, 9)] == ["best", "best"]
    (first,) = (sample for sample in pick_samples(record(1, 1, 1), 1, 2))
    assert first.rewards["b"] is None and first.rewards["a"] is not None, "None stands for an abstention"


def test_a_batch_is_shown_if_any_of_its_steps_is_due() -> None:
    assert [step for step in range(1, 12) if is_due(step, 5, updates=1)] == [1, 6, 11]
    assert [step for step in range(1, 25, 4) if is_due(step, 5, updates=4)] == [1, 5, 9, 13, 21]  # 1, 6, 11, 16, 21


@pytest.mark.parametrize("config", [ConsoleConfig, TrackersConfig])
def test_numbers_too_small_are_refused(config: type[Any]) -> None:
    with pytest.raises(SettingsError, match=r"every: 0, expected at least 1"):
        build(config, {"every": 0})
    with pytest.raises(SettingsError, match=r"samples: -1, expected at least"):
        build(config, {"samples": -1})
