"""Puts ``ops.policy_loss`` in the place of TRL's loss, with TRL's names, values and normalisation.

Where both losses have an objective, ours gives the same value and the same gradient as TRL's. The normalisation of dapo
and cispo is that of the newest TRL, on any version: by the tokens of one accumulation window.

There are two ways to the log-probs. ``packed_policy_loss`` takes them from TRL's own forward. ``head_policy_loss`` has
``ops.linear_policy_loss`` compute them from the hidden states: head and loss in one sweep, without all the logits. The
op's head rounds otherwise than TRL's, so this way is taken only where no log-prob of TRL's is compared with the op's,
and where the head is a plain matrix that every process holds; ``why_trls_logprobs`` checks that. FSDP2 shards the head,
but leaves it whole between a forward and its backward, because the backward begins with it.

A user's own loss, a function of ``LossInputs``, goes the same two ways.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
import trl.trainer.utils
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from maestro_fast.integrations.trl.context import scores_old_logprobs
from maestro_fast.integrations.trl.overrides import overrides
from maestro_fast.integrations.trl.refuse import keeps_logits, prompt_learning
from maestro_fast.integrations.trl.sharing import layouts_of, sequences_to_read, shards_unseen
from maestro_fast.model import (
    Layouts,
    Sequences,
    backbone_of,
    causal_lm,
    check_head,
    head_of,
    last_hidden,
    product_dtype,
)
from maestro_fast.model.forward import evaluating
from maestro_fast.ops import LossFunction, PolicyLossConfig, linear_policy_loss, policy_loss
from maestro_fast.ops.loss_function import wants_entropies

logger = logging.getLogger(__name__)
_Normalization = Literal["grpo", "bnpo", "dapo", "dr_grpo"]
_Loss = PolicyLossConfig | LossFunction


# --- when the trainer is made ---


def loss_config(trainer: Any) -> PolicyLossConfig:
    """Translates the trainer's options into those of ``ops.policy_loss``.

    Raises:
        ValueError: ``ops.policy_loss`` does not take the value of an option; the message has TRL's name of it.
    """
    cispo = trainer.loss_type == "cispo"
    normalization: _Normalization = "dapo" if cispo else trainer.loss_type
    corrects = trainer.use_vllm and trainer.vllm_importance_sampling_correction
    cap_name = _first_of(trainer, "vllm_importance_sampling_clip_max", "vllm_importance_sampling_cap")
    cap = getattr(trainer, cap_name, None)
    trl_names = {
        "clip_low": "epsilon",
        "clip_high": "epsilon_high",
        "kl_coef": "beta",
        "clip_max": "epsilon_high" if cispo else "delta",
        "sampler_cap": cap_name,
    }
    try:
        return PolicyLossConfig(
            normalization=normalization,
            clip_low=min(trainer.epsilon_low, 1.0),  # A ratio is never below 0, so a wider clip is the same.
            clip_high=trainer.epsilon_high,
            kl_coef=trainer.beta,
            kl_bias_correction=trainer.args.use_bias_correction_kl,
            max_completion_length=trainer.max_completion_length,
            objective="cispo" if cispo else "clip",
            ratio=trainer.importance_sampling_level,
            clip_max=trainer.epsilon_high if cispo else trainer.args.delta,
            sampler_correction=trainer.vllm_importance_sampling_mode if corrects else "none",
            sampler_cap=math.inf if cap is None else cap,
            entropy_coef=getattr(trainer, "entropy_coef", 0.0),
        )
    except ValueError as error:
        name, _, rest = str(error).partition(":")
        raise ValueError(f'{trl_names.get(name, name)}:{rest} ({name} is its name in loss="maestro_fast")') from None


def _first_of(trainer: Any, *names: str) -> str:
    """The first of TRL's names for an option that this version has; the last one if it has none."""
    return next((name for name in names if hasattr(trainer, name)), names[-1])


