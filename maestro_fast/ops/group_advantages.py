"""Group-relative advantages from K rewards and their weights.

    r'_k = (r_k - mean_k) / (std_k + eps)      per reward, over the profile's scopes
    s    = sum_k w_k r'_k  -  beta * KL        the score of a response
    A    = (s - mean) / (std + eps)            over the profile's scopes; verl_gdpo: / sqrt(std^2 + eps)

Each scope's maximum is subtracted before its mean is taken. That changes nothing in exact arithmetic, and makes groups
of identical rewards exactly 0, where (r - mean) would be rounding noise that the division by a tiny std blows up.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from maestro_fast.ops import cpp_advantages
from maestro_fast.ops.backend import Backend, resolve
from maestro_fast.ops.gpu import operator
from maestro_fast.ops.groups import Groups, GroupsLike
from maestro_fast.ops.moments import Members, live_weights, normalize_rewards, standardise_scores, sum_over_rewards
from maestro_fast.ops.tensors import is_integer, readable, wide
from maestro_fast.specs import AdvantageProfile, as_numbers, from_numbers, resolve_profile


class GroupAdvantages(NamedTuple):
    """Advantages and what they were made of; float32 [B] (float64 for float64 rewards) unless noted.

    Attributes:
        advantages: 0 for degenerate groups (except singletons that the profile leaves raw) and for responses without a
            live reward.
        scores: the weighted sum of the normalised rewards, minus beta * KL where the profile has the KL in the score.
        normalized_rewards: [B, K], 0 where a reward abstained.
        mean: what was subtracted from the score (leave-one-out: the mean of the others).
        std: of the scores over ``score_scale``'s scope, over the group where that is ``none``; 1 for a raw singleton.
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
    lengths: Tensor | None = None,
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
        lengths: [B], integer or floating, tokens of each completion; what a profile with the scope ``tokens`` needs and
            no other takes. A response counts as often as it has tokens in that scope alone: one of length 0 is live in
            its group, and has an advantage, which no token carries.
        profile: a name of ``PROFILES`` or an ``AdvantageProfile``.
        backend: "cpp", "triton", "torch", or None: C++ on the CPU and Triton on a CUDA device, unless there is float64
            or a gradient to compute.

    Raises:
        ValueError: shapes, devices, unknown names, a KL given to a profile whose KL is in the loss; lengths
            missing, not wanted, or (where the host can look at them) not finite or negative.
        TypeError: dtypes.
    """
    prof = resolve_profile(profile)
    if groups is None:
        raise TypeError("groups: missing, expected an int, a [B] sequence of ids or Groups")
    check_inputs(rewards, weights, kl, beta, prof)
    check_lengths(lengths, rewards, prof)
    chosen = resolve("group_advantages", backend, rewards, weights, kl, lengths)
    if chosen == "cpp":
        return GroupAdvantages(*cpp_advantages.group_advantages(rewards, weights, groups, kl, beta, lengths, prof))
    if chosen == "triton":
        index_NG = Groups.of(groups, rewards.shape[0]).to(rewards.device).index_NG
        return GroupAdvantages(*_by_triton(rewards, weights, kl, float(beta), lengths, index_NG, prof))
    rewards_BK, weights_BK = as_matrices(rewards, weights)
    grouping = Groups.of(groups, rewards.shape[0]).to(rewards.device)
    return _reference(rewards_BK, weights_BK, grouping, kl, beta, lengths, prof)


def check_inputs(
    rewards: Tensor, weights: Tensor | None, kl: Tensor | None, beta: float, profile: AdvantageProfile
) -> None:
    """Raises an error that names the argument. Every microsecond here counts: the C++ kernel takes ten."""
    if not rewards.is_floating_point():
        raise TypeError(f"rewards: dtype {rewards.dtype}, expected a floating dtype")
    if rewards.ndim not in (1, 2) or (rewards.ndim == 2 and rewards.shape[1] == 0):
        raise ValueError(f"rewards: shape {tuple(rewards.shape)}, expected [B, K] with K >= 1 or [B]")
    if weights is not None:
        if not weights.is_floating_point():
            raise TypeError(f"weights: dtype {weights.dtype}, expected a floating dtype")
        whole = rewards.shape if rewards.ndim == 2 else (rewards.shape[0], 1)
        if weights.shape != whole and weights.shape != whole[1:]:
            raise ValueError(f"weights: shape {tuple(weights.shape)}, expected {tuple(whole)} or ({whole[1]},)")
    if kl is not None and kl.shape != rewards.shape[:1]:
        raise ValueError(f"kl: shape {tuple(kl.shape)}, expected ({rewards.shape[0]},)")
    if kl is not None and profile.kl_in == "loss":
        raise ValueError("kl: given, but this profile has the KL in the loss (kl_in='loss'); it must enter once")
    if kl is None and beta != 0.0:
        raise ValueError(f"beta: {beta} without kl, expected the [B] tensor kl beside it")
    for name, tensor in (("weights", weights), ("kl", kl)):
        if tensor is not None and tensor.device != rewards.device:
            raise ValueError(f"{name}: on {tensor.device}, expected {rewards.device} as rewards")


def as_matrices(rewards: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """Rewards and weights as [B, K] of one dtype, float32 or float64."""
    rewards_BK = wide(rewards)[:, None] if rewards.ndim == 1 else wide(rewards)
    if weights is None:
        return rewards_BK, torch.ones_like(rewards_BK)
    return rewards_BK, weights.to(rewards_BK.dtype).expand_as(rewards_BK)


def check_lengths(lengths: Tensor | None, rewards: Tensor, profile: AdvantageProfile) -> None:
    if lengths is None:
        if profile.needs_lengths:
            raise ValueError(f"lengths: missing, expected ({rewards.shape[0]},) with a profile of scope 'tokens'")
        return
    if not profile.needs_lengths:
        raise ValueError("lengths: given, but no scope of this profile is 'tokens'")
    if lengths.shape != rewards.shape[:1]:
        raise ValueError(f"lengths: shape {tuple(lengths.shape)}, expected ({rewards.shape[0]},)")
    if not (is_integer(lengths) or lengths.is_floating_point()):
        raise TypeError(f"lengths: dtype {lengths.dtype}, expected an integer or floating dtype")
    if lengths.device != rewards.device:
        raise ValueError(f"lengths: on {lengths.device}, expected {rewards.device} as rewards")
    if readable(lengths) and not bool(((lengths >= 0) & lengths.isfinite()).all()):
        raise ValueError("lengths: negative or not finite, expected numbers of tokens")


def _reference(
    rewards_BK: Tensor,
    weights_BK: Tensor,
    groups: Groups,
    kl: Tensor | None,
    beta: float,
    lengths: Tensor | None,
    profile: AdvantageProfile,
) -> GroupAdvantages:
    live_BK = ~rewards_BK.isnan()
    rewards_BK = torch.where(live_BK, rewards_BK, 0.0)
    if rewards_BK.shape[0] == 0:  # there is no maximum over nothing
        empty_B = rewards_BK.sum(-1)
        return GroupAdvantages(empty_B, empty_B, rewards_BK, empty_B, empty_B, empty_B.bool())
    normalized_BK = normalize_rewards(rewards_BK, live_BK, groups, profile)
    weights_BK, live_B = live_weights(weights_BK, live_BK, profile)
    raw_B = torch.where(live_B, sum_over_rewards(weights_BK * normalized_BK), 0.0)
    scores_B = raw_B if kl is None else torch.where(live_B, raw_B - beta * kl.to(raw_B.dtype), 0.0)

    lengths_NG = None if lengths is None else groups.gather(lengths.to(raw_B.dtype), 0.0)
    members = Members(groups.gather(live_B, False), profile.singleton, lengths_NG)
    out = standardise_scores(groups.gather(raw_B, 0.0), groups.gather(scores_B, 0.0), members, profile)
    advantages_B, mean_B, std_B, degenerate_B = (groups.scatter(x_NG) for x_NG in out)
    return GroupAdvantages(advantages_B, scores_B, normalized_BK, mean_B, std_B, degenerate_B)


# --- Triton ---


def advantage_shapes(rewards: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """Empty outputs of the operators that give the fields of ``GroupAdvantages``."""
    batch, K = rewards.shape[0], rewards.shape[1] if rewards.ndim == 2 else 1
    one = [rewards.new_empty(batch, dtype=torch.float32) for _ in range(4)]
    normalized = rewards.new_empty((batch, K), dtype=torch.float32)
    return one[0], one[1], normalized, one[2], one[3], rewards.new_empty(batch, dtype=torch.bool)


def kernel_matrices(rewards: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """float32 [B, K] as the kernels take them; weights are expanded, since a stride of 0 costs nothing."""
    rewards_BK = rewards.float() if rewards.ndim == 2 else rewards.float()[:, None]
    weights = rewards_BK.new_ones(1) if weights is None else weights.float()
    return rewards_BK, weights if weights.shape == rewards_BK.shape else weights.expand_as(rewards_BK)


@operator(
    "triton_group_advantages(Tensor rewards, Tensor? weights, Tensor? kl, float beta, Tensor? lengths, Tensor index,"
    " int[] integers, float[] epsilons) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    advantage_shapes,
    flat=lambda *given: (*given[:-1], *as_numbers(given[-1])),
    whole=lambda *given: (*given[:-2], from_numbers(*given[-2:])),
)
def _by_triton(
    rewards: Tensor,
    weights: Tensor | None,
    kl: Tensor | None,
    beta: float,
    lengths: Tensor | None,
    index_NG: Tensor,
    profile: AdvantageProfile,
) -> tuple[Tensor, ...]:
    from maestro_fast.kernels import group_advantages as kernel

    rewards_BK, weights_BK = kernel_matrices(rewards, weights)
    kl, lengths = (None if x is None else x.contiguous() for x in (kl, lengths))
    return kernel.group_advantages(rewards_BK, weights_BK, index_NG, profile=profile, kl=kl, beta=beta, lengths=lengths)
