"""The clipped policy-gradient loss of GRPO and its relatives, over packed completion tokens.

    rho_t  = exp(log pi - log pi_old)          (1 with its gradient where old_logprobs is None: on-policy)
    l_t    = -min(rho_t A, clip(rho_t, 1 - clip_low, 1 + clip_high) A)
    k3_t   = exp(log pi_ref - log pi) - (log pi_ref - log pi) - 1       (Schulman's k3 estimator of KL(pi || pi_ref))
    loss   = sum_t c_t (l_t + kl_coef k3_t)

    normalization   c_t                        normalizer stands for (default)
    grpo            1 / (tokens of the response * normalizer)     responses of the optimiser step (those given)
    bnpo            1 / normalizer                                tokens of the batch (those given)
    dapo            1 / normalizer                                tokens of the optimiser step (must be given)
    dr_grpo         1 / (max_completion_length * normalizer)      responses of the optimiser step (those given)

Sources: GRPO arXiv 2402.03300, Dr. GRPO 2503.20783, DAPO 2503.14476; names and values as in TRL's ``loss_type``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from maestro_fast.ops.backend import Backend, resolve
from maestro_fast.ops.tensors import is_integer, readable, wide

Normalization = Literal["grpo", "bnpo", "dapo", "dr_grpo"]


@dataclass(frozen=True)
class PolicyLossConfig:
    """Options of ``policy_loss``.

    Attributes:
        normalization: how token losses are averaged, see the module.
        clip_low, clip_high: the ratio is clipped to [1 - clip_low, 1 + clip_high].
        kl_coef: coefficient of the k3 term; 0 needs no reference.
        max_completion_length: tokens, the constant of ``dr_grpo``.
    """

    normalization: Normalization = "dapo"
    clip_low: float = 0.2
    clip_high: float = 0.2
    kl_coef: float = 0.0
    max_completion_length: int | None = None

    def __post_init__(self) -> None:
        if self.normalization not in get_args(Normalization):
            raise ValueError(f"normalization: {self.normalization!r}, expected one of {get_args(Normalization)}")
        if not 0 <= self.clip_low <= 1:
            raise ValueError(f"clip_low: {self.clip_low}, expected 0 <= clip_low <= 1")
        if not self.clip_high >= 0:
            raise ValueError(f"clip_high: {self.clip_high}, expected clip_high >= 0")
        if not self.kl_coef >= 0:
            raise ValueError(f"kl_coef: {self.kl_coef}, expected kl_coef >= 0")
        if self.normalization == "dr_grpo" and not (self.max_completion_length or 0) > 0:
            raise ValueError("max_completion_length: missing, expected a positive int with normalization='dr_grpo'")


class PolicyLoss(NamedTuple):
    """Scalar loss, and metrics as 0-dim tensors: means over the live tokens. Float32 (float64 for float64 input).

    ``clip_low`` and ``clip_high`` are the shares of tokens clipped on either side, ``ratio`` the mean of rho, ``kl``
    the mean of k3 (only with a reference).
    """

    loss: Tensor
    metrics: dict[str, Tensor]


def policy_loss(
    logprobs: Tensor,
    advantages: Tensor,
    cu_seqlens: Tensor,
    *,
    old_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    token_mask: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    config: PolicyLossConfig,
    backend: Backend | None = None,
) -> PolicyLoss:
    """The loss of B responses with T completion tokens in all.

    Args:
        logprobs: [T], log pi of the sampled tokens in nats; differentiable.
        advantages: [B].
        cu_seqlens: int [B + 1], response b is ``[cu_seqlens[b], cu_seqlens[b + 1])``.
        old_logprobs: [T] of the policy that the ratio refers to; None: the current one.
        ref_logprobs: [T] of the reference; required when ``config.kl_coef`` > 0.
        token_mask: [T], zero leaves a token out of loss, lengths and metrics.
        normalizer: the divisor of the whole optimiser step, see the module.
        config: variant and coefficients.
        backend: None or "torch".

    Raises:
        ValueError: shapes, devices, or a missing ``normalizer`` or ``ref_logprobs``.
        TypeError: dtypes.
    """
    resolve("policy_loss", backend)
    _check(logprobs, advantages, cu_seqlens, old_logprobs, ref_logprobs, token_mask, normalizer, config)
    sequence_T = _sequence_of_token(cu_seqlens, logprobs.shape[0])
    live_T = torch.ones_like(logprobs, dtype=torch.bool) if token_mask is None else token_mask != 0
    advantages_T = wide(advantages)[sequence_T]
    logprobs = wide(logprobs)
    old = logprobs.detach() if old_logprobs is None else wide(old_logprobs)
    # a masked token may hold anything: it must not reach an exp, whose inf would become NaN in the gradient
    ratio = torch.where(live_T, logprobs - old, 0.0).exp()
    clipped = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
    token_loss = -torch.minimum(ratio * advantages_T, clipped * advantages_T)
    k3 = None
    if ref_logprobs is not None:
        gap = torch.where(live_T, wide(ref_logprobs) - logprobs, 0.0)
        k3 = torch.expm1(gap) - gap
        if config.kl_coef > 0:  # for the metric alone, an infinite k3 must not become 0 * inf in the loss
            token_loss = token_loss + config.kl_coef * k3
    coefficient_T = _coefficients(sequence_T, live_T, advantages.shape[0], normalizer, config)
    loss = torch.where(live_T, token_loss * coefficient_T.to(token_loss.dtype), 0.0).sum()
    return PolicyLoss(loss, _metrics(ratio, k3, advantages_T, live_T, config))


def _sequence_of_token(cu_seqlens: Tensor, tokens: int) -> Tensor:
    position_T = torch.arange(tokens, device=cu_seqlens.device)
    return torch.bucketize(position_T, cu_seqlens[1:].to(torch.int64), right=True)


def _coefficients(
    sequence_T: Tensor,
    live_T: Tensor,
    batch: int,
    normalizer: float | Tensor | None,
    config: PolicyLossConfig,
) -> Tensor:
    """c_t [T], or a scalar where it is the same for all tokens; float64, so that no count is rounded."""
    if normalizer is None:
        normalizer = batch if config.normalization in ("grpo", "dr_grpo") else live_T.sum()
    if isinstance(normalizer, Tensor):
        divisor = normalizer.to(live_T.device, torch.float64)
    else:
        divisor = torch.full((), normalizer, dtype=torch.float64, device=live_T.device)
    if config.normalization == "dr_grpo":
        assert config.max_completion_length is not None
        divisor = divisor * config.max_completion_length
    if config.normalization == "grpo":
        lengths_B = torch.zeros(batch, dtype=torch.int64, device=live_T.device)
        lengths_B = lengths_B.index_add(0, sequence_T, live_T.long())  # integers: any order gives the same sum
        divisor = divisor * lengths_B[sequence_T]
    return 1.0 / divisor.clamp(min=1e-30)


def _metrics(
    ratio: Tensor, k3: Tensor | None, advantages_T: Tensor, live_T: Tensor, config: PolicyLossConfig
) -> dict[str, Tensor]:
    ratio = ratio.detach()
    tokens = live_T.sum().clamp(min=1)
    low = (ratio < 1 - config.clip_low) & (advantages_T < 0)
    high = (ratio > 1 + config.clip_high) & (advantages_T > 0)
    metrics = {
        "clip_low": (low & live_T).sum() / tokens,
        "clip_high": (high & live_T).sum() / tokens,
        "ratio": torch.where(live_T, ratio, 0.0).sum() / tokens,
    }
    if k3 is not None:
        metrics["kl"] = torch.where(live_T, k3.detach(), 0.0).sum() / tokens
    return metrics


def _check(
    logprobs: Tensor,
    advantages: Tensor,
    cu_seqlens: Tensor,
    old_logprobs: Tensor | None,
    ref_logprobs: Tensor | None,
    token_mask: Tensor | None,
    normalizer: float | Tensor | None,
    config: PolicyLossConfig,
) -> None:
    if logprobs.ndim != 1 or not logprobs.is_floating_point():
        raise ValueError(f"logprobs: {logprobs.dtype} {tuple(logprobs.shape)}, expected floating [T]")
    if advantages.ndim != 1 or cu_seqlens.shape != (advantages.shape[0] + 1,):
        raise ValueError(
            f"advantages, cu_seqlens: shapes {tuple(advantages.shape)} and {tuple(cu_seqlens.shape)}, "
            "expected [B] and [B + 1]"
        )
    if not is_integer(cu_seqlens):
        raise TypeError(f"cu_seqlens: dtype {cu_seqlens.dtype}, expected an integer dtype")
    tokenwise = {"old_logprobs": old_logprobs, "ref_logprobs": ref_logprobs, "token_mask": token_mask}
    for name, tensor in tokenwise.items():
        if tensor is not None and tensor.shape != logprobs.shape:
            raise ValueError(f"{name}: shape {tuple(tensor.shape)}, expected {tuple(logprobs.shape)}")
    for name, tensor in {**tokenwise, "advantages": advantages, "cu_seqlens": cu_seqlens}.items():
        if tensor is None:
            continue
        if tensor.device != logprobs.device:
            raise ValueError(f"{name}: on {tensor.device}, expected {logprobs.device} as logprobs")
        if name not in ("token_mask", "cu_seqlens") and not tensor.is_floating_point():
            raise TypeError(f"{name}: dtype {tensor.dtype}, expected a floating dtype")
    if config.kl_coef > 0 and ref_logprobs is None:
        raise ValueError(f"ref_logprobs: missing, expected [T] with kl_coef={config.kl_coef}")
    if config.normalization == "dapo" and normalizer is None:
        raise ValueError("normalizer: missing, expected the token count of the optimiser step with 'dapo'")
    if readable(cu_seqlens):
        first, last = int(cu_seqlens[0]), int(cu_seqlens[-1])
        if first != 0 or last != logprobs.shape[0] or bool((cu_seqlens.diff() < 0).any()):
            raise ValueError(
                f"cu_seqlens: from {first} to {last}, expected non-decreasing from 0 to T = {logprobs.shape[0]}"
            )
