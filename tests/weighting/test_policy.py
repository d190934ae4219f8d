"""What weight policies share: numbers by reward name, statistics without abstentions, shapes of a saved state."""

from __future__ import annotations

import re

import pytest
import torch

from maestro_fast.weighting.policy import (
    check_shapes,
    in_reward_order,
    live_mean_and_std,
    live_range,
    positive_in_reward_order,
    same_weights,
)
from tests.weighting.helpers import NAMES, context

NAN, INF = float("nan"), float("inf")
VALUES = torch.tensor([[1.0, 5.0, NAN], [3.0, NAN, NAN], [8.0, NAN, NAN]], dtype=torch.float64)


@pytest.mark.parametrize(("correction", "std"), [(0, (26 / 3) ** 0.5), (1, 13**0.5)])
@pytest.mark.parametrize("dim", [0, 1])
def test_mean_and_deviation_leave_abstentions_out(dim: int, correction: int, std: float) -> None:
    """1, 3, 8 have the mean 4 and squared deviations of 26; 5 stands alone; the last column has no value."""
    mean, found = live_mean_and_std(VALUES if dim == 0 else VALUES.T, dim, correction=correction)
    torch.testing.assert_close(mean, torch.tensor([4.0, 5.0, NAN]).double(), equal_nan=True)
    torch.testing.assert_close(found, torch.tensor([std, 0.0, NAN]).double(), equal_nan=True)


@pytest.mark.parametrize("dim", [0, 1])
def test_the_range_leaves_abstentions_out(dim: int) -> None:
    low, high = live_range(VALUES if dim == 0 else VALUES.T, dim)
    assert low.tolist() == [1.0, 5.0, INF] and high.tolist() == [8.0, 5.0, -INF]


def test_numbers_come_in_the_order_of_the_rewards() -> None:
    values = {"entropy": 3.0, "format": 1.0, "length": -2.0}
    assert in_reward_order(values, NAMES, "values") == (1.0, -2.0, 3.0)
    assert in_reward_order({"length": 2.0}, NAMES, "values", 0.5) == (0.5, 2.0, 0.5)
    assert positive_in_reward_order({"length": 2.0}, NAMES, "values") == (1.0, 2.0, 1.0)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"taste": 1.0}, "values.taste: there is no such reward, expected one of format, length, entropy"),
        ({"format": NAN}, "values.format: nan, expected a finite number"),
        ({"format": 1.0}, "values.length: missing, every reward needs a weight"),
    ],
)
def test_wrong_numbers_are_named(values: dict[str, float], words: str) -> None:
    with pytest.raises(ValueError, match="^" + re.escape(words)):
        in_reward_order(values, NAMES, "values")


def test_same_weights_for_every_response() -> None:
    at = context(4)
    found = same_weights(torch.tensor([0.5, 0.25, 0.0], dtype=torch.float64), at)
    assert torch.equal(found.weights_BK, torch.tensor([[0.5, 0.25, 0.0]] * 4))
    assert found.weights_BK.dtype == torch.float32
    assert torch.equal(found.expected_BK, found.weights_BK) and found.actions_B is None and found.direct_B is None


def test_a_state_that_does_not_fit_is_named() -> None:
    expected = {"mean": (3,)}
    check_shapes({"mean": torch.ones(3), "more": torch.ones(1)}, expected)
    with pytest.raises(ValueError, match=r"^state\.mean: missing, expected shape \(3,\)"):
        check_shapes({}, expected)
    with pytest.raises(ValueError, match=r"^state\.mean: shape \(2,\), expected shape \(3,\)"):
        check_shapes({"mean": torch.ones(2)}, expected)
