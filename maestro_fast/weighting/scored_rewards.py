"""What a batch is scored by: its named rewards, a learnt reward beside them (the residual), or the utility itself.

With weights w, normalised rewards r' and a residual f of factor c, the score of a response is

    s = w . r' + c * std_group(w . r') * z_group(f)            z(f) = (f - mean) / (sample std + 1e-4)

so in a group's advantages w . r' and f have parts in the proportion 1 to c, whatever their units are, and the score
keeps the unit of the weighted rewards, which a KL in the score and profiles without a scale expect. Where the weighted
rewards do not tell the responses apart, f alone does: std_group(w . r') then counts as 1. (So it does where it is too
large for its dtype, since an infinite weight would make every score NaN.) Where the two say the opposite of each other,
as they may in groups with two kinds of responses, next to nothing is left of the score. Its sign is chance, and the
division by its standard deviation would make a full advantage of it. So such a group has no score.

f enters as one more column of rewards, which an advantage profile normalises as it does all rewards; the column's
weight makes up for that. An abstention moves no weight between the named rewards and f.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from maestro_fast.ops.group_advantages import group_advantages, live_weights, over, sum_over_rewards
from maestro_fast.specs import AdvantageProfile, resolve_profile
from maestro_fast.weighting.policy import Outcome, WeightContext, Weights

_OPPOSED = 0.02  # This share of the weighted rewards' standard deviation has to be left once the residual is added.


def scored(
    context: WeightContext, weights: Weights, profile: str | AdvantageProfile = "maestro", factor: float = 1.0
) -> tuple[Tensor, Tensor]:
    """The rewards and weights of a batch, as ``group_advantages`` takes them under the same profile.

    Both are [B, K], and each of these adds one more column:

    - ``weights.residual_B`` adds the residual, as the formula above has it. It is left out (NaN) where every reward
      abstains from a response, and has no weight where the response is scored by its utility.
    - ``weights.direct_B`` adds the utility. It has all the weight in the groups that are scored by it and none
      elsewhere, so the profile normalises it like any other reward.

    Args:
        context: the batch.
        weights: what a policy returned.
        profile: the advantage profile, or its name.
        factor: what all weights are multiplied by, above 0: those of rewards, residual and utility.
    """
    rewards, own = context.rewards_BK, weights.weights_BK
    if weights.residual_B is not None:
        rewards, own = _with_residual(context, weights, resolve_profile(profile))
    if factor != 1.0:
        own = own * factor
    if weights.direct_B is None:
        return rewards, own
    assert context.utilities_B is not None
    direct_B1 = weights.direct_B[:, None]
    utilities_B1 = context.utilities_B.to(context.rewards_BK)[:, None]
    rewards = torch.cat([rewards, torch.where(direct_B1, utilities_B1, float("nan"))], 1)
    own = torch.where(direct_B1, 0.0, own)
    return rewards, torch.cat([own, factor * direct_B1.to(own.dtype)], 1)


def _with_residual(context: WeightContext, weights: Weights, profile: AdvantageProfile) -> tuple[Tensor, Tensor]:
    """Rewards and weights with the column of the residual, both [B, K + 1]."""
    rewards_BK, size = context.rewards_BK, context.group_size
    assert weights.residual_B is not None
    live_BK = ~rewards_BK.isnan()
    # Weights are moved away from rewards that abstain before the column is there, so that none of theirs moves to it.
    own_BK, scored_B = live_weights(weights.weights_BK, live_BK, profile)
    counts_B = scored_B | (live_BK.any(1) & (weights.weights_BK == 0).all(1))
    residual_B = torch.where(counts_B, weights.residual_B, float("nan"))
    z_B = group_advantages(residual_B, None, size, profile="grpo").advantages
    column_B = torch.where(residual_B.isnan(), float("nan"), z_B)
    rewards = torch.cat([rewards_BK, column_B[:, None]], 1)
    normalised = _normalised(rewards, size, profile)
    score_B = torch.where(scored_B, sum_over_rewards(own_BK * normalised[:, :-1]), float("nan"))
    column_after_B = torch.where(column_B.isnan(), float("nan"), normalised[:, -1])
    three = torch.cat([score_B, column_B, column_after_B])
    # This profile reports the sample standard deviation of each group.
    std_B, std_z_B, std_after_B = group_advantages(three, None, size, profile="dr_grpo").std.chunk(3)
    spread_B = torch.where((std_B > 0) & std_B.isfinite(), std_B, 1.0)
    weight_B = weights.residual_factor * spread_B * over(std_z_B, std_after_B)
    weight_B = torch.where(column_B.isnan(), 0.0, weight_B)
    whole_B = torch.where(column_B.isnan(), score_B, score_B + weight_B * normalised[:, -1])
    left_B = group_advantages(whole_B, None, size, profile="dr_grpo").std
    opposed_B1 = (left_B < _OPPOSED * std_B)[:, None]
    return rewards, torch.where(opposed_B1, 0.0, torch.cat([own_BK, weight_B[:, None]], 1))


def _normalised(rewards: Tensor, group_size: int, profile: AdvantageProfile) -> Tensor:
    """The rewards as the profile normalises them, 0 where a reward abstained."""
    unscored = replace(profile, score_center="none", score_scale="none")
    return group_advantages(rewards, None, group_size, profile=unscored).normalized_rewards


def residual_share(outcome: Outcome) -> Tensor | None:
    """The share of the scores' variance within groups that comes from the residual: cov(part, s) / var(s), as a mean.

    The shares of the weighted rewards and of the residual add up to 1, so either may be negative or above 1 where the
    two oppose each other. Groups that are scored by their utility, and those without spread, do not count.

    Returns:
        The mean over groups, float64, NaN if no group counts; None if there is no residual.
    """
    context, weights = outcome.context, outcome.weights
    if weights.residual_B is None:
        return None
    profile = resolve_profile(outcome.profile)
    rewards, used = scored(context, weights, profile)
    parts = (used * _normalised(rewards, context.group_size, profile)).double()
    live_B = ~context.rewards_BK.isnan().all(1) & (used != 0).any(1)
    if weights.direct_B is not None:
        live_B = live_B & ~weights.direct_B
    shape = (-1, context.group_size)
    live_NG = live_B.view(shape)
    part_NG, score_NG = (
        _centred(x_B.view(shape), live_NG) for x_B in (parts[:, context.rewards_BK.shape[1]], parts.sum(1))
    )
    variance_N = score_NG.square().sum(1)
    counts_N = variance_N > 1e-12
    return ((part_NG * score_NG).sum(1)[counts_N] / variance_N[counts_N]).mean()


def _centred(x_NG: Tensor, live_NG: Tensor) -> Tensor:
    """x minus its mean over the live responses of the group, and 0 for the others."""
    x_NG = torch.where(live_NG, x_NG, 0.0)
    mean_N1 = x_NG.sum(1, keepdim=True) / live_NG.sum(1, keepdim=True).clamp(min=1)
    return torch.where(live_NG, x_NG - mean_N1, 0.0)
