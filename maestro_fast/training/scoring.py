"""Where the log-probs, entropies and hidden states of sampled responses come from, and what that costs.

none      nothing reads them
scoring   a forward before the training forward. Several updates per batch need it anyway, for the log-probs of the
          policy that sampled; otherwise it is extra
training  the training forward itself, where one micro-batch holds the whole batch and one update is made of it:
          rewards, weights, advantages and loss follow in the same step
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn

from maestro_fast.ops import PolicyLossConfig
from maestro_fast.ops.pool_hidden import PoolMode
from maestro_fast.rewards import RewardSet
from maestro_fast.specs import AdvantageProfile
from maestro_fast.training.batches import BatchPlan
from maestro_fast.weighting import WeightPolicy

Source = Literal["none", "scoring", "training"]


@dataclass(frozen=True)
class Scoring:
    """The source, and the sentence that the log and the user get about it."""

    source: Source
    reason: str


def choose_scoring(
    model: nn.Module,
    plan: BatchPlan,
    rewards: RewardSet,
    weights: WeightPolicy,
    loss: PolicyLossConfig,
    profile: AdvantageProfile,
) -> Scoring:
    """The cheapest source that serves every reader."""
    readers = [
        reader
        for reader, reads in (
            ("the weight policy", context_mode(weights) is not None),
            ("an entropy reward", rewards.needs_entropy),
            ("the KL in the score", loss.kl_coef > 0 and profile.kl_in == "score"),
        )
        if reads
    ]
    if plan.updates > 1:
        free = f", and {' and '.join(readers)} get what they read from it for nothing" if readers else ""
        return Scoring("scoring", f"{plan.updates} updates per batch need the log-probs of the sampling policy{free}")
    if not readers:
        return Scoring("none", "no reward, weight policy or score reads them")
    named = " and ".join(readers)
    if plan.micro_steps > 1:
        return Scoring(
            "scoring",
            f"an extra forward for {named}; with batch.micro_batch {plan.responses} the training forward would do",
        )
    if has_dropout(model):
        return Scoring("scoring", f"an extra forward for {named}: the model's dropout would disturb the training one")
    return Scoring("training", f"{named} read the training forward: one micro-batch, one update")


def context_mode(weights: WeightPolicy) -> PoolMode | None:
    """Which hidden state of the policy's own forward a weight policy reads, if any."""
    if not weights.needs_context or weights.context_kind == "reference_prompt_mean":
        return None
    return "last" if weights.context_kind == "response" else weights.context_kind


def reads_reference(weights: WeightPolicy) -> bool:
    return weights.needs_context and weights.context_kind == "reference_prompt_mean"


def has_dropout(model: nn.Module) -> bool:
    """Whether a training forward of the model differs from one in evaluation mode by dropout."""
    return any(_drops(module) for module in model.modules())


def _drops(module: nn.Module) -> bool:
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return module.p > 0
    rate = getattr(module, "attention_dropout", None)  # a number: attention modules of transformers apply it inline
    return isinstance(rate, float) and rate > 0
