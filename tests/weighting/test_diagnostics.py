"""The diagnostics equal figures worked out by hand, and the watch warns when they leave their ranges."""

from __future__ import annotations

import logging
import math

import pytest
import torch
from torch import Tensor

from maestro_fast.ops import group_advantages
from maestro_fast.weighting import Comparison, Outcome, WeightContext, Weights, compare
from maestro_fast.weighting.diagnostics import Watch, diagnose, healthy_ranges
from tests.weighting.helpers import normal

NAMES = ("a", "b")


def outcome(
    rewards: list[list[float]] | Tensor, weights: list[list[float]] | Tensor, g: int = 2, **more: Tensor
) -> Outcome:
    rewards_BK, weights_BK = torch.as_tensor(rewards), torch.as_tensor(weights)
    context = WeightContext(NAMES, g, 0, rewards_BK)
    advantages = group_advantages(rewards_BK, weights_BK, g)
    return Outcome(context, Weights(weights_BK, weights_BK, **more), advantages)


def test_by_hand() -> None:
    """There are two groups of two, so standardised rewards are +-h with h = 1 / sqrt(2)."""
    rewards = [[1.0, 0.0], [0.0, 4.0], [5.0, 9.0], [4.0, 7.0]]
    weights = [[0.9, 0.1], [0.2, 0.8], [0.9, 0.1], [0.5, 0.5]]
    found, h = diagnose(outcome(rewards, weights)), 0.5**0.5
    # w . r' = 0.8 h, 0.6 h, h, -h
    assert found["diagnostics/self_flattery"] == pytest.approx(0.35 * h, rel=1e-3)
    # In the first two responses the best reward has the greatest weight; the others have no single best one.
    assert found["diagnostics/argmax_agreement"] == 1.0
    entropies = [-sum(p * math.log(p) for p in row) / math.log(2) for row in weights]
    assert found["diagnostics/entropy"] == pytest.approx(sum(entropies) / 4, rel=1e-5)
    # The weights of a have the group means 0.55 and 0.7: +-0.35 and +-0.2 within, +-0.075 between. b mirrors a.
    within, between = (0.35**2 + 0.2**2) / 2, 0.075**2
    assert found["diagnostics/between_prompts"] == pytest.approx(between / (within + between), rel=1e-4)
    assert found["diagnostics/pareto_inversions"] == 0.0  # the one comparable pair scores h against -h
    # r' is h, -h, h, -h for a and -h, h, h, -h for b.
    assert found["rewards_correlation/mean"] == pytest.approx(0.0, abs=1e-4)
    assert found["advantage_share/a"] + found["advantage_share/b"] == pytest.approx(1.0)


def test_shares_by_hand() -> None:
    """To the scores s = w . r', a gives +-0.9 h and b -+0.1 h, so their products with A are as 0.9 to -0.1."""
    found = diagnose(outcome([[1.0, 0.0], [0.0, 1.0]], [[0.9, 0.1]] * 2))
    assert found["advantage_share/a"] == pytest.approx(0.9 / 0.8, rel=1e-4)
    assert found["advantage_share/b"] == pytest.approx(-0.1 / 0.8, rel=1e-4)
    assert found["rewards_correlation/min"] == pytest.approx(-1.0)


def test_a_pareto_inversion() -> None:
    """r' is 1, 0, -1 for both rewards, so the scores are -2, 0, -2. One of the three pairs is inverted."""
    found = diagnose(outcome([[2.0, 2.0], [1.0, 1.0], [0.0, 0.0]], [[-1.0, -1.0], [1.0, 1.0], [1.0, 1.0]], g=3))
    assert found["diagnostics/pareto_inversions"] == pytest.approx(1 / 3)


def test_flat_groups_are_those_that_were_scored() -> None:
    """Of three groups with weights one is flat. The fourth is because the policy leaves it out, which is no fault."""
    rewards_BK = torch.tensor(
        [[1.0, 0.0], [0.0, 0.0], [1.0, 1.0], [1.0, 1.0], [2.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 0.0]]
    )
    half_BK, zeros_BK = torch.full((8, 2), 0.5), torch.zeros(8, 2)
    found = diagnose(outcome(rewards_BK, torch.where(torch.arange(8)[:, None] < 6, half_BK, zeros_BK)))
    assert found["diagnostics/flat_groups"] == pytest.approx(1 / 3)
    assert diagnose(outcome(rewards_BK, half_BK))["diagnostics/flat_groups"] == pytest.approx(1 / 4)
    # None of them is scored, or only the last one, which has no spread either.
    assert "diagnostics/flat_groups" not in diagnose(outcome(rewards_BK, zeros_BK))
    context = WeightContext(NAMES, 2, 0, rewards_BK, utilities_B=torch.ones(8))
    for more in ({"direct_B": torch.arange(8) >= 6}, {"residual_B": torch.tensor([float("nan")] * 6 + [1.0, 1.0])}):
        weights = Weights(zeros_BK, zeros_BK, **more)
        found = diagnose(Outcome(context, weights, compare(context, weights, Comparison())))
        assert found["diagnostics/flat_groups"] == 1.0, more


def test_equal_weights_are_healthy() -> None:
    rewards_BK = normal(64, 2, seed=0)
    found = diagnose(outcome(rewards_BK, torch.full((64, 2), 0.5), g=8))
    ranges = healthy_ranges(NAMES)
    assert abs(found["diagnostics/self_flattery"]) < 1e-6
    assert "diagnostics/argmax_agreement" not in found and "diagnostics/between_prompts" not in found  # undefined
    for name, value in found.items():
        if name in ranges:
            assert ranges[name].low <= value <= ranges[name].high, name


