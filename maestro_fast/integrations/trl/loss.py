"""``ops.policy_loss`` in the place of TRL's loss, with TRL's names, values and normalisation.

The log-probs come from TRL's own forward, or with their gradient from hidden states and ``ops.linear_policy_loss``;
``head`` says where. What the two losses have in common gives the same value and the same gradient. The normalisation
of dapo and cispo is that of the newest TRL, on any version: by the tokens of one accumulation window.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from maestro_fast.integrations.trl.head import completion_hidden, head_dtype
from maestro_fast.model.head import head_of
from maestro_fast.ops import PolicyLossConfig, linear_policy_loss, policy_loss

_Normalization = Literal["grpo", "bnpo", "dapo", "dr_grpo"]


def loss_config(trainer: Any) -> PolicyLossConfig:
    """The options of ``ops.policy_loss`` that mean what the trainer's mean."""
    cispo = trainer.loss_type == "cispo"
    normalization: _Normalization = "dapo" if cispo else trainer.loss_type
    corrects = trainer.use_vllm and trainer.vllm_importance_sampling_correction
    cap = getattr(trainer, "vllm_importance_sampling_clip_max", getattr(trainer, "vllm_importance_sampling_cap", None))
    return PolicyLossConfig(
        normalization=normalization,
        clip_low=trainer.epsilon_low,
        clip_high=trainer.epsilon_high,
        kl_coef=trainer.beta,
        max_completion_length=trainer.max_completion_length,
        objective="cispo" if cispo else "clip",
        ratio=trainer.importance_sampling_level,
        clip_max=trainer.epsilon_high if cispo else trainer.args.delta,
        sampler_correction=trainer.vllm_importance_sampling_mode if corrects else "none",
        sampler_cap=math.inf if cap is None else cap,
        entropy_coef=getattr(trainer, "entropy_coef", 0.0),
    )


def packed_policy_loss(trainer: Any, config: PolicyLossConfig, model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    """The scalar loss of one micro-batch, from the log-probs of TRL's forward; its metrics go to TRL's log."""
    completion_ids = inputs["completion_ids"]
    input_ids = torch.cat([inputs["prompt_ids"], completion_ids], dim=1)
    attention_mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
    logprobs, entropies = trainer._get_per_token_logps_and_entropies(
        model, input_ids, attention_mask, completion_ids.shape[1], compute_entropy=True
    )[:2]
    live = _live(inputs)
    lengths = live.sum(1)
    out = policy_loss(
        logprobs[live],
        inputs["advantages"],
        _bounds(lengths),
        entropies=entropies[live] if config.entropy_coef > 0 else None,
        **_given_logprobs(config, inputs, live),
        **_divisors(trainer, config, inputs, lengths),
        config=config,
    )
    tokens = lengths.sum()
    mean_entropy = entropies[live].detach().sum() / tokens.clamp(min=1)
    _log(trainer, {**out.metrics, "entropy": mean_entropy}, tokens)
    return out.loss


def head_policy_loss(trainer: Any, config: PolicyLossConfig, model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    """The same from hidden states, head and loss in one sweep, where ``head.why_trls_logprobs`` has nothing against it.

    What the host has to know of the batch it is told before the forward, so that it does not wait for that.
    """
    live = _live(inputs)
    lengths = live.sum(1)
    rows, bounds, advantages = live.nonzero(as_tuple=True), _bounds(lengths).cpu(), inputs["advantages"].cpu()
    hidden = completion_hidden(trainer, model, inputs)
    head = head_of(trainer.model)
    weight = head.weight.to(head_dtype(trainer, head.weight))
    out = linear_policy_loss(
        hidden[rows].to(weight.device, weight.dtype),
        weight,
        inputs["completion_ids"][rows].to(weight.device),
        advantages,
        bounds,
        **head.numbers,
        temperature=trainer.temperature,
        **_given_logprobs(config, inputs, live),
        **_divisors(trainer, config, inputs, lengths),
        mean_entropy=True,
        config=config,
    )
    _log(trainer, out.metrics, lengths.sum())
    return out.loss


def _live(inputs: Mapping[str, Tensor]) -> Tensor:
    """bool [B, C], the tokens that the policy sampled and the loss counts."""
    mask = inputs["completion_mask"]
    if "tool_mask" in inputs:
        mask = mask * inputs["tool_mask"]
    return mask.bool()


def _bounds(lengths: Tensor) -> Tensor:
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])


def _given_logprobs(config: PolicyLossConfig, inputs: Mapping[str, Tensor], live: Tensor) -> dict[str, Any]:
    def packed(name: str) -> Tensor | None:
        return inputs[name][live] if name in inputs else None

    return {
        "old_logprobs": packed("old_per_token_logps"),
        "ref_logprobs": packed("ref_per_token_logps"),
        "sampling_logprobs": packed("sampling_per_token_logps") if config.sampler_correction != "none" else None,
    }


def _divisors(trainer: Any, config: PolicyLossConfig, inputs: Mapping[str, Tensor], lengths: Tensor) -> dict[str, Any]:
    steps = trainer.current_gradient_accumulation_steps if trainer.model.training else 1
    tokens = lengths.sum().clamp(min=1)
    return {
        "normalizer": _normalizer(trainer, inputs, config, tokens, steps),
        "entropy_normalizer": tokens * steps,
    }


def _normalizer(
    trainer: Any, inputs: Mapping[str, Tensor], config: PolicyLossConfig, tokens: Tensor, steps: int
) -> Tensor | float:
    """Divisor of the loss's sum: over the ``steps`` micro-batches of an update, their losses add up to the mean."""
    if config.normalization == "bnpo":
        return tokens * steps
    if config.normalization != "dapo":
        return float(inputs["completion_ids"].shape[0] * steps)
    # TRL counts the tokens of the generation batch over all processes, whose gradients are averaged
    share = steps / trainer.args.steps_per_generation if trainer.model.training else 1.0
    total = torch.as_tensor(inputs["num_items_in_batch"], device=tokens.device)
    divisor: Tensor = total.clamp(min=1) / trainer.accelerator.num_processes * share
    return divisor


_TRL_NAMES = {
    "clip_low": "clip_ratio/low_mean",
    "clip_high": "clip_ratio/high_mean",
    "kl": "kl",
    "entropy": "entropy",
    "ratio": "ratio",
}


def _log(trainer: Any, metrics: dict[str, Tensor], tokens: Tensor) -> None:
    """Means over the live tokens of this micro-batch on all processes, under TRL's names."""
    named = {_TRL_NAMES[name]: value for name, value in metrics.items() if name in _TRL_NAMES}
    if trainer.loss_type == "cispo":
        named["cispo_clip_ratio"] = named.pop("clip_ratio/high_mean")
        del named["clip_ratio/low_mean"]
    else:
        named["clip_ratio/region_mean"] = named["clip_ratio/low_mean"] + named["clip_ratio/high_mean"]
    local = torch.stack([*(value.detach().float() * tokens for value in named.values()), tokens.float()])
    *sums, count = trainer.accelerator.reduce(local, reduction="sum").tolist()
    log = trainer._metrics["train" if trainer.model.training else "eval"]
    for name, total in zip(named, sums, strict=True):
        log[name].append(total / max(count, 1.0))
