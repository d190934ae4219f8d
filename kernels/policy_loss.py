"""The policy-gradient loss over packed completion tokens: loss, gradients and metrics in two launches.

    loss = sum_t c_t (w_t l_t + kl_coef k3_t) - entropy_coef * mean_t H_t

    objective "clip":        d l_t / d log pi_t = -rho A, or 0 where the smaller term is constant: capped or clipped
    with ratio "sequence":   d l_t / d log pi_t = -rho A mean_s(w_s) / w_t, or 0 likewise
    objective "cispo":       d l_t / d log pi_t = -min(rho, clip_max) A
    k3:                      d k3_t / d log pi_t = 1 - exp(log pi_ref - log pi)
    rho k3:                  d / d log pi_t = rho (log pi - log pi_ref)                       kl_bias_correction
    with ratio "sequence":   d / d log pi_t = mean_s(rho k3_s) + rho (1 - exp(log pi_ref - log pi))

``ops/policy_loss.py`` explains the terms. ``_sequences`` has one program per response, which writes the gradients and
eight sums. ``_reduce`` adds up the sums in the order of the responses. Under a mask the host does not know the number
of live tokens in the batch. Where that number is a divisor, the second launch divides the gradients by it. There is no
graph of autograd, and no intermediate of size T is stored.

The gradients and the sums share one allocation. Loss and metrics have allocations of their own, because a metric that
is kept must not keep the gradients alive, and writing into a metric must not count as a change of the loss.

Bytes moved: 4 T for the gradient, and T times the size of its dtype for every input [T].
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from maestro_fast.kernels.bound_launch import BoundLaunch, blocks
from maestro_fast.specs import EXPONENT_SHIFT, LARGE_EXPONENT, LossInputs, LossWithGradients, PolicyLossConfig

# Tokens of one step. A program has 128 threads, so a thread holds 8 values of each vector in registers. Responses have
# about a thousand tokens, so most take one or two steps, and a batch of 512 responses fills a GPU.
_TOKENS = 1024
# The sums of a response: LOSS_METRICS in their order, then the loss, the entropy, and the number of live tokens.
_PARTS = tl.constexpr(8)
_LOSS = tl.constexpr(5)
_ENTROPY = tl.constexpr(6)
_LIVE = tl.constexpr(7)
_LARGE = tl.constexpr(LARGE_EXPONENT)
_SHIFT = tl.constexpr(EXPONENT_SHIFT)
_FAR = tl.constexpr(math.exp(EXPONENT_SHIFT))


class Sources(NamedTuple):
    """Pointers to inputs [T]; None for inputs that are missing."""

    logprobs: tl.tensor
    old: tl.tensor
    sampling: tl.tensor
    mask: tl.tensor


class Tokens(NamedTuple):
    """BT tokens of a response.

    Attributes:
        index: the places of the tokens in the batch.
        inside: whether the response is long enough to have a token.
        live: whether a token counts.
        logprob: log pi.
        old: log pi_old; log pi on-policy.
        log_ratio: log pi - log pi_old.
        sampler_gap: log pi_old - log pi_sampler.
    """

    index: tl.tensor
    inside: tl.tensor
    live: tl.tensor
    logprob: tl.tensor
    old: tl.tensor
    log_ratio: tl.tensor
    sampler_gap: tl.tensor


class Clip(NamedTuple):
    """clip_low, clip_high and clip_max of the config. ``largest``, which is clip_max, is 0 where it is None."""

    low: tl.tensor
    high: tl.tensor
    largest: tl.tensor


class TokenLosses(NamedTuple):
    """The loss of each token, its derivative by log pi, and 1.0 where the token was clipped on either side."""

    loss: tl.tensor
    slope: tl.tensor
    clipped_low: tl.tensor
    clipped_high: tl.tensor


class Exponential(NamedTuple):
    """e^x as the product of two factors, so that a large one may meet a small number; see ``specs.Exponential``."""

    near: tl.tensor
    far: tl.tensor


class KlTerm(NamedTuple):
    """The KL term of each token and its derivative by log pi, both times a coefficient."""

    value: tl.tensor
    slope: tl.tensor


@triton.jit
def _exponential(x):
    large = x > _LARGE
    return Exponential(tl.exp(tl.where(large, x - _SHIFT, x)), tl.where(large, _FAR, 1.0))


@triton.jit
def _log_ratio(logprob, other, live):
    """logprob - other, or 0 where both are -inf and in tokens that do not count."""
    return tl.where(live & (logprob != other), logprob - other, 0.0)


@triton.jit
def _k3(gap, exp_gap):
    """exp(gap) - 1 - gap. Near 0 that would cancel, so a Taylor series with an error below 2e-9 replaces it."""
    series = 1.0 + gap / 9.0
    series = 1.0 + gap / 8.0 * series
    series = 1.0 + gap / 7.0 * series
    series = 1.0 + gap / 6.0 * series
    series = 1.0 + gap / 5.0 * series
    series = 1.0 + gap / 4.0 * series
    series = 1.0 + gap / 3.0 * series
    return tl.where(tl.abs(gap) < 0.5, 0.5 * gap * gap * series, exp_gap - 1.0 - gap)


@triton.jit
def _kl(gap, coefficient):
    """k3 and its derivative. Where gap is large, 1 + gap is far below the last digit of exp(gap)."""
    large = gap > _LARGE
    e = _exponential(gap)
    k3 = _k3(gap, e.near)
    slope = tl.where(tl.abs(gap) < 0.5, k3 + gap, e.near - 1.0)
    top = coefficient * e.near * e.far
    return KlTerm(tl.where(large, top, coefficient * k3), -tl.where(large, top, coefficient * slope))


@triton.jit
def _kl_times_ratio(gap, ratio, of_old, mean, coefficient, SEQUENCE: tl.constexpr):
    """rho k3 and its derivative, to which the mean of the response's terms belongs if the ratio is that of a sequence.

    ``of_old`` is log pi_ref - log pi_old, or gap plus the log-ratio of the sequence. Where gap is large, rho may be 0
    while exp(gap) is infinite. So there, rho k3 = exp(of_old) - rho (1 + gap).
    """
    large = gap > 2.0
    k3 = _k3(gap, tl.exp(tl.minimum(gap, 2.0)))
    top = _exponential(tl.where(large, of_old, 0.0))
    ahead = coefficient * top.near * top.far
    # Of two infinite terms the first is larger. Where gap is infinite, rho is 0. Where rho is infinite, gap may be 0.
    one_more = coefficient * (1.0 + tl.minimum(gap, 1e4)) * ratio.near * ratio.far
    one_more = tl.where(ahead == float("inf"), 0.0, one_more)
    moderate = tl.where(gap == 0.0, 0.0, ratio.near * k3 * coefficient * ratio.far)
    value = tl.where(large, ahead - one_more, moderate)
    if SEQUENCE:
        rho = tl.where(gap == 0.0, 0.0, coefficient * ratio.near)
        slope = mean + tl.where(large, rho * ratio.far - ahead, -rho * (k3 + gap) * ratio.far)
    else:
        slope = -coefficient * gap * ratio.near * ratio.far
        slope = tl.where((gap == 0.0) | (ratio.near == 0.0), 0.0, slope)
    return KlTerm(value, slope)


@triton.jit
def _weighted(e, advantage, weight):
    """-e^x A w, which is 0 if A or w is, although another factor may be infinite."""
    infinite = (e.near == float("inf")) | (weight == float("inf"))
    nothing = infinite & ((advantage == 0) | (weight == 0))
    return tl.where(nothing, 0.0, -e.near * advantage * weight * e.far)


@triton.jit
def _objective(
    ratio,
    logprob,
    advantage,
    weight,
    mean_weight,
    clip,
    OBJECTIVE: tl.constexpr,
    SEQUENCE: tl.constexpr,
    HAS_LARGEST: tl.constexpr,
):
    """The formulas of ``specs.OBJECTIVES``, and their derivatives by log pi."""
    rho = ratio.near * ratio.far
    if OBJECTIVE == "cispo":
        # The ratio counts as a constant, so only log pi has a derivative.
        above = rho > clip.largest
        capped = Exponential(tl.where(above, clip.largest, ratio.near), tl.where(above, 1.0, ratio.far))
        slope = _weighted(capped, advantage, weight)
        loss = _weighted(capped, advantage * tl.where(slope == 0, 0.0, logprob), weight)
        low = tl.zeros_like(rho)
        high = tl.where(above & (advantage > 0), 1.0, 0.0)
    else:
        tl.static_assert(OBJECTIVE == "clip", "an objective of specs.OBJECTIVES that this kernel does not know")
        least = tl.where(advantage < 0, 1.0 - clip.low, 0.0)
        most = tl.where(advantage < 0, float("inf"), 1.0 + clip.high)
        if HAS_LARGEST:
            bound = 1.0 + clip.high
            most = tl.where(advantage < 0, tl.maximum(bound, clip.largest), tl.minimum(bound, clip.largest))
        # A ratio that is out of bounds is a constant. One that is NaN is not, so the loss becomes NaN.
        out = (rho < least) | (rho > most)
        clamped = tl.minimum(tl.maximum(rho, least), most)
        clamped = Exponential(tl.where(out, clamped, ratio.near), tl.where(out, 1.0, ratio.far))
        loss = _weighted(clamped, advantage, weight)
        # The ratio of a sequence depends on all of its tokens, each of which gets the mean of their weights.
        slope = _weighted(clamped, advantage, mean_weight + tl.zeros_like(rho) if SEQUENCE else weight)
        slope = tl.where(out | (logprob == float("-inf")), 0.0, slope)
        low = tl.where((rho < 1.0 - clip.low) & (advantage < 0), 1.0, 0.0)
        high = tl.where((rho > 1.0 + clip.high) & (advantage > 0), 1.0, 0.0)
    return TokenLosses(loss, slope, low, high)


@triton.jit
def _sampler_weight(ratio, cap, CORRECTION: tl.constexpr):
    if CORRECTION == "token_truncate" or CORRECTION == "sequence_truncate":
        return tl.minimum(ratio, cap)
    elif CORRECTION == "token_mask" or CORRECTION == "sequence_mask":
        return tl.where(ratio > cap, 0.0, ratio)
    else:
        return tl.zeros_like(ratio) + 1.0


@triton.jit
def _load_tokens(sources, t, n, first, BT: tl.constexpr):
    """Tokens t to t + BT of the response of n tokens that begins at ``first``."""
    index = first + t + tl.arange(0, BT)
    inside = t + tl.arange(0, BT) < n
    live = inside
    if sources.mask is not None:
        live = inside & (tl.load(sources.mask + index, mask=inside, other=0) != 0)
    # A masked token may hold anything, so it is not even loaded.
    logprob = tl.load(sources.logprobs + index, mask=live, other=0.0).to(tl.float32)
    old = logprob
    if sources.old is not None:
        old = tl.load(sources.old + index, mask=live, other=0.0).to(tl.float32)
    sampler_gap = tl.zeros([BT], tl.float32)
    if sources.sampling is not None:
        sampler_gap = old - tl.load(sources.sampling + index, mask=live, other=0.0).to(tl.float32)
        # NaN, which is not equal to itself, means that the sampler gave no log-prob.
        sampler_gap = tl.where(live & (sampler_gap == sampler_gap), sampler_gap, 0.0)
    return Tokens(index, inside, live, logprob, old, _log_ratio(logprob, old, live), sampler_gap)


@triton.jit
def _load_gap(ref_ptr, tokens, mean_log_ratio, SEQUENCE: tl.constexpr):
    """log pi_ref - log pi and log pi_ref - log pi_old of the tokens; for a sequence, the mean of the latter's ratio."""
    ref = tl.load(ref_ptr + tokens.index, mask=tokens.live, other=0.0).to(tl.float32)
    gap = _log_ratio(ref, tokens.logprob, tokens.live)
    if SEQUENCE:
        return gap, gap + mean_log_ratio
    else:
        return gap, _log_ratio(ref, tokens.old, tokens.live)


