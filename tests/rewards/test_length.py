"""LengthReward by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest

from maestro_fast.records import RewardBatch
from maestro_fast.rewards import LengthReward

MakeBatch = Callable[..., RewardBatch]
LENGTHS = [0, 9, 10, 12, 15, 20, 25]


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0, 0, 0, -0.2, -0.5, -1, -1]),
        ({"scale": 20}, [0, 0, 0, -0.1, -0.25, -0.5, -0.75]),
        ({"floor": -1.2}, [0, 0, 0, -0.2, -0.5, -1, -1.2]),
        ({"floor": -math.inf, "scale": 1}, [0, 0, 0, -2, -5, -10, -15]),
        ({"floor": 0}, [0, 0, 0, 0, 0, 0, 0]),
    ],
)
def test_values(options: dict[str, Any], expected: list[float], chat: bool, make_batch: MakeBatch) -> None:
    tokens = make_batch(["one"] * 7, chat=chat, completion_ids=[[3] * n for n in LENGTHS])
    assert LengthReward(target=10, **options)(tokens) == pytest.approx(expected, abs=1e-12)
    words = make_batch(["one\n" * n for n in LENGTHS], chat=chat, completion_ids=[[3]] * 7)
    assert LengthReward(target=10, unit="words", **options)(words) == pytest.approx(expected, abs=1e-12)


def test_a_target_of_zero_with_a_scale(make_batch: MakeBatch) -> None:
    assert LengthReward(target=0, scale=4)(make_batch(["", "a", "a b"])) == [0.0, -0.25, -0.5]


def test_the_floor_is_minus_one_by_default(make_batch: MakeBatch) -> None:
    assert LengthReward(target=1)(make_batch(["a b c d"])) == [-1.0]


def test_equals_trl_up_to_the_maximum(make_batch: MakeBatch) -> None:
    make = pytest.importorskip("trl.rewards").get_soft_overlong_punishment
    theirs = make(max_completion_len=20, soft_punish_cache=8)
    batch = make_batch(["a"] * 30, completion_ids=[[1] * n for n in range(30)])
    assert LengthReward(target=12, scale=8)(batch) == pytest.approx(theirs(completion_ids=batch.completion_ids))


def test_needs_nothing() -> None:
    reward = LengthReward(3)
    assert (reward.name, reward.needs_entropy, reward.needs_policy) == ("length", False, False)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"target": -1}, "target: -1, expected a number of tokens, at least 0"),
        ({"target": "12", "unit": "words"}, "target: '12', expected a number of words"),
        ({"target": math.nan}, "target: nan"),
        ({"target": True}, "target: True"),
        ({"target": 0}, "scale: 0, expected a positive number"),
        ({"target": 5, "scale": 0}, "scale: 0, expected a positive number"),
        ({"target": 5, "scale": "2"}, "scale: '2', expected a positive number"),
        ({"target": 5, "floor": 0.5}, "floor: 0.5, expected a number, at most 0"),
        ({"target": 5, "floor": None}, "floor: None"),
        ({"target": 5, "unit": "characters"}, r"unit: 'characters', expected one of \('tokens', 'words'\)"),
    ],
)
def test_bad_options(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        LengthReward(**options)
