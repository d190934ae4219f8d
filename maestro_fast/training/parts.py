"""What acts in every generation batch: the sampler, the scorer of the policy's log-probs, and the judges.

``training/step.py`` says in which order they act. They are the same for training and evaluation.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, cast

from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from maestro_fast.generation import AheadGenerator, Generator, SamplingConfig
from maestro_fast.model.chat import ChatConfig
from maestro_fast.model.forward import completion_logprobs
from maestro_fast.model.forward import score as score_forward
from maestro_fast.model.head import LanguageHead, causal_lm, check_head, head_of, vocabulary_of
from maestro_fast.model.hidden_states import ContextMode, HiddenStates
from maestro_fast.model.layout_trial import choose_layout
from maestro_fast.model.layouts import Layouts
from maestro_fast.model.rows import Sequences
from maestro_fast.model.sharding import is_sharded
from maestro_fast.model.text_scorer import encode_known, text_scorer
from maestro_fast.records import (
    PolicyOutputs,
    Prompt,
    Prompts,
    RewardBatch,
    Rollouts,
    StepRecord,
    response_means,
)
from maestro_fast.rewards import RewardSet
from maestro_fast.rewards.first_batches import FirstBatches
from maestro_fast.rewards.reward import figures
from maestro_fast.rewards.whereabouts import first_of, shown
from maestro_fast.settings import SettingsError
from maestro_fast.specs import EntropyMode
from maestro_fast.training.batches import Processes
from maestro_fast.training.plan import Method

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sampler:
    """Samples responses.

    Attributes:
        generator: generates the responses.
        group_size: G, the number of responses to each prompt.
        seed: the seed that, with the number of the batch and the rank of the process, fixes all random draws.
        processes: gives the rank of this process.
        truncates: whether some tokens cannot be sampled. The generator's log-probs are then those of another
            distribution than the policy's, and are left out.
        updates: as in ``Judges``.
    """

    generator: Generator
    group_size: int
    seed: int
    processes: Processes
    truncates: bool = False
    updates: int | None = None

    @staticmethod
    def of(generator: Generator, sampling: SamplingConfig, seed: int, processes: Processes) -> Sampler:
        """Makes the sampler of a run; the log says where its log-probs are left out."""
        if sampling.truncation is not None:
            logger.info(
                "sampling/logprob_gap_* and sampling/k3 are not logged: with %s the sampler's log-probs are those "
                "after truncation and the policy's those before",
                sampling.truncation,
            )
        return Sampler(generator, sampling.group_size, seed, processes, sampling.truncation is not None)

    def __call__(self, model: nn.Module, prompts: Prompts, number: int, part: int = 0) -> Rollouts:
        """Samples one response to each entry of ``prompts``; ``number`` and ``part`` key the random draws.

        An error gets a note on the step and the prompts.
        """
        unwrapped = self.processes.accelerator.unwrap_model(model, keep_torch_compile=False)
        try:
            rollouts = self.generator.generate(unwrapped, prompts, seed=self.seed_of(number) ^ part << 48)
        except Exception as error:
            named = list(dict.fromkeys(map(shown, prompts.texts)))
            error.add_note(f"in {batch_name(number, self.updates)}, while responses to {first_of(named)} were sampled")
            raise
        return replace(rollouts, sampling_logprobs_C=None) if self.truncates else rollouts

    def renewed(self, model: nn.Module) -> Sampler:
        """Makes a sampler for one call, which samples from ``model`` as it is now; see ``AheadGenerator.renewed``."""
        unwrapped = self.processes.accelerator.unwrap_model(model, keep_torch_compile=False)
        return replace(self, generator=cast(AheadGenerator, self.generator).renewed(unwrapped))

    def seed_of(self, number: int, rank: int | None = None) -> int:
        """A seed that differs between batches and processes, and that a resumed run computes again.

        ``rank`` names a process; None is this one.
        """
        rank = self.processes.rank if rank is None else rank
        return ((self.seed * 1_000_003 + number) * 65_537 + rank) % 2**63


@dataclass(frozen=True)
class ModelTrial:
    """Tries the head and the layouts of a model once.

    Attributes:
        model, head: the model and its LM head.
        method: says whether responses share their prompt, and which layout has to serve.
        autocast: makes the context of mixed precision in which the model is trained.
    """

    model: nn.Module
    head: LanguageHead
    method: Method
    autocast: Callable[[], contextlib.AbstractContextManager[Any]]

    @cached_property
    def layouts(self) -> Layouts:
        """The layouts that serve the model. With a sharded model, all processes ask for them together.

        Raises:
            ValueError: the head is not read right, see ``check_head``, or the model has no layout.
            SettingsError: the layout that has to serve does not.
        """
        with self.autocast():
            check_head(self.model, self.head)
            found, wanted = choose_layout(self.model, self.method.sharing), self.method.layout
        if wanted not in (None, found.plain):
            raise SettingsError(
                f"model.attention: {wanted} does not serve this model, for the reason logged as its layout"
            )
        return found


@dataclass(frozen=True)
class Scorer:
    """Runs a forward without a gradient, of the policy or the reference, over any number of responses.

    Attributes:
        head: the policy's LM head.
        trial: finds the layouts of the policy.
        micro_batch: the number of responses in one forward.
        temperature: the number that divides the logits.
        autocast: makes the context of mixed precision in which the policy is trained, so that it is scored in the same.
    """

    head: LanguageHead
    trial: ModelTrial
    micro_batch: int
    temperature: float
    autocast: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext

    @staticmethod
    def of(model: nn.Module, micro_batch: int, method: Method, accelerator: Accelerator) -> Scorer:
        """Reads the head off a policy, and tries it and the layouts on a few tokens in the precision of the training.

        A model that is going to be sharded is tried when the layouts are first asked for: only then is it on its
        device, and only all processes together hold its weights.

        Raises:
            ValueError: the head cannot be read, see ``check_head``, or the model has no layout, see ``choose_layout``.
        """
        head = head_of(model)
        trial = ModelTrial(model, head, method, accelerator.autocast)
        if not is_sharded(accelerator):
            _ = trial.layouts
        return Scorer(head, trial, micro_batch, method.sampling.temperature, accelerator.autocast)

    @property
    def layouts(self) -> Layouts:
        """How the sequences are laid out as rows of the model's input."""
        return self.trial.layouts

    def logprobs(self, hidden: HiddenStates, entropy: EntropyMode) -> tuple[Tensor, Tensor | None]:
        """Log-probs and entropies [C] of the completion tokens, from the states of a training forward."""
        with self.autocast():
            return completion_logprobs(hidden, self.head, self.temperature, entropy)

    def __call__(
        self,
        model: nn.Module,
        sequences: Sequences,
        *,
        head: LanguageHead | None = None,
        temperature: float | None = None,
        entropy: bool = False,
        context: ContextMode | None = None,
    ) -> PolicyOutputs:
        """Computes the log-probs of the completions, as ``model.forward.score`` does.

        Args:
            head, temperature: take the place of the scorer's own; None keeps those. With the scorer's own head the
                log-probs have the bits of a training forward, so that an on-policy ratio is exactly 1.
            entropy: whether to return entropies as well.
            context: how each response's hidden states become its context; None returns no contexts.
        """
        with self.autocast():
            return score_forward(
                model,
                sequences,
                head or self.head,
                layout=self.layouts,
                micro_batch=self.micro_batch,
                temperature=self.temperature if temperature is None else temperature,
                entropy=entropy,
                context=context,
                strategy="chunked" if head is None else "auto",
            )


