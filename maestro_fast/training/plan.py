"""Decides and checks, before the first step, what every step does: its sizes, its loss, and which forward it reads.

Everything that the weight policy, the rewards and the loss read off the policy network (log-probs, entropies, hidden
states) comes from one of three sources, see ``choose_scoring``:

none      Nothing reads them.
scoring   A forward before the training forward. Several updates per batch need it anyway, for the log-probs of the
          policy that sampled; otherwise it is extra.
training  The training forward itself. It serves where one micro-batch holds the whole batch and one update is made of
          it: the responses are then judged between that forward and its backward.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field, replace
from typing import Literal

from torch import nn

from maestro_fast.data.dataset import PromptDataset
from maestro_fast.generation import SamplingConfig
from maestro_fast.model.attention import Layout
from maestro_fast.model.head import causal_lm, first_layer_of, head_of
from maestro_fast.model.hidden_states import ContextMode
from maestro_fast.model.layouts import Sharing
from maestro_fast.model.trained import check_trainable
from maestro_fast.ops import AdvantageProfile, PolicyLossConfig
from maestro_fast.ops.loss_function import wants_entropies
from maestro_fast.rewards import RewardSet
from maestro_fast.settings import SettingsError
from maestro_fast.specs import EntropyMode, LossFunction, resolve_profile
from maestro_fast.training.batches import BatchConfig, BatchPlan
from maestro_fast.weighting import WeightPolicy

Source = Literal["none", "scoring", "training"]


@dataclass(frozen=True)
class Method:
    """What is done in a step, apart from the optimiser.

    Attributes:
        sampling: how responses are sampled.
        batch: the sizes of a generation batch.
        loss: the policy loss, or a function of the user's own, see ``LossTerms``.
        profile: how rewards become advantages.
        seed: the seed of the order of the prompts and of the sampling.
        evaluation_samples: the number of responses to each prompt of an evaluation.
        sharing: whether responses with a common prompt share its computation where that costs less ("auto"), always, or
            never, see ``model/layouts.py``.
        layout: the layout that has to serve the model; None takes one that does.
    """

    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    loss: PolicyLossConfig | LossFunction = field(default_factory=PolicyLossConfig)
    profile: str | AdvantageProfile = "maestro"
    seed: int = 0
    evaluation_samples: int = 1
    sharing: Sharing = "auto"
    layout: Layout | None = None

    def __post_init__(self) -> None:
        check_correction(self.sampling, self.loss)
        if self.evaluation_samples < 1:
            raise ValueError(f"evaluation_samples: {self.evaluation_samples}, expected at least 1")
        LossTerms.of(self.loss, resolve_profile(self.profile))  # raises before a model is loaded


def checked_plan(method: Method, model: nn.Module, dataset: PromptDataset, processes: int) -> BatchPlan:
    """Divides a batch over ``processes``.

    Raises:
        ValueError: the numbers do not divide, the prompts are too few, or the model cannot be served.
    """
    plan = BatchPlan.of(method.batch, method.sampling.group_size, processes)
    dataset.check_enough(method.batch.prompts_per_batch)
    language_model = causal_lm(model)
    if "logits_to_keep" not in inspect.signature(language_model.forward).parameters:
        raise ValueError(
            f"model: {type(language_model).__name__}.forward takes no logits_to_keep, so it would form all logits"
        )
    adapter = getattr(model, "active_peft_config", None)
    if adapter is not None and adapter.is_prompt_learning:
        raise ValueError(
            f"model: adapters of type {adapter.peft_type.value} add tokens to the prompt, which shifts the states; "
            "expected LoRA or others that change weights"
        )
    head_of(model)
    check_trainable(model)
    return plan


def check_correction(sampling: SamplingConfig, loss: object) -> None:
    """Refuses a correction for the sampler that would correct for its truncation instead.

    The sampler's log-probs are those after truncation: log p - log Z, with Z the probability of the tokens that were
    kept. The trainer knows its own p and not its own Z, which would need the logits of all tokens at every position,
    and the set that the sampler kept. So pi_old / pi_sampler would be Z even where both compute the same p.

    Raises:
        SettingsError: the loss has a ``sampler_correction`` and the sampler truncates.
    """
    correction = getattr(loss, "sampler_correction", "none")
    if correction != "none" and sampling.truncation is not None:
        raise SettingsError(
            f"loss.sampler_correction: {correction} with {sampling.truncation}: the sampler's log-probs are those "
            "after truncation and the policy's those before, so every ratio would be scaled by the probability that "
            "was kept, expected sampler_correction: none, or top_p: 1.0 and top_k: 0"
        )


@dataclass(frozen=True)
class LossTerms:
    """What the trainer has to know of a loss, whether a ``PolicyLossConfig`` or a user's function computes it.

    Attributes:
        function: the loss that ``training.loss`` computes. It has no KL if the scores have one already.
        kl_in_score: the coefficient of the KL that is subtracted from the scores; 0 if the loss has it or nothing has.
        needs_reference: whether ``function`` reads the reference's log-probs.
        needs_sampling: whether ``function`` fails without the sampler's log-probs.
        wants_sampling: whether ``function`` reads the sampler's log-probs where there are some.
        entropy: "grad" if ``function`` reads entropies. Otherwise "value": only rewards and the log read them.
        normalization: as in ``PolicyLossConfig``; it decides by what a micro-batch's sum is divided.
    """

    function: PolicyLossConfig | LossFunction
    kl_in_score: float
    needs_reference: bool
    needs_sampling: bool
    wants_sampling: bool
    entropy: EntropyMode
    normalization: str

    @staticmethod
    def of(loss: PolicyLossConfig | LossFunction, profile: AdvantageProfile) -> LossTerms:
        """The terms of ``loss`` if ``profile`` makes the advantages.

        A user's own function has no KL that could enter the scores. It gets the reference's log-probs only if its
        attribute ``needs_reference`` is true (``specs.FunctionLoss`` has it), entropies if ``wants_entropies`` says so,
        and the sampler's log-probs where the generator returns them and does not truncate. Its normalizer counts the
        tokens of the update.

        Raises:
            TypeError: ``loss`` is neither a ``PolicyLossConfig`` nor a function.
            ValueError: ``loss`` corrects a KL that enters the scores, where no ratio could correct it.
        """
        if isinstance(loss, PolicyLossConfig):
            in_score = profile.kl_in == "score"
            if in_score and loss.kl_bias_correction:
                raise ValueError(
                    "loss.kl_bias_correction: True, and the profile subtracts the KL from the scores; expected False, "
                    "or a profile whose KL is in the loss (kl_in='loss')"
                )
            corrects = loss.sampler_correction != "none"
            return LossTerms(
                function=replace(loss, kl_coef=0.0) if in_score else loss,
                kl_in_score=loss.kl_coef if in_score else 0.0,
                needs_reference=loss.kl_coef > 0 and not in_score,
                needs_sampling=corrects,
                wants_sampling=corrects,
                entropy="grad" if wants_entropies(loss) else "value",
                normalization=loss.normalization,
            )
        if not callable(loss):
            raise TypeError(f"loss: got {type(loss).__name__}, expected a PolicyLossConfig or a function of LossInputs")
        return LossTerms(
            function=loss,
            kl_in_score=0.0,
            needs_reference=bool(getattr(loss, "needs_reference", False)),
            needs_sampling=False,
            wants_sampling=True,
            entropy="grad" if wants_entropies(loss) else "value",
            normalization="dapo",
        )

    @property
    def reads_reference(self) -> bool:
        """Whether the loss or the scores need the reference's log-probs."""
        return self.needs_reference or self.kl_in_score > 0


