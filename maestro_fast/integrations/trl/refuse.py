"""Refuses what cannot be served inside TRL, and says why, when the trainer is made and not after a day of training.

``refusals()`` is the table of settings that are refused, and ``refusal_table()`` prints it for the documentation.
``check_version`` checks the version of TRL itself.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

from accelerate.utils import is_peft_model
from packaging.version import Version
from transformers import ProcessorMixin

from maestro_fast.integrations.refusals import Refusal, as_table
from maestro_fast.integrations.trl.context import MODES, scores_old_logprobs
from maestro_fast.integrations.trl.overrides import hides_ours, other_advantages, other_loss
from maestro_fast.model import causal_lm
from maestro_fast.ops import LossFunction
from maestro_fast.weighting import (
    Anchored,
    Conductor,
    Guarded,
    RewardModel,
    Static,
    Utility,
    WeightPolicy,
    check_profile,
)

# --- versions of TRL ---

# The tests train with the oldest and with the newest version that are named here.
OLDEST = "0.29"  # the first version with multi_objective_aggregation, so that each of TRL's profiles has a name
NEWEST = "1.16"

_warned = False


def check_version() -> None:
    """Warns, once, about a version of TRL that the tests do not train with.

    Raises:
        ImportError: TRL is older than ``OLDEST`` and lacks the methods that are overridden here.
    """
    global _warned
    found = Version(version("trl"))
    if found < Version(OLDEST):
        raise ImportError(
            f"trl {found} is too old, maestro_fast needs {OLDEST} or newer: pip install 'maestro-fast[trl]'"
        )
    if _warned or any(found.release[:2] == Version(tested).release for tested in (OLDEST, NEWEST)):
        return
    _warned = True
    warnings.warn(f"maestro_fast is tested with TRL {OLDEST} and {NEWEST}, this is {found}; it may work", stacklevel=4)


# --- settings ---


def _is_set(name: str, neutral: object) -> Callable[[Any, WeightPolicy], bool]:
    """Whether ``args.<name>`` has another value than the neutral one; older versions of TRL lack some settings."""
    return lambda trainer, _policy: getattr(trainer.args, name, neutral) != neutral


def _corrects_for_truncation(trainer: Any, _policy: WeightPolicy) -> bool:
    """Whether the log-probs that TRL divides by are of a truncated or penalised distribution, and the policy's not."""
    args = trainer.args
    if not (args.use_vllm and args.vllm_importance_sampling_correction):
        return False
    neutral: dict[str, tuple[Any, ...]] = {
        "top_p": (None, 1.0),
        "top_k": (None, 0, -1),
        "min_p": (None, 0.0),
        "repetition_penalty": (None, 1.0),
        "presence_penalty": (None, 0.0),
        "frequency_penalty": (None, 0.0),
        "logit_bias": (None, {}),
        "temperature": (args.temperature,),  # generation_kwargs may set another one for vLLM alone.
    }
    own = args.generation_kwargs or {}
    return any(own.get(name, getattr(args, name, None)) not in values for name, values in neutral.items())


def _compares_beyond_groups(trainer: Any, policy: WeightPolicy) -> bool:
    try:
        check_profile(policy, trainer.profile)
    except ValueError:
        return True
    return False


def _needs_utility(policy: WeightPolicy) -> bool:
    """Whether the policy fails without known utilities, which TRL has no place for."""
    if isinstance(policy, Conductor):
        return policy.config.objective == "first_order"
    return isinstance(policy, Anchored | Guarded | RewardModel | Utility)


EVERYTHING = "everything"
STATIC = "weights: static"
OTHER_WEIGHTS = "the Conductor's estimators baseline, all_actions and pathwise"
OUR_PROFILE = "a profile that is not TRL's"
UTILITY = "weights anchored, reward_model and utility, the Conductor's objective first_order, and a guard"
CONTEXT = "a weight policy that reads hidden states"
OUR_LOSS = 'loss="maestro_fast"'
NOT_TRLS_LOSS = 'loss="maestro_fast" or a function'


def _hides_ours(trainer: Any, policy: WeightPolicy) -> str | None:
    methods = ["_generate_and_score_completions", "_calculate_rewards", "_save_checkpoint"]
    methods += ["_load_optimizer_and_scheduler", *(["_generate"] if policy.needs_context else [])]
    return hides_ours(trainer, *methods)


