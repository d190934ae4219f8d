"""LengthReward and EntropyReward by hand, OverlongReward against TRL."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from maestro_fast.records import RewardBatch
from maestro_fast.rewards import EntropyReward, LengthReward, OverlongReward

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
def test_length_values(options: dict[str, Any], expected: list[float], chat: bool, make_batch: MakeBatch) -> None:
    tokens = make_batch(["one"] * 7, chat=chat, completion_ids=[[3] * n for n in LENGTHS])
    assert LengthReward(target=10, **options)(tokens) == pytest.approx(expected, abs=1e-12)
    words = make_batch(["one\n" * n for n in LENGTHS], chat=chat, completion_ids=[[3]] * 7)
    assert LengthReward(target=10, unit="words", **options)(words) == pytest.approx(expected, abs=1e-12)


def test_length_a_target_of_zero_with_a_scale(make_batch: MakeBatch) -> None:
    assert LengthReward(target=0, scale=4)(make_batch(["", "a", "a b"])) == [0.0, -0.25, -0.5]


def test_length_the_floor_is_minus_one_by_default(make_batch: MakeBatch) -> None:
    assert LengthReward(target=1)(make_batch(["a b c d"])) == [-1.0]


@pytest.mark.parametrize(("limit", "buffer"), [(20, 8), (20, 20), (20, 0), (1, 1)])
def test_overlong_equals_trl(make_batch: MakeBatch, limit: int, buffer: int) -> None:
    make = pytest.importorskip("trl.rewards").get_soft_overlong_punishment
    theirs = make(max_completion_len=limit, soft_punish_cache=buffer)
    batch = make_batch(["a"] * 30, completion_ids=[[1] * n for n in range(30)])
    assert OverlongReward(limit, buffer)(batch) == pytest.approx(theirs(completion_ids=batch.completion_ids))


@pytest.mark.parametrize(("limit", "buffer", "complaint"), [(0, 0, "limit: 0"), (8, 9, "buffer: 9"), (8, -1, "buffer")])
def test_overlong_refuses_what_is_no_buffer(limit: int, buffer: int, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        OverlongReward(limit, buffer)


def test_length_needs_nothing() -> None:
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
def test_length_bad_options(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        LengthReward(**options)


@pytest.mark.parametrize("chat", [False, True])
def test_entropy_values_and_abstention_without_tokens(chat: bool, make_batch: MakeBatch) -> None:
    batch = make_batch(["a b", "", "c"], chat=chat, mean_entropies_B=torch.tensor([0.5, float("nan"), 2.0]))
    assert EntropyReward()(batch) == [-0.5, None, -2.0]
    assert EntropyReward("minimise")(batch) == [-0.5, None, -2.0]
    assert EntropyReward("maximise")(batch) == [0.5, None, 2.0]


def test_entropy_sums_and_the_estimate_from_samples(make_batch: MakeBatch) -> None:
    """Two, no and three tokens; EM-RL-token is the sum of entropies, EM-RL-sequence the log-prob of the response."""
    means = {"mean_entropies_B": torch.tensor([0.5, 0.0, 2.0]), "mean_logprobs_B": torch.tensor([-0.25, 0.0, -1.0])}
    batch = make_batch(["a b", "", "c d e"], **means)
    assert EntropyReward(reduction="sum")(batch) == [-1.0, None, -6.0]
    assert EntropyReward(estimate="sampled")(batch) == [-0.25, None, -1.0]
    assert EntropyReward(estimate="sampled", reduction="sum")(batch) == [-0.5, None, -3.0]
    assert EntropyReward("maximise", estimate="sampled", reduction="sum")(batch) == [0.5, None, 3.0]
    with pytest.raises(ValueError, match=r"reward 'entropy': mean_logprobs_B is missing, expected \(1,\)"):
        EntropyReward(estimate="sampled")(make_batch(["a"], mean_entropies_B=torch.zeros(1)))


def test_entropy_asks_for_the_entropy() -> None:
    reward = EntropyReward()
    assert (reward.name, reward.needs_entropy, reward.needs_policy) == ("entropy", True, False)


@pytest.mark.parametrize(
    ("entropies", "words"),
    [
        (None, r"reward 'entropy': mean_entropies_B is missing, expected \(2,\)"),
        (torch.zeros(3), r"reward 'entropy': mean_entropies_B is of shape \(3,\), expected \(2,\)"),
    ],
)
def test_entropy_entropies_must_be_there(entropies: Tensor | None, words: str, make_batch: MakeBatch) -> None:
    with pytest.raises(ValueError, match=words):
        EntropyReward()(make_batch(["a", "b"], mean_entropies_B=entropies))


def test_entropy_bad_options() -> None:
    with pytest.raises(ValueError, match=r"estimate: 'both', expected one of \('exact', 'sampled'\)"):
        EntropyReward(estimate="both")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"reduction: None, expected one of \('mean', 'sum'\)"):
        EntropyReward(reduction=None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"direction: 'up', expected one of \('minimise', 'maximise'\)"):
        EntropyReward("up")  # type: ignore[arg-type]