def layouts_for_loss(trainer: Any) -> Layouts | None:
    """How the hidden states are computed that the loss is computed from; None if it is computed from TRL's log-probs.

    The log says which of the two it is, and why.
    """
    layouts, reason = None, why_trls_logprobs(trainer)
    if reason is None:
        try:
            layouts = layouts_of(trainer)
        except ValueError as error:
            reason = str(error)
    if trainer.accelerator.is_main_process:
        if reason is None:
            logger.info("loss: maestro_fast, head and loss in one sweep over the hidden states")
        else:
            logger.info("loss: maestro_fast, from the log-probs of TRL's forward: %s", reason)
    return layouts


def why_trls_logprobs(trainer: Any) -> str | None:
    """Why the loss must be computed from TRL's log-probs; None if it can be computed from the hidden states."""
    reasons = {
        "TRL scores old log-probs, by its own head": scores_old_logprobs(trainer),
        "beta: TRL's reference log-probs come from its own head": trainer.beta != 0,
        "with DeepSpeed or FSDP1 the head is not read outside the forward": shards_unseen(trainer),
        "torch.nn.DataParallel splits the forward": trainer.args.n_gpu > 1,
        "a hook on the backbone is not sure to run in a compiled model": (
            trainer.args.torch_compile or hasattr(trainer.model, "_orig_mod")
        ),
        "_get_per_token_logps_and_entropies is overridden": bool(
            overrides(trainer, "_get_per_token_logps_and_entropies")
        ),
        "the model's forward takes no logits_to_keep": not keeps_logits(trainer.model),
        "virtual tokens of PEFT shift the hidden states": prompt_learning(trainer.model),
    }
    return next((reason for reason, applies in reasons.items() if applies), None) or _unreadable_head(trainer.model)


def _unreadable_head(model: nn.Module) -> str | None:
    """Why the model's head cannot be read, in words; None if it can."""
    try:
        head = head_of(model)
        if isinstance(model, FSDPModule) and _sharded_head(model)[1]:
            return "FSDP2 shards the head again right after the forward"
        weight: Any = head.module.weight
        if _class_of(head.module) is not nn.Linear or type(weight) is not nn.Parameter:
            return f"the head is a {type(head.module).__name__}, not a plain torch.nn.Linear"
        check_head(model, head)
    except (RuntimeError, ValueError, TypeError, AttributeError) as error:  # A model may raise any of these when read.
        return f"{type(error).__name__}: {error}"
    return None


def check_sharded_head(trainer: Any) -> None:
    """Checks that FSDP2 makes the head whole for the forward, where TRL reads its weight without calling it.

    TRL gathers a head that is sharded there, but its gradient is then that of one process: it is not reduced. A policy
    trained so (TRL 1.16, the head wrapped as a unit of its own) differs from that of DDP.

    Raises:
        ValueError: the head is trained and sharded there.
    """
    if not hasattr(trl.trainer.utils, "add_fused_lm_head"):  # Older versions call the head.
        return
    head = causal_lm(trainer.model).get_output_embeddings() if keeps_logits(trainer.model) else None
    if head is not None and head.weight.requires_grad and _sharded_head(trainer.model)[0]:
        raise ValueError(
            "fsdp_config: it makes the output head an FSDP unit of its own, expected transformer layers alone in "
            "transformer_layer_cls_to_wrap: TRL reads the head's weight without calling the head, and its gradient "
            "would not be reduced over the processes"
        )


@torch.no_grad()
def _sharded_head(model: nn.Module) -> tuple[bool, bool]:
    """Whether the head of a model under FSDP2 is sharded when the backbone has run, and when the whole forward has."""
    head, found = causal_lm(model).get_output_embeddings(), []

    def look(*_args: Any) -> None:
        found.append(isinstance(head.weight, DTensor))

    handle = backbone_of(model).register_forward_hook(look)
    try:
        with evaluating(model):  # Dropout would draw random numbers, which a resumed run must not draw once more.
            last_hidden(model, Sequences([[0, 1]], [[2]]), "padded")
    finally:
        handle.remove()
    look()
    return found[0], found[1]


def _class_of(module: nn.Module) -> type:
    """The class of a module; where FSDP2 has made a subclass of it, the class that the module had before."""
    return type(module).__bases__[1] if isinstance(module, FSDPModule) else type(module)