@triton.jit
def _divisor(tensor_ptr, value):
    if tensor_ptr is not None:
        return tl.load(tensor_ptr).to(tl.float32)
    else:
        return value


@triton.jit
def _divided(work_ptr, T, HAS_ENTROPY: tl.constexpr):
    """Pointers to the parts of ``work``: gradient by log-probs [T], gradient by entropies [T] or nothing, and sums
    [B, _PARTS]."""
    end_ptr = work_ptr + T.to(tl.int64)
    return work_ptr, end_ptr, end_ptr + T if HAS_ENTROPY else end_ptr


@triton.jit(do_not_specialize=["T"])
def _sequences(
    logprobs_ptr,
    advantages_ptr,
    cu_ptr,
    old_ptr,
    ref_ptr,
    sampling_ptr,
    entropies_ptr,
    mask_ptr,
    normalizer_ptr,
    entropy_normalizer_ptr,
    work_ptr,
    T,
    normalizer,
    entropy_normalizer,
    per_length,
    clip_low,
    clip_high,
    clip_max,
    kl_coef,
    entropy_coef,
    sampler_cap,
    HAS_KL: tl.constexpr,
    CORRECTS_KL: tl.constexpr,
    HAS_CLIP_MAX: tl.constexpr,
    BY_LENGTH: tl.constexpr,
    OBJECTIVE: tl.constexpr,
    SEQUENCE: tl.constexpr,
    CORRECTION: tl.constexpr,
    BT: tl.constexpr,
):
    """The gradients and the sums of one response.

    The divisor of the loss is ``normalizer``, or the number that ``normalizer_ptr`` points to, times ``per_length``,
    the constant of dr_grpo. Where only the second launch knows the divisor, it is 1 here.
    """
    HAS_ENTROPY: tl.constexpr = entropies_ptr is not None
    BY_SEQUENCE: tl.constexpr = CORRECTION == "sequence_truncate" or CORRECTION == "sequence_mask"
    sources = Sources(logprobs=logprobs_ptr, old=old_ptr, sampling=sampling_ptr, mask=mask_ptr)
    clip = Clip(low=clip_low, high=clip_high, largest=clip_max)
    b = tl.program_id(0).to(tl.int64)
    d_logprobs_ptr, d_entropies_ptr, parts_ptr = _divided(work_ptr, T, HAS_ENTROPY)
    first = tl.load(cu_ptr + b).to(tl.int64)
    n = (tl.load(cu_ptr + b + 1).to(tl.int64) - first).to(tl.int32)
    advantage = tl.load(advantages_ptr + b).to(tl.float32)

    # A first loop over the tokens computes what every token needs of its whole response: the number of live tokens, the
    # mean log-ratio, and the mean sampler weight. Each lane adds up its own tokens; lanes are added at the end.
    length = n.to(tl.float32)
    mean_log_ratio = 0.0
    sequence_sampler = 1.0
    mean_weight = 1.0
    if mask_ptr is not None or SEQUENCE or BY_SEQUENCE:
        live_L = tl.zeros([BT], tl.float32)
        log_ratio_L = tl.zeros([BT], tl.float32)
        gap_L = tl.zeros([BT], tl.float32)
        weight_L = tl.zeros([BT], tl.float32)
        for t in range(0, n, BT):
            tokens = _load_tokens(sources, t, n, first, BT)
            live_L += tl.where(tokens.live, 1.0, 0.0)
            log_ratio_L += tokens.log_ratio
            gap_L += tokens.sampler_gap
            weight = _sampler_weight(tl.exp(tokens.sampler_gap), sampler_cap, CORRECTION)
            weight_L += tl.where(tokens.live, weight, 0.0)
        length = tl.sum(live_L, 0)
        mean_log_ratio = tl.div_rn(tl.sum(log_ratio_L, 0), tl.maximum(length, 1.0))
        sequence_sampler = tl.exp(tl.sum(gap_L, 0))
        mean_weight = tl.div_rn(tl.sum(weight_L, 0), tl.maximum(length, 1.0))
        if BY_SEQUENCE:
            mean_weight = _sampler_weight(sequence_sampler, sampler_cap, CORRECTION)

    # The ratio of a sequence moves with each token, and with it the KL of every other.
    mean_kl = 0.0
    if ref_ptr is not None and HAS_KL and CORRECTS_KL and SEQUENCE:
        kl_L = tl.zeros([BT], tl.float32)
        ratio = _exponential(tl.zeros([BT], tl.float32) + mean_log_ratio)
        for t in range(0, n, BT):
            tokens = _load_tokens(sources, t, n, first, BT)
            gap, of_old = _load_gap(ref_ptr, tokens, mean_log_ratio, SEQUENCE=SEQUENCE)
            kl_L += _kl_times_ratio(gap, ratio, of_old, 0.0, kl_coef, SEQUENCE=SEQUENCE).value
        mean_kl = tl.div_rn(tl.sum(kl_L, 0), tl.maximum(length, 1.0))

    divisor = _divisor(normalizer_ptr, normalizer) * per_length
    if BY_LENGTH:
        divisor = divisor * tl.maximum(length, 1.0)
    coefficient = tl.div_rn(1.0, tl.maximum(divisor, 1e-30))

    # The second loop over the tokens writes their gradients, and adds up loss and metrics lane by lane.
    loss_L = tl.zeros([BT], tl.float32)
    entropy_L = tl.zeros([BT], tl.float32)
    low_L = tl.zeros([BT], tl.float32)
    high_L = tl.zeros([BT], tl.float32)
    ratio_L = tl.zeros([BT], tl.float32)
    kl_L = tl.zeros([BT], tl.float32)
    sampler_L = tl.zeros([BT], tl.float32)
    a_L = tl.zeros([BT], tl.float32) + advantage
    for t in range(0, n, BT):
        tokens = _load_tokens(sources, t, n, first, BT)
        live = tokens.live
        log_ratio = tokens.log_ratio
        if SEQUENCE:
            log_ratio = tl.zeros([BT], tl.float32) + mean_log_ratio
        ratio = _exponential(log_ratio)
        sampler = tl.exp(tokens.sampler_gap)
        if BY_SEQUENCE:
            sampler = tl.zeros([BT], tl.float32) + sequence_sampler
        weight = _sampler_weight(sampler, sampler_cap, CORRECTION)
        found = _objective(
            ratio, tokens.logprob, a_L, weight, mean_weight, clip,
            OBJECTIVE=OBJECTIVE, SEQUENCE=SEQUENCE, HAS_LARGEST=HAS_CLIP_MAX,
        )  # fmt: skip
        loss = found.loss
        slope = found.slope
        if ref_ptr is not None:
            gap, of_old = _load_gap(ref_ptr, tokens, mean_log_ratio, SEQUENCE=SEQUENCE)
            if CORRECTS_KL:
                kl_L += _kl_times_ratio(gap, ratio, of_old, 0.0, 1.0, SEQUENCE=SEQUENCE).value
                kl = _kl_times_ratio(gap, ratio, of_old, mean_kl, kl_coef, SEQUENCE=SEQUENCE)
            else:
                kl_L += _kl(gap, 1.0).value
                kl = _kl(gap, kl_coef)
            if HAS_KL:
                loss += kl.value
                # A token whose log-prob is -inf has no gradient, but that of its response's mean would reach it.
                slope += tl.where(tokens.logprob == float("-inf"), 0.0, kl.slope) if CORRECTS_KL else kl.slope
        tl.store(d_logprobs_ptr + tokens.index, tl.where(live, slope * coefficient, 0.0), mask=tokens.inside)
        loss_L += tl.where(live, loss, 0.0)
        low_L += tl.where(live, found.clipped_low, 0.0)
        high_L += tl.where(live, found.clipped_high, 0.0)
        ratio_L += tl.where(live, ratio.near * ratio.far, 0.0)
        if sampling_ptr is not None:
            sampler_L += tl.where(live, sampler, 0.0)
        if HAS_ENTROPY:
            # The derivative by an entropy is the same for all live tokens.
            entropy_L += tl.load(entropies_ptr + tokens.index, mask=live, other=0.0).to(tl.float32)
            share = tl.div_rn(-entropy_coef, _divisor(entropy_normalizer_ptr, entropy_normalizer))
            tl.store(d_entropies_ptr + tokens.index, tl.where(live, share, 0.0), mask=tokens.inside)

    part_ptr = parts_ptr + b * _PARTS
    tl.store(part_ptr + _LOSS, tl.sum(loss_L, 0) * coefficient)
    tl.store(part_ptr + _ENTROPY, tl.sum(entropy_L, 0))
    tl.store(part_ptr, tl.sum(low_L, 0))
    tl.store(part_ptr + 1, tl.sum(high_L, 0))
    tl.store(part_ptr + 2, tl.sum(ratio_L, 0))
    tl.store(part_ptr + 3, tl.sum(kl_L, 0))
    tl.store(part_ptr + 4, tl.sum(sampler_L, 0))
    tl.store(part_ptr + _LIVE, length)


