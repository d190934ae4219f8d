"""The policy loss in PyTorch: the formula that all backends are compared with. ``ops.policy_loss`` is its public door.

The formulas of a token's loss are ``specs.OBJECTIVES``. The others stand here.

Log-probs may be hundreds of nats apart, so a ratio may overflow float32, which ends at e^88.7. On every backend:

- A ratio counts only where it is not clipped, capped, or multiplied by an advantage or a weight of 0. Elsewhere it adds
  nothing to the loss but the bound, and its gradient is 0.
- A term of a token, before it is multiplied by c_t, is right wherever it fits into the dtype, although the ratio or
  e^(log pi_ref - log pi) may not: e^x is held as two factors. So is its gradient. Only where A w is not 0 but smaller
  than 1e-27, a ratio beyond e^152 counts as infinite.
- A term that does not fit is infinite, as in TRL, and so is the loss. Nothing that fits is clamped. (verl clamps
  log pi_ref - log pi to +-20 and k3 to +-10, so the tokens that are furthest away have no gradient.)
- A sampler's weight is a number of the dtype: 0 if it is too small for it, infinite if it is too large and has no cap.
- A token to which the policy gives probability 0 has a ratio of 0, or of 1 if the old policy gives it 0, too. Its ratio
  has no gradient. A log-prob that is NaN makes the loss NaN.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from maestro_fast.ops.tensors import wide
from maestro_fast.specs import LARGE_EXPONENT, OBJECTIVES, Exponential, LossInputs, PolicyLoss, PolicyLossConfig


def reference_loss(inputs: LossInputs, config: PolicyLossConfig) -> PolicyLoss:
    """The formula at the top of ``ops.policy_loss``, differentiable, for inputs that have been checked."""
    segments = _Segments.of(inputs)
    live_T = segments.live_T
    advantages_T = wide(inputs.advantages)[segments.sequence_T]
    logprobs = wide(inputs.logprobs)
    old = logprobs.detach() if inputs.old_logprobs is None else wide(inputs.old_logprobs)
    log_ratio = _log_ratio(logprobs, old, live_T)
    if config.ratio == "sequence":
        log_ratio = segments.sums(log_ratio) / segments.lengths
    sampler_ratio, weights = None, torch.ones_like(logprobs)
    if inputs.sampling_logprobs is not None:
        sampler_ratio = _sampler_ratio(old.detach() - wide(inputs.sampling_logprobs), segments, config)
        if config.sampler_correction != "none":
            weights = _sampler_weight(sampler_ratio, advantages_T, config)
    live_logprobs = torch.where(live_T, logprobs, 0.0)
    loss_T, low_T, high_T = OBJECTIVES[config.objective](log_ratio, live_logprobs, advantages_T, weights, config)
    metrics = {
        "clip_low": segments.mean(low_T.to(logprobs.dtype)),
        "clip_high": segments.mean(high_T.to(logprobs.dtype)),
        "ratio": segments.mean(log_ratio.detach().exp()),
    }
    if sampler_ratio is not None:
        metrics["sampler_ratio"] = segments.mean(sampler_ratio)
    if inputs.ref_logprobs is not None:
        kl = _KlTerm.of(inputs, log_ratio, live_T, config)
        metrics["kl"] = segments.mean(kl.times(1.0).detach())
        if config.kl_coef > 0:  # Where k3 is only a metric, an infinite one must not reach the loss as 0 * inf.
            loss_T = loss_T + kl.times(config.kl_coef)
    coefficient_T = _coefficients(segments, inputs, config)
    loss = torch.where(live_T, loss_T * coefficient_T.to(loss_T.dtype), 0.0).sum()
    if config.entropy_coef > 0:
        assert inputs.entropies is not None
        loss = loss - config.entropy_coef * segments.mean(wide(inputs.entropies), inputs.entropy_normalizer)
    return PolicyLoss(loss, metrics)


class _Segments(NamedTuple):
    """The responses as segments of the packed tokens.

    Attributes:
        sequence_T: int64 [T], the response that a token belongs to.
        live_T: bool [T], whether a token counts.
        bounds: int64 [B + 1], where the responses begin and end.
    """

    sequence_T: Tensor
    live_T: Tensor
    bounds: Tensor

    @staticmethod
    def of(inputs: LossInputs) -> _Segments:
        position_T = torch.arange(inputs.logprobs.shape[0], device=inputs.cu_seqlens.device)
        bounds, mask = inputs.cu_seqlens.to(torch.int64), inputs.token_mask
        sequence_T = torch.bucketize(position_T, bounds[1:], right=True)
        live_T = torch.ones_like(position_T, dtype=torch.bool) if mask is None else mask != 0
        return _Segments(sequence_T, live_T, bounds)

    def sums(self, x_T: Tensor) -> Tensor:
        """For each token the sum over its response, [T], without atomics. Masked tokens have to be 0 already."""
        if self.bounds.shape[0] == 1:
            return x_T
        return torch.segment_reduce(x_T, "sum", offsets=self.bounds, axis=0, initial=0)[self.sequence_T]

    @property
    def lengths(self) -> Tensor:
        """int64 [T], the number of live tokens of each token's response, at least 1."""
        lengths_B = torch.zeros(self.bounds.shape[0] - 1, dtype=torch.int64, device=self.live_T.device)
        # Integers add up to the same sum in any order.
        lengths_B = lengths_B.index_add(0, self.sequence_T, self.live_T.long())
        return lengths_B[self.sequence_T].clamp(min=1)

    def mean(self, x_T: Tensor, count: float | Tensor | None = None) -> Tensor:
        """The sum over the live tokens, divided by their number or by ``count``."""
        total = torch.where(self.live_T, x_T, 0.0).sum()
        return total / (self.live_T.sum().clamp(min=1) if count is None else count)


