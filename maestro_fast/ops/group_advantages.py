"""Group-relative advantages from K rewards and their weights.

    r'_k = (r_k - mean_k) / (std_k + eps)      per reward, over the profile's scopes
    s    = sum_k w_k r'_k  -  beta * KL        the score of a response
    A    = (s - mean) / (std + eps)            over the profile's scopes

Each scope's maximum is subtracted before its mean is taken. That changes nothing in exact arithmetic, and makes groups
of identical rewards exactly 0, where (r - mean) would be rounding noise that the division by a tiny std blows up.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from maestro_fast.ops.backend import Backend, resolve
from maestro_fast.ops.groups import Groups, GroupsLike
from maestro_fast.ops.profiles import AdvantageProfile, Center, Scale, resolve_profile


class GroupAdvantages(NamedTuple):
    """Advantages and what they were made of; float32 [B] (float64 for float64 rewards) unless noted.

    Attributes:
        advantages: 0 for degenerate groups and for responses without a live reward.
        scores: the weighted sum of the normalised rewards, minus beta * KL where the profile has the KL in the score.
        normalized_rewards: [B, K], 0 where a reward abstained.
        mean: what was subtracted from the score (leave-one-out: the mean of the others).
        std: of the scores over ``score_scale``'s scope, over the group where that is ``none``.
        degenerate: bool, True for every response of a group without spread before the KL, or with one live response.
    """

    advantages: Tensor
    scores: Tensor
    normalized_rewards: Tensor
    mean: Tensor
    std: Tensor
    degenerate: Tensor


def group_advantages(
    rewards: Tensor,
    weights: Tensor | None = None,
    groups: GroupsLike | None = None,
    *,
    kl: Tensor | None = None,
    beta: float = 0.0,
    profile: str | AdvantageProfile = "maestro",
    backend: Backend | None = None,
) -> GroupAdvantages:
    """Advantages of B responses in N groups from K rewards.

    Args:
        rewards: [B, K] or [B]; NaN where a reward abstained.
        weights: [B, K], [K], or None for weights of 1. Differentiable.
        groups: G, a [B] list or CPU tensor of group ids, or ``Groups``. Required.
        kl: [B], the per-response token mean of log pi - log pi_ref in nats; needs a profile with ``kl_in="score"``.
        beta: the KL's coefficient.
        profile: a name of ``PROFILES`` or an ``AdvantageProfile``.
        backend: None or "torch".

    Raises:
        ValueError: shapes, devices, unknown names, a KL given to a profile whose KL is in the loss.
        TypeError: dtypes.
    """
    resolve("group_advantages", backend)
    prof = resolve_profile(profile)
    if groups is None:
        raise TypeError("groups: missing, expected an int, a [B] sequence of ids or Groups")
    rewards_BK, weights_BK = _check(rewards, weights, kl, beta, prof)
    grouping = Groups.of(groups, rewards.shape[0]).to(rewards.device)
    return _reference(rewards_BK, weights_BK, grouping, kl, beta, prof)


def _check(
    rewards: Tensor, weights: Tensor | None, kl: Tensor | None, beta: float, profile: AdvantageProfile
) -> tuple[Tensor, Tensor]:
    if not rewards.is_floating_point():
        raise TypeError(f"rewards: dtype {rewards.dtype}, expected a floating dtype")
    if rewards.ndim not in (1, 2) or (rewards.ndim == 2 and rewards.shape[1] == 0):
        raise ValueError(f"rewards: shape {tuple(rewards.shape)}, expected [B, K] with K >= 1 or [B]")
    wide = rewards if rewards.dtype == torch.float64 else rewards.float()
    rewards_BK = wide[:, None] if rewards.ndim == 1 else wide
    if weights is None:
        weights = torch.ones_like(rewards_BK)
    if not weights.is_floating_point():
        raise TypeError(f"weights: dtype {weights.dtype}, expected a floating dtype")
    if weights.shape not in (rewards_BK.shape, rewards_BK.shape[1:]):
        raise ValueError(
            f"weights: shape {tuple(weights.shape)}, expected {tuple(rewards_BK.shape)} or ({rewards_BK.shape[1]},)"
        )
    if kl is not None and kl.shape != rewards.shape[:1]:
        raise ValueError(f"kl: shape {tuple(kl.shape)}, expected ({rewards.shape[0]},)")
    if kl is not None and profile.kl_in == "loss":
        raise ValueError("kl: given, but this profile has the KL in the loss (kl_in='loss'); it must enter once")
    if kl is None and beta != 0.0:
        raise ValueError(f"beta: {beta} without kl, expected the [B] tensor kl beside it")
    for name, tensor in (("weights", weights), ("kl", kl)):
        if tensor is not None and tensor.device != rewards.device:
            raise ValueError(f"{name}: on {tensor.device}, expected {rewards.device} as rewards")
    return rewards_BK, weights.to(rewards_BK.dtype).expand_as(rewards_BK)


def _reference(
    rewards_BK: Tensor,
    weights_BK: Tensor,
    groups: Groups,
    kl: Tensor | None,
    beta: float,
    profile: AdvantageProfile,
) -> GroupAdvantages:
    live_BK = ~rewards_BK.isnan()
    rewards_BK = torch.where(live_BK, rewards_BK, 0.0)
    if rewards_BK.shape[0] == 0:  # there is no maximum over nothing
        empty_B = rewards_BK.sum(-1)
        return GroupAdvantages(empty_B, empty_B, rewards_BK, empty_B, empty_B, empty_B.bool())
    normalized_BK = _normalize_rewards(rewards_BK, live_BK, groups, profile)
    weights_BK, live_B = _live_weights(weights_BK, live_BK, profile)
    raw_B = _sum_over_rewards(weights_BK * normalized_BK)
    raw_B = torch.where(live_B, raw_B, 0.0)
    degenerate_B = _degenerate(raw_B, live_B, groups)
    scores_B = raw_B if kl is None else torch.where(live_B, raw_B - beta * kl.to(raw_B.dtype), 0.0)

    score_NG, live_NG = groups.gather(scores_B, 0.0), groups.gather(live_B, False)
    centred_NG, mean_NG = _centred(score_NG, live_NG, profile.score_center)
    spread = "group" if profile.score_scale == "none" else profile.score_scale
    std_NG = _deviation(score_NG, live_NG, spread, profile.ddof)
    if profile.score_scale != "none":
        centred_NG = centred_NG / (std_NG + profile.score_eps)
    advantages_B = torch.where(degenerate_B | ~live_B, 0.0, groups.scatter(centred_NG))
    mean_B, std_B = groups.scatter(mean_NG), groups.scatter(std_NG)
    return GroupAdvantages(advantages_B, scores_B, normalized_BK, mean_B, std_B, degenerate_B)


def _normalize_rewards(rewards_BK: Tensor, live_BK: Tensor, groups: Groups, profile: AdvantageProfile) -> Tensor:
    if profile.reward_center == "none" and profile.reward_scale == "none":
        return rewards_BK
    x_NGK, live_NGK = groups.gather(rewards_BK, 0.0), groups.gather(live_BK, False)
    out_NGK, _ = _centred(x_NGK, live_NGK, profile.reward_center)
    scope: Center | Scale = profile.reward_center
    if profile.reward_scale != "none":
        scope = profile.reward_scale
        out_NGK = out_NGK / (_deviation(x_NGK, live_NGK, scope, profile.ddof) + profile.reward_eps)
    alone_NGK = live_NGK.sum(_dims(scope), keepdim=True) < 2  # one value has no place among others
    return torch.where(live_BK, groups.scatter(torch.where(alone_NGK, 0.0, out_NGK)), 0.0)


def _live_weights(weights_BK: Tensor, live_BK: Tensor, profile: AdvantageProfile) -> tuple[Tensor, Tensor]:
    """Weights with 0 for abstained rewards, and which responses count at all."""
    masked_BK = torch.where(live_BK, weights_BK, 0.0)
    live_B = live_BK.any(-1)
    if profile.missing == "zero":
        return masked_BK, live_B
    whole_B, rest_B = _sum_over_rewards(weights_BK), _sum_over_rewards(masked_BK)
    partial_B = ~live_BK.all(-1)
    live_B = live_B & ~(partial_B & (rest_B == 0))  # all weight on abstained rewards: nothing to scale up
    factor_B = torch.where(partial_B & live_B, whole_B / torch.where(rest_B == 0, 1.0, rest_B), 1.0)
    return masked_BK * factor_B[:, None], live_B


def _sum_over_rewards(x_BK: Tensor) -> Tensor:
    """[B], added in the order of K. The order of torch.sum depends on strides and row, so equal rows could differ."""
    total_B = x_BK[:, 0]
    for k in range(1, x_BK.shape[1]):
        total_B = total_B + x_BK[:, k]
    return total_B


def _degenerate(scores_B: Tensor, live_B: Tensor, groups: Groups) -> Tensor:
    x_NG, live_NG = groups.gather(scores_B.detach(), 0.0), groups.gather(live_B, False)
    top_N = torch.where(live_NG, x_NG, float("-inf")).amax(1)
    low_N = torch.where(live_NG, x_NG, float("inf")).amin(1)
    flat_N = ~(top_N > low_N)  # one live response or none compares False as well
    return groups.scatter(flat_N[:, None].expand_as(live_NG))


def _dims(scope: Center | Scale) -> tuple[int, ...]:
    return (0, 1) if scope == "batch" else (1,)


def _shifted(x_NG: Tensor, live_NG: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """x minus the scope's live maximum (0 where not live), that maximum, and the live count."""
    top = torch.where(live_NG, x_NG.detach(), float("-inf")).amax(dims, keepdim=True)
    top = torch.where(top == float("-inf"), 0.0, top)
    return torch.where(live_NG, x_NG - top, 0.0), top, live_NG.sum(dims, keepdim=True)