@triton.jit(do_not_specialize=["B", "T"])
def _reduce(
    work_ptr,
    entropy_normalizer_ptr,
    loss_ptr,
    values_ptr,
    B,
    T,
    entropy_normalizer,
    entropy_coef,
    HAS_ENTROPY: tl.constexpr,
    DIVIDE: tl.constexpr,
    DIVIDE_ENTROPY: tl.constexpr,
    BT: tl.constexpr,
    BB: tl.constexpr,
):
    """The loss, and values [8]: the means of ``LOSS_METRICS`` over the live tokens, then the loss and two sums.

    The first program computes them. With ``DIVIDE``, the loss and the gradient by log-probs are divided by the number
    of live tokens. With ``DIVIDE_ENTROPY``, so are the entropies and the gradient by them. Then each program divides
    the gradients of BT tokens.
    """
    d_logprobs_ptr, d_entropies_ptr, parts_ptr = _divided(work_ptr, T, HAS_ENTROPY)
    # The loop takes BB responses at a time, in the order of the batch, so every program finds the same sums.
    part = tl.arange(0, _PARTS)
    sum_BP = tl.zeros([BB, _PARTS], tl.float32)
    for b0 in range(0, B, BB):
        b = b0 + tl.arange(0, BB)
        sum_BP += tl.load(parts_ptr + b[:, None] * _PARTS + part[None, :], mask=(b < B)[:, None], other=0.0)
    sum_P = tl.sum(sum_BP, 0)
    live = tl.maximum(tl.sum(tl.where(part == _LIVE, sum_P, 0.0), 0), 1.0)
    if tl.program_id(0) == 0:
        mean_P = tl.div_rn(sum_P, tl.zeros([_PARTS], tl.float32) + live)
        loss = tl.sum(tl.where(part == _LOSS, mean_P if DIVIDE else sum_P, 0.0), 0)
        if HAS_ENTROPY:
            entropy = tl.sum(tl.where(part == _ENTROPY, sum_P, 0.0), 0)
            count = live if DIVIDE_ENTROPY else _divisor(entropy_normalizer_ptr, entropy_normalizer)
            loss -= entropy_coef * tl.div_rn(entropy, count)
        tl.store(values_ptr + part, tl.where(part == _LOSS, loss, mean_P))
        tl.store(loss_ptr, loss)
    if DIVIDE or DIVIDE_ENTROPY:
        token = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
        live_T = tl.zeros([BT], tl.float32) + live
        if DIVIDE:
            slope = tl.load(d_logprobs_ptr + token, mask=token < T, other=0.0)
            tl.store(d_logprobs_ptr + token, tl.div_rn(slope, live_T), mask=token < T)
        if DIVIDE_ENTROPY:
            share = tl.load(d_entropies_ptr + token, mask=token < T, other=0.0)
            tl.store(d_entropies_ptr + token, tl.div_rn(share, live_T), mask=token < T)


