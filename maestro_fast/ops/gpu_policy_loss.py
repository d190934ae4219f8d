"""The policy loss by Triton: one operator with its gradient, in eager mode and for ``torch.compile``."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from maestro_fast.ops.gpu import library
from maestro_fast.ops.policy_loss_config import PolicyLossConfig

Divisor = float | Tensor | None
_NAMES = ("old_logprobs", "ref_logprobs", "sampling_logprobs", "entropies", "token_mask")


def policy_loss(
    logprobs: Tensor,
    advantages: Tensor,
    cu_seqlens: Tensor,
    tokenwise: Mapping[str, Tensor | None],
    divisors: tuple[Divisor, Divisor],
    config: PolicyLossConfig,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and metrics. The arguments are checked."""
    from maestro_fast.kernels.policy_loss import METRICS

    values, _, _ = _call(logprobs, advantages, cu_seqlens, tokenwise, divisors, config)
    wanted = {
        "kl": tokenwise["ref_logprobs"] is not None,
        "sampler_ratio": tokenwise["sampling_logprobs"] is not None,
    }
    metrics = values.detach()
    return values[0], {name: metrics[place] for name, place in METRICS.items() if wanted.get(name, True)}


def policy_gradient(
    logprobs: Tensor,
    advantages: Tensor,
    cu_seqlens: Tensor,
    tokenwise: Mapping[str, Tensor | None],
    divisors: tuple[Divisor, Divisor],
    config: PolicyLossConfig,
) -> tuple[Tensor, Tensor | None]:
    """The loss's gradients of the log-probs and, with an entropy bonus, of the entropies, float32 [T]."""
    _, d_logprobs, d_entropies = _call(logprobs, advantages, cu_seqlens, tokenwise, divisors, config)
    return d_logprobs, d_entropies if config.entropy_coef > 0 else None


def _call(
    logprobs: Tensor,
    advantages: Tensor,
    cu_seqlens: Tensor,
    tokenwise: Mapping[str, Tensor | None],
    divisors: tuple[Divisor, Divisor],
    config: PolicyLossConfig,
) -> tuple[Tensor, Tensor, Tensor]:
    numbers = [None if isinstance(d, Tensor) or d is None else float(d) for d in divisors]
    tensors = [_on_device(d, logprobs.device) if isinstance(d, Tensor) else None for d in divisors]
    others = [None if x is None else x.contiguous() for x in (tokenwise[name] for name in _NAMES)]
    if config.entropy_coef == 0:
        others[3] = None  # nothing reads them
    results: tuple[Tensor, Tensor, Tensor] = torch.ops.maestro_fast.triton_policy_loss(
        logprobs.contiguous(),
        advantages.contiguous(),
        cu_seqlens.contiguous(),
        *others,
        *tensors,
        *numbers,
        *_fields(config),
    )
    return results


def _on_device(number: Tensor, device: torch.device) -> Tensor:
    return number.detach().to(device, torch.float32)


def _fields(config: PolicyLossConfig) -> tuple[list[str], list[float], float | None, int | None]:
    names = [config.normalization, config.objective, config.ratio, config.sampler_correction]
    numbers = [config.clip_low, config.clip_high, config.kl_coef, config.sampler_cap, config.entropy_coef]
    return [*names], [float(number) for number in numbers], config.clip_max, config.max_completion_length


@lru_cache(maxsize=64)
def _config(
    names: tuple[Any, ...], numbers: tuple[float, ...], clip_max: float | None, longest: int | None
) -> PolicyLossConfig:
    normalization, objective, ratio, correction = names
    clip_low, clip_high, kl_coef, sampler_cap, entropy_coef = numbers
    return PolicyLossConfig(
        normalization, clip_low, clip_high, kl_coef, longest, objective, ratio, clip_max, correction, sampler_cap,
        entropy_coef,
    )  # fmt: skip


library.define(
    "triton_policy_loss(Tensor logprobs, Tensor advantages, Tensor cu_seqlens, Tensor? old, Tensor? ref,"
    " Tensor? sampling, Tensor? entropies, Tensor? mask, Tensor? normalizer, Tensor? entropy_normalizer,"
    " float? number, float? entropy_number, str[] names, float[] numbers, float? clip_max, int? longest)"
    " -> (Tensor values, Tensor d_logprobs, Tensor d_entropies)"
)


def _launch(
    logprobs: Tensor,
    advantages: Tensor,
    cu_seqlens: Tensor,
    old: Tensor | None,
    ref: Tensor | None,
    sampling: Tensor | None,
    entropies: Tensor | None,
    mask: Tensor | None,
    normalizer: Tensor | None,
    entropy_normalizer: Tensor | None,
    number: float | None,
    entropy_number: float | None,
    *fields: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    from maestro_fast.kernels import policy_loss as kernel

    names, numbers, clip_max, longest = fields
    values, d_logprobs, d_entropies = kernel.policy_loss(
        logprobs,
        advantages,
        cu_seqlens,
        old_logprobs=old,
        ref_logprobs=ref,
        sampling_logprobs=sampling,
        entropies=entropies,
        token_mask=mask,
        normalizer=number if normalizer is None else normalizer,
        entropy_normalizer=entropy_number if entropy_normalizer is None else entropy_normalizer,
        config=_config(tuple(names), tuple(numbers), clip_max, longest),
    )
    return values, d_logprobs, d_logprobs.new_empty(0) if d_entropies is None else d_entropies


library.impl("triton_policy_loss", _launch, "CUDA")
library.impl("triton_policy_loss", _launch, "CPU")  # Triton's interpreter


def _shapes(logprobs: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    floats = logprobs.new_empty(logprobs.shape, dtype=torch.float32)
    with_entropy = rest[-3][-1] > 0
    return floats.new_empty(8), floats, torch.empty_like(floats) if with_entropy else floats.new_empty(0)


torch.library.register_fake("maestro_fast::triton_policy_loss", _shapes, lib=library)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, d_logprobs, d_entropies = output
    ctx.mark_non_differentiable(d_logprobs, d_entropies)
    ctx.save_for_backward(d_logprobs, d_entropies)
    ctx.dtypes = inputs[0].dtype, None if inputs[6] is None else inputs[6].dtype


def _backward(ctx: Any, d_values: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    """The metrics have no gradient: what comes for the values is the loss's share, at 0."""
    d_logprobs, d_entropies = ctx.saved_tensors
    of_logprobs, of_entropies = ctx.dtypes
    first = (d_values[0] * d_logprobs).to(of_logprobs)
    second = None if of_entropies is None or not d_entropies.numel() else (d_values[0] * d_entropies).to(of_entropies)
    return (first, *[None] * 5, second, *[None] * 9)


torch.library.register_autograd("maestro_fast::triton_policy_loss", _backward, setup_context=_remember, lib=library)
