"""What a response's advantage would have been under other reward weights.

    s_j(a)   = sum_k w_k(a) r'_jk - beta * KL_j                      score of response j under the weights of action a
    cf[j, a] = (s_j(a) - mean) / (std + eps)                         over the group with s_j replaced by s_j(a)

r' are the normalised rewards of ``group_advantages``, which do not depend on weights. The other responses keep their
scores, but response j moves the mean and the deviation that it is compared with, so each of the B * A entries has its
own mean and deviation. That makes cf[j, a] exactly the advantage of j had its action been a, not an approximation.
"""

from __future__ import annotations

import torch
from torch import Tensor

from maestro_fast.ops import cpp
from maestro_fast.ops.backend import Backend, resolve
from maestro_fast.ops.gpu import operator
from maestro_fast.ops.group_advantages import (
    CppGroups,
    Members,
    as_matrices,
    check_inputs,
    cpp_flat,
    cpp_profile,
    cpp_whole,
    kernel_matrices,
    live_weights,
    normalize_rewards,
    standardise_scores,
    sum_over_rewards,
    triton_flat,
    triton_whole,
)
from maestro_fast.ops.groups import Groups, GroupsLike
from maestro_fast.ops.tensors import check_tensors, floats
from maestro_fast.specs import AdvantageProfile, resolve_profile


def counterfactual_advantages(
    rewards: Tensor,
    weights: Tensor | None,
    action_weights: Tensor,
    groups: GroupsLike,
    *,
    kl: Tensor | None = None,
    beta: float = 0.0,
    profile: str | AdvantageProfile = "maestro",
    backend: Backend | None = None,
) -> Tensor:
    """Advantages of B responses, each under A alternative weight vectors, while all other responses are unchanged.

    Args:
        rewards: [B, K] or [B]; NaN where a reward abstained.
        weights: [B, K], [K], or None for weights of 1. The other responses of a group keep them. Differentiable.
        action_weights: [A, K], the weights of each action. Differentiable.
        groups, kl, beta: as in ``group_advantages``.
        profile: a name of ``PROFILES`` or an ``AdvantageProfile`` that compares scores within groups. With the scopes
            ``batch`` and ``tokens`` another action of one response would move every advantage of the batch.
        backend: "cpp", "triton" or "torch". None takes C++ on the CPU and Triton on a CUDA device, unless there is
            float64 or a gradient to compute. Triton serves groups of at most 1,024.

    Returns:
        [B, A], float32 (float64 for float64 rewards). Up to rounding, entry [j, a] is advantage j of
        ``group_advantages`` with row j of the weights replaced by ``action_weights[a]``. So it is 0 where, after this
        replacement, the group is degenerate or the response does not count. Singletons and abstained rewards follow the
        profile: ``renormalize`` rescales the weights of each action, too.

    The PyTorch reference forms [N, G, G, A] scores for N groups of at most G responses; C++ takes O(B * A * K).

    Raises:
        ValueError: as in ``group_advantages``; action_weights have a wrong shape or device; the profile compares scores
            beyond the group.
        TypeError: a dtype is wrong.
    """
    prof = resolve_profile(profile)
    check_inputs(rewards, weights, kl, beta, prof)
    _check(rewards, action_weights, prof)
    chosen = resolve("counterfactual_advantages", backend, rewards, weights, action_weights, kl)
    if chosen == "cpp":
        partition = CppGroups.of(groups, rewards.shape[0])
        return _by_cpp(rewards, weights, action_weights, kl, float(beta), partition, prof)
    if chosen == "triton":
        index_NG = Groups.of(groups, rewards.shape[0]).to(rewards.device).index_NG
        return _by_triton(rewards, weights, action_weights, kl, float(beta), index_NG, prof)
    rewards_BK, weights_BK = as_matrices(rewards, weights)
    grouping = Groups.of(groups, rewards.shape[0]).to(rewards.device)
    return _reference(rewards_BK, weights_BK, action_weights.to(rewards_BK.dtype), grouping, kl, beta, prof)


def _check(rewards: Tensor, action_weights: Tensor, profile: AdvantageProfile) -> None:
    """Checks what ``check_inputs`` does not check, and raises an error that names the argument."""
    check_tensors(1, action_weights=action_weights)
    K = rewards.shape[1] if rewards.ndim == 2 else 1
    if not action_weights.is_floating_point():
        raise TypeError(f"action_weights: dtype {action_weights.dtype}, expected a floating dtype")
    if action_weights.ndim != 2 or action_weights.shape[0] == 0 or action_weights.shape[1] != K:
        raise ValueError(f"action_weights: shape {tuple(action_weights.shape)}, expected [A, {K}] with A >= 1")
    if action_weights.device != rewards.device:
        raise ValueError(f"action_weights: on {action_weights.device}, expected {rewards.device} as rewards")
    beyond = "batch", "tokens"
    if profile.score_center in beyond or profile.score_scale in beyond:
        name = "score_center" if profile.score_center in beyond else "score_scale"
        scope = getattr(profile, name)
        raise ValueError(f"profile: its {name} is {scope!r}, expected one that compares scores within the group")


