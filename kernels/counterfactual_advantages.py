"""What a response's advantage would have been under other reward weights.

    s_j(a)   = sum_k w_k(a) r'_jk - beta * KL_j              score of response j under the weights of action a
    cf[j, a] = (s_j(a) - mean) / (std + eps)                 over the group with s_j replaced by s_j(a)

Let t be the maximum of the n' others, t + m their mean, M the sum of squares around it, and D = (s_j(a) - t) - m. Then

    s_j(a) - mean = D n' / (n' + 1)          leave_one_out: D
    std^2         = (M + D^2 n' / (n' + 1)) / (n' + 1 - ddof)

So one [G, G] tile of the others' scores serves all actions. M is summed around its own mean, and D subtracts t first,
so that nothing cancels, and D and M are exactly 0 where all scores are the same.

A program takes ``_ROWS`` responses j of one group, and all actions. Its tiles are [1, BG] for the group as it is (every
program of the group computes it again), [BJ, BG] for the others of each j, and [BJ, BA] for the actions.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from maestro_fast.kernels.bound_launch import BoundLaunch, blocks, power_of_2
from maestro_fast.kernels.group_advantages import (
    Inputs,
    Rules,
    divisor,
    live_factors,
    normalized,
    reward_moments,
    switches,
)
from maestro_fast.kernels.moments import over, unit_of
from maestro_fast.specs import AdvantageProfile

_ROWS = 16  # responses j of one program
_LARGEST = 1024  # responses of the largest group


class Own(NamedTuple):
    """The BJ responses of a program: their rows in the batch, whether they exist, and their places in the group."""

    rows_J: tl.tensor
    inside_J: tl.tensor
    j: tl.tensor


class Actions(NamedTuple):
    """The weights of A actions, contiguous float32 [A, K] in device memory, and their indices ``a`` [BA]."""

    weights_ptr: tl.tensor
    a: tl.tensor
    A: tl.tensor


@triton.jit
def _own_factors(own, actions, inputs, zero_JA, K: tl.constexpr, RENORMALIZE: tl.constexpr):
    """``live_factors`` of the responses j under the weights of each action, both [BJ, BA]."""
    whole_JA = zero_JA  # the sum of an action's weights
    rest_JA = zero_JA  # the part of it that lies on live rewards of j
    present_J = tl.zeros(own.rows_J.shape, tl.int32)  # how many rewards of j are live
    for k in tl.static_range(K):
        reward_ptr = inputs.rewards_ptr + own.rows_J * inputs.stride_rb + k * inputs.stride_rk
        reward_J = tl.load(reward_ptr, mask=own.inside_J, other=float("nan"))
        action_ptr = actions.weights_ptr + actions.a * K + k
        action_JA = tl.load(action_ptr, mask=actions.a < actions.A, other=0.0)[None, :] + zero_JA
        present_J += (reward_J == reward_J).to(tl.int32)
        whole_JA += action_JA
        rest_JA += tl.where((reward_J == reward_J)[:, None], action_JA, 0.0)
    present_JA = present_J[:, None] + tl.zeros(zero_JA.shape, tl.int32)
    live_JA = present_JA > 0
    factor_JA = tl.full(zero_JA.shape, 1.0, tl.float32)
    if RENORMALIZE:
        partial_JA = present_JA < K
        live_JA = live_JA & ~(partial_JA & (rest_JA == 0.0))
        ratio_JA = tl.div_rn(whole_JA, tl.where(rest_JA == 0.0, 1.0, rest_JA))
        factor_JA = tl.where(partial_JA & live_JA, ratio_JA, 1.0)
    return live_JA, factor_JA


@triton.jit
def _raw_scores(rows_1G, inside_1G, factor_1G, own_JG, own_factor_JA, actions, inputs, rules, K: tl.constexpr):
    """Scores before the KL: of the group as it is [1, BG], and of the responses j under each action [BJ, BA]."""
    raw_1G = tl.zeros(rows_1G.shape, tl.float32)
    own_raw_JA = tl.zeros(own_factor_JA.shape, tl.float32)
    for k in tl.static_range(K):  # one reward at a time, because [BJ, BG] and [BJ, BA] fill the registers
        reward_ptr = inputs.rewards_ptr + rows_1G * inputs.stride_rb + k * inputs.stride_rk
        reward_1G = tl.load(reward_ptr, mask=inside_1G, other=float("nan"))
        weight_ptr = inputs.weights_ptr + rows_1G * inputs.stride_wb + k * inputs.stride_wk
        weight_1G = tl.load(weight_ptr, mask=inside_1G, other=0.0)
        action_A = tl.load(actions.weights_ptr + actions.a * K + k, mask=actions.a < actions.A, other=0.0)
        present_1G = reward_1G == reward_1G
        reward_1G = tl.where(present_1G, reward_1G, 0.0)
        out_1G = normalized(reward_1G, present_1G, k, inputs.moments_ptr, rules)
        raw_1G += tl.where(present_1G, weight_1G, 0.0) * factor_1G * out_1G
        # The sum picks one element, so it is exact. It is 0 where the reward abstained.
        own_out_J = tl.sum(tl.where(own_JG, out_1G, 0.0), 1)
        own_raw_JA += action_A[None, :] * own_factor_JA * own_out_J[:, None]
    return raw_1G, own_raw_JA


@triton.jit
def _compared(own_JA, own_raw_JA, own_live_JA, others_JG, score_1G, raw_1G, rules):
    """The advantages [BJ, BA] of the responses j, whose scores are own [BJ, BA], compared with the other responses."""
    # Whether there is any spread is decided before the KL. A NaN counts as spread, so it is the highest and the lowest.
    high_1G = tl.where(raw_1G == raw_1G, raw_1G, float("inf"))
    low_1G = tl.where(raw_1G == raw_1G, raw_1G, float("-inf"))
    high_J = tl.max(tl.where(others_JG, high_1G, float("-inf")), 1)
    low_J = tl.min(tl.where(others_JG, low_1G, float("inf")), 1)
    flat_JA = tl.maximum(high_J[:, None], own_raw_JA) == tl.minimum(low_J[:, None], own_raw_JA)
    flat_JA = flat_JA & (own_raw_JA == own_raw_JA)
    # Then count, maximum t, mean m and squares M of the others of each j.
    count_J = tl.sum(others_JG.to(tl.float32), 1)
    top_J = tl.max(tl.where(others_JG, score_1G, float("-inf")), 1)
    top_J = tl.where(top_J == float("-inf"), 0.0, top_J)  # there are no others
    shifted_JG = tl.where(others_JG, score_1G - top_J[:, None], 0.0)
    mean_J = tl.div_rn(tl.sum(shifted_JG, 1), tl.maximum(count_J, 1.0))
    unit_J, per_unit_J = unit_of(mean_J)  # M is in units whose squares float32 can hold
    off_JG = tl.where(others_JG, (shifted_JG - mean_J[:, None]) * per_unit_J[:, None], 0.0)
    squares_J = tl.sum(off_JG * off_JG, 1)

    delta_JA = (own_JA - top_J[:, None]) - mean_J[:, None]  # D
    alone_JA = (count_J[:, None] + tl.zeros_like(own_JA)) == 0.0
    shrink_J = tl.div_rn(count_J, count_J + 1.0)  # n' / (n' + 1)
    if rules.SCORE_CENTER == "none":
        out_JA = own_JA
    elif rules.SCORE_CENTER == "leave_one_out":
        out_JA = delta_JA
    else:
        out_JA = delta_JA * shrink_J[:, None]
    out_JA = tl.where(alone_JA, own_JA if rules.RAW or rules.SCORE_CENTER == "none" else own_JA - own_JA, out_JA)
    if rules.SCORE_SCALE != "none":
        # D may be far larger than the unit of M, so their sum has a unit for both.
        unit_JA, per_unit_JA = unit_of(tl.maximum(tl.abs(delta_JA), unit_J[:, None]))
        smaller_JA = unit_J[:, None] * per_unit_JA
        own_off_JA = delta_JA * per_unit_JA
        all_JA = squares_J[:, None] * smaller_JA * smaller_JA + own_off_JA * own_off_JA * shrink_J[:, None]
        freedom_J = tl.maximum(count_J + 1.0 - rules.DDOF, 1.0)
        std_JA = tl.sqrt_rn(tl.div_rn(all_JA, freedom_J[:, None] + tl.zeros_like(all_JA))) * unit_JA
        std_JA = tl.where(alone_JA, 1.0 if rules.RAW else 0.0, std_JA)
        out_JA = over(out_JA, divisor(std_JA, rules.score_eps, rules.IN_VARIANCE))
    if rules.RAW:
        return tl.where(own_live_JA & (alone_JA | ~flat_JA), out_JA, 0.0)
    else:
        return tl.where(own_live_JA & ~flat_JA, out_JA, 0.0)


@triton.jit
def _counterfactual_tile(
    rows_1G, inside_1G, g, own, actions, inputs, rules, K: tl.constexpr, BJ: tl.constexpr, BA: tl.constexpr
):
    """cf [BJ, BA] of the responses ``own``. Their group has the responses ``rows_1G`` in its slots ``g``."""
    live_1G, factor_1G = live_factors(rows_1G, inside_1G, inputs, K, 1, rules.RENORMALIZE)
    zero_JA = tl.zeros([BJ, BA], tl.float32)
    own_live_JA, own_factor_JA = _own_factors(own, actions, inputs, zero_JA, K, rules.RENORMALIZE)
    own_JG = g[None, :] == own.j[:, None]
    raw_1G, own_raw_JA = _raw_scores(rows_1G, inside_1G, factor_1G, own_JG, own_factor_JA, actions, inputs, rules, K)
    raw_1G = tl.where(live_1G, raw_1G, 0.0)
    score_1G = raw_1G
    own_JA = own_raw_JA
    if inputs.kl_ptr is not None:
        kl_1G = tl.load(inputs.kl_ptr + rows_1G, mask=inside_1G, other=0.0).to(tl.float32)
        score_1G = tl.where(live_1G, raw_1G - inputs.beta * kl_1G, 0.0)
        kl_J = tl.load(inputs.kl_ptr + own.rows_J, mask=own.inside_J, other=0.0).to(tl.float32)
        own_JA = own_raw_JA - inputs.beta * kl_J[:, None]
    others_JG = live_1G & (g[None, :] != own.j[:, None])
    return _compared(own_JA, own_raw_JA, own_live_JA, others_JG, score_1G, raw_1G, rules)


@triton.jit(do_not_specialize=["B"])
def _counterfactuals(
    index_ptr,
    rewards_ptr,
    weights_ptr,
    action_weights_ptr,
    kl_ptr,
    moments_ptr,
    out_ptr,
    G,
    B,
    A,
    stride_rb,
    stride_rk,
    stride_wb,
    stride_wk,
    beta,
    reward_eps,
    score_eps,
    K: tl.constexpr,
    REWARD_CENTER: tl.constexpr,
    REWARD_SCALE: tl.constexpr,
    SCORE_CENTER: tl.constexpr,
    SCORE_SCALE: tl.constexpr,
    DDOF: tl.constexpr,
    RAW: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    IN_VARIANCE: tl.constexpr,
    BJ: tl.constexpr,
    BG: tl.constexpr,
    BA: tl.constexpr,
):
    """One program computes all actions of BJ responses of a group."""
    inputs = Inputs(
        rewards_ptr=rewards_ptr,
        weights_ptr=weights_ptr,
        kl_ptr=kl_ptr,
        lengths_ptr=None,
        moments_ptr=moments_ptr,
        stride_rb=stride_rb,
        stride_rk=stride_rk,
        stride_wb=stride_wb,
        stride_wk=stride_wk,
        beta=beta,
    )
    n = tl.program_id(0).to(tl.int64)
    g = tl.arange(0, BG)
    j = tl.program_id(1) * BJ + tl.arange(0, BJ)
    a = tl.arange(0, BA)
    rows_1G = tl.load(index_ptr + n * G + g, mask=g < G, other=B)[None, :]
    inside_1G = rows_1G < B
    rows_J = tl.load(index_ptr + n * G + j, mask=j < G, other=B)
    own = Own(rows_J=rows_J, inside_J=rows_J < B, j=j)
    actions = Actions(weights_ptr=action_weights_ptr, a=a, A=A)
    out_JA = _counterfactual_tile(
        rows_1G,
        inside_1G,
        g,
        own,
        actions,
        inputs,
        Rules(
            reward_eps=reward_eps,
            score_eps=score_eps,
            REWARD_CENTER=REWARD_CENTER,
            REWARD_SCALE=REWARD_SCALE,
            SCORE_CENTER=SCORE_CENTER,
            SCORE_SCALE=SCORE_SCALE,
            DDOF=DDOF,
            RAW=RAW,
            RENORMALIZE=RENORMALIZE,
            IN_VARIANCE=IN_VARIANCE,
        ),
        K,
        BJ,
        BA,
    )
    mask_JA = own.inside_J[:, None] & (a < A)[None, :]
    tl.store(out_ptr + rows_J[:, None] * A + a[None, :], out_JA, mask=mask_JA)


def counterfactual_advantages(
    rewards_BK: Tensor,
    weights_BK: Tensor,
    action_weights_AK: Tensor,
    index_NG: Tensor,
    *,
    profile: AdvantageProfile,
    kl: Tensor | None = None,
    beta: float = 0.0,
) -> Tensor:
    """Launches the kernel on arguments that ``ops.counterfactual_advantages`` has checked.

    There is one launch, and one before it for rewards that are normalised over the batch.

    Args:
        rewards_BK, weights_BK: float32 [B, K], any strides; NaN where a reward abstained.
        action_weights_AK: float32 [A, K], contiguous.
        index_NG: int64 [N, G_max] of ``ops.Groups``.
        profile: a profile that compares scores within groups.
        kl: [B], contiguous, or None.
        beta: the coefficient of the KL.

    Raises:
        ValueError: a group has more than 1,024 responses.
    """
    (batch, rewards), actions = rewards_BK.shape, action_weights_AK.shape[0]
    number, size = index_NG.shape
    if size > _LARGEST:
        raise ValueError(f"groups: one of {size} responses, expected at most {_LARGEST} with backend='triton'")
    out = torch.empty(batch, actions, device=rewards_BK.device, dtype=torch.float32)
    if batch == 0:
        return out
    width = power_of_2(size)
    rows = min(width, _ROWS)
    _launch(profile, rewards, rows, width, power_of_2(actions))(
        (number, blocks(size, rows)),
        index_ptr=index_NG,
        rewards_ptr=rewards_BK,
        weights_ptr=weights_BK,
        action_weights_ptr=action_weights_AK,
        kl_ptr=kl,
        moments_ptr=reward_moments(rewards_BK, profile, False),
        out_ptr=out,
        G=size,
        B=batch,
        A=actions,
        stride_rb=rewards_BK.stride(0),
        stride_rk=rewards_BK.stride(1),
        stride_wb=weights_BK.stride(0),
        stride_wk=weights_BK.stride(1),
        beta=float(beta),
        reward_eps=float(profile.reward_eps),
        score_eps=float(profile.score_eps),
    )
    return out


@lru_cache(maxsize=256)
def _launch(profile: AdvantageProfile, rewards: int, rows: int, width: int, actions: int) -> BoundLaunch:
    constants = {
        "K": rewards,
        **switches(profile, False),
        "BJ": rows,
        "BG": width,
        "BA": actions,
    }
    return BoundLaunch(_counterfactuals, constants, num_warps=min(8, max(1, rows * width // 256)))
