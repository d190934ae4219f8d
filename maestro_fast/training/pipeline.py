"""One generation batch, from prompts to micro-batches: sample, score, judge (reward, weigh, compare within groups)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from maestro_fast.generation import Generator, SamplingConfig
from maestro_fast.model.forward import Layout, Sequences, score
from maestro_fast.model.head import LanguageHead
from maestro_fast.model.reference import PromptContexts, Reference
from maestro_fast.ops import AdvantageProfile, GroupAdvantages, PolicyLossConfig
from maestro_fast.records import PolicyOutputs, Prompts, Rollouts, StepRecord
from maestro_fast.rewards import RewardSet
from maestro_fast.training.batches import BatchPlan, MicroBatch, TokenLogprobs, split_micro_batches
from maestro_fast.training.beside import Lessons, under_way
from maestro_fast.training.data import PromptDataset, Row
from maestro_fast.training.metrics import batch_metrics, policy_metrics, response_means
from maestro_fast.training.rewarding import joined_rewards, own_rewards
from maestro_fast.training.scoring import Scoring, context_mode
from maestro_fast.training.timing import StageClock
from maestro_fast.training.weighing import weight_context
from maestro_fast.weighting import Comparison, Outcome, WeightContext, WeightPolicy, Weights, compare, weigh
from maestro_fast.weighting.diagnostics import Watch, diagnose


@dataclass(frozen=True)
class Started:
    """A generation batch of one process that is being sampled, in ``parts`` of whole groups; ``wait`` until none is."""

    prompts: Prompts
    parts: list[Callable[[], Rollouts]]
    wait: Callable[[], None]
    number: int
    step: int


@dataclass(frozen=True)
class Sampled:
    """Responses of one process that nothing has weighed yet.

    Attributes:
        number: of the generation batch, from 0.
        step: optimiser steps done before it.
        rewards: rewards [B, K] and known utilities [B] of parts that were judged while others were sampled; else None.
    """

    rollouts: Rollouts
    number: int
    step: int
    rewards: tuple[Tensor, Tensor | None] | None = None

    @property
    def sequences(self) -> Sequences:
        return Sequences(self.rollouts.prompts.token_ids, self.rollouts.completion_ids)


@dataclass(frozen=True)
class Judged:
    """What came of a generation batch: what to train on, and what to log."""

    micro_batches: list[MicroBatch]
    record: StepRecord
    metrics: dict[str, float]


@dataclass(frozen=True)
class Pipeline:
    """The fixed parts of every generation batch. ``reference`` None: no KL."""

    tokenizer: PreTrainedTokenizerBase
    dataset: PromptDataset
    rewards: RewardSet
    weights: WeightPolicy
    anchor: RewardSet | None
    generator: Generator
    sampling: SamplingConfig
    plan: BatchPlan
    loss: PolicyLossConfig
    profile: AdvantageProfile
    head: LanguageHead
    layout: Layout
    scoring: Scoring
    reference: Reference | None
    accelerator: Accelerator
    clock: StageClock
    seed: int
    watch: Watch
    lessons: Lessons

    @cached_property
    def prompt_contexts(self) -> PromptContexts:
        return PromptContexts(self.layout, self.gather, self.accelerator.device)

    @property
    def kl_in_score(self) -> float:
        return self.loss.kl_coef if self.profile.kl_in == "score" else 0.0

    @property
    def token_loss(self) -> PolicyLossConfig:
        """The loss without a KL that the score already holds."""
        return replace(self.loss, kl_coef=0.0) if self.profile.kl_in == "score" else self.loss

    def start(self, model: nn.Module, rows: Sequence[Row], number: int, step: int) -> Started:
        """Generation batch ``number`` (from 0), made after ``step`` optimiser steps, from this process's prompts.

        A generator that works elsewhere begins at once, others in ``finish``.
        """
        prompts = self.dataset.prompts(rows, self.tokenizer).repeat(self.sampling.group_size)
        parts = prompts.split(max(1, self.generator.concurrent_parts))
        calls: list[Callable[[], Rollouts]] = [
            partial(self.generate, model, part, number, i) for i, part in enumerate(parts)
        ]
        if not self.generator.concurrent_parts:
            return Started(prompts, calls, lambda: None, number, step)
        return Started(prompts, *under_way(calls, self.accelerator.device), number, step)

    def finish(self, model: nn.Module, started: Started) -> Sampled:
        """Waits for the responses; of several parts, it judges one while the next are being sampled."""
        rollouts, rewards = [], []
        for part in started.parts:
            with self.clock.stage("generate"):
                rollouts.append(part())
            if len(started.parts) > 1:
                with self.clock.stage("rewards"):
                    rewards.append(own_rewards(self, model, rollouts[-1], None, started.number))
        whole = Rollouts.joined(started.prompts, rollouts)
        return Sampled(whole, started.number, started.step, joined_rewards(rewards) if rewards else None)

    def generate(self, model: nn.Module, prompts: Prompts, number: int, part: int = 0) -> Rollouts:
        """One response to each entry of ``prompts``; ``number`` and ``part`` key the random draws."""
        sampler = self.accelerator.unwrap_model(model, keep_torch_compile=False)
        return self.generator.generate(sampler, prompts, seed=self._seed(number) ^ part << 48)

    def score(self, model: nn.Module, sampled: Sampled) -> PolicyOutputs | None:
        """The scoring forward, if it is this that gives log-probs, entropies and hidden states."""
        if self.scoring.source != "scoring":
            return None
        with self.clock.stage("score"):
            return self.forward(model, sampled.sequences, entropy=True, context=context_mode(self.weights))

    def judge(self, model: nn.Module, sampled: Sampled, outputs: PolicyOutputs | None) -> Judged:
        """Rewards, weights and advantages over all processes, and this process's micro-batches."""
        clock, rollouts = self.clock, sampled.rollouts
        with clock.stage("reference"):
            ref_logprobs_C = self._reference_logprobs(sampled.sequences)
        with clock.stage("rewards"):
            own_BK, own_B = sampled.rewards or own_rewards(self, model, rollouts, outputs, sampled.number)
            rewards_BK = self.gather(own_BK.to(self.accelerator.device))
            utilities_B = None if own_B is None else self.gather(own_B.to(rewards_BK.device))
        kl_B = self._kl(rollouts, outputs, ref_logprobs_C)
        with clock.stage("weights"):
            context = weight_context(self, sampled, rewards_BK, outputs, utilities_B)
            comparison = self._comparison(rollouts, kl_B)
            weights, advantages = weigh(self.weights, context, comparison)
        if advantages is None:
            with clock.stage("advantages"):
                advantages = compare(context, weights, comparison)
        outcome = Outcome(context, weights, advantages, self.profile, kl_B, self.kl_in_score)
        with clock.stage("conductor_update"):
            self.lessons.add(outcome, postpone=self.generator.concurrent_parts > 0)
        record = self._record(sampled.step, rollouts, context, weights, advantages)
        metrics = batch_metrics(record, advantages) | diagnose(outcome) | self.weights.metrics()
        self.watch.see(metrics)
        metrics |= policy_metrics(rollouts, outputs, self.gather) | rollouts.metrics
        logprobs = TokenLogprobs(
            outputs.logprobs_C if outputs is not None and self.plan.updates > 1 else None,
            ref_logprobs_C if self.token_loss.kl_coef > 0 else None,
            self._sampling_logprobs(rollouts, scored=outputs is not None),
        )
        return Judged(self._micro_batches(sampled, advantages, logprobs), record, metrics)

    def _comparison(self, rollouts: Rollouts, kl_B: Tensor | None) -> Comparison:
        lengths_B = self._lengths(rollouts) if self.profile.needs_lengths else None
        return Comparison(self.profile, kl_B, self.kl_in_score, lengths_B)

    @property
    def _rank(self) -> int:
        return int(self.accelerator.process_index)

    def _seed(self, number: int) -> int:
        """Differs between batches and processes, and does not depend on what ran before: a resumed run repeats it."""
        return ((self.seed * 1_000_003 + number) * 65_537 + self._rank) % 2**63

    def gather(self, tensor: Tensor) -> Tensor:
        gathered: Tensor = self.accelerator.gather(tensor.contiguous())
        return gathered

    def _lengths(self, rollouts: Rollouts) -> Tensor:
        """int64 [B], tokens of the completions of all processes."""
        return self.gather(rollouts.completion_lengths_B.to(self.accelerator.device))

    def forward(
        self,
        model: nn.Module,
        sequences: Sequences,
        head: LanguageHead | None = None,
        temperature: float | None = None,
        **wanted: Any,
    ) -> PolicyOutputs:
        return score(
            model,
            sequences,
            head or self.head,
            layout=self.layout,
            micro_batch=self.plan.responses // self.plan.micro_steps,
            temperature=self.sampling.temperature if temperature is None else temperature,
            **wanted,
        )

    def _reference_logprobs(self, sequences: Sequences) -> Tensor | None:
        if self.reference is None or self.loss.kl_coef == 0:
            return None
        with self.reference() as (model, head):
            return self.forward(model, sequences, head).logprobs_C

    def _kl(self, rollouts: Rollouts, outputs: PolicyOutputs | None, ref_logprobs_C: Tensor | None) -> Tensor | None:
        """Per response, the token mean of log pi - log pi_ref; None unless it belongs into the score."""
        if self.kl_in_score == 0.0 or ref_logprobs_C is None:
            return None
        assert outputs is not None
        return self.gather(response_means(outputs.logprobs_C - ref_logprobs_C, rollouts))

    def _sampling_logprobs(self, rollouts: Rollouts, *, scored: bool) -> Tensor | None:
        """Those of the sampler, if the loss corrects for them or the training forward is the first to be compared."""
        if self.loss.sampler_correction == "none":
            return None if scored else rollouts.sampling_logprobs_C
        if rollouts.sampling_logprobs_C is None:
            raise ValueError(
                f"loss.sampler_correction: {self.loss.sampler_correction}, but the generator returns no log-probs"
            )
        return rollouts.sampling_logprobs_C

    def _micro_batches(
        self, sampled: Sampled, advantages: GroupAdvantages, logprobs: TokenLogprobs
    ) -> list[MicroBatch]:
        plan, sequences = self.plan, sampled.sequences
        own = slice(self._rank * plan.responses, (self._rank + 1) * plan.responses)
        generator = torch.Generator().manual_seed(self._seed(sampled.number))
        order = torch.randperm(plan.responses, generator=generator).tolist()
        if self.scoring.source == "training":  # its forward is done, in the order of sampling
            order = list(range(plan.responses))
        lengths = torch.tensor([len(sequences.completion_ids[j]) for j in order], dtype=torch.float64)
        local = lengths.view(plan.updates, -1).sum(1).to(self.accelerator.device)
        tokens_per_update = self.gather(local).view(-1, plan.updates).mean(0).tolist()
        return split_micro_batches(
            plan,
            sequences,
            advantages.advantages[own],
            logprobs,
            tokens_per_update,
            self.loss,
            order,
            self.accelerator.device,
        )

    def _record(
        self, step: int, rollouts: Rollouts, context: WeightContext, weights: Weights, advantages: GroupAdvantages
    ) -> StepRecord:
        device = self.accelerator.device
        prompts = rollouts.prompts
        return StepRecord(
            step=step,
            reward_names=self.rewards.names,
            families=self.gather_objects(prompts.families),
            prompts=self.gather_objects(prompts.texts),
            completions=self.gather_objects(rollouts.completions),
            rewards_BK=context.rewards_BK.cpu(),
            weights_BK=weights.weights_BK.cpu(),
            expected_weights_BK=weights.expected_BK.cpu(),
            advantages_B=advantages.advantages.cpu(),
            scores_B=advantages.scores.cpu(),
            degenerate_B=advantages.degenerate.cpu(),
            lengths_B=self._lengths(rollouts).cpu(),
            truncated_B=self.gather(rollouts.truncated_B.to(device)).cpu(),
            utilities_B=None if context.utilities_B is None else context.utilities_B.cpu(),
        )

    def gather_rows(self, own: Tensor, count: int) -> Tensor:
        """The first ``count`` rows, on the CPU, of a tensor whose rows are dealt to the processes in turn."""
        gathered = self.gather(own.to(self.accelerator.device)).cpu()
        return gathered.view(self.accelerator.num_processes, *own.shape).transpose(0, 1).flatten(0, 1)[:count]

    def gather_objects(self, values: list[Any]) -> list[Any]:
        """The lists of all processes, one after the other."""
        return list(gather_object(values)) if self.accelerator.num_processes > 1 else values