# --- the loss of a micro-batch ---


def packed_policy_loss(trainer: Any, config: _Loss, model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    """Computes the loss of a micro-batch from the log-probs of TRL's forward; its metrics go to TRL's log."""
    completion_ids = inputs["completion_ids"]
    input_ids = torch.cat([inputs["prompt_ids"], completion_ids], dim=1)
    attention_mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
    logprobs, entropies = trainer._get_per_token_logps_and_entropies(
        model, input_ids, attention_mask, completion_ids.shape[1], compute_entropy=True
    )[:2]
    counted = _counted(inputs)
    lengths = counted.sum(1)
    out = policy_loss(
        logprobs[counted],
        inputs["advantages"],
        _bounds(lengths),
        entropies=entropies[counted] if wants_entropies(config) else None,
        **_other_logprobs(config, inputs, counted),
        **_divisors(trainer, config, inputs, lengths),
        config=config,
    )
    tokens = lengths.sum()
    mean_entropy = entropies[counted].detach().sum() / tokens.clamp(min=1)
    _log(trainer, config, {**out.metrics, "entropy": mean_entropy}, tokens)
    _log_entropy_bonus(trainer, config, out.loss, mean_entropy)
    return out.loss


def head_policy_loss(trainer: Any, config: _Loss, model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    """Computes the same loss from the hidden states, with head and loss in one sweep.

    ``model`` is the wrapped model that TRL hands to the loss. The values that the CPU needs of the batch are copied to
    it before the forward, so that it need not wait for that.
    """
    counted = _counted(inputs)
    lengths, counted_BC = counted.sum(1), counted.cpu()
    sequences, predicting = sequences_to_read(inputs, counted_BC)
    targets = inputs["completion_ids"].cpu()[counted_BC]
    bounds, advantages = _bounds(lengths).cpu(), inputs["advantages"].cpu()
    with trainer.accelerator.autocast():
        hidden = last_hidden(model, sequences, trainer._layouts)
    head = head_of(trainer.model)
    parameter: Any = head.module.weight
    weight: Tensor = parameter.to(head_dtype(trainer, parameter))
    out = linear_policy_loss(
        hidden.take(predicting, weight.dtype).to(weight.device),
        weight,
        targets.to(weight.device),
        advantages,
        bounds,
        **head.numbers,
        temperature=trainer.temperature,
        **_other_logprobs(config, inputs, counted),
        **_divisors(trainer, config, inputs, lengths),
        mean_entropy=True,
        config=config,
    )
    _log(trainer, config, out.metrics, lengths.sum())
    _log_entropy_bonus(trainer, config, out.loss, out.metrics["entropy"])
    return out.loss


def head_dtype(trainer: Any, weight: Tensor) -> torch.dtype:
    """The dtype of the head's product in TRL: that of every other linear layer, unless TRL casts the head's logits."""
    if getattr(trainer.args, "cast_lm_head_to_fp32", False):
        return weight.dtype
    with trainer.accelerator.autocast():
        return product_dtype(weight)


# --- TRL's inputs in the ops' terms, and the ops' metrics in TRL's ---


def _counted(inputs: Mapping[str, Tensor]) -> Tensor:
    """bool [B, C], the tokens that the loss counts: the policy sampled them, and no mask leaves them out."""
    mask = inputs["completion_mask"]
    if "tool_mask" in inputs:
        mask = mask * inputs["tool_mask"]
    return mask.bool()


def _bounds(lengths: Tensor) -> Tensor:
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])


def _other_logprobs(config: _Loss, inputs: Mapping[str, Tensor], counted: Tensor) -> dict[str, Any]:
    """The log-probs [T] of the counted tokens under the old policy, the reference and the sampler, if TRL has them.

    A config that does not correct for the sampler gets no log-probs of it, and so logs no metric of them.
    """
    reads_sampler = not isinstance(config, PolicyLossConfig) or config.sampler_correction != "none"

    def packed(name: str) -> Tensor | None:
        return inputs[name][counted] if name in inputs else None

    return {
        "old_logprobs": packed("old_per_token_logps"),
        "ref_logprobs": packed("ref_per_token_logps"),
        "sampling_logprobs": packed("sampling_per_token_logps") if reads_sampler else None,
    }