@dataclass(frozen=True)
class Scoring:
    """The source of log-probs, entropies and hidden states, and the sentence that tells the user why it is this one."""

    source: Source
    reason: str


def choose_scoring(
    model: nn.Module,
    plan: BatchPlan,
    rewards: RewardSet,
    weights: WeightPolicy,
    terms: LossTerms,
    *,
    refills: bool = False,
) -> Scoring:
    """Chooses the cheapest source that serves everything that reads the policy network.

    ``refills`` says that other prompts take the place of groups without a signal, for which the responses have to be
    judged before the training forward.

    Raises:
        ValueError: the weight policy reads the first layer, and the model has no list of layers.
    """
    if context_mode(weights) == "response_first_layer":
        first_layer_of(model)
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
    if refills:
        return Scoring("scoring", f"an extra forward for {named}: batch.no_signal refill judges before the training")
    if has_dropout(model):
        return Scoring("scoring", f"an extra forward for {named}: the model's dropout would disturb the training one")
    return Scoring("training", f"{named} read the training forward: one micro-batch, one update")


def context_mode(weights: WeightPolicy) -> ContextMode | None:
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
    # Attention modules of transformers apply this rate themselves, without a Dropout module.
    rate = getattr(module, "attention_dropout", None)
    return isinstance(rate, float) and rate > 0
