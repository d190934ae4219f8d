"""What a run does in every step, and what follows from it before the first: sizes, losses, and which forward is read.

Everything that the weight policy, the rewards and the loss read off the policy network (log-probs, entropies, hidden
states) comes from one of three sources, see ``choose_scoring``:

none      nothing reads them.
scoring   A forward before the training forward. Several updates per batch need it anyway, for the log-probs of the
          policy that sampled; otherwise it is extra.
training  The training forward itself. It serves where one micro-batch holds the whole batch and one update is made of
          it: the responses are then judged between that forward and its backward.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import nn

from maestro_fast.generation import SamplingConfig
from maestro_fast.model.head import causal_lm, head_of
from maestro_fast.ops import AdvantageProfile, PolicyLossConfig
from maestro_fast.ops.pool_hidden import PoolMode
from maestro_fast.rewards import RewardSet
from maestro_fast.specs import EntropyMode
from maestro_fast.training.batches import BatchConfig, BatchPlan
from maestro_fast.training.data import PromptDataset
from maestro_fast.weighting import WeightPolicy

Source = Literal["none", "scoring", "training"]


@dataclass(frozen=True)
class Method:
    """Sampling, batch sizes, advantages and loss. ``evaluation_samples``: responses per prompt of an evaluation.

    ``loss`` is a ``PolicyLossConfig`` or a function of one's own, see ``LossTerms``.
    """

    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    loss: Any = field(default_factory=PolicyLossConfig)
    profile: str | AdvantageProfile = "maestro"
    seed: int = 0
    evaluation_samples: int = 1

    def __post_init__(self) -> None:
        if self.evaluation_samples < 1:
            raise ValueError(f"evaluation_samples: {self.evaluation_samples}, expected at least 1")


def checked_plan(method: Method, model: nn.Module, dataset: PromptDataset, processes: int) -> BatchPlan:
    """Divides a batch over ``processes``.

    Raises:
        ValueError: the numbers do not divide, the prompts are too few, or the model cannot be served.
    """
    plan = BatchPlan.of(method.batch, method.sampling.group_size, processes)
    block = method.batch.prompts_per_batch
    if len(dataset) < block:
        raise ValueError(f"batch.prompts_per_batch: {block}, but the data holds {len(dataset)} prompts")
    language_model = causal_lm(model)
    if "logits_to_keep" not in inspect.signature(language_model.forward).parameters:
        raise ValueError(
            f"model: {type(language_model).__name__}.forward takes no logits_to_keep, so it would form all logits"
        )
    head_of(model)
    return plan


@dataclass(frozen=True)
class LossTerms:
    """What the trainer has to know of a loss, whether a ``PolicyLossConfig`` or a user's function computes it.

    Attributes:
        function: what ``training.loss`` computes: the loss without a KL that the scores hold already.
        kl_in_score: coefficient of the KL that the scores lose; 0 where the loss has the KL, or nothing has.
        needs_reference: whether ``function`` reads the reference's log-probs.
        needs_sampling: whether it cannot do without the sampler's log-probs; wants_sampling: whether it reads them.
        entropy: "grad" if it reads entropies, else "value", which the training forward gives to rewards and logs.
        normalization: as in ``PolicyLossConfig``; it decides by what a micro-batch's sum is divided.
    """

    function: Any
    kl_in_score: float
    needs_reference: bool
    needs_sampling: bool
    wants_sampling: bool
    entropy: EntropyMode
    normalization: str

    @staticmethod
    def of(loss: Any, profile: AdvantageProfile) -> LossTerms:
        """The terms of ``loss`` where ``profile`` makes the advantages.

        A function of a user's own has no KL that could enter the scores. It gets the reference's log-probs if its
        ``needs_reference`` is true, differentiable entropies if its ``needs_entropy`` is, and the sampler's log-probs
        where the generator returns them. Its sums are divided by the tokens of the update.

        Raises:
            TypeError: ``loss`` is neither of the two.
        """
        if isinstance(loss, PolicyLossConfig):
            in_score = profile.kl_in == "score"
            corrects = loss.sampler_correction != "none"
            return LossTerms(
                function=replace(loss, kl_coef=0.0) if in_score else loss,
                kl_in_score=loss.kl_coef if in_score else 0.0,
                needs_reference=loss.kl_coef > 0 and not in_score,
                needs_sampling=corrects,
                wants_sampling=corrects,
                entropy="grad" if loss.entropy_coef > 0 else "value",
                normalization=loss.normalization,
            )
        if not callable(getattr(loss, "function", loss)):
            raise TypeError(f"loss: got {type(loss).__name__}, expected a PolicyLossConfig or a function of LossInputs")
        return LossTerms(
            function=loss,
            kl_in_score=0.0,
            needs_reference=bool(getattr(loss, "needs_reference", False)),
            needs_sampling=False,
            wants_sampling=True,
            entropy="grad" if getattr(loss, "needs_entropy", False) else "value",
            normalization="dapo",
        )

    @property
    def reads_reference(self) -> bool:
        """Whether the loss or the scores need the reference's log-probs."""
        return self.needs_reference or self.kl_in_score > 0


@dataclass(frozen=True)
class Scoring:
    """Where log-probs, entropies and hidden states come from, and the sentence that tells the user why."""

    source: Source
    reason: str


def choose_scoring(
    model: nn.Module, plan: BatchPlan, rewards: RewardSet, weights: WeightPolicy, terms: LossTerms
) -> Scoring:
    """The cheapest source that serves everything that reads the policy network."""
    readers = [
        reader
        for reader, reads in (
            ("the weight policy", context_mode(weights) is not None),
            ("an entropy reward", rewards.needs_entropy),
            ("the KL in the score", terms.kl_in_score > 0),
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
    """Which hidden state of the policy's own forward a weight policy reads; None if it reads none."""
    if not weights.needs_context or weights.context_kind == "reference_prompt_mean":
        return None
    return "last" if weights.context_kind == "response" else weights.context_kind


def reads_reference(weights: WeightPolicy) -> bool:
    """Whether a weight policy reads hidden states of the reference."""
    return weights.needs_context and weights.context_kind == "reference_prompt_mean"


def has_dropout(model: nn.Module) -> bool:
    """Whether dropout makes a training forward of the model differ from one in evaluation mode."""
    return any(_drops(module) for module in model.modules())


def _drops(module: nn.Module) -> bool:
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return module.p > 0
    rate = getattr(module, "attention_dropout", None)  # attention modules of transformers apply this number inline
    return isinstance(rate, float) and rate > 0