def _divisors(trainer: Any, config: _Loss, inputs: Mapping[str, Tensor], lengths: Tensor) -> dict[str, Any]:
    """What the sums over a micro-batch are divided by, so that the micro-batches of an update add up to its mean.

    A loss function gets the divisor of dapo as ``normalizer``, the number of tokens of the update.
    """
    steps = trainer.current_gradient_accumulation_steps if trainer.model.training else 1
    tokens = lengths.sum().clamp(min=1)
    divisors: dict[str, Any] = {"entropy_normalizer": tokens * steps}
    normalization = config.normalization if isinstance(config, PolicyLossConfig) else "dapo"
    if normalization == "bnpo":
        return divisors | {"normalizer": tokens * steps}
    if normalization != "dapo":
        return divisors | {"normalizer": float(inputs["completion_ids"].shape[0] * steps)}
    # TRL counts the tokens of the generation batch over all processes, and the processes' gradients are averaged.
    share = steps / trainer.args.steps_per_generation if trainer.model.training else 1.0
    total = torch.as_tensor(inputs["num_items_in_batch"], device=tokens.device)
    return divisors | {"normalizer": total.clamp(min=1) / trainer.accelerator.num_processes * share}


_TRL_NAMES = {
    "clip_low": "clip_ratio/low_mean",
    "clip_high": "clip_ratio/high_mean",
    "kl": "kl",
    "entropy": "entropy",
    "ratio": "ratio",
}


def _trl_metrics(metrics: dict[str, Tensor], *, cispo: bool) -> dict[str, Tensor]:
    """The metrics of ``ops.policy_loss`` that TRL logs, too, under TRL's names."""
    named = {_TRL_NAMES[name]: value for name, value in metrics.items() if name in _TRL_NAMES}
    if cispo:
        named["cispo_clip_ratio"] = named.pop("clip_ratio/high_mean")
        del named["clip_ratio/low_mean"]
    else:
        named["clip_ratio/region_mean"] = named["clip_ratio/low_mean"] + named["clip_ratio/high_mean"]
    return named


def _log(trainer: Any, config: _Loss, metrics: dict[str, Tensor], tokens: Tensor) -> None:
    """Logs the mean of each metric over the counted tokens of this micro-batch on all processes.

    The metrics of a loss function keep their names.
    """
    named = metrics
    if isinstance(config, PolicyLossConfig):
        named = _trl_metrics(metrics, cispo=config.objective == "cispo")
    local = torch.stack([*(value.detach().float() * tokens for value in named.values()), tokens.float()])
    *sums, count = trainer.accelerator.reduce(local, reduction="sum").tolist()
    log = trainer._metrics["train" if trainer.model.training else "eval"]
    for name, total in zip(named, sums, strict=True):
        log[name].append(total / max(count, 1.0))


def _log_entropy_bonus(trainer: Any, config: _Loss, loss: Tensor, mean_entropy: Tensor) -> None:
    """Logs the loss without its entropy bonus as ``policy_loss``, and the coefficient, if there is a bonus.

    As in TRL, the mean over a micro-batch is not divided by the steps of accumulation here, but the sum that dapo and
    cispo divide by the tokens of the update is. The coefficient is logged once for each update.
    """
    if not isinstance(config, PolicyLossConfig) or not config.entropy_coef:
        return
    training = trainer.model.training
    steps = trainer.current_gradient_accumulation_steps if training else 1
    policy_loss = loss.detach() + config.entropy_coef * mean_entropy / steps
    if config.normalization != "dapo":
        policy_loss = policy_loss * steps
    log = trainer._metrics["train" if training else "eval"]
    log["policy_loss"].append(trainer.accelerator.gather(policy_loss).nanmean().item())
    if training and trainer.accelerator.sync_gradients:
        log["entropy_coef"].append(config.entropy_coef)
