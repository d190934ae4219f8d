"""The policy-gradient loss over packed completion tokens: loss, gradients and metrics in two launches.

    loss = sum_t c_t (w_t l_t + kl_coef k3_t) - entropy_coef * mean_t H_t         see ``ops/policy_loss.py`` for the
    terms

    d l_t / d log pi_t = -rho A     where the smaller of the capped and the clipped term is not constant    (token,
    clip)
                       = -rho A mean_s(w_s) / w_t, with the same condition                             (sequence, clip)
                       = -min(rho, clip_max) A                                                                 (cispo)
    d k3_t / d log pi_t = 1 - exp(log pi_ref - log pi)

``_sequences`` has one program per response: the gradients, and eight sums. ``_reduce`` adds these in the order of the
responses. Where a divisor is the number of live tokens in the batch, which a mask hides from the host, the gradients
are divided by it in the second launch. No autograd graph is built, no intermediate of size T is stored.

The gradients and the sums share one allocation. Loss and metrics have theirs: a metric that is kept must not keep
the gradients, nor may writing into it count as a change of the loss.

Bytes moved: 4 T each for log-probs and gradient, and for every other input of a token what its dtype has.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from maestro_fast.kernels.bound_launch import BoundLaunch, blocks

_TOKENS = 1024  # of one step
_PARTS = tl.constexpr(8)  # loss, entropy, clipped low, clipped high, ratio, kl, sampler ratio, live tokens
METRICS = {"clip_low": 2, "clip_high": 3, "ratio": 4, "kl": 5, "sampler_ratio": 6}


@triton.jit
def _k3(gap):
    """exp(gap) - 1 - gap. Near 0 the difference would cancel, so a Taylor series takes its place (error < 2e-9 of
    it)."""
    series = 1.0 + gap / 9.0
    series = 1.0 + gap / 8.0 * series
    series = 1.0 + gap / 7.0 * series
    series = 1.0 + gap / 6.0 * series
    series = 1.0 + gap / 5.0 * series
    series = 1.0 + gap / 4.0 * series
    series = 1.0 + gap / 3.0 * series
    return tl.where(tl.abs(gap) < 0.5, 0.5 * gap * gap * series, tl.exp(gap) - 1.0 - gap)


@triton.jit
def _capped(ratio, cap, CORRECTION: tl.constexpr):
    if CORRECTION == "token_truncate" or CORRECTION == "sequence_truncate":
        return tl.minimum(ratio, cap)
    elif CORRECTION == "token_mask" or CORRECTION == "sequence_mask":
        return tl.where(ratio > cap, 0.0, ratio)
    else:
        return ratio * 0.0 + 1.0


@triton.jit
def _load_tokens(
    t,
    n,
    first,
    logprobs_ptr,
    old_ptr,
    sampling_ptr,
    mask_ptr,
    HAS_OLD: tl.constexpr,
    HAS_SAMPLING: tl.constexpr,
    HAS_MASK: tl.constexpr,
    BT: tl.constexpr,
):
    """Tokens t .. t + BT of a response: index, in range, live, log pi, log pi - log pi_old, log pi_old - log
    pi_sampler."""
    token = first + t + tl.arange(0, BT)
    inside = t + tl.arange(0, BT) < n
    live = inside
    if HAS_MASK:
        live = inside & (tl.load(mask_ptr + token, mask=inside, other=0) != 0)
    # A masked token may hold anything, so it is not even loaded.
    logprob = tl.load(logprobs_ptr + token, mask=live, other=0.0).to(tl.float32)
    old = logprob
    if HAS_OLD:
        old = tl.load(old_ptr + token, mask=live, other=0.0).to(tl.float32)
    sampler_gap = tl.zeros([BT], tl.float32)
    if HAS_SAMPLING:
        sampler_gap = old - tl.load(sampling_ptr + token, mask=live, other=0.0).to(tl.float32)
        sampler_gap = tl.where(live & (sampler_gap == sampler_gap), sampler_gap, 0.0)  # NaN: the sampler gave none
    return token, inside, live, logprob, tl.where(live, logprob - old, 0.0), sampler_gap


@triton.jit
def _divisor(tensor_ptr, value, FROM_TENSOR: tl.constexpr):
    if FROM_TENSOR:
        return tl.load(tensor_ptr).to(tl.float32)
    else:
        return value


@triton.jit
def _divided(work_ptr, T, HAS_ENTROPY: tl.constexpr):
    """Where the gradient of the log-probs [T], that of the entropies [T] if any, and the sums [B, _PARTS] begin."""
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
    HAS_OLD: tl.constexpr,
    HAS_REF: tl.constexpr,
    HAS_SAMPLING: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_KL: tl.constexpr,
    HAS_CLIP_MAX: tl.constexpr,
    NORMALIZER_TENSOR: tl.constexpr,
    ENTROPY_TENSOR: tl.constexpr,
    BY_LENGTH: tl.constexpr,
    CISPO: tl.constexpr,
    SEQUENCE: tl.constexpr,
    CORRECTION: tl.constexpr,
    BT: tl.constexpr,
):
    """per_length: a constant factor of the divisor (dr_grpo). A divisor of 1 stands for what the second launch
    knows."""
    b = tl.program_id(0).to(tl.int64)
    d_logprobs_ptr, d_entropies_ptr, parts_ptr = _divided(work_ptr, T, HAS_ENTROPY)
    first = tl.load(cu_ptr + b).to(tl.int64)
    n = (tl.load(cu_ptr + b + 1).to(tl.int64) - first).to(tl.int32)
    advantage = tl.load(advantages_ptr + b).to(tl.float32)
    BY_SEQUENCE: tl.constexpr = CORRECTION == "sequence_truncate" or CORRECTION == "sequence_mask"

    length = n.to(tl.float32)
    mean_ratio = 1.0
    sequence_sampler = 1.0
    mean_weight = 1.0
    if HAS_MASK or SEQUENCE or BY_SEQUENCE:
        live_L = tl.zeros([BT], tl.float32)
        log_ratio_L = tl.zeros([BT], tl.float32)
        gap_L = tl.zeros([BT], tl.float32)
        weight_L = tl.zeros([BT], tl.float32)
        for t in range(0, n, BT):
            _, _, live, _, log_ratio, gap = _load_tokens(
                t, n, first, logprobs_ptr, old_ptr, sampling_ptr, mask_ptr, HAS_OLD, HAS_SAMPLING, HAS_MASK, BT
            )
            live_L += tl.where(live, 1.0, 0.0)
            log_ratio_L += log_ratio
            gap_L += gap
            weight_L += tl.where(live, _capped(tl.exp(gap), sampler_cap, CORRECTION), 0.0)
        length = tl.sum(live_L, 0)
        mean_ratio = tl.exp(tl.div_rn(tl.sum(log_ratio_L, 0), tl.maximum(length, 1.0)))
        sequence_sampler = tl.exp(tl.sum(gap_L, 0))
        mean_weight = tl.div_rn(tl.sum(weight_L, 0), tl.maximum(length, 1.0))
        if BY_SEQUENCE:
            mean_weight = _capped(sequence_sampler, sampler_cap, CORRECTION)

    divisor = _divisor(normalizer_ptr, normalizer, NORMALIZER_TENSOR) * per_length
    if BY_LENGTH:
        divisor = divisor * tl.maximum(length, 1.0)
    coefficient = tl.div_rn(1.0, tl.maximum(divisor, 1e-30))

    loss_L = tl.zeros([BT], tl.float32)
    entropy_L = tl.zeros([BT], tl.float32)
    low_L = tl.zeros([BT], tl.float32)
    high_L = tl.zeros([BT], tl.float32)
    ratio_L = tl.zeros([BT], tl.float32)
    kl_L = tl.zeros([BT], tl.float32)
    sampler_L = tl.zeros([BT], tl.float32)
    a_L = tl.zeros([BT], tl.float32) + advantage
    for t in range(0, n, BT):
        token, inside, live, logprob, log_ratio, gap = _load_tokens(
            t, n, first, logprobs_ptr, old_ptr, sampling_ptr, mask_ptr, HAS_OLD, HAS_SAMPLING, HAS_MASK, BT
        )
        ratio = tl.exp(log_ratio)
        if SEQUENCE:
            ratio = tl.zeros([BT], tl.float32) + mean_ratio
        sampler = tl.exp(gap)
        if BY_SEQUENCE:
            sampler = tl.zeros([BT], tl.float32) + sequence_sampler
        weight = _capped(sampler, sampler_cap, CORRECTION)
        capped = ratio
        if HAS_CLIP_MAX:
            capped = tl.minimum(ratio, clip_max)
        if CISPO:
            loss = -capped * a_L * logprob * weight
            slope = -capped * a_L * weight
            low = tl.zeros([BT], tl.float32)
            high = tl.where((ratio > clip_max) & (a_L > 0), 1.0, 0.0)
        else:
            clipped = tl.minimum(tl.maximum(ratio, 1.0 - clip_low), 1.0 + clip_high)
            low = tl.where((ratio < 1.0 - clip_low) & (a_L < 0), 1.0, 0.0)
            high = tl.where((ratio > 1.0 + clip_high) & (a_L > 0), 1.0, 0.0)
            one, other = capped * a_L, clipped * a_L
            loss = -tl.minimum(one, other) * weight
            # Each term moves with the ratio as long as it is the ratio; equal terms both do, or neither.
            moves = tl.where(one <= other, tl.where(capped == ratio, 1.0, 0.0), tl.where(clipped == ratio, 1.0, 0.0))
            slope = -moves * a_L * ratio * (mean_weight if SEQUENCE else weight)
        if HAS_REF:
            kl_gap = tl.load(ref_ptr + token, mask=live, other=0.0).to(tl.float32) - logprob
            kl_gap = tl.where(live, kl_gap, 0.0)
            k3 = _k3(kl_gap)
            kl_L += k3
            if HAS_KL:
                loss += kl_coef * k3
                slope -= kl_coef * (k3 + kl_gap)
        tl.store(d_logprobs_ptr + token, tl.where(live, slope * coefficient, 0.0), mask=inside)
        loss_L += tl.where(live, loss, 0.0)
        low_L += tl.where(live, low, 0.0)
        high_L += tl.where(live, high, 0.0)
        ratio_L += tl.where(live, ratio, 0.0)
        if HAS_SAMPLING:
            sampler_L += tl.where(live, sampler, 0.0)
        if HAS_ENTROPY:
            entropy_L += tl.load(entropies_ptr + token, mask=live, other=0.0).to(tl.float32)
            share = tl.div_rn(-entropy_coef, _divisor(entropy_normalizer_ptr, entropy_normalizer, ENTROPY_TENSOR))
            tl.store(d_entropies_ptr + token, tl.where(live, share, 0.0), mask=inside)
    part_ptr = parts_ptr + b * _PARTS
    tl.store(part_ptr, tl.sum(loss_L, 0) * coefficient)
    tl.store(part_ptr + 1, tl.sum(entropy_L, 0))
    tl.store(part_ptr + 2, tl.sum(low_L, 0))
    tl.store(part_ptr + 3, tl.sum(high_L, 0))
    tl.store(part_ptr + 4, tl.sum(ratio_L, 0))
    tl.store(part_ptr + 5, tl.sum(kl_L, 0))
    tl.store(part_ptr + 6, tl.sum(sampler_L, 0))
    tl.store(part_ptr + 7, length)


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
    ENTROPY_TENSOR: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    DIVIDE: tl.constexpr,
    DIVIDE_ENTROPY: tl.constexpr,
    BT: tl.constexpr,
    BB: tl.constexpr,
):
    """values [8]: the loss, and means over the live tokens. DIVIDE: the loss, and the gradient, by the live tokens."""
    d_logprobs_ptr, d_entropies_ptr, parts_ptr = _divided(work_ptr, T, HAS_ENTROPY)
    part = tl.arange(0, _PARTS)
    sum_BP = tl.zeros([BB, _PARTS], tl.float32)
    for b0 in range(0, B, BB):
        b = b0 + tl.arange(0, BB)
        sum_BP += tl.load(parts_ptr + b[:, None] * _PARTS + part[None, :], mask=(b < B)[:, None], other=0.0)
    sum_P = tl.sum(sum_BP, 0)
    live = tl.maximum(tl.sum(tl.where(part == 7, sum_P, 0.0), 0), 1.0)
    if tl.program_id(0) == 0:
        mean_P = tl.div_rn(sum_P, tl.zeros([_PARTS], tl.float32) + live)
        loss = tl.sum(tl.where(part == 0, mean_P if DIVIDE else sum_P, 0.0), 0)
        if HAS_ENTROPY:
            entropy = tl.sum(tl.where(part == 1, sum_P, 0.0), 0)
            count = live if DIVIDE_ENTROPY else _divisor(entropy_normalizer_ptr, entropy_normalizer, ENTROPY_TENSOR)
            loss -= entropy_coef * tl.div_rn(entropy, count)
        tl.store(values_ptr + part, tl.where(part == 0, loss, mean_P))
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


class Loss(NamedTuple):
    """float32: the loss [], all of ``METRICS`` in values [8], and the loss's gradients.

    The gradients [1 or 2, T] are those of the log-probs and, with an entropy bonus, of the entropies.
    """

    loss: Tensor
    values: Tensor
    gradients: Tensor

    @property
    def metrics(self) -> dict[str, Tensor]:
        values = self.values.unbind()
        return {name: values[place] for name, place in METRICS.items()}


@lru_cache(maxsize=64)
def _settings(config: Any) -> dict[str, float]:
    """The numbers of a configuration, as the first launch takes them."""
    return {
        "per_length": float(config.max_completion_length) if config.normalization == "dr_grpo" else 1.0,
        "clip_low": float(config.clip_low),
        "clip_high": float(config.clip_high),
        "clip_max": float(config.clip_max or 0.0),
        "kl_coef": float(config.kl_coef),
        "entropy_coef": float(config.entropy_coef),
        "sampler_cap": float(config.sampler_cap),
    }


@lru_cache(maxsize=256)
def _sequences_launch(config: Any, given: tuple[bool, ...], tokens: int) -> BoundLaunch:
    """``given``: which of the optional arguments there are, in the order of the constants below."""
    names = ("HAS_OLD", "HAS_REF", "HAS_SAMPLING", "HAS_ENTROPY", "HAS_MASK", "NORMALIZER_TENSOR", "ENTROPY_TENSOR")
    constants = dict(zip(names, given, strict=True)) | {
        "HAS_KL": config.kl_coef > 0,
        "HAS_CLIP_MAX": config.clip_max is not None,
        "BY_LENGTH": config.normalization == "grpo",
        "CISPO": config.objective == "cispo",
        "SEQUENCE": config.ratio == "sequence",
        "CORRECTION": config.sampler_correction,
        "BT": tokens,
    }
    return BoundLaunch(_sequences, constants, num_warps=4)


@lru_cache(maxsize=32)
def _reduce_launch(
    entropy_tensor: bool, with_entropy: bool, divide: bool, divide_entropy: bool, tokens: int
) -> BoundLaunch:
    constants = {
        "ENTROPY_TENSOR": entropy_tensor,
        "HAS_ENTROPY": with_entropy,
        "DIVIDE": divide,
        "DIVIDE_ENTROPY": divide_entropy,
        "BT": tokens,
        "BB": 128,
    }
    return BoundLaunch(_reduce, constants, num_warps=4)


def _default_divisor(config: Any, batch: int, tokens: int, masked: bool) -> float | None:
    """What ``normalizer`` is if not given; None where only the device knows it."""
    if config.normalization in ("grpo", "dr_grpo"):
        return float(batch)
    return None if masked else float(tokens)


def policy_loss(
    logprobs: Tensor,
    advantages: Tensor,
    cu_seqlens: Tensor,
    *,
    old_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    sampling_logprobs: Tensor | None = None,
    entropies: Tensor | None = None,
    token_mask: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    entropy_normalizer: float | Tensor | None = None,
    config: Any,
) -> Loss:
    """Launches what ``ops.policy_loss`` has checked; the arguments are its own, contiguous, on one device.

    Args:
        config: an ``ops.PolicyLossConfig``.
        normalizer, entropy_normalizer: numbers, or 0-dim tensors on the device, which are not read by the host.
    """
    tokens, batch, device = logprobs.shape[0], advantages.shape[0], logprobs.device
    masked, with_entropy = token_mask is not None, config.entropy_coef > 0
    if normalizer is None:
        normalizer = _default_divisor(config, batch, tokens, masked)
    if entropy_normalizer is None and not masked:
        entropy_normalizer = float(max(tokens, 1))
    divide, divide_entropy = normalizer is None, with_entropy and entropy_normalizer is None
    by_tensor, entropy_by_tensor = isinstance(normalizer, Tensor), isinstance(entropy_normalizer, Tensor)
    entropy_number = 1.0 if entropy_by_tensor or entropy_normalizer is None else float(entropy_normalizer)
    entropy_tensor = entropy_normalizer if entropy_by_tensor else None
    gradients = tokens * (2 if with_entropy else 1)
    work = torch.empty(gradients + batch * _PARTS.value, device=device, dtype=torch.float32)
    values = torch.empty(_PARTS.value, device=device, dtype=torch.float32)
    loss = torch.empty((), device=device, dtype=torch.float32)
    if batch:
        others = old_logprobs, ref_logprobs, sampling_logprobs
        given = (*(x is not None for x in others), with_entropy, masked, by_tensor, entropy_by_tensor)
        _sequences_launch(config, given, _TOKENS)(
            (batch,),
            logprobs_ptr=logprobs,
            advantages_ptr=advantages,
            cu_ptr=cu_seqlens,
            old_ptr=old_logprobs,
            ref_ptr=ref_logprobs,
            sampling_ptr=sampling_logprobs,
            entropies_ptr=entropies,
            mask_ptr=token_mask,
            normalizer_ptr=normalizer if by_tensor else None,
            entropy_normalizer_ptr=entropy_tensor,
            work_ptr=work,
            T=tokens,
            normalizer=1.0 if normalizer is None or by_tensor else float(normalizer),
            entropy_normalizer=entropy_number,
            **_settings(config),
        )
    _reduce_launch(entropy_by_tensor, with_entropy, divide, divide_entropy, _TOKENS)(
        (max(1, blocks(tokens, _TOKENS)) if divide or divide_entropy else 1,),
        work_ptr=work,
        entropy_normalizer_ptr=entropy_tensor,
        loss_ptr=loss,
        values_ptr=values,
        B=batch,
        T=tokens,
        entropy_normalizer=entropy_number,
        entropy_coef=float(config.entropy_coef),
    )
    return Loss(loss, values, work[:gradients].view(2 if with_entropy else 1, tokens))
