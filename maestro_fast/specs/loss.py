"""The language model's head and the policy loss: options, inputs and results.

Axis suffixes: B responses, T or C tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

EntropyMode = Literal["none", "value", "grad"]


@dataclass(frozen=True)
class HeadSpec:
    """What happens to the output of the head's matrix product: scale, soft cap and temperature, see ``ops.head_rows``.

    Attributes:
        ignore_index: the target of rows that are ignored.
        entropy: "none", "value" (without a gradient), or "grad".
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
        entropies: in nats; 0 in ignored rows. They have no elements with ``entropy="none"``.
    """

    logprobs: Tensor
    peaks: Tensor
    totals: Tensor
    entropies: Tensor


class TokenLogprobs(NamedTuple):
    """Log-probs [T] and entropies [T] in nats (None with ``entropy="none"``); ignored rows hold 0."""

    logprobs: Tensor
    entropies: Tensor | None


class LossInputs(NamedTuple):
    """What a loss is computed from: T completion tokens of B responses, packed. A user's own loss gets this record.

    Attributes:
        logprobs: [T], log-probs of the sampled tokens under the current policy, in nats.
        advantages: [B].
        cu_seqlens: int [B + 1]; response b has the tokens ``[cu_seqlens[b], cu_seqlens[b + 1])``.
        old_logprobs: [T] of the policy that the ratio refers to; None means the current policy.
        ref_logprobs: [T] of the reference policy.
        sampling_logprobs: [T] of the sampler; NaN where it gave none.
        entropies: [T] of the current policy, in nats.
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
    """The scalar loss, and metrics as scalar tensors by their names. Float32 (float64 for float64 log-probs).

    The metrics of a ``PolicyLossConfig`` are means over the live tokens. ``clip_low`` and ``clip_high`` are the shares
    of tokens that were clipped on either side, ``ratio`` is the mean of rho, ``kl`` the mean of k3 (only with a
    reference), ``sampler_ratio`` the mean of w before it is capped (only with sampling log-probs).
    """

    loss: Tensor
    metrics: dict[str, Tensor]


class LinearPolicyLoss(NamedTuple):
    """``PolicyLoss``, and the log-probs [T] that it was computed from, without a graph.

    Rows that were skipped keep the log-prob given as ``old_logprobs``, or 0.
    """

    loss: Tensor
    metrics: dict[str, Tensor]
    logprobs: Tensor


LOSS_METRICS = ("clip_low", "clip_high", "ratio", "kl", "sampler_ratio")


class LossWithGradients(NamedTuple):
    """A loss whose gradients were computed with it, float32.

    Attributes:
        loss: a scalar.
        metrics: [8], of which the first are ``LOSS_METRICS`` in their order.
        gradients: [1 or 2, T], of the log-probs and, with an entropy bonus, of the entropies.
    """

    loss: Tensor
    metrics: Tensor
    gradients: Tensor


