"""Equal weights."""

from __future__ import annotations

import pytest
import torch

from maestro_fast.weighting import Equal
from tests.weighting.helpers import context


@pytest.mark.parametrize("k", [1, 2, 3, 7])
def test_one_over_k(k: int) -> None:
    weights = Equal().weights(context(5, k=k))
    expected = torch.tensor([[1 / k] * k] * 5)
    assert torch.equal(weights.weights_BK, expected)
    assert torch.equal(weights.expected_BK, expected)
    assert weights.actions_B is None


def test_abstentions_do_not_matter() -> None:
    at = context(torch.full((4, 3), float("nan")))
    assert torch.equal(Equal().weights(at).weights_BK, torch.full((4, 3), 1 / 3))