@dataclass(frozen=True)
class Judges:
    """Everything that judges responses.

    Attributes:
        rewards: the rewards that the policy is trained on.
        anchor: the utility that a weight policy learns from, or None.
        tokenizer, scorer, processes, chat: serve the rewards that ask the policy for log-probs of texts.
        updates: the number of optimiser steps of a generation batch, by which messages name the step; None lets them
            name the batch.
    """

    rewards: RewardSet
    anchor: RewardSet | None
    tokenizer: PreTrainedTokenizerBase
    scorer: Scorer
    processes: Processes
    chat: ChatConfig = field(default_factory=ChatConfig)
    updates: int | None = None

    def __call__(
        self, model: nn.Module, rollouts: Rollouts, outputs: PolicyOutputs | None, number: int
    ) -> tuple[Tensor, Tensor | None]:
        """Judges the responses of this process.

        Returns:
            Rewards, float32 [B, K], NaN where a reward abstained; and utilities, float32 [B], NaN where none is known,
            or None without an anchor. Both are on the CPU.
        """
        batch = self._reward_batch(model, rollouts, outputs, number)
        return self.rewards(batch), None if self.anchor is None else self.anchor(batch)[:, 0]

    def metrics(self) -> dict[str, float]:
        """The figures that rewards and anchor have of their own, since the last call, in this process.

        They are ``rewards/<name>/<figure>`` and ``anchor/<figure>``.
        """
        anchor = {} if self.anchor is None else figures(self.anchor.rewards[0])
        return self.rewards.metrics() | {f"anchor/{figure}": value for figure, value in anchor.items()}

    @cached_property
    def _first_batches(self) -> FirstBatches:
        return FirstBatches(self.rewards.rewards)

    def watch_first(self, record: StepRecord, rollouts: Rollouts, group_size: int) -> None:
        """Has the main process report rewards that teach nothing over the first batches, see ``FirstBatches``."""

        def tokens_of(row: int) -> tuple[str, str]:
            if row >= len(rollouts):  # The rows of the main process come first; those of others have no tokens here.
                return "", ""
            prompt_ids, completion_ids = rollouts.prompts.token_ids[row], rollouts.completion_ids[row]
            return str(self.tokenizer.decode(completion_ids)), str(self.tokenizer.decode(prompt_ids[-32:]))

        if self.processes.rank == 0:
            self._first_batches.see(record, group_size, tokens_of)

    def text_scorer(
        self, model: nn.Module, prompts: Prompts | None = None
    ) -> Callable[[Sequence[Prompt], Sequence[str], Sequence[str]], list[Tensor]]:
        """Makes ``RewardBatch.score_texts``, which scores texts under ``model``, on all processes together.

        A text that is one of ``prompts`` is read as the policy read it there, with the tools of its row.
        """
        return text_scorer(
            self.tokenizer,
            partial(self.scorer, model, temperature=1.0),
            self.processes.gather,
            self.processes.device,
            encode_text=partial(encode_known, self.tokenizer, prompts, self.chat.template_kwargs),
            vocabulary=vocabulary_of(causal_lm(model)),
        )

    def _reward_batch(
        self, model: nn.Module, rollouts: Rollouts, outputs: PolicyOutputs | None, number: int
    ) -> RewardBatch:
        entropies_B = logprobs_B = None
        if self.rewards.needs_entropy:
            assert outputs is not None and outputs.entropies_C is not None
            entropies_B = response_means(outputs.entropies_C, rollouts).cpu()
            logprobs_B = response_means(outputs.logprobs_C, rollouts).cpu()
        needs_policy = self.rewards.needs_policy or (self.anchor is not None and self.anchor.needs_policy)
        return replace(
            RewardBatch.of(rollouts, number),
            mean_entropies_B=entropies_B,
            score_texts=self.text_scorer(model, rollouts.prompts) if needs_policy else None,
            device=self.processes.device,
            mean_logprobs_B=logprobs_B,
            place=batch_name(number, self.updates),
        )


def batch_name(number: int, updates: int | None) -> str:
    """What messages call a generation batch: by the first step that trains on it, as in the log, if that is known.

    Args:
        number: its number, from 0; those of evaluations are negative.
        updates: the number of optimiser steps of each batch.
    """
    if number < 0:
        return "an evaluation"
    return f"generation batch {number + 1}" if updates is None else f"step {number * updates + 1}"
