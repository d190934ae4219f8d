"""Computes the policy loss of a micro-batch, from its hidden states or from log-probs that are known already."""

from __future__ import annotations

from torch import Tensor

from maestro_fast.model.head import LanguageHead
from maestro_fast.model.hidden_states import HiddenStates
from maestro_fast.ops import (
    LinearPolicyLoss,
    LossFunction,
    PolicyLoss,
    PolicyLossConfig,
    linear_policy_loss,
    policy_loss,
)
from maestro_fast.training.batches import MicroBatch


def loss_of_states(
    hidden: HiddenStates,
    batch: MicroBatch,
    head: LanguageHead,
    temperature: float,
    config: PolicyLossConfig | LossFunction,
) -> LinearPolicyLoss:
    """Computes the loss from hidden states, with LM head and loss in one sweep.

    Responses whose advantage is 0 are left out of the sweep if that changes neither gradient nor metrics. That is so
    if there are no other log-probs to compare with, since every ratio is then 1. A user's own loss and an entropy bonus
    may give such responses a gradient, so they are kept there.
    """
    weight, logprobs = head.weight, batch.logprobs
    states, targets = hidden.completions(weight.dtype)
    active = batch.advantages_B != 0
    compared = any(x is not None for x in (logprobs.old_C, logprobs.ref_C, logprobs.sampling_C))
    every_response = not isinstance(config, PolicyLossConfig) or config.entropy_coef > 0
    return linear_policy_loss(
        states,
        weight,
        targets,
        batch.advantages_B,
        batch.cu_seqlens,
        **head.numbers,
        temperature=temperature,
        old_logprobs=logprobs.old_C,
        ref_logprobs=logprobs.ref_C,
        sampling_logprobs=logprobs.sampling_C,
        token_mask=batch.token_mask_C,
        normalizer=batch.normalizer,
        entropy_normalizer=batch.entropy_normalizer,
        active=None if compared or every_response or not bool(active.any()) else active,
        config=config,
    )


def loss_of_logprobs(
    current_C: Tensor, entropies_C: Tensor | None, batch: MicroBatch, config: PolicyLossConfig | LossFunction
) -> PolicyLoss:
    """Computes the loss from the policy's log-probs, on which the advantages themselves depend.

    This way costs one more product with the LM head than ``loss_of_states``.

    Args:
        current_C: the policy's log-probs, with their graph.
        entropies_C: the entropies of the same tokens; needed if ``ops.loss_function.wants_entropies(config)``.
    """
    logprobs, device = batch.logprobs, current_C.device
    return policy_loss(
        current_C,
        batch.advantages_B.to(device),
        batch.cu_seqlens.to(device),
        old_logprobs=logprobs.old_C,
        ref_logprobs=logprobs.ref_C,
        sampling_logprobs=logprobs.sampling_C,
        entropies=entropies_C,
        token_mask=None if batch.token_mask_C is None else batch.token_mask_C.to(device),
        normalizer=batch.normalizer,
        entropy_normalizer=batch.entropy_normalizer,
        config=config,
    )