# --- the launches ---


@lru_cache(maxsize=64)
def _numbers(config: PolicyLossConfig) -> dict[str, float]:
    """The numbers among the options, as the first launch takes them."""
    return {
        "per_length": float(config.max_completion_length or 1) if config.normalization == "dr_grpo" else 1.0,
        "clip_low": float(config.clip_low),
        "clip_high": float(config.clip_high),
        "clip_max": float(config.clip_max or 0.0),
        "kl_coef": float(config.kl_coef),
        "entropy_coef": float(config.entropy_coef),
        "sampler_cap": float(config.sampler_cap),
    }


@lru_cache(maxsize=256)
def _sequences_launch(config: PolicyLossConfig, tokens: int) -> BoundLaunch:
    constants = {
        "HAS_KL": config.kl_coef > 0,
        "CORRECTS_KL": config.kl_bias_correction,
        "HAS_CLIP_MAX": config.clip_max is not None,
        "BY_LENGTH": config.normalization == "grpo",
        "OBJECTIVE": config.objective,
        "SEQUENCE": config.ratio == "sequence",
        "CORRECTION": config.sampler_correction,
        "BT": tokens,
    }
    return BoundLaunch(_sequences, constants, num_warps=4)


@lru_cache(maxsize=32)
def _reduce_launch(with_entropy: bool, divide: bool, divide_entropy: bool, tokens: int) -> BoundLaunch:
    constants = {
        "HAS_ENTROPY": with_entropy,
        "DIVIDE": divide,
        "DIVIDE_ENTROPY": divide_entropy,
        "BT": tokens,
        "BB": 128,
    }
    return BoundLaunch(_reduce, constants, num_warps=4)


