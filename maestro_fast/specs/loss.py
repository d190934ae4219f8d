"""The language model's head and the policy loss: options, inputs and results.

Axis suffixes: B responses, T tokens of a batch, C rows of a chunk of tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

EntropyMode = Literal["none", "value", "grad"]


@dataclass(frozen=True)
class HeadSpec:
    """How the output of the head's matrix product becomes logits and log-probs; see ``ops.head_rows``.

    Attributes:
        scale: the factor of the product's output, before the bias.
        softcap: the bound of the tanh soft cap, or None for no cap.
        temperature: the divisor of the capped logits.
        ignore_index: the target of rows that are ignored.
        entropy: "none" computes no entropies, "value" computes them without a gradient, "grad" with one.
    """

    scale: float
    softcap: float | None
    temperature: float
    ignore_index: int
    entropy: EntropyMode


class RowStatistics(NamedTuple):
    """Statistics of C rows of logits, each [C], in the dtype of the logits.

    Attributes:
        logprobs: the log-prob of the target in nats; 0 in ignored rows.
        peaks: max_v y_v, before the temperature.
        totals: sum_v exp((y_v - peak) / T), so that logsumexp(z) = peak / T + log(total). One number for both would be
            rounded to the size of the logits: in float32, with logits near 1e4, every probability would lose 1e-3.
        entropies: the entropy in nats; 0 in ignored rows. There are no elements with ``entropy="none"``.
    """

    logprobs: Tensor
    peaks: Tensor
    totals: Tensor
    entropies: Tensor


class TokenLogprobs(NamedTuple):
    """Log-probs [T], and entropies [T] or None with ``entropy="none"``, both in nats. Ignored rows hold 0."""

    logprobs: Tensor
    entropies: Tensor | None


class LossInputs(NamedTuple):
    """The inputs of a loss, for T packed completion tokens of B responses. A user's own loss gets this record.

    Attributes:
        logprobs: [T], log-probs of the sampled tokens under the current policy, in nats.
        advantages: [B], the advantage of each response.
        cu_seqlens: int [B + 1]; response b has the tokens ``[cu_seqlens[b], cu_seqlens[b + 1])``.
        old_logprobs: [T], log-probs under the policy that the ratio refers to; None means the current policy.
        ref_logprobs: [T], log-probs under the reference policy.
        sampling_logprobs: [T], log-probs as the sampler reported them; NaN where it reported none.
        entropies: [T], entropies of the current policy, in nats.
        token_mask: [T]; a zero leaves a token out.
        normalizer: what the summed loss is divided by, for the whole optimizer step.
        entropy_normalizer: what the summed entropies are divided by.
    """

    logprobs: Tensor
    advantages: Tensor
    cu_seqlens: Tensor
    old_logprobs: Tensor | None = None
    ref_logprobs: Tensor | None = None
    sampling_logprobs: Tensor | None = None
    entropies: Tensor | None = None
    token_mask: Tensor | None = None
    normalizer: float | Tensor | None = None
    entropy_normalizer: float | Tensor | None = None

    @property
    def of_tokens(self) -> dict[str, Tensor | None]:
        """The optional tensors [T], by their names."""
        return {
            "old_logprobs": self.old_logprobs,
            "ref_logprobs": self.ref_logprobs,
            "sampling_logprobs": self.sampling_logprobs,
            "entropies": self.entropies,
            "token_mask": self.token_mask,
        }


# A user's own loss returns the scalar loss, and metrics as scalar tensors by their names.
LossFunction = Callable[[LossInputs], tuple[Tensor, dict[str, Tensor]]]


class PolicyLoss(NamedTuple):
    """The scalar loss, and metrics as scalar tensors by their names, in float32 (float64 for float64 log-probs).

    The metrics of a ``PolicyLossConfig`` are means over the live tokens. ``clip_low`` and ``clip_high`` are the shares
    of tokens that were clipped on either side, ``ratio`` is the mean policy ratio, ``kl`` the mean of k3 (only with a
    reference; times the ratio with ``kl_bias_correction``), and ``sampler_ratio`` the mean of pi_old / pi_sampler
    before the cap (only with sampling log-probs).
    """

    loss: Tensor
    metrics: dict[str, Tensor]


class LinearPolicyLoss(NamedTuple):
    """A ``PolicyLoss``, and the log-probs [T] that it was computed from, which carry no graph.

    Rows that were skipped keep the log-prob given as ``old_logprobs``, or 0.
    """

    loss: Tensor
    metrics: dict[str, Tensor]
    logprobs: Tensor


LOSS_METRICS = ("clip_low", "clip_high", "ratio", "kl", "sampler_ratio")


class LossWithGradients(NamedTuple):
    """A loss whose gradients were computed with it, all in float32.

    Attributes:
        loss: the scalar loss.
        metrics: [8]; the first elements are ``LOSS_METRICS`` in their order, the others are sums of the kernel.
        gradients: [1 or 2, T], the gradient by the log-probs and, with an entropy bonus, by the entropies.
    """

    loss: Tensor
    metrics: Tensor
    gradients: Tensor


Normalization = Literal["grpo", "bnpo", "dapo", "dr_grpo"]
Objective = Literal["clip", "cispo"]
Ratio = Literal["token", "sequence"]
SamplerCorrection = Literal["none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]

# These losses of TRL 1.16 are not covered by the options. They are refused with the reason, not approximated.
_REFUSED = {
    "luspo": "it weights a sequence by its length, which no normalization here does",
    "sapo": "its soft gate replaces the clip",
    "vespo": "its gamma weights replace the clip",
}


@dataclass(frozen=True)
class PolicyLossConfig:
    """Options of ``policy_loss``.

    Attributes:
        normalization: how the losses of tokens are averaged, see ``ops.policy_loss``. With "bnpo" the update depends on
            the size of the micro-batches, whose means it averages as TRL does; with the others it does not.
        clip_low, clip_high: the ratio is clipped to [1 - clip_low, 1 + clip_high].
        kl_coef: coefficient of the k3 term; 0 needs no reference.
        kl_bias_correction: whether k3 is multiplied by the ratio before any clip, whose gradient counts too. Then the
            term estimates KL(pi || pi_ref) and its gradient without bias although pi_old sampled the tokens
            (DeepSeek-V3.2; TRL's ``use_bias_correction_kl``). This changes the gradient on-policy, too.
        max_completion_length: the constant number of tokens that ``dr_grpo`` divides by.
        objective: "clip", or "cispo", which treats the capped ratio as a constant, so that no token loses its gradient.
        ratio: "token", or "sequence", the geometric mean over the response's tokens (GSPO).
        clip_max: upper bound of the ratio itself. With "clip" it bounds the loss of tokens with negative advantage
            (two-sided clipping, TRL's ``delta``) and is 1 at least; "cispo" needs it (TRL's ``epsilon_high``), and
            there it may be below 1, as it is by TRL's defaults.
        sampler_correction: multiplies the policy term by pi_old / pi_sampler of a token or of a whole response, which
            is capped ("truncate") or becomes zero past the cap ("mask"). Both have to be log-probs of the whole
            vocabulary, so a run whose sampler truncates (top_p, top_k) refuses it.
        sampler_cap: the cap of ``sampler_correction``.
        entropy_coef: coefficient of the mean entropy of the tokens, which the loss rewards.
    """

    normalization: Normalization = "dapo"
    clip_low: float = 0.2
    clip_high: float = 0.2
    kl_coef: float = 0.0
    kl_bias_correction: bool = False
    max_completion_length: int | None = None
    objective: Objective = "clip"
    ratio: Ratio = "token"
    clip_max: float | None = None
    sampler_correction: SamplerCorrection = "none"
    sampler_cap: float = 3.0
    entropy_coef: float = 0.0

    def __post_init__(self) -> None:
        for name, allowed in (
            ("normalization", get_args(Normalization)),
            ("objective", get_args(Objective)),
            ("ratio", get_args(Ratio)),
            ("sampler_correction", get_args(SamplerCorrection)),
        ):
            value = getattr(self, name)
            if value not in allowed:
                reason = f" ({_REFUSED[value]})" if isinstance(value, str) and value in _REFUSED else ""
                raise ValueError(f"{name}: {value!r}{reason}, expected one of {allowed}")
        numbers = ("clip_low", "clip_high", "kl_coef", "entropy_coef", "clip_max", "sampler_cap")
        for name in numbers:
            value = getattr(self, name)
            if isinstance(value, bool) or not (
                isinstance(value, int | float) or (name == "clip_max" and value is None)
            ):
                raise TypeError(f"{name}: got {type(value).__name__} {value!r}, expected a number")
            if isinstance(value, int) and abs(value) > 2**63:
                raise ValueError(f"{name}: an integer above 2**63, expected a number that a float32 can hold")
        if not 0 <= self.clip_low <= 1:
            raise ValueError(f"clip_low: {self.clip_low}, expected 0 <= clip_low <= 1")
        for name in ("clip_high", "kl_coef", "entropy_coef"):
            value = getattr(self, name)
            if not value >= 0 or (name != "clip_high" and value == math.inf):
                raise ValueError(f"{name}: {value}, expected a {'finite ' * (name != 'clip_high')}number >= 0")
        length = self.max_completion_length
        if length is not None and (isinstance(length, bool) or not isinstance(length, int) or length < 1):
            raise ValueError(f"max_completion_length: {length!r}, expected a positive int or None")
        if self.normalization == "dr_grpo" and length is None:
            raise ValueError("max_completion_length: missing, expected a positive int with normalization='dr_grpo'")
        if self.objective == "cispo" and self.clip_max is None:
            raise ValueError("clip_max: missing, expected the cap of the ratio with objective='cispo'")
        if self.objective == "cispo" and not (self.clip_max or 0.0) > 0:
            raise ValueError(f"clip_max: {self.clip_max}, expected clip_max > 0 with objective='cispo'")
        if self.objective == "clip" and self.clip_max is not None and not self.clip_max >= 1:
            raise ValueError(f"clip_max: {self.clip_max}, expected clip_max >= 1 or None with objective='clip'")
        if not self.sampler_cap >= 1:
            raise ValueError(f"sampler_cap: {self.sampler_cap}, expected sampler_cap >= 1")


@dataclass(frozen=True)
class FunctionLoss:
    """A loss of your own: a function of ``ops.LossInputs`` that returns the scalar loss and a dict of scalar tensors.

    Once ``function`` is loaded, this object is a loss function itself.

    Attributes:
        function: the loss function, in a config as "package.module:name" or "path/to/file.py:name".
        needs_reference: whether the function reads ``ref_logprobs``, so that the reference policy has to be scored.
        needs_entropy: whether the function reads ``entropies``, whose gradient then counts.
    """

    function: str | Callable[[Any], Any]
    needs_reference: bool = False
    needs_entropy: bool = False

    def __call__(self, inputs: Any) -> Any:
        if isinstance(self.function, str):
            raise TypeError(f"function: is the name {self.function!r}, expected the function that it stands for")
        return self.function(inputs)

    @property
    def row_wise(self) -> bool:
        """Whether the function is marked to be evaluated chunk by chunk, see ``ops.linear_policy_loss``."""
        return bool(getattr(self.function, "row_wise", False))

    @property
    def entropies(self) -> bool:
        """Whether entropies and their gradient are needed: ``needs_entropy`` or the function's own mark says so."""
        return self.needs_entropy or bool(getattr(self.function, "entropies", False))


# From this exponent on, ``Exponential`` holds e^x as e^(x - EXPONENT_SHIFT) times e^EXPONENT_SHIFT. In float32, e^x
# itself overflows at 88.7; so held, it does not up to 152.
LARGE_EXPONENT = 80.0
EXPONENT_SHIFT = 64.0


class Exponential(NamedTuple):
    """e^x [T] as the product of two factors; ``far`` is 1 where x is at most ``LARGE_EXPONENT``.

    The product with a small number may be in range where e^x alone is not.
    """

    near: Tensor
    far: Tensor

    @staticmethod
    def of(x: Tensor) -> Exponential:
        large = x > LARGE_EXPONENT
        near = torch.where(large, x - EXPONENT_SHIFT, x).exp()
        return Exponential(near, torch.where(large, math.exp(EXPONENT_SHIFT), torch.ones_like(x)))

    def times(self, *factors: Tensor | float) -> Tensor:
        """e^x times the factors."""
        product = self.near
        for factor in factors:
            product = product * factor
        return product * self.far


class TokenLosses(NamedTuple):
    """The loss of each token [T], its sampler's weight included, and whether it was clipped below or above, bool [T].

    Its gradient must not meet an infinite ratio, since 0 * inf is NaN. So each formula finds out first where the ratio
    counts, and computes e^x with a graph only there. ``ops.reference_loss`` says what is right where a ratio overflows.
    """

    loss: Tensor
    clipped_low: Tensor
    clipped_high: Tensor


def _clip(
    log_ratio: Tensor, logprobs: Tensor, advantages: Tensor, weights: Tensor, config: PolicyLossConfig
) -> TokenLosses:
    """-min(min(rho, clip_max) A, clip(rho) A), which is -clamp(rho) A with other bounds for either sign of A."""
    ratio = log_ratio.detach().exp()
    low, high = 1 - config.clip_low, 1 + config.clip_high
    largest = math.inf if config.clip_max is None else config.clip_max
    negative, zero = advantages < 0, torch.zeros_like(ratio)
    least = torch.where(negative, zero + low, zero)
    most = torch.where(negative, zero + max(high, largest), zero + min(high, largest))
    out = (ratio < least) | (ratio > most)
    near, far = Exponential.of(torch.where(out | _counts_nothing(ratio, advantages, weights), 0.0, log_ratio))
    clamped = Exponential(torch.where(out, torch.clamp(ratio, least, most), near), far)
    return TokenLosses(-clamped.times(advantages, weights), (ratio < low) & negative, (ratio > high) & (advantages > 0))


def _cispo(
    log_ratio: Tensor, logprobs: Tensor, advantages: Tensor, weights: Tensor, config: PolicyLossConfig
) -> TokenLosses:
    """-sg(min(rho, clip_max)) A log pi. It is 0 where the policy gives the token the probability 0."""
    assert config.clip_max is not None
    ratio = log_ratio.detach().exp()
    above = ratio > config.clip_max
    constant = above | _counts_nothing(ratio, advantages, weights)
    near, far = Exponential.of(torch.where(constant, 0.0, log_ratio.detach()))
    factor = torch.where(above, config.clip_max, near) * advantages
    logprobs = torch.where(((factor == 0) | (weights == 0)) & logprobs.isinf(), 0.0, logprobs)
    loss = -Exponential(factor, far).times(logprobs, weights)
    return TokenLosses(loss, torch.zeros_like(above), above & (advantages > 0))


def _counts_nothing(ratio: Tensor, advantages: Tensor, weights: Tensor) -> Tensor:
    """Whether an infinite ratio is multiplied by 0, bool [T]."""
    return ratio.isinf() & ((advantages == 0) | (weights == 0))


# The formula of each ``Objective``, for log-ratios, log-probs, advantages and the sampler's weights (1
# without a correction), all [T]. ``_objective`` of kernels/policy_loss.py has the same formulas.
OBJECTIVES = {"clip": _clip, "cispo": _cispo}
