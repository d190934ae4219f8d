"""Group-relative advantages from K rewards and their weights.

    r'_k = (r_k - mean_k) / (std_k + eps)      per reward, over the profile's scopes
    s    = sum_k w_k r'_k  -  beta * KL        the score of a response
    A    = (s - mean) / (std + eps)            over the profile's scopes; verl_gdpo: / sqrt(std^2 + eps)

Each scope's maximum is subtracted before its mean is taken. That changes nothing in exact arithmetic, and makes groups
of identical rewards exactly 0, where (r - mean) would be rounding noise that the division by a tiny std blows up.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from maestro_fast.ops import cpp
from maestro_fast.ops.backend import Backend, resolve
from maestro_fast.ops.gpu import operator
from maestro_fast.ops.groups import Groups, GroupsLike
from maestro_fast.ops.moments import Members, live_weights, normalize_rewards, standardise_scores, sum_over_rewards
from maestro_fast.ops.tensors import floats, is_integer, readable, wide
from maestro_fast.specs import AdvantageProfile, GroupAdvantages, as_text, from_text, resolve_profile

if TYPE_CHECKING:
    from maestro_fast import _C

__all__ = ["GroupAdvantages", "group_advantages"]


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
        partition = cpp_groups(groups, rewards.shape[0])
        return _by_cpp(rewards, weights, kl, float(beta), lengths, *partition, prof)
    if chosen == "triton":
        index_NG = Groups.of(groups, rewards.shape[0]).to(rewards.device).index_NG
        return _by_triton(rewards, weights, kl, float(beta), lengths, index_NG, prof)
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


# --- C++ and Triton ---

_RESULTS = "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"


def flat_profile(*arguments: Any) -> tuple[Any, ...]:
    """The arguments of a launch, of which a profile is the last, as its operator takes them."""
    return *arguments[:-1], as_text(arguments[-1])


def whole_profile(*arguments: Any) -> tuple[Any, ...]:
    """The opposite of ``flat_profile``."""
    return *arguments[:-1], from_text(AdvantageProfile, arguments[-1])


def advantage_shapes(rewards: Tensor, *rest: Any) -> GroupAdvantages:
    """Empty outputs of the operators that compute ``GroupAdvantages``."""
    return GroupAdvantages.empty(rewards)


@cpp.operator(
    "group_advantages(Tensor rewards, Tensor? weights, Tensor? kl, float beta, Tensor? lengths, int size,"
    f" Tensor? offsets, Tensor? order, str profile) -> {_RESULTS}",
    advantage_shapes,
    flat=flat_profile,
    whole=whole_profile,
    result=GroupAdvantages,
)
def _by_cpp(
    rewards: Tensor,
    weights: Tensor | None,
    kl: Tensor | None,
    beta: float,
    lengths: Tensor | None,
    size: int,
    offsets: Tensor | None,
    order: Tensor | None,
    profile: AdvantageProfile,
) -> GroupAdvantages:
    rewards = cpp_rewards(rewards)
    weights = None if weights is None else floats(weights)
    kl = None if kl is None else floats(kl)
    lengths = None if lengths is None else floats(lengths)
    out = GroupAdvantages.empty(rewards)
    cpp._C.group_advantages(
        rewards.data_ptr(),
        rewards.dtype is torch.bfloat16,
        rewards.shape[1] if rewards.ndim == 2 else 1,
        cpp.address(weights),
        weights is not None and weights.ndim == 2,
        cpp.address(kl),
        beta,
        cpp.address(lengths),
        cpp_partition(size, offsets, order, rewards.shape[0]),
        cpp_profile(profile),
        out.advantages.data_ptr(),
        out.scores.data_ptr(),
        out.normalized_rewards.data_ptr(),
        out.mean.data_ptr(),
        out.std.data_ptr(),
        out.degenerate.data_ptr(),
        torch.get_num_threads(),
    )
    return out


def cpp_rewards(rewards: Tensor) -> Tensor:
    """Contiguous bfloat16 or float32."""
    return rewards.contiguous() if rewards.dtype is torch.bfloat16 else floats(rewards)


def cpp_groups(groups: GroupsLike, batch: int) -> tuple[int, Tensor | None, Tensor | None]:
    """The partition as an operator takes it: (G, None, None) for consecutive groups of G, else (0, offsets, order)."""
    if type(groups) is int and groups > 0 and batch % groups == 0:
        return groups, None, None
    known = Groups.of(groups, batch)
    if known.size:
        return known.size, None, None
    if known.offsets_N1.device.type != "cpu":
        raise ValueError(f"groups: on {known.offsets_N1.device}, expected the CPU as rewards")
    return 0, known.offsets_N1, known.order_B


def cpp_partition(size: int, offsets: Tensor | None, order: Tensor | None, batch: int) -> _C.Partition:
    """The partition of ``cpp_groups`` as the C++ kernels take it. It holds addresses of these tensors."""
    if size:
        return _consecutive(size, batch)
    assert offsets is not None and order is not None
    return cpp._C.Partition(offsets.numel() - 1, batch, 0, offsets.data_ptr(), order.data_ptr())


@lru_cache(maxsize=1024)
def _consecutive(size: int, batch: int) -> _C.Partition:
    return cpp._C.Partition(batch // size, batch, size, 0, 0)


_SCOPES = ("none", "group", "batch", "leave_one_out", "tokens")  # csrc's enum Scope, in its order


@lru_cache(maxsize=256)
def cpp_profile(profile: AdvantageProfile) -> _C.AdvantageProfile:
    """The profile as the C++ kernels take it, except for ``kl_in``, which concerns the caller alone."""
    return cpp._C.AdvantageProfile(
        _SCOPES.index(profile.reward_center),
        _SCOPES.index(profile.reward_scale),
        _SCOPES.index(profile.score_center),
        _SCOPES.index(profile.score_scale),
        float(profile.reward_eps),
        float(profile.score_eps),
        profile.ddof,
        profile.singleton == "raw",
        profile.missing == "renormalize",
        profile.score_eps_in == "variance",
    )


def kernel_matrices(rewards: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """float32 [B, K] as the kernels take them; weights are expanded, since a stride of 0 costs nothing."""
    rewards_BK = rewards.float() if rewards.ndim == 2 else rewards.float()[:, None]
    weights = rewards_BK.new_ones(1) if weights is None else weights.float()
    return rewards_BK, weights if weights.shape == rewards_BK.shape else weights.expand_as(rewards_BK)


@operator(
    "triton_group_advantages(Tensor rewards, Tensor? weights, Tensor? kl, float beta, Tensor? lengths, Tensor index,"
    f" str profile) -> {_RESULTS}",
    advantage_shapes,
    flat=flat_profile,
    whole=whole_profile,
    result=GroupAdvantages,
)
def _by_triton(
    rewards: Tensor,
    weights: Tensor | None,
    kl: Tensor | None,
    beta: float,
    lengths: Tensor | None,
    index_NG: Tensor,
    profile: AdvantageProfile,
) -> GroupAdvantages:
    from maestro_fast.kernels import group_advantages as kernel

    rewards_BK, weights_BK = kernel_matrices(rewards, weights)
    kl, lengths = (None if x is None else x.contiguous() for x in (kl, lengths))
    out = kernel.group_advantages(rewards_BK, weights_BK, index_NG, profile=profile, kl=kl, beta=beta, lengths=lengths)
    return GroupAdvantages(*out)
