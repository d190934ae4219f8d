"""A residual beside the weights: the score formula by an independent way, under every profile, scaled or not."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from maestro_fast.ops import AdvantageProfile, group_advantages
from maestro_fast.ops.group_advantages import live_weights
from maestro_fast.specs import PROFILES
from maestro_fast.weighting import Comparison, Outcome, WeightContext, Weights, compare, compare_scaled, scored
from maestro_fast.weighting.scored_rewards import residual_share
from tests.weighting.helpers import NAMES, K, normal

N, G, C = 6, 5, 0.7
B = N * G
ALL = {
    **PROFILES,
    "batch rewards": AdvantageProfile(reward_center="batch", reward_scale="batch"),
    "left out": AdvantageProfile(reward_center="leave_one_out", reward_scale="none"),
    "population": AdvantageProfile(ddof=0),
}
NAN = float("nan")


def batch() -> tuple[WeightContext, Weights]:
    """One reward abstains from a response, all do from another, and in one group the rewards do not differ."""
    rewards_BK = normal(B, K, seed=1).double() * torch.tensor([1.0, 7.0, 0.1])
    rewards_BK[1, 0] = rewards_BK[7] = NAN
    rewards_BK[10:15] = 0.3
    weights_BK = normal(N, K, seed=2).softmax(1).repeat_interleave(G, 0).double()
    residual_B = 100.0 + 30.0 * normal(B, seed=3).double()
    context = WeightContext(NAMES, G, 0, rewards_BK, utilities_B=normal(B, seed=4).double())
    return context, Weights(weights_BK, weights_BK, residual_B=residual_B, residual_factor=C)


def comparison(profile: AdvantageProfile) -> Comparison:
    kl_B = normal(B, seed=5).double().abs() if profile.kl_in == "score" else None
    lengths_B = torch.arange(1, B + 1) if profile.needs_lengths else None
    return Comparison(profile, kl_B, 0.0 if kl_B is None else 0.04, lengths_B)


def by_hand(context: WeightContext, weights: Weights, how: Comparison) -> tuple[Tensor, Tensor]:
    """Scores before the KL and advantages, one group after another; the KL and the comparison are the op's."""
    profile = how.profile
    assert isinstance(profile, AdvantageProfile) and weights.residual_B is not None
    base_B = group_advantages(
        context.rewards_BK, weights.weights_BK, G, profile=profile, lengths=how.lengths_B
    ).scores.clone()
    absent_B = context.rewards_BK.isnan().all(1)
    for n in range(N):
        rows = [i for i in range(n * G, (n + 1) * G) if not absent_B[i]]
        f, w_r = weights.residual_B[rows], base_B[rows]
        spread = w_r.std() if w_r.max() - w_r.min() > 1e-9 else 1.0
        base_B[rows] = w_r + C * spread * (f - f.mean()) / (f.std() + 1e-4)
    base_B[absent_B] = NAN
    scores_alone = replace(profile, reward_center="none", reward_scale="none")
    found = group_advantages(base_B, None, G, kl=how.kl_B, beta=how.beta, lengths=how.lengths_B, profile=scores_alone)
    return found.scores, found.advantages


@pytest.mark.parametrize("name", ALL)
def test_the_score_is_the_formula_under_every_profile(name: str) -> None:
    (context, weights), how = batch(), comparison(ALL[name])
    found = compare(context, weights, how)
    scores_B, advantages_B = by_hand(context, weights, how)
    torch.testing.assert_close(found.scores, scores_B, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.advantages, advantages_B, rtol=1e-9, atol=1e-9)
    assert found.advantages[10:15].abs().max() > 0.1, "where the rewards do not differ, the residual decides"
    assert found.advantages[7] == 0.0 and not found.degenerate.any()