def _sampler_ratio(gap: Tensor, segments: _Segments, config: PolicyLossConfig) -> Tensor:
    """pi_old / pi_sampler [T] before the cap, from its logarithm ``gap``."""
    gap = torch.where(segments.live_T & ~gap.isnan(), gap, 0.0)
    return (segments.sums(gap) if config.sampler_correction.startswith("sequence") else gap).exp()


def _sampler_weight(ratio: Tensor, advantages: Tensor, config: PolicyLossConfig) -> Tensor:
    truncates = config.sampler_correction.endswith("truncate")
    weight = torch.where(ratio > config.sampler_cap, config.sampler_cap if truncates else 0.0, ratio)
    return torch.where(weight.isinf() & (advantages == 0), 0.0, weight)  # Without a cap, 0 * inf would be NaN.


def _log_ratio(logprobs: Tensor, others: Tensor, live_T: Tensor) -> Tensor:
    """logprobs - others [T]. It is 0 where both are -inf, and in masked tokens, which may hold anything."""
    gap = logprobs - others
    return torch.where(live_T & ~(gap.isnan() & (logprobs == others)), gap, 0.0)


class _KlTerm(NamedTuple):
    """k3, or with the bias correction rho k3, each [T]. ``times`` multiplies it by a coefficient.

    Attributes:
        gap: log pi_ref - log pi.
        log_ratio: log rho; None without the correction.
        of_old: log pi_ref - log pi_old, which is gap + log_ratio; None without the correction.
    """

    gap: Tensor
    log_ratio: Tensor | None
    of_old: Tensor | None

    @staticmethod
    def of(inputs: LossInputs, log_ratio: Tensor, live_T: Tensor, config: PolicyLossConfig) -> _KlTerm:
        assert inputs.ref_logprobs is not None
        logprobs, ref = wide(inputs.logprobs), wide(inputs.ref_logprobs)
        gap = _log_ratio(ref, logprobs, live_T)
        if not config.kl_bias_correction:
            return _KlTerm(gap, None, None)
        if config.ratio == "sequence":
            return _KlTerm(gap, log_ratio, log_ratio + gap)
        old = logprobs.detach() if inputs.old_logprobs is None else wide(inputs.old_logprobs)
        return _KlTerm(gap, log_ratio, _log_ratio(ref, old, live_T))

    def times(self, coefficient: float) -> Tensor:
        if self.log_ratio is None or self.of_old is None:
            large = self.gap > LARGE_EXPONENT  # Here 1 + gap is far below the last digit of e^gap, even in float64.
            gap = torch.where(large, 0.0, self.gap)
            k3 = coefficient * (torch.expm1(gap) - gap)
            return torch.where(large, Exponential.of(torch.where(large, self.gap, 0.0)).times(coefficient), k3)
        large = self.gap > 2
        gap = torch.where(large, 0.0, self.gap)
        infinite = (gap == 0) & (self.log_ratio > LARGE_EXPONENT)  # A ratio like that times 0 would be NaN.
        rho = Exponential.of(torch.where(large | infinite, 0.0, self.log_ratio))
        moderate = rho.times(torch.expm1(gap) - gap, coefficient)
        # Where gap is large, rho may be 0 while e^gap is infinite. So there, rho k3 = e^of_old - rho (1 + gap).
        ahead = Exponential.of(torch.where(large, self.of_old, 0.0)).times(coefficient)
        both = large & ahead.isfinite()  # Of two infinite terms the first is larger.
        gap = torch.where(both, self.gap, 0.0).clamp(max=1e4)  # Beyond, rho is 0.
        rest = Exponential.of(torch.where(both, self.log_ratio, 0.0)).times(1 + gap, coefficient)
        return torch.where(large, ahead - torch.where(both, rest, 0.0), moderate)


def _coefficients(segments: _Segments, inputs: LossInputs, config: PolicyLossConfig) -> Tensor:
    """c_t [T], or a scalar where it is the same for all tokens; float64, so that no count is rounded."""
    live_T, normalizer = segments.live_T, inputs.normalizer
    if normalizer is None:
        normalizer = inputs.advantages.shape[0] if config.normalization in ("grpo", "dr_grpo") else live_T.sum()
    if isinstance(normalizer, Tensor):
        divisor = normalizer.to(live_T.device, torch.float64)
    else:
        divisor = torch.full((), normalizer, dtype=torch.float64, device=live_T.device)
    if config.normalization == "dr_grpo":
        assert config.max_completion_length is not None
        divisor = divisor * config.max_completion_length
    if config.normalization == "grpo":
        divisor = divisor * segments.lengths
    return 1.0 / divisor.clamp(min=1e-30)
