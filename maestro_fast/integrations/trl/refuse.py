"""What cannot be served inside TRL, and why: said when the trainer is made, not after a day of training."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from accelerate.utils import is_peft_model
from transformers import ProcessorMixin

from maestro_fast.integrations.trl.context import scores_old_logprobs
from maestro_fast.model.head import causal_lm
from maestro_fast.weighting import Static, WeightPolicy


@dataclass(frozen=True)
class Refusal:
    """A setting that is refused.

    Attributes:
        setting: what the user wrote, as in TRL.
        where: the part of maestro_fast that cannot be had with it.
        reason: why.
    """

    setting: str
    where: str
    reason: str
    applies: Callable[[Any, WeightPolicy], bool]


def _is_set(name: str, *neutral: object) -> Callable[[Any, WeightPolicy], bool]:
    """Whether ``args.<name>`` is there and not neutral; older versions of TRL lack some."""
    return lambda trainer, _policy: getattr(trainer.args, name, neutral[0]) not in neutral


_NO_TERMINAL_STATE = "a weight policy that reads hidden states"
_LOSS = 'loss="maestro_fast"'

_ALWAYS = (
    Refusal(
        "no reward function",
        "everything",
        "there is nothing to weigh",
        lambda trainer, _policy: not trainer.reward_funcs,
    ),
    Refusal(
        "reward_weights",
        "weights: static",
        "both are fixed weights, and it is not said which of them counts",
        lambda trainer, policy: isinstance(policy, Static) and trainer.args.reward_weights is not None,
    ),
)
_CONTEXT = (
    Refusal(
        "a vision-language model",
        _NO_TERMINAL_STATE,
        "a forward for hidden states does not get the images",
        lambda trainer, _policy: isinstance(trainer.processing_class, ProcessorMixin),
    ),
    Refusal(
        "prompt learning of PEFT (prompt or prefix tuning)",
        _NO_TERMINAL_STATE,
        "virtual tokens shift the hidden states against the attention mask",
        lambda trainer, _policy: prompt_learning(trainer.model),
    ),
    Refusal(
        "a model whose forward takes no logits_to_keep, where TRL scores no old log-probs",
        _NO_TERMINAL_STATE,
        "the forward for hidden states would form all logits",
        lambda trainer, _policy: not scores_old_logprobs(trainer) and not keeps_logits(trainer.model),
    ),
)
_IN_LOSS = (
    Refusal(
        "loss_type luspo, sapo, vespo or any other than grpo, bnpo, dr_grpo, dapo, cispo",
        _LOSS,
        "ops.policy_loss has no such objective",
        lambda trainer, _policy: trainer.loss_type not in ("grpo", "bnpo", "dr_grpo", "dapo", "cispo"),
    ),
    Refusal(
        "off_policy_mask_threshold",
        _LOSS,
        "ops.policy_loss drops no sequences",
        _is_set("off_policy_mask_threshold", None),
    ),
    Refusal(
        "top_entropy_quantile below 1",
        _LOSS,
        "ops.policy_loss takes no mask for the policy term alone",
        _is_set("top_entropy_quantile", 1.0),
    ),
    Refusal(
        "beta with use_bias_correction_kl",
        _LOSS,
        "ops.policy_loss has the plain k3 estimator",
        lambda trainer, _policy: trainer.beta != 0 and trainer.args.use_bias_correction_kl,
    ),
    Refusal(
        "use_adaptive_entropy",
        _LOSS,
        "the coefficient of ops.policy_loss is constant",
        _is_set("use_adaptive_entropy", False),
    ),
    Refusal(
        "vllm_importance_sampling_clip_min",
        _LOSS,
        "ops.policy_loss caps the sampler's ratio from above only",
        _is_set("vllm_importance_sampling_clip_min", None),
    ),
    Refusal(
        "the auxiliary loss of a mixture of experts",
        _LOSS,
        "only TRL's loss adds it",
        lambda trainer, _policy: getattr(trainer, "aux_loss_enabled", False),
    ),
    Refusal(
        "use_liger_kernel, where that is Liger's loss (old versions)",
        _LOSS,
        "each replaces TRL's loss, and only one can",
        lambda trainer, _policy: trainer.args.use_liger_kernel and hasattr(trainer, "compute_liger_loss"),
    ),
    Refusal(
        "images",
        _LOSS,
        "its forward gets token ids alone",
        lambda trainer, _policy: isinstance(trainer.processing_class, ProcessorMixin),
    ),
)


def refusals() -> tuple[Refusal, ...]:
    """All of them, in the order in which they are looked at."""
    return _ALWAYS + _CONTEXT + _IN_LOSS


def check(trainer: Any, policy: WeightPolicy, loss: str) -> None:
    """Raises for the first refusal that applies.

    Raises:
        ValueError: names the setting, the part that cannot be had, and the reason.
    """
    if loss not in ("trl", "maestro_fast"):
        raise ValueError(f"loss: {loss!r}, expected 'trl' or 'maestro_fast'")
    wanted = _ALWAYS + (_CONTEXT if policy.needs_context else ()) + (_IN_LOSS if loss == "maestro_fast" else ())
    for refusal in wanted:
        if refusal.applies(trainer, policy):
            raise ValueError(f"{refusal.setting}: not with {refusal.where}: {refusal.reason}")


def prompt_learning(model: Any) -> bool:
    """Whether an adapter puts virtual tokens in front of the prompt."""
    return is_peft_model(model) and any(config.is_prompt_learning for config in model.peft_config.values())


def keeps_logits(model: Any) -> bool:
    """Whether the forward can leave out the logits that nobody asks for."""
    return "logits_to_keep" in inspect.signature(type(causal_lm(model)).forward).parameters
