"""Group-relative advantages from K rewards and their weights.

    r'_k = (r_k - mean_k) / (std_k + eps)      per reward, over the profile's scopes
    s    = sum_k w_k r'_k  -  beta * KL        the score of a response
    A    = (s - mean) / (std + eps)            over the profile's scopes

One launch is enough where every scope is a group, or where one program holds the whole batch (up to ``_WHOLE`` slots of
groups). A larger batch under a profile with a batch or token scope takes a second launch, which finishes the scores. If
the rewards themselves are normalised over the batch, one more launch comes before both. No program waits for another,
so there are no counters and no atomics, and every sum has one order. All programs of the second launch repeat the same
reduction over the B scores, which are in the L2 cache.

For B = 4,096, K = 8, G = 16 in a CUDA graph on an H200, the profile grpo took 3.1 us (2.7 in another run) and maestro
4.4 (3.8), where a copy of as many bytes takes 3.5 to 3.8. With one reward after the other they took 3.4 and 6.0 us on
an H100. The chain of dependent instructions decides, so a tile holds as many rewards as fit into its registers.

Rewards are added in the order of K, like everywhere in this package, and no product and sum are fused into an FMA, so
that equal rows get equal scores. There is no backward kernel: autograd goes through the reference of
``ops/group_advantages.py``.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from maestro_fast.kernels.bound_launch import BoundLaunch, blocks, power_of_2
from maestro_fast.kernels.moments import centred, deviation, over, scope_sum, spread, unit_of
from maestro_fast.specs import AdvantageProfile, GroupAdvantages

TILE = 16  # responses of one program, which one warp reduces without a barrier
_PER_THREAD = 8  # rewards that a thread holds at a time
_WHOLE = 2048  # slots of the largest batch that one program holds in registers
_MOST = 8192  # responses of the largest group
_SCAN = 1024  # responses per step of the reductions over a batch
# Bits of the state of a response that the first launch hands to the second: it is live; its advantage is 0.
_LIVE, _ZERO = tl.constexpr(1), tl.constexpr(2)


# --- records of device functions: arguments that travel together ---


class Inputs(NamedTuple):
    """The inputs of a batch of B responses, in device memory.

    Attributes:
        rewards_ptr, weights_ptr: float32 [B, K] at the strides below; a NaN reward abstained.
        kl_ptr: [B], or None for scores without a KL.
        lengths_ptr: [B], the tokens of each completion; None without the scope "tokens".
        moments_ptr: float32 [K, 4] of ``_reward_moments``; None unless the scope of rewards is "split".
        beta: the coefficient of the KL.
    """

    rewards_ptr: tl.tensor
    weights_ptr: tl.tensor
    kl_ptr: tl.tensor
    lengths_ptr: tl.tensor
    moments_ptr: tl.tensor
    stride_rb: tl.tensor
    stride_rk: tl.tensor
    stride_wb: tl.tensor
    stride_wk: tl.tensor
    beta: tl.tensor


class Rules(NamedTuple):
    """An ``AdvantageProfile`` as kernels take it. All but the epsilons are compile-time constants.

    Triton keeps these constants only if the ``Rules`` is made in the call that takes it; assigned to a variable, they
    would become tensors. A scope is the profile's own scope if a tile holds all elements of the scope. Otherwise, that
    is for a batch that is larger than a tile, it is "split".
    """

    reward_eps: tl.tensor
    score_eps: tl.tensor
    REWARD_CENTER: tl.constexpr
    REWARD_SCALE: tl.constexpr
    SCORE_CENTER: tl.constexpr
    SCORE_SCALE: tl.constexpr
    DDOF: tl.constexpr
    RAW: tl.constexpr  # singleton="raw"
    RENORMALIZE: tl.constexpr  # missing="renormalize"
    IN_VARIANCE: tl.constexpr  # score_eps_in="variance"


class Series(NamedTuple):
    """B numbers in device memory, whose mean and deviation are computed.

    The constant KIND says which numbers count. In a "reward" series, those that are not NaN count. In a "score" series,
    those that ``state_ptr`` marks as live. In a "tokens" series the same, each as often as ``lengths_ptr`` says.
    """

    values_ptr: tl.tensor
    state_ptr: tl.tensor
    lengths_ptr: tl.tensor
    B: tl.tensor
    stride: tl.tensor


# --- a tile of groups ---


@triton.jit
def normalized(reward, live, k, moments_ptr, rules):
    """Rewards normalised over the profile's scopes; 0 where not live, or where no other is live in their scope.

    The tile is [BN, BG] of one reward k, or [BN, BG, KB] of the rewards k [1, 1, KB].
    """
    if rules.REWARD_CENTER == "none" and rules.REWARD_SCALE == "none":
        return reward
    else:
        counted = live.to(tl.float32)
        zero = tl.zeros_like(reward)
        if rules.REWARD_CENTER == "split":
            # The scope is larger than the tile. A launch before has stored maximum, mean minus maximum, ...
            top, mean = tl.load(moments_ptr + 4 * k), tl.load(moments_ptr + 4 * k + 1)
            out = tl.where(live, reward - top, 0.0) - mean
        else:
            out, _ = centred(reward, live, counted, rules.REWARD_CENTER, rules.RAW)
        if rules.REWARD_SCALE == "split":
            out = over(out, tl.load(moments_ptr + 4 * k + 2) + rules.reward_eps + zero)  # ... standard deviation, ...
        elif rules.REWARD_SCALE != "none":
            std = deviation(reward, live, counted, rules.REWARD_SCALE, rules.DDOF, rules.RAW)
            out = over(out, std + rules.reward_eps)
        SCOPE: tl.constexpr = rules.REWARD_CENTER if rules.REWARD_SCALE == "none" else rules.REWARD_SCALE
        # A single value has nothing to be compared with, and becomes 0 (NaN if it is not finite) unless the profile
        # keeps it raw.
        if SCOPE == "split":
            out = tl.where((tl.load(moments_ptr + 4 * k + 3) + zero) < 2.0, reward - reward, out)  # ... live elements
        elif SCOPE == "batch" or not rules.RAW:
            out = tl.where((scope_sum(counted, SCOPE) + zero) < 2.0, reward - reward, out)
        return tl.where(live, out, 0.0)


@triton.jit
def add_in_order(total_NG, x_NGK, KB: tl.constexpr):
    """Adds the elements of the last axis to total [BN, BG], one after the other.

    So neither the layout of the tile nor the number of rewards that it holds changes the bits of a sum over rewards.
    """
    if KB == 1:
        return total_NG + tl.sum(x_NGK, 2)
    else:
        k = tl.arange(0, KB)[None, None, :]
        for i in tl.static_range(KB):
            total_NG += tl.sum(tl.where(k == i, x_NGK, 0.0), 2)  # picks one element, so this sum is exact
        return total_NG


@triton.jit
def live_factors(rows_NG, inside_NG, inputs, K: tl.constexpr, KB: tl.constexpr, RENORMALIZE: tl.constexpr):
    """Which responses count, and the factor that scales the weights of their live rewards up, both [BN, BG]."""
    whole_NG = tl.zeros(rows_NG.shape, tl.float32)  # the sum of a row's weights
    rest_NG = tl.zeros(rows_NG.shape, tl.float32)  # the part of it that lies on live rewards
    present_NG = tl.zeros(rows_NG.shape, tl.int32)  # how many of its rewards are live
    for block in tl.static_range(0, K, KB):  # KB rewards at a time
        k = block + tl.arange(0, KB)[None, None, :]
        mask_NGK = inside_NG[:, :, None] & (k < K)
        reward_ptr = inputs.rewards_ptr + rows_NG[:, :, None] * inputs.stride_rb + k * inputs.stride_rk
        reward_NGK = tl.load(reward_ptr, mask=mask_NGK, other=float("nan"))
        present_NG += tl.sum((reward_NGK == reward_NGK).to(tl.int32), 2)
        if RENORMALIZE:
            weight_ptr = inputs.weights_ptr + rows_NG[:, :, None] * inputs.stride_wb + k * inputs.stride_wk
            weight_NGK = tl.load(weight_ptr, mask=mask_NGK, other=0.0)
            whole_NG = add_in_order(whole_NG, weight_NGK, KB)
            rest_NG = add_in_order(rest_NG, tl.where(reward_NGK == reward_NGK, weight_NGK, 0.0), KB)
    live_NG = present_NG > 0
    factor_NG = tl.full(rows_NG.shape, 1.0, tl.float32)
    if RENORMALIZE:
        partial_NG = present_NG < K
        # A response whose weight lies on abstained rewards alone has no weight to scale up.
        live_NG = live_NG & ~(partial_NG & (rest_NG == 0.0))
        ratio_NG = tl.div_rn(whole_NG, tl.where(rest_NG == 0.0, 1.0, rest_NG))
        factor_NG = tl.where(partial_NG & live_NG, ratio_NG, 1.0)
    return live_NG, factor_NG


@triton.jit
def raw_scores(
    rows_NG, inside_NG, live_NG, factor_NG, inputs, rules, normalized_ptr, K: tl.constexpr, KB: tl.constexpr
):
    """Scores [BN, BG] before the KL, 0 where not live. The normalised rewards are stored, too."""
    raw_NG = tl.zeros(rows_NG.shape, tl.float32)
    for block in tl.static_range(0, K, KB):  # KB rewards at a time; ``live_factors`` has brought them into the L1 cache
        k = block + tl.arange(0, KB)[None, None, :]
        mask_NGK = inside_NG[:, :, None] & (k < K)
        reward_ptr = inputs.rewards_ptr + rows_NG[:, :, None] * inputs.stride_rb + k * inputs.stride_rk
        reward_NGK = tl.load(reward_ptr, mask=mask_NGK, other=float("nan"))
        weight_ptr = inputs.weights_ptr + rows_NG[:, :, None] * inputs.stride_wb + k * inputs.stride_wk
        weight_NGK = tl.load(weight_ptr, mask=mask_NGK, other=0.0)
        present_NGK = reward_NGK == reward_NGK
        reward_NGK = tl.where(present_NGK, reward_NGK, 0.0)
        # The last block of KB may reach beyond K, where there are no moments to read.
        out_NGK = normalized(reward_NGK, present_NGK, tl.minimum(k, K - 1), inputs.moments_ptr, rules)
        tl.store(normalized_ptr + rows_NG[:, :, None] * K + k, out_NGK, mask=mask_NGK)
        raw_NG = add_in_order(raw_NG, tl.where(present_NGK, weight_NGK, 0.0) * factor_NG[:, :, None] * out_NGK, KB)
    return tl.where(live_NG, raw_NG, 0.0)


@triton.jit
def advantage_tile(rows_NG, inside_NG, inputs, rules, out, state_ptr, K: tl.constexpr, KB: tl.constexpr):
    """Computes and stores the advantages of BN groups.

    Everything of the tile stays in registers from the loads to the stores. Scores with a "split" scope are finished by
    ``_finish``, which reads ``state_ptr``.

    Args:
        rows_NG, inside_NG: [BN, BG], the responses of the groups, and whether a slot holds one.
        inputs, rules: an ``Inputs`` and a ``Rules``.
        out: a ``GroupAdvantages`` of pointers.
        state_ptr: int8 [B], the state of each response for ``_finish``; None without a "split" scope.
        K, KB: the number of rewards, and how many of them are in registers at a time.
    """
    live_NG, factor_NG = live_factors(rows_NG, inside_NG, inputs, K, KB, rules.RENORMALIZE)
    normalized_ptr = out.normalized_rewards
    raw_NG = raw_scores(rows_NG, inside_NG, live_NG, factor_NG, inputs, rules, normalized_ptr, K, KB)

    # Whether a group has spread is decided before the KL, which would differ even where all rewards are equal.
    flat_NG = tl.where(spread(raw_NG, live_NG), 0, 1) + tl.zeros(rows_NG.shape, tl.int32)
    zero_NG = flat_NG
    if rules.RAW:
        # The only live response of its group is flagged, too, but keeps its advantage.
        zero_NG = tl.where(tl.sum(live_NG.to(tl.int32), 1)[:, None] == 1, 0, flat_NG)
    score_NG = raw_NG
    if inputs.kl_ptr is not None:
        kl_NG = tl.load(inputs.kl_ptr + rows_NG, mask=inside_NG, other=0.0).to(tl.float32)
        score_NG = tl.where(live_NG, raw_NG - inputs.beta * kl_NG, 0.0)
    tl.store(out.scores + rows_NG, score_NG, mask=inside_NG)
    tl.store(out.degenerate + rows_NG, flat_NG != 0, mask=inside_NG)

    counted_NG = live_NG.to(tl.float32)
    tokens_NG = counted_NG
    if rules.SCORE_CENTER == "tokens" or rules.SCORE_SCALE == "tokens":
        tokens_NG = tl.load(inputs.lengths_ptr + rows_NG, mask=inside_NG, other=0).to(tl.float32) * counted_NG
    out_NG = score_NG
    if rules.SCORE_CENTER != "split":
        members_NG = tokens_NG if rules.SCORE_CENTER == "tokens" else counted_NG
        out_NG, mean_NG = centred(score_NG, live_NG, members_NG, rules.SCORE_CENTER, rules.RAW)
        tl.store(out.mean + rows_NG, mean_NG, mask=inside_NG)
    if rules.SCORE_SCALE != "split":
        # Where scores are not scaled, the standard deviation of their group is still reported.
        SPREAD: tl.constexpr = "group" if rules.SCORE_SCALE == "none" else rules.SCORE_SCALE
        members_NG = tokens_NG if rules.SCORE_SCALE == "tokens" else counted_NG
        std_NG = deviation(score_NG, live_NG, members_NG, SPREAD, rules.DDOF, rules.RAW)
        tl.store(out.std + rows_NG, std_NG, mask=inside_NG)
    if rules.SCORE_CENTER == "split" or rules.SCORE_SCALE == "split":
        state_NG = tl.where(live_NG, _LIVE, 0) + tl.where(zero_NG != 0, _ZERO, 0)
        tl.store(state_ptr + rows_NG, state_NG.to(tl.int8), mask=inside_NG)
    else:
        if rules.SCORE_SCALE != "none":
            out_NG = over(out_NG, divisor(std_NG, rules.score_eps, rules.IN_VARIANCE))
        out_NG = tl.where(live_NG & (zero_NG == 0), out_NG, 0.0)
    # With a "split" scope this is not the advantage yet, but the score, which is centred if its centre is not split.
    tl.store(out.advantages + rows_NG, out_NG, mask=inside_NG)


@triton.jit
def divisor(std, eps, IN_VARIANCE: tl.constexpr):
    """The divisor of the centred score."""
    if IN_VARIANCE:
        # The square of a large one may be beyond float32, and an epsilon beside it changes no bit. The square of a
        # small one may vanish, which only matters without an epsilon.
        alone = (std > 1e15) | (eps == 0)
        return tl.where(alone, std, tl.sqrt_rn(tl.where(alone, 1.0, std * std) + eps))
    else:
        return std + eps


@triton.jit
def tile_rows(index_ptr, N, G, B, BN: tl.constexpr, BG: tl.constexpr):
    """The responses of this program's groups, int64 [BN, BG], and whether a slot holds one.

    The index [N, G] is padded with B.
    """
    n = (tl.program_id(0) * BN + tl.arange(0, BN)).to(tl.int64)
    g = tl.arange(0, BG)
    rows_NG = tl.load(index_ptr + n[:, None] * G + g[None, :], mask=(n < N)[:, None] & (g < G)[None, :], other=B)
    return rows_NG, rows_NG < B


@triton.jit(do_not_specialize=["N", "B"])
def _groups(
    index_ptr,
    rewards_ptr,
    weights_ptr,
    kl_ptr,
    lengths_ptr,
    moments_ptr,
    advantages_ptr,
    scores_ptr,
    normalized_ptr,
    mean_ptr,
    std_ptr,
    degenerate_ptr,
    state_ptr,
    N,
    G,
    B,
    stride_rb,
    stride_rk,
    stride_wb,
    stride_wk,
    beta,
    reward_eps,
    score_eps,
    K: tl.constexpr,
    KB: tl.constexpr,
    REWARD_CENTER: tl.constexpr,
    REWARD_SCALE: tl.constexpr,
    SCORE_CENTER: tl.constexpr,
    SCORE_SCALE: tl.constexpr,
    DDOF: tl.constexpr,
    RAW: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    IN_VARIANCE: tl.constexpr,
    BN: tl.constexpr,
    BG: tl.constexpr,
):
    """One program computes BN whole groups. A small batch with a batch or token scope has one program."""
    inputs = Inputs(
        rewards_ptr=rewards_ptr,
        weights_ptr=weights_ptr,
        kl_ptr=kl_ptr,
        lengths_ptr=lengths_ptr,
        moments_ptr=moments_ptr,
        stride_rb=stride_rb,
        stride_rk=stride_rk,
        stride_wb=stride_wb,
        stride_wk=stride_wk,
        beta=beta,
    )
    out = GroupAdvantages(
        advantages=advantages_ptr,
        scores=scores_ptr,
        normalized_rewards=normalized_ptr,
        mean=mean_ptr,
        std=std_ptr,
        degenerate=degenerate_ptr,
    )
    rows_NG, inside_NG = tile_rows(index_ptr, N, G, B, BN, BG)
    advantage_tile(
        rows_NG,
        inside_NG,
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
        out,
        state_ptr,
        K,
        KB,
    )


# --- a batch that is larger than a tile ---


@triton.jit
def _element(b, series, KIND: tl.constexpr):
    """Loads the elements b of a ``Series``: their values, whether they are live, and how often they count."""
    inside = b < series.B
    if KIND == "reward":
        value = tl.load(series.values_ptr + b.to(tl.int64) * series.stride, mask=inside, other=float("nan"))
        live = value == value
    else:
        value = tl.load(series.values_ptr + b.to(tl.int64) * series.stride, mask=inside, other=0.0)
        live = (tl.load(series.state_ptr + b, mask=inside, other=0) & _LIVE) != 0
    counted = tl.where(live, 1.0, 0.0)
    if KIND == "tokens":
        counted = counted * tl.load(series.lengths_ptr + b, mask=inside, other=0).to(tl.float32)
    return value, live, counted


@triton.jit
def _batch_moments(series, KIND: tl.constexpr, DDOF: tl.constexpr, BLOCK: tl.constexpr):
    """Maximum, mean minus maximum, standard deviation and count of a ``Series``, summed in one fixed order.

    Each lane of [BLOCK] sums up every BLOCK-th element, and the lanes are added up at the end. There are three passes
    over the numbers, which are in the L2 cache, as in ``moments``: maximum, mean, squares around the mean.
    """
    lane = tl.arange(0, BLOCK)
    top_L = tl.full([BLOCK], float("-inf"), tl.float32)
    for start in range(0, series.B, BLOCK):
        value_L, live_L, _ = _element(start + lane, series, KIND)
        top_L = tl.maximum(top_L, tl.where(live_L, value_L, float("-inf")))
    top = tl.max(top_L, 0)
    top = tl.where(top == float("-inf"), 0.0, top)  # nothing is live
    total_L = tl.zeros([BLOCK], tl.float32)
    count_L = tl.zeros([BLOCK], tl.float32)
    for start in range(0, series.B, BLOCK):
        value_L, live_L, counted_L = _element(start + lane, series, KIND)
        total_L += tl.where(live_L, value_L - top, 0.0) * counted_L
        count_L += counted_L
    count = tl.sum(count_L, 0)
    mean = tl.div_rn(tl.sum(total_L, 0), tl.maximum(count, 1.0))
    unit, per_unit = unit_of(mean)
    squares_L = tl.zeros([BLOCK], tl.float32)
    for start in range(0, series.B, BLOCK):
        value_L, live_L, counted_L = _element(start + lane, series, KIND)
        off_L = tl.where(counted_L > 0, (value_L - top - mean) * per_unit, 0.0)
        squares_L += off_L * off_L * counted_L
    std = tl.sqrt_rn(tl.div_rn(tl.sum(squares_L, 0), tl.maximum(count - DDOF, 1.0))) * unit
    return top, mean, std, count


@triton.jit(do_not_specialize=["B"])
def _reward_moments(rewards_ptr, moments_ptr, B, stride_rb, stride_rk, DDOF: tl.constexpr, BLOCK: tl.constexpr):
    """The moments [K, 4] of each reward over the batch: maximum, mean minus maximum, deviation, live elements.

    One program takes one reward.
    """
    k = tl.program_id(0)
    values_ptr = rewards_ptr + k * stride_rk
    series = Series(values_ptr, state_ptr=None, lengths_ptr=None, B=B, stride=stride_rb)
    top, mean, std, count = _batch_moments(series, "reward", DDOF, BLOCK)
    tl.store(moments_ptr + 4 * k, top)
    tl.store(moments_ptr + 4 * k + 1, mean)
    tl.store(moments_ptr + 4 * k + 2, std)
    tl.store(moments_ptr + 4 * k + 3, count)


@triton.jit(do_not_specialize=["B"])
def _finish(
    scores_ptr,
    state_ptr,
    lengths_ptr,
    advantages_ptr,
    mean_ptr,
    std_ptr,
    B,
    score_eps,
    CENTER: tl.constexpr,
    SCALE: tl.constexpr,
    DDOF: tl.constexpr,
    IN_VARIANCE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Centres and scales the scores of the first launch over the batch or over its tokens.

    Every program reduces the whole batch, and finishes BLOCK responses.
    """
    b = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = b < B
    state = tl.load(state_ptr + b, mask=inside, other=0)
    live = (state & _LIVE) != 0
    series = Series(scores_ptr, state_ptr, lengths_ptr, B, stride=1)
    if CENTER == "batch" or CENTER == "tokens":
        KIND: tl.constexpr = "tokens" if CENTER == "tokens" else "score"
        top, mean, std, _ = _batch_moments(series, KIND, DDOF, BLOCK)
        out = tl.where(live, tl.load(scores_ptr + b, mask=inside, other=0.0) - top, 0.0) - mean
        tl.store(mean_ptr + b, tl.zeros([BLOCK], tl.float32) + (mean + top), mask=inside)
    else:
        out = tl.load(advantages_ptr + b, mask=inside, other=0.0)  # the first launch has centred it in its group
    if SCALE == "batch" or SCALE == "tokens":
        if SCALE != CENTER:  # otherwise the deviation was computed with the mean
            OTHER: tl.constexpr = "tokens" if SCALE == "tokens" else "score"
            _, _, std, _ = _batch_moments(series, OTHER, DDOF, BLOCK)
        std_L = tl.zeros([BLOCK], tl.float32) + std
        tl.store(std_ptr + b, std_L, mask=inside)
    else:
        std_L = tl.load(std_ptr + b, mask=inside, other=0.0)
    if SCALE != "none":
        out = over(out, divisor(std_L, score_eps, IN_VARIANCE))
    tl.store(advantages_ptr + b, tl.where(live & ((state & _ZERO) == 0), out, 0.0), mask=inside)


