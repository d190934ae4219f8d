"""Head and loss in one sweep inside TRL: where the hidden states may be taken, and the forward that gives them.

``ops.linear_policy_loss`` has its log-probs from a head of its own, which rounds otherwise than TRL's. So it is used
where no log-prob of TRL's is compared with them, and where the head is a plain matrix that every process holds.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from maestro_fast.integrations.trl.context import scores_old_logprobs
from maestro_fast.integrations.trl.refuse import keeps_logits, prompt_learning
from maestro_fast.model.head import backbone_of, check_head, head_of

logger = logging.getLogger(__name__)


def takes_hidden_states(trainer: Any) -> bool:
    """Whether the loss is taken from the hidden states; the log says so, or why not."""
    reason = why_trls_logprobs(trainer)
    if trainer.accelerator.is_main_process:
        if reason is None:
            logger.info("loss: maestro_fast, head and loss in one sweep over the hidden states")
        else:
            logger.info("loss: maestro_fast, from the log-probs of TRL's forward: %s", reason)
    return reason is None


def why_trls_logprobs(trainer: Any) -> str | None:
    """Why the loss has to be taken from TRL's log-probs; None where it can be taken from the hidden states."""
    reasons = {
        "TRL scores old log-probs, by its own head": scores_old_logprobs(trainer),
        "beta: TRL's reference log-probs come from its own head": trainer.beta != 0,
        "with DeepSpeed or FSDP the head is not read outside the forward": (
            trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled
        ),
        "torch.nn.DataParallel splits the forward": trainer.args.n_gpu > 1,
        "a hook on the backbone is not sure to run in a compiled model": (
            trainer.args.torch_compile or hasattr(trainer.model, "_orig_mod")
        ),
        "_get_per_token_logps_and_entropies is overridden": _overrides_logprobs(trainer),
        "the model's forward takes no logits_to_keep": not keeps_logits(trainer.model),
        "virtual tokens of PEFT shift the hidden states": prompt_learning(trainer.model),
    }
    return next((reason for reason, applies in reasons.items() if applies), None) or _unreadable_head(trainer.model)


def _overrides_logprobs(trainer: Any) -> bool:
    name = "_get_per_token_logps_and_entropies"
    owners = [owner.__module__.partition(".")[0] for owner in type(trainer).__mro__ if name in vars(owner)]
    return not {*owners} <= {"trl", "maestro_fast"}


def _unreadable_head(model: nn.Module) -> str | None:
    """What is wrong with the head, in words."""
    try:
        head = head_of(model)
        if type(head.module) is not nn.Linear or type(head.module.weight) is not nn.Parameter:
            return f"the head is a {type(head.module).__name__}, not a plain torch.nn.Linear"
        check_head(model, head)
    except (RuntimeError, ValueError, TypeError, AttributeError) as error:  # whatever a model makes of being read
        return f"{type(error).__name__}: {error}"
    return None


def head_dtype(trainer: Any, weight: Tensor) -> torch.dtype:
    """The dtype that the head's product has in TRL: autocast's, as for every other linear layer, or the weight's."""
    device = weight.device.type
    with trainer.accelerator.autocast():
        casts = torch.is_autocast_enabled(device) and weight.dtype is not torch.float64
    if not casts or getattr(trainer.args, "cast_lm_head_to_fp32", False):
        return weight.dtype
    with trainer.accelerator.autocast():
        return torch.get_autocast_dtype(device)


def completion_hidden(trainer: Any, model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """[B, C, d], the states that predict the completion tokens, padding among them; no logits but of one position."""
    states: list[Tensor] = []
    handle = backbone_of(trainer.model).register_forward_hook(
        lambda _module, _args, out: states.append(out.last_hidden_state)
    )
    try:
        with trainer.accelerator.autocast():
            model(
                input_ids=torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1),
                attention_mask=torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),
                use_cache=False,
                logits_to_keep=1,
            )
    finally:
        handle.remove()
    return states[0][:, -inputs["completion_ids"].shape[1] - 1 : -1]