def _centred(x_NG: Tensor, live_NG: Tensor, scope: Center | Scale) -> tuple[Tensor, Tensor]:
    """x minus its scope's mean, and that mean, both [N, G_max, ...]."""
    if scope == "none":
        return x_NG, torch.zeros_like(x_NG)
    shifted, top, count = _shifted(x_NG, live_NG, _dims(scope))
    total = shifted.sum(_dims(scope), keepdim=True)
    if scope == "leave_one_out":
        mean = (total - shifted) / (count - live_NG.long()).clamp(min=1)  # the others that are live
    else:
        mean = (total / count.clamp(min=1)).expand_as(x_NG)
    return shifted - mean, mean + top


def _deviation(x_NG: Tensor, live_NG: Tensor, scope: Center | Scale, ddof: int) -> Tensor:
    """Standard deviation over the scope, [N, G_max, ...]; 0 for fewer than two live elements."""
    shifted, _, count = _shifted(x_NG, live_NG, _dims(scope))
    mean = shifted.sum(_dims(scope), keepdim=True) / count.clamp(min=1)
    squares = torch.where(live_NG, (shifted - mean) ** 2, 0.0).sum(_dims(scope), keepdim=True)
    variance = squares / (count - ddof).clamp(min=1)
    positive = variance > 0  # sqrt has no finite derivative at 0
    std = torch.where(positive, torch.where(positive, variance, 1.0).sqrt(), 0.0)
    return std.expand_as(x_NG)