_REFUSALS = (
    Refusal(
        "a method of your subclass that does not call super()",
        EVERYTHING,
        "ours would never run: let it call super(), or put it into a subclass of trl.GRPOTrainer and write "
        "class Mine(MaestroGRPOMixin, ThatSubclass)",
        _hides_ours,
    ),
    Refusal(
        "a _generate_and_score_completions of your own that sets advantages",
        OUR_PROFILE,
        "the profile would replace them: leave out profile, or put MaestroGRPOTrainer behind your class and call "
        "super() first",
        lambda trainer, _policy: other_advantages(trainer),
    ),
    Refusal(
        "no reward function",
        EVERYTHING,
        "there is nothing to weigh",
        lambda trainer, _policy: not trainer.reward_funcs,
    ),
    Refusal(
        "reward_weights",
        STATIC,
        "both are fixed weights, and it is not said which of them counts",
        lambda trainer, policy: isinstance(policy, Static) and trainer.args.reward_weights is not None,
    ),
    Refusal(
        "a profile that compares scores beyond their group (gdpo, grpo_batch, verl_gdpo)",
        OTHER_WEIGHTS,
        "they ask what other weights would have given, one group at a time",
        _compares_beyond_groups,
    ),
    Refusal(
        "no known utility",
        UTILITY,
        "TRL hands out rewards alone: train with maestro-fast train or verl, or take other weights",
        lambda _trainer, policy: policy.name,
    ),
    Refusal(
        "context: response_first_layer or reference_prompt_mean",
        CONTEXT,
        "only the last layer of the policy itself is read: set context to one of " + ", ".join(MODES),
        lambda _trainer, policy: policy.context_kind not in MODES and policy.context_kind,
    ),
    Refusal(
        "a vision-language model",
        CONTEXT,
        "a forward for hidden states does not get the images",
        lambda trainer, _policy: isinstance(trainer.processing_class, ProcessorMixin),
    ),
    Refusal(
        "prompt learning of PEFT (prompt or prefix tuning)",
        CONTEXT,
        "virtual tokens shift the hidden states against the attention mask",
        lambda trainer, _policy: prompt_learning(trainer.model),
    ),
    Refusal(
        "a model whose forward takes no logits_to_keep, where TRL scores no old log-probs",
        CONTEXT,
        "the forward for hidden states would form all logits",
        lambda trainer, _policy: not scores_old_logprobs(trainer) and not keeps_logits(trainer.model),
    ),
    Refusal(
        "a _compute_loss or compute_loss of your own",
        NOT_TRLS_LOSS,
        "only one of them can be the loss: drop loss= to train with yours, or write yours as a function of LossInputs "
        "and give that as loss=",
        lambda trainer, _policy: other_loss(trainer),
    ),
    Refusal(
        "loss_type luspo, sapo, vespo or any other than grpo, bnpo, dr_grpo, dapo, cispo",
        OUR_LOSS,
        "ops.policy_loss has no such objective",
        lambda trainer, _policy: trainer.loss_type not in ("grpo", "bnpo", "dr_grpo", "dapo", "cispo"),
    ),
    Refusal(
        "off_policy_mask_threshold",
        NOT_TRLS_LOSS,
        "only TRL's loss drops sequences",
        _is_set("off_policy_mask_threshold", None),
    ),
    Refusal(
        "top_entropy_quantile below 1",
        NOT_TRLS_LOSS,
        "only TRL's loss has a mask for the policy term alone",
        _is_set("top_entropy_quantile", 1.0),
    ),
    Refusal(
        "use_adaptive_entropy",
        NOT_TRLS_LOSS,
        "only TRL's loss adapts its entropy coefficient",
        _is_set("use_adaptive_entropy", False),
    ),
    Refusal(
        "vllm_importance_sampling_clip_min",
        NOT_TRLS_LOSS,
        "only TRL's loss caps the sampler's ratio from below",
        _is_set("vllm_importance_sampling_clip_min", None),
    ),
    Refusal(
        "vllm_importance_sampling_correction with top_p, top_k, min_p, penalties, logit_bias or vLLM's own temperature",
        OUR_LOSS,
        "vLLM's log-probs are those after these and the policy's those before: set vllm_importance_sampling_correction "
        "to False, or turn these off",
        _corrects_for_truncation,
    ),
    Refusal(
        "the auxiliary loss of a mixture of experts",
        NOT_TRLS_LOSS,
        "only TRL's loss adds it: set router_aux_loss_coef=0 to train without it, or drop loss= to keep it",
        lambda trainer, _policy: getattr(trainer, "aux_loss_enabled", False),
    ),
    Refusal(
        "use_liger_kernel, where that is Liger's loss (old versions)",
        NOT_TRLS_LOSS,
        "each replaces TRL's loss, and only one can",
        lambda trainer, _policy: trainer.args.use_liger_kernel and hasattr(trainer, "compute_liger_loss"),
    ),
    Refusal(
        "images",
        NOT_TRLS_LOSS,
        "its forward gets token ids alone",
        lambda trainer, _policy: isinstance(trainer.processing_class, ProcessorMixin),
    ),
)


def refusals() -> tuple[Refusal, ...]:
    """All refusals, in the order in which a new trainer is checked for them."""
    return _REFUSALS


def refusal_table() -> str:
    """The refusals as a table in Markdown, for the documentation."""
    return as_table(_REFUSALS)


def check(trainer: Any, policy: WeightPolicy, loss: str | LossFunction) -> None:
    """Raises for the first refusal that applies to a new trainer.

    Raises:
        ValueError: the message names the setting, the part of maestro_fast that does not work with it, and the reason.
        TypeError: ``loss`` is neither a name nor a function.
    """
    if not isinstance(loss, str) and not callable(loss):
        raise TypeError(f"loss: got {type(loss).__name__}, expected 'trl', 'maestro_fast' or a function of LossInputs")
    if isinstance(loss, str) and loss not in ("trl", "maestro_fast"):
        raise ValueError(f"loss: {loss!r}, expected 'trl', 'maestro_fast' or a function of LossInputs")
    used = {
        EVERYTHING: True,
        OUR_PROFILE: not trainer._trl_aggregates,
        STATIC: True,
        OTHER_WEIGHTS: policy.needs_group_scores,
        UTILITY: _needs_utility(policy),
        CONTEXT: policy.needs_context,
        OUR_LOSS: loss == "maestro_fast",
        NOT_TRLS_LOSS: loss != "trl",
    }
    for refusal in _REFUSALS:
        if used[refusal.where] and (found := refusal.applies(trainer, policy)):
            raise ValueError(refusal.message(found))


def prompt_learning(model: Any) -> bool:
    """Whether an adapter puts virtual tokens in front of the prompt."""
    return is_peft_model(model) and any(config.is_prompt_learning for config in model.peft_config.values())


def keeps_logits(model: Any) -> bool:
    """Whether the model's forward can leave out the logits that nobody asks for."""
    return "logits_to_keep" in inspect.signature(type(causal_lm(model)).forward).parameters