def test_two_groups_by_hand() -> None:
    """Group 0: w . r' is (-1, 0, 1) and z(f) is (1, -1, 0), so the scores are (0, -1, 1) for c = 1."""
    eps0 = AdvantageProfile(reward_eps=0.0, score_eps=0.0)
    rewards_BK = torch.tensor([[1.0], [2.0], [3.0], [4.0], [4.0], [4.0]], dtype=torch.float64)
    residual_B = torch.tensor([5.0, -5.0, 0.0, 0.0, 2.0, 4.0], dtype=torch.float64) * 1e3
    context = WeightContext(("r",), 3, 0, rewards_BK)
    weights_BK = torch.full((6, 1), 0.5, dtype=torch.float64)
    found = compare(context, Weights(weights_BK, weights_BK, residual_B=residual_B), Comparison(eps0))
    expected = torch.tensor([0.0, -0.5, 0.5, -1.0, 0.0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(found.scores, expected, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(found.advantages[:3] * 2, 2 * torch.tensor([0.0, -1.0, 1.0]).double(), atol=1e-7, rtol=0)


@pytest.mark.parametrize("hybrid", [False, True])
@pytest.mark.parametrize("name", ALL)
def test_factors_multiply_residual_and_utility_too(name: str, hybrid: bool) -> None:
    """Scores under f times the weights are f times the scores, whether the profile has a scale or not."""
    profile = replace(ALL[name], kl_in="loss")
    (context, weights), how = batch(), comparison(profile)
    if hybrid:  # Groups that are scored by their utility keep their size beside the others.
        by_utility = replace(weights, direct_B=torch.arange(B) < 10)
        found = compare_scaled(context, by_utility, how, 3.0)
        torch.testing.assert_close(found.scores, 3.0 * compare(context, by_utility, how).scores, rtol=1e-9, atol=1e-9)
        return
    found = compare_scaled(context, weights, how, 3.0)
    torch.testing.assert_close(found.scores, 3.0 * compare(context, weights, how).scores, rtol=1e-9, atol=1e-9)
    larger = replace(weights, weights_BK=3.0 * weights.weights_BK)
    live_B = torch.ones(B, dtype=torch.bool)
    live_B[10:15] = False  # where the weights decide nothing, their size says nothing of the residual's
    if not {"batch", "tokens"} & {profile.score_center, profile.score_scale}:
        expected = compare(context, larger, how).advantages
        torch.testing.assert_close(found.advantages[live_B], expected[live_B], rtol=1e-9, atol=1e-9)


def test_an_abstention_moves_no_weight_to_the_residual() -> None:
    context, weights = batch()
    rewards, used = scored(context, weights, "maestro")
    expected, _ = live_weights(weights.weights_BK, ~context.rewards_BK.isnan(), PROFILES["maestro"])
    assert torch.equal(used[:, :K], expected) and rewards.shape == used.shape == (B, K + 1)
    assert rewards[7, K].isnan() and used[7, K] == 0.0, "no rewards, no residual"
    assert weights.residual_B is not None
    poisoned = weights.residual_B.clone()
    poisoned[7] = 1e9  # what f says of a response without rewards changes nothing
    again = compare(context, replace(weights, residual_B=poisoned), Comparison())
    assert torch.equal(again.advantages, compare(context, weights, Comparison()).advantages)


@pytest.mark.parametrize("profile", ["maestro", "dr_grpo", "rloo", "verl_grpo"])
def test_all_weight_on_the_residual(profile: str) -> None:
    """With weights of 0, the advantages are those of z(f), for a response of which one reward abstained as well."""
    context, weights = batch()
    assert weights.residual_B is not None
    zeros_BK = torch.zeros_like(weights.weights_BK)
    alone = Weights(zeros_BK, zeros_BK, residual_B=weights.residual_B)
    found_B = compare(context, alone, Comparison(profile)).advantages
    f_B = torch.where(context.rewards_BK.isnan().all(1), NAN, weights.residual_B)
    z_B = group_advantages(f_B, None, G, profile="grpo").advantages
    z_B = torch.where(f_B.isnan(), NAN, z_B)
    alone_B = group_advantages(z_B, None, G, profile=profile).advantages
    torch.testing.assert_close(found_B, alone_B, rtol=3e-4, atol=1e-9)
    assert found_B[1] != 0.0 and found_B[7] == 0.0


def test_without_a_residual_or_with_a_flat_one_nothing_changes() -> None:
    context, weights = batch()
    flat = replace(weights, residual_B=torch.full((B,), 3.0, dtype=torch.float64))
    nan = replace(weights, residual_B=torch.full((B,), NAN, dtype=torch.float64))
    without = compare(context, replace(weights, residual_B=None), Comparison())
    for same in (flat, nan, replace(weights, residual_factor=0.0)):
        torch.testing.assert_close(compare(context, same, Comparison()).advantages, without.advantages)


@pytest.mark.parametrize("name", ALL)
def test_rewards_too_large_for_their_spread_leave_the_scores_finite(name: str) -> None:
    """The squares of such rewards overflow, so their standard deviation is infinite."""
    (context, weights), how = batch(), comparison(ALL[name])
    huge = replace(context, rewards_BK=context.rewards_BK * 1e200)
    without = compare(huge, replace(weights, residual_B=None), how)
    assert without.advantages.isfinite().all() and compare(huge, weights, how).advantages.isfinite().all()


def test_groups_scored_by_their_utility_have_no_residual() -> None:
    context, weights = batch()
    direct_B = torch.arange(B) < 10
    hybrid = replace(weights, direct_B=direct_B)
    found_B = compare(context, hybrid, Comparison()).advantages
    assert context.utilities_B is not None
    by_utility_B = group_advantages(context.utilities_B, None, G).advantages
    torch.testing.assert_close(found_B[:5], by_utility_B[:5], rtol=1e-3, atol=1e-4)
    assert torch.equal(found_B[10:], compare(context, weights, Comparison()).advantages[10:])


def test_the_order_of_the_responses_does_not_matter() -> None:
    context, weights = batch()
    assert weights.residual_B is not None
    order_B = torch.cat([n * G + normal(G, seed=n).argsort() for n in range(N)])
    moved = replace(context, rewards_BK=context.rewards_BK[order_B])
    found = compare(moved, replace(weights, residual_B=weights.residual_B[order_B]), Comparison())
    torch.testing.assert_close(found.advantages, compare(context, weights, Comparison()).advantages[order_B])


def test_the_residuals_share_of_the_variance() -> None:
    """Rewards and residual that are uncorrelated share as 1 to c^2; groups scored by their utility do not count."""
    r_NG = torch.tensor([[1.0, -1.0, 1.0, -1.0], [1.0, -1.0, 1.0, -1.0]], dtype=torch.float64)
    f_NG = torch.tensor([[1.0, 1.0, -1.0, -1.0], [1.0, -1.0, 1.0, -1.0]], dtype=torch.float64)
    context = WeightContext(("r",), 4, 0, r_NG.view(-1, 1), utilities_B=normal(8, seed=1).double())
    ones_BK = torch.ones(8, 1, dtype=torch.float64)
    weights = Weights(ones_BK, ones_BK, residual_B=f_NG.flatten(), residual_factor=2.0)

    def share(weights: Weights) -> float | None:
        found = residual_share(Outcome(context, weights, compare(context, weights, Comparison())))
        return None if found is None else found.item()

    # In group 1 the two agree: the parts are in the proportion 1 to 2.
    assert share(weights) == pytest.approx((4 / 5 + 2 / 3) / 2, abs=1e-3)
    assert share(replace(weights, direct_B=torch.arange(8) >= 4)) == pytest.approx(4 / 5, abs=1e-3)
    assert share(replace(weights, weights_BK=0 * ones_BK)) == pytest.approx(1.0)
    assert share(replace(weights, residual_factor=0.0)) == 0.0
    assert share(replace(weights, residual_B=None)) is None
    nobody = share(replace(weights, direct_B=torch.ones(8, dtype=torch.bool)))
    assert nobody is not None and math.isnan(nobody)


@pytest.mark.parametrize("profile", ["maestro", "grpo", "dr_grpo", "gdpo", "rloo"])
def test_opposite_opinions_give_no_advantage(profile: str) -> None:
    """In a group of two kinds of responses, rewards and residual agree or are opposites, but for an epsilon."""
    r_NG = torch.tensor([[1.0, 0.0, 0.0, 0.0]]).repeat(3, 1)
    f_NG = torch.tensor([[0.2, 0.7, 0.7, 0.7], [0.7, 0.2, 0.2, 0.2], [0.0, 0.7, 0.7, 0.2]])
    context, ones_BK = WeightContext(("r",), 4, 0, r_NG.view(-1, 1)), torch.ones(12, 1)
    weights = Weights(ones_BK, ones_BK, residual_B=f_NG.flatten())
    found = compare(context, weights, Comparison(profile))
    opposite, alike, between = found.advantages.view(3, 4)
    assert not opposite.any() and found.degenerate.view(3, 4)[0].all() and not found.degenerate[4:].any()
    assert alike[0] > 0.4 and (alike[1:] < 0).all() and between.abs().max() > 0.1
    share = residual_share(Outcome(context, weights, found, profile))
    assert share is not None and 0.0 < share.item() < 1.0
