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
from maestro_fast.ops.sweep import keeps_every_gradient
from maestro_fast.training.batches import MicroBatch


def loss_of_states(
    hidden: Tensor, batch: MicroBatch, head: LanguageHead, temperature: float, config: PolicyLossConfig | LossFunction
) -> LinearPolicyLoss:
    """From packed states [T, d]: head and loss in one sweep.

    Responses whose advantage is 0 are left out of it where they change no metric: on-policy, every ratio is 1.
    """
    weight, logprobs = head.weight, batch.logprobs
    states, targets = completion_states(hidden, batch.sequences, weight.dtype)
    active = batch.advantages_B != 0
    compared = any(x is not None for x in (logprobs.old_C, logprobs.ref_C, logprobs.sampling_C))
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
        active=None if compared or keeps_every_gradient(config) or not bool(active.any()) else active,
        config=config,
    )


def loss_of_logprobs(
    current_C: Tensor, entropies_C: Tensor | None, batch: MicroBatch, config: PolicyLossConfig | LossFunction
) -> PolicyLoss:
    """From the policy's log-probs, which the advantages had to wait for: their gradient costs a GEMM more."""
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