@pytest.mark.parametrize("k", range(2, 13))
def test_entropy_of_equal_weights_is_one_and_no_more(k: int) -> None:
    rewards_BK, weights_BK = normal(16, k, seed=0), torch.full((16, k), 1 / k)
    context = WeightContext(tuple(map(str, range(k))), 4, 0, rewards_BK)
    advantages = group_advantages(rewards_BK, weights_BK, 4)
    found = diagnose(Outcome(context, Weights(weights_BK, weights_BK), advantages))["diagnostics/entropy"]
    assert 1 - 1e-6 < found <= 1.0


def test_weights_that_follow_the_response_flatter() -> None:
    rewards_BK = normal(64, 2, seed=0)
    best_BK = torch.nn.functional.one_hot(group_advantages(rewards_BK, None, 8).normalized_rewards.argmax(1), 2).float()
    found = diagnose(outcome(rewards_BK, 0.35 + 0.3 * best_BK, g=8))
    ranges = healthy_ranges(NAMES)
    for name in ("diagnostics/self_flattery", "diagnostics/argmax_agreement"):
        assert found[name] > ranges[name].high


def test_directly_scored_groups_are_left_out_of_the_weights_part() -> None:
    rewards_BK, weights_BK = normal(8, 2, seed=0), torch.full((8, 2), 0.5)
    direct_B = torch.arange(8) < 4
    whole = outcome(rewards_BK, weights_BK, g=4, direct_B=direct_B)
    half = outcome(rewards_BK[4:], weights_BK[4:], g=4)
    for name in ("advantage_share/a", "advantage_share/b"):
        assert diagnose(whole)[name] == pytest.approx(diagnose(half)[name], rel=1e-5)


def test_a_learnt_reward_takes_its_part_of_the_advantage() -> None:
    """Both rewards and f say the same, and f has the spread of the two together, so the shares are 1/4, 1/4 and 1/2."""
    rewards_BK = normal(8, 1, seed=0).expand(8, 2).contiguous()
    weights_BK = torch.full((8, 2), 0.5)
    context = WeightContext(NAMES, 4, 0, rewards_BK)
    weights = Weights(weights_BK, weights_BK, residual_B=rewards_BK[:, 0] * 7.0)
    found = diagnose(Outcome(context, weights, compare(context, weights, Comparison())))
    for name in ("advantage_share/a", "advantage_share/b"):
        assert found[name] == pytest.approx(0.25, rel=1e-3)


def test_weights_of_0_have_no_entropy() -> None:
    """Nothing is said of weights where a response has none, and all rows that have some count."""
    rewards_BK, zeros_BK = normal(8, 2, seed=0), torch.zeros(8, 2)
    none = diagnose(outcome(rewards_BK, zeros_BK, g=4))
    assert not {"diagnostics/entropy", "diagnostics/argmax_agreement", "advantage_share/a"} & none.keys()
    half_BK = torch.where(torch.arange(8)[:, None] < 4, 0.5, zeros_BK)
    assert diagnose(outcome(rewards_BK, half_BK, g=4))["diagnostics/entropy"] == pytest.approx(1.0)


def test_abstentions_and_single_rewards() -> None:
    nan = float("nan")
    found = diagnose(outcome([[nan, 1.0], [nan, 2.0]], [[0.5, 0.5]] * 2))
    assert all(math.isfinite(value) for value in found.values())
    assert found["advantage_share/b"] == pytest.approx(1.0)
    context = WeightContext(("a",), 2, 0, torch.tensor([[1.0], [2.0]]))
    weights = torch.ones(2, 1)
    single = diagnose(Outcome(context, Weights(weights, weights), group_advantages(context.rewards_BK, weights, 2)))
    assert single["advantage_share/a"] == pytest.approx(1.0)


def test_weight_on_what_abstains_is_seen(caplog: pytest.LogCaptureFixture) -> None:
    """In the second prompt reward a abstains; there it has 0.8 of the weight, where equal weights would give it 0.5."""
    nan = float("nan")
    rewards = [[1.0, 2.0], [3.0, 1.0], [nan, 1.0], [nan, 2.0]]
    found = diagnose(outcome(rewards, [[0.8, 0.2]] * 4))
    assert found["diagnostics/abstained_weight"] == pytest.approx(0.4)
    assert found["diagnostics/abstained_excess"] == pytest.approx(0.3)
    equal = diagnose(outcome(rewards, [[0.5, 0.5]] * 4))
    assert (equal["diagnostics/abstained_weight"], equal["diagnostics/abstained_excess"]) == (0.25, 0.0)
    nothing = diagnose(outcome([[nan, nan]] * 2, [[0.8, 0.2]] * 2))
    assert (nothing["diagnostics/abstained_weight"], nothing["diagnostics/abstained_excess"]) == (1.0, 0.0)

    watch = Watch(healthy_ranges(NAMES))
    for figures in [equal] * 9 + [found] * 5:
        watch.see({name: figures[name] for name in figures if "abstained" in name})
    assert ["abstains there" in record.message for record in caplog.records] == [True]


def test_the_watch_warns_once_and_names_the_remedy(caplog: pytest.LogCaptureFixture) -> None:
    watch = Watch(healthy_ranges(NAMES), patience=3)
    for value in (0.2, 0.2, 0.01, 0.2, 0.2):
        watch.see({"diagnostics/self_flattery": value})
    assert not caplog.records
    for _ in range(5):
        watch.see({"diagnostics/self_flattery": 0.2})
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and "anchored" in record.message and "-0.05 to 0.05" in record.message
    assert watch.warned == {"diagnostics/self_flattery"}