Normalization = Literal["grpo", "bnpo", "dapo", "dr_grpo"]
Objective = Literal["clip", "cispo"]
Ratio = Literal["token", "sequence"]
SamplerCorrection = Literal["none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]

# Losses of TRL 1.16 that these options do not cover, and why. They are refused by name, not approximated.
_REFUSED = {
    "luspo": "it weights a sequence by its length, which no normalization here does",
    "sapo": "its soft gate replaces the clip",
    "vespo": "its gamma weights replace the clip",
}


@dataclass(frozen=True)
class PolicyLossConfig:
    """Options of ``policy_loss``.

    Attributes:
        normalization: how the losses of tokens are averaged, see ``ops.policy_loss``.
        clip_low, clip_high: the ratio is clipped to [1 - clip_low, 1 + clip_high].
        kl_coef: coefficient of the k3 term; 0 needs no reference.
        max_completion_length: in tokens, the constant that ``dr_grpo`` divides by.
        objective: "clip", or "cispo", which treats the capped ratio as a constant, so that no token loses its gradient.
        ratio: "token", or "sequence", the geometric mean over the response's tokens (GSPO).
        clip_max: upper bound of the ratio itself. With "clip" it bounds the loss of tokens with negative advantage
            (two-sided clipping, TRL's ``delta``); "cispo" needs it (TRL's ``epsilon_high``).
        sampler_correction: multiplies the policy term by pi_old / pi_sampler of a token or of a whole response, which
            is capped ("truncate") or becomes zero past the cap ("mask").
        sampler_cap: that cap.
        entropy_coef: coefficient of the mean entropy of the tokens, which the loss rewards.
    """

    normalization: Normalization = "dapo"
    clip_low: float = 0.2
    clip_high: float = 0.2
    kl_coef: float = 0.0
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
                reason = f" ({_REFUSED[value]})" if value in _REFUSED else ""
                raise ValueError(f"{name}: {value!r}{reason}, expected one of {allowed}")
        if not 0 <= self.clip_low <= 1:
            raise ValueError(f"clip_low: {self.clip_low}, expected 0 <= clip_low <= 1")
        for name in ("clip_high", "kl_coef", "entropy_coef"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}: {getattr(self, name)}, expected {name} >= 0")
        if self.normalization == "dr_grpo" and not (self.max_completion_length or 0) > 0:
            raise ValueError("max_completion_length: missing, expected a positive int with normalization='dr_grpo'")
        if self.objective == "cispo" and self.clip_max is None:
            raise ValueError("clip_max: missing, expected the cap of the ratio with objective='cispo'")
        if self.clip_max is not None and not self.clip_max >= 1:
            raise ValueError(f"clip_max: {self.clip_max}, expected clip_max >= 1 or None")
        if not self.sampler_cap >= 1:
            raise ValueError(f"sampler_cap: {self.sampler_cap}, expected sampler_cap >= 1")


@dataclass(frozen=True)
class FunctionLoss:
    """A loss of the user's own, as a config names it. Once ``function`` is loaded, this is a loss function itself.

    The function takes ``LossInputs`` and returns the scalar loss and a dict of scalar metrics.

    Attributes:
        function: the loss function, in a config as "package.module:name" or "path/to/file.py:name".
        needs_reference: says that the function reads ``ref_logprobs``, so the reference policy is scored for it.
        needs_entropy: says that the function reads ``entropies``, and that their gradient counts.
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
        """Whether entropies and their gradient are needed: it says so, or the function is marked so."""
        return self.needs_entropy or bool(getattr(self.function, "entropies", False))


class TokenLosses(NamedTuple):
    """[T] each: the loss of a token before its weight, and bool, whether it was clipped on either side."""

    loss: Tensor
    clipped_low: Tensor
    clipped_high: Tensor


def _clip(ratio: Tensor, logprobs: Tensor, advantages: Tensor, config: PolicyLossConfig) -> TokenLosses:
    capped = ratio if config.clip_max is None else ratio.clamp(max=config.clip_max)
    clipped = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
    low = (ratio < 1 - config.clip_low) & (advantages < 0)
    high = (ratio > 1 + config.clip_high) & (advantages > 0)
    return TokenLosses(-torch.minimum(capped * advantages, clipped * advantages), low, high)


def _cispo(ratio: Tensor, logprobs: Tensor, advantages: Tensor, config: PolicyLossConfig) -> TokenLosses:
    assert config.clip_max is not None
    capped = ratio.clamp(max=config.clip_max).detach()
    high = (ratio > config.clip_max) & (advantages > 0)
    return TokenLosses(-capped * advantages * logprobs, torch.zeros_like(high), high)


# The formula of each ``Objective``, for ratios, log-probs and advantages [T]. The kernel's are in ``_objective`` of
# kernels/policy_loss.py.
OBJECTIVES = {"clip": _clip, "cispo": _cispo}
