"""The policy loss of a micro-batch, from its hidden states or from log-probs that are there already."""

from __future__ import annotations

from torch import Tensor

from maestro_fast.model.forward import completion_states
from maestro_fast.model.head import LanguageHead
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
    hidden: Tensor, batch: MicroBatch, head: LanguageHead, temperature: float, config: PolicyLossConfig | LossFunction
) -> LinearPolicyLoss:
    """The loss from packed states [T, d]: head and loss in one sweep.

    Responses whose advantage is 0 are left out of the sweep where that changes no metric: on-policy, every ratio is 1.
    A user's own loss may give them a gradient, so it keeps them.
    """
    weight, logprobs = head.weight, batch.logprobs
    states, targets = completion_states(hidden, batch.sequences, weight.dtype)
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
        normalizer=batch.normalizer,
        entropy_normalizer=batch.entropy_normalizer,
        active=None if compared or every_response or not bool(active.any()) else active,
        config=config,
    )


def loss_of_logprobs(
    current_C: Tensor, entropies_C: Tensor | None, batch: MicroBatch, config: PolicyLossConfig | LossFunction
) -> PolicyLoss:
    """The loss from the policy's log-probs, for advantages that had to wait for them; it costs a matrix product more.

    Args:
        entropies_C: of the same tokens, where ``ops.loss_function.wants_entropies(config)``.
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
        normalizer=batch.normalizer,
        entropy_normalizer=batch.entropy_normalizer,
        config=config,
    )