class _Divisor(NamedTuple):
    """A divisor as a kernel takes it: a tensor on the device, or else a number.

    ``known`` is False where only the device can count the live tokens. The number is then 1.
    """

    tensor: Tensor | None
    number: float
    known: bool

    @staticmethod
    def of(given: float | Tensor | None) -> _Divisor:
        if isinstance(given, Tensor):
            return _Divisor(given, 1.0, True)
        return _Divisor(None, 1.0 if given is None else float(given), given is not None)


def _divisors(inputs: LossInputs, config: PolicyLossConfig) -> tuple[_Divisor, _Divisor]:
    """The divisors of the loss and of the entropies. The default is the number of responses or of live tokens."""
    tokens, masked = inputs.logprobs.shape[0], inputs.token_mask is not None
    normalizer, entropy_normalizer = inputs.normalizer, inputs.entropy_normalizer
    if normalizer is None:
        if config.normalization in ("grpo", "dr_grpo"):
            normalizer = float(inputs.advantages.shape[0])
        elif not masked:
            normalizer = float(tokens)
    if entropy_normalizer is None and not masked:
        entropy_normalizer = float(max(tokens, 1))
    return _Divisor.of(normalizer), _Divisor.of(entropy_normalizer)


def policy_loss(inputs: LossInputs, config: PolicyLossConfig) -> LossWithGradients:
    """Launches the kernels on inputs that ``ops.policy_loss`` has checked.

    Args:
        inputs: contiguous tensors on one device. Divisors are numbers, or scalar tensors on the device, which the host
            does not read. Entropies are read only with an entropy bonus.
        config: the variant of the loss and its coefficients.
    """
    tokens, batch, device = inputs.logprobs.shape[0], inputs.advantages.shape[0], inputs.logprobs.device
    with_entropy = config.entropy_coef > 0
    divisor, entropy_divisor = _divisors(inputs, config)
    divide, divide_entropy = not divisor.known, with_entropy and not entropy_divisor.known
    gradients = tokens * (2 if with_entropy else 1)
    work = torch.empty(gradients + batch * _PARTS.value, device=device, dtype=torch.float32)
    values = torch.empty(_PARTS.value, device=device, dtype=torch.float32)
    loss = torch.empty((), device=device, dtype=torch.float32)
    if batch:
        _sequences_launch(config, _TOKENS)(
            (batch,),
            logprobs_ptr=inputs.logprobs,
            advantages_ptr=inputs.advantages,
            cu_ptr=inputs.cu_seqlens,
            old_ptr=inputs.old_logprobs,
            ref_ptr=inputs.ref_logprobs,
            sampling_ptr=inputs.sampling_logprobs,
            entropies_ptr=inputs.entropies if with_entropy else None,
            mask_ptr=inputs.token_mask,
            normalizer_ptr=divisor.tensor,
            entropy_normalizer_ptr=entropy_divisor.tensor,
            work_ptr=work,
            T=tokens,
            normalizer=divisor.number,
            entropy_normalizer=entropy_divisor.number,
            **_numbers(config),
        )
    _reduce_launch(with_entropy, divide, divide_entropy, _TOKENS)(
        (max(1, blocks(tokens, _TOKENS)) if divide or divide_entropy else 1,),
        work_ptr=work,
        entropy_normalizer_ptr=entropy_divisor.tensor,
        loss_ptr=loss,
        values_ptr=values,
        B=batch,
        T=tokens,
        entropy_normalizer=entropy_divisor.number,
        entropy_coef=float(config.entropy_coef),
    )
    return LossWithGradients(loss, values, work[:gradients].view(2 if with_entropy else 1, tokens))