def _reference(
    rewards_BK: Tensor,
    weights_BK: Tensor,
    action_weights_AK: Tensor,
    groups: Groups,
    kl: Tensor | None,
    beta: float,
    profile: AdvantageProfile,
) -> Tensor:
    """The formula of the module in PyTorch, differentiable. It forms every group once for each of its responses."""
    B, A = rewards_BK.shape[0], action_weights_AK.shape[0]
    if B == 0:
        return rewards_BK.new_zeros(0, A)
    live_BK = ~rewards_BK.isnan()
    rewards_BK = torch.where(live_BK, rewards_BK, 0.0)
    normalized_BK = normalize_rewards(rewards_BK, live_BK, groups, profile)
    # The weights that each response really has are added as one more action, the last.
    weights_BAK = torch.cat([action_weights_AK.expand(B, -1, -1), weights_BK[:, None]], 1)
    weights_BAK, live_BA = live_weights(weights_BAK, live_BK[:, None].expand_as(weights_BAK), profile)
    raw_BA = torch.where(live_BA, sum_over_rewards(weights_BAK * normalized_BK[:, None]), 0.0)
    scores_BA = raw_BA if kl is None else torch.where(live_BA, raw_BA - beta * kl.to(raw_BA.dtype)[:, None], 0.0)

    members = Members(_replaced(groups.gather(live_BA, False)), profile.singleton)
    raw_NGGA, scores_NGGA = _replaced(groups.gather(raw_BA, 0.0)), _replaced(groups.gather(scores_BA, 0.0))
    advantages_NGGA = standardise_scores(raw_NGGA, scores_NGGA, members, profile).advantages_NG
    return groups.scatter(advantages_NGGA.diagonal(dim1=1, dim2=2).transpose(1, 2))


def _replaced(x_NGA: Tensor) -> Tensor:
    """[N, G, A + 1] -> [N, G, G, A]. Entry [n, i, j, a] is the value of response i if j alone takes action a.

    The last of the A + 1 actions is the one that each response really took.
    """
    own_GG = torch.eye(x_NGA.shape[1], dtype=torch.bool, device=x_NGA.device)
    return torch.where(own_GG[..., None], x_NGA[:, None, :, :-1], x_NGA[:, :, None, -1:])


# --- C++ and Triton ---


def _shapes(rewards: Tensor, weights: Tensor | None, action_weights: Tensor, *rest: object) -> Tensor:
    """The empty output of the operators, [B, A]."""
    return torch.empty(rewards.shape[0], action_weights.shape[0], dtype=torch.float32, device=rewards.device)


@cpp.operator(
    "counterfactual_advantages(Tensor rewards, Tensor? weights, Tensor action_weights, Tensor? kl, float beta,"
    " int size, Tensor? offsets, Tensor? order, str profile) -> Tensor",
    _shapes,
    flat=cpp_flat,
    whole=cpp_whole,
)
def _by_cpp(
    rewards: Tensor,
    weights: Tensor | None,
    action_weights: Tensor,
    kl: Tensor | None,
    beta: float,
    groups: CppGroups,
    profile: AdvantageProfile,
) -> Tensor:
    rewards, action_weights = cpp.floats_or_bfloat16(rewards), floats(action_weights)
    weights = None if weights is None else floats(weights)
    kl = None if kl is None else floats(kl)
    out = _shapes(rewards, weights, action_weights)
    actions, K = action_weights.shape
    cpp._C.counterfactual_advantages(
        rewards.data_ptr(),
        rewards.dtype is torch.bfloat16,
        K,
        cpp.address(weights),
        weights is not None and weights.ndim == 2,
        cpp.address(kl),
        beta,
        action_weights.data_ptr(),
        actions,
        groups.native(rewards.shape[0]),
        cpp_profile(profile),
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out


@operator(
    "triton_counterfactual_advantages(Tensor rewards, Tensor? weights, Tensor actions, Tensor? kl, float beta,"
    " Tensor index, str profile) -> Tensor",
    _shapes,
    flat=triton_flat,
    whole=triton_whole,
)
def _by_triton(
    rewards: Tensor,
    weights: Tensor | None,
    action_weights: Tensor,
    kl: Tensor | None,
    beta: float,
    index_NG: Tensor,
    profile: AdvantageProfile,
) -> Tensor:
    """Raises a ValueError where a group is larger than the kernel's tile."""
    from maestro_fast.kernels import counterfactual_advantages as kernel

    rewards_BK, weights_BK = kernel_matrices(rewards, weights)
    kl = None if kl is None else kl.contiguous()
    return kernel.counterfactual_advantages(
        rewards_BK, weights_BK, floats(action_weights), index_NG, profile=profile, kl=kl, beta=beta
    )