# --- launches ---


class Tiles(NamedTuple):
    """How the groups are distributed over programs.

    Attributes:
        groups, width: BN and BG, the groups of a program and the slots of a group, both powers of 2.
        programs: the number of programs.
        whole: whether one program holds the whole batch.
    """

    groups: int
    width: int
    programs: int
    whole: bool

    @staticmethod
    def of(number: int, size: int, wide: bool) -> Tiles:
        """The tiles for ``number`` groups of at most ``size`` responses.

        ``wide`` says that some scope of the profile crosses groups. Then one program for a small batch saves a launch.

        Raises:
            ValueError: a group has more than 8,192 responses.
        """
        width = power_of_2(size)
        if width > _MOST:
            raise ValueError(f"groups: one of {size} responses, expected at most {_MOST} with backend='triton'")
        whole = wide and power_of_2(number) * width <= _WHOLE
        groups = power_of_2(number) if whole else max(1, TILE // width)
        return Tiles(groups, width, blocks(number, groups), whole)

    @property
    def warps(self) -> int:
        return min(8, max(1, self.groups * self.width // 32))


def rewards_at_once(rewards: int, slots: int, warps: int) -> int:
    """KB for a tile of so many slots, a power of 2. It covers all rewards if they fit into the registers."""
    room = max(1, _PER_THREAD * 32 * warps // slots)
    return min(power_of_2(rewards), 1 << (room.bit_length() - 1))


def is_wide(profile: AdvantageProfile) -> bool:
    """Whether some scope of the profile crosses groups."""
    scopes = (profile.reward_center, profile.reward_scale, profile.score_center, profile.score_scale)
    return not {"batch", "tokens"}.isdisjoint(scopes)


def switches(profile: AdvantageProfile, whole: bool) -> dict[str, str | int]:
    """The compile-time constants of ``Rules``. ``whole`` says whether one program holds the batch."""

    def scope(name: str) -> str:
        return "split" if not whole and name in ("batch", "tokens") else name

    return {
        "REWARD_CENTER": scope(profile.reward_center),
        "REWARD_SCALE": scope(profile.reward_scale),
        "SCORE_CENTER": scope(profile.score_center),
        "SCORE_SCALE": scope(profile.score_scale),
        "DDOF": profile.ddof,
        "RAW": profile.singleton == "raw",
        "RENORMALIZE": profile.missing == "renormalize",
        "IN_VARIANCE": profile.score_eps_in == "variance",
    }


def reward_moments(rewards_BK: Tensor, profile: AdvantageProfile, whole: bool) -> Tensor | None:
    """The moments [K, 4] of ``Inputs`` if rewards are normalised over a batch that is larger than a tile, else None."""
    if whole or "batch" not in (profile.reward_center, profile.reward_scale):
        return None
    moments_K4 = torch.empty(rewards_BK.shape[1], 4, device=rewards_BK.device, dtype=torch.float32)
    _reward_moments_launch(profile.ddof, _SCAN)(
        (rewards_BK.shape[1],),
        rewards_ptr=rewards_BK,
        moments_ptr=moments_K4,
        B=rewards_BK.shape[0],
        stride_rb=rewards_BK.stride(0),
        stride_rk=rewards_BK.stride(1),
    )
    return moments_K4


@lru_cache(maxsize=16)
def _reward_moments_launch(ddof: int, block: int) -> BoundLaunch:
    return BoundLaunch(_reward_moments, {"DDOF": ddof, "BLOCK": block}, num_warps=8)


def scratch(out: GroupAdvantages, profile: AdvantageProfile, whole: bool) -> Tensor | None:
    """Memory [B] for the states that the first launch hands to ``finish``, or None where no second launch follows."""
    if whole or not is_wide(profile):
        return None
    return torch.empty_like(out.degenerate, dtype=torch.int8)


def finish(
    out: GroupAdvantages, state_B: Tensor | None, lengths: Tensor | None, profile: AdvantageProfile, whole: bool
) -> None:
    """The second launch, for scores that are compared over the batch or its tokens where no tile holds the batch."""
    if whole or {"batch", "tokens"}.isdisjoint((profile.score_center, profile.score_scale)):
        return
    batch = out.advantages.shape[0]
    _finish_launch(profile, _SCAN)(
        (blocks(batch, _SCAN),),
        scores_ptr=out.scores,
        state_ptr=state_B,
        lengths_ptr=lengths,
        advantages_ptr=out.advantages,
        mean_ptr=out.mean,
        std_ptr=out.std,
        B=batch,
        score_eps=float(profile.score_eps),
    )


@lru_cache(maxsize=64)
def _finish_launch(profile: AdvantageProfile, block: int) -> BoundLaunch:
    constants = {
        "CENTER": profile.score_center,
        "SCALE": profile.score_scale,
        "DDOF": profile.ddof,
        "IN_VARIANCE": profile.score_eps_in == "variance",
        "BLOCK": block,
    }
    return BoundLaunch(_finish, constants, num_warps=8)


def group_advantages(
    rewards_BK: Tensor,
    weights_BK: Tensor,
    index_NG: Tensor,
    *,
    profile: AdvantageProfile,
    kl: Tensor | None = None,
    beta: float = 0.0,
    lengths: Tensor | None = None,
) -> GroupAdvantages:
    """Launches the kernels on arguments that ``ops.group_advantages`` has checked.

    Args:
        rewards_BK, weights_BK: float32 [B, K], any strides; NaN where a reward abstained.
        index_NG: int64 [N, G_max] of ``ops.Groups``.
        profile: the scopes, and how abstained rewards and singletons are treated. A scope that crosses groups costs a
            second launch if the batch has more than 2,048 slots.
        kl, lengths: [B], contiguous, any dtype that converts to float32; or None.
        beta: the coefficient of the KL.

    Raises:
        ValueError: a group has more than 8,192 responses.
    """
    out = GroupAdvantages.empty(rewards_BK)
    batch, rewards = rewards_BK.shape
    if batch == 0:
        return out
    number, size = index_NG.shape
    tiles = Tiles.of(number, size, is_wide(profile))
    state_B = scratch(out, profile, tiles.whole)
    _groups_launch(profile, rewards, tiles)(
        (tiles.programs,),
        index_ptr=index_NG,
        rewards_ptr=rewards_BK,
        weights_ptr=weights_BK,
        kl_ptr=kl,
        lengths_ptr=lengths,
        moments_ptr=reward_moments(rewards_BK, profile, tiles.whole),
        advantages_ptr=out.advantages,
        scores_ptr=out.scores,
        normalized_ptr=out.normalized_rewards,
        mean_ptr=out.mean,
        std_ptr=out.std,
        degenerate_ptr=out.degenerate,
        state_ptr=state_B,
        N=number,
        G=size,
        B=batch,
        stride_rb=rewards_BK.stride(0),
        stride_rk=rewards_BK.stride(1),
        stride_wb=weights_BK.stride(0),
        stride_wk=weights_BK.stride(1),
        beta=float(beta),
        reward_eps=float(profile.reward_eps),
        score_eps=float(profile.score_eps),
    )
    finish(out, state_B, lengths, profile, tiles.whole)
    return out


@lru_cache(maxsize=256)
def _groups_launch(profile: AdvantageProfile, rewards: int, tiles: Tiles) -> BoundLaunch:
    constants = {
        "K": rewards,
        "KB": rewards_at_once(rewards, tiles.groups * tiles.width, tiles.warps),
        **switches(profile, tiles.whole),
        "BN": tiles.groups,
        "BG": tiles.width,
    }
    return BoundLaunch(_groups, constants, num_warps=tiles.warps)
