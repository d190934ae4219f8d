"""Static weights, by reward name."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch

from maestro_fast.settings import SettingsError
from maestro_fast.weighting import Static, build_weight_policy
from tests.weighting.helpers import NAMES, context


def test_the_order_of_the_rewards_decides() -> None:
    policy = build_weight_policy({"policy": "static", "values": {"entropy": -0.5, "format": 2, "length": 0}}, NAMES, 1)
    weights = policy.weights(context(4))
    expected = torch.tensor([[2.0, 0.0, -0.5]] * 4)
    assert torch.equal(weights.weights_BK, expected) and torch.equal(weights.expected_BK, expected)
    assert weights.weights_BK.dtype == torch.float32
    assert weights.actions_B is None


def test_abstentions_do_not_matter() -> None:
    at = context(torch.full((4, 3), float("nan")))
    assert torch.equal(Static((0.2, 0.3, 0.5)).weights(at).weights_BK, torch.tensor([[0.2, 0.3, 0.5]] * 4))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (
            {"format": 1, "length": 1, "entropy": 1, "lenght": 1},
            "weights.values.lenght: there is no such reward, expected one of format, length, entropy",
        ),
        ({"format": 1, "length": 1}, "weights.values.entropy: missing, every reward needs a weight"),
        ({}, "weights.values.format: missing"),
        ({"format": math.inf, "length": 1, "entropy": 1}, "weights.values.format: inf, expected a finite number"),
        ({"format": math.nan, "length": 1, "entropy": 1}, "weights.values.format: nan, expected a finite number"),
        ({"format": "much", "length": 1, "entropy": 1}, "weights.values.format: got str 'much', expected float"),
        ([1, 1, 1], "weights.values: got list [1, 1, 1], expected a mapping"),
    ],
)
def test_errors_name_the_reward(values: Any, words: str) -> None:
    with pytest.raises(SettingsError, match="^" + re.escape(words)):
        build_weight_policy({"policy": "static", "values": values}, NAMES, 1)
