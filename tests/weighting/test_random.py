"""Random weights: Dirichlet(1), drawn for each response from seed and step."""

from __future__ import annotations

import math

import pytest
import torch

from maestro_fast.weighting import Random
from tests.weighting.helpers import context


@pytest.mark.parametrize("k", [2, 3, 5])
def test_uniform_on_the_simplex(k: int) -> None:
    """The moments of Dirichlet(1, ..., 1), and the distribution of one weight, P(w <= x) = 1 - (1 - x)^(k - 1)."""
    count = 20_000
    weights_BK = Random(3).weights(context(count, step=5, k=k)).weights_BK.double()
    assert (weights_BK > 0).all()
    torch.testing.assert_close(weights_BK.sum(-1), torch.ones(count, dtype=torch.float64), rtol=0, atol=1e-6)
    standard = math.sqrt((k - 1) / (k * k * (k + 1)))
    torch.testing.assert_close(
        weights_BK.mean(0), torch.full((k,), 1 / k, dtype=torch.float64), rtol=0, atol=4 * standard / math.sqrt(count)
    )
    covariance = (torch.eye(k, dtype=torch.float64) * k - 1) / (k * k * (k + 1))
    torch.testing.assert_close(weights_BK.T.cov(), covariance, rtol=0, atol=0.05 * standard**2)
    steps = torch.arange(1, count + 1, dtype=torch.float64) / count
    for column in weights_BK.T:
        distance = (1 - (1 - column.sort().values) ** (k - 1) - steps).abs().max()
        assert distance < 2.0 / math.sqrt(count)  # Kolmogorov-Smirnov, p < 0.001


def test_a_draw_belongs_to_seed_step_and_response() -> None:
    weights = Random(3).weights(context(16, step=2))
    again = Random(3)
    again.weights(context(7, step=1))  # what was drawn before does not matter
    assert torch.equal(again.weights(context(16, step=2)).weights_BK, weights.weights_BK)
    assert torch.equal(again.weights(context(8, step=2)).weights_BK, weights.weights_BK[:8])
    assert len({tuple(row) for row in weights.weights_BK.tolist()}) == 16
    for other in (Random(4).weights(context(16, step=2)), Random(3).weights(context(16, step=3))):
        assert (other.weights_BK != weights.weights_BK).all()


def test_the_expectation_is_equal_weights() -> None:
    weights = Random(3).weights(context(16))
    assert torch.equal(weights.expected_BK, torch.full((16, 3), 1 / 3))
    assert weights.actions_B is None


def test_abstentions_do_not_matter() -> None:
    missing = context(torch.full((4, 3), float("nan")))
    assert torch.equal(Random(1).weights(missing).weights_BK, Random(1).weights(context(4)).weights_BK)
