"""One generation batch, from prompts to micro-batches: sample, score, reward, weigh, compare within groups."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from maestro_fast.generation import Generator, SamplingConfig
from maestro_fast.ops import AdvantageProfile, GroupAdvantages, PolicyLossConfig, group_advantages
from maestro_fast.records import PolicyOutputs, RewardBatch, Rollouts, StepRecord, Text
from maestro_fast.rewards import RewardSet
from maestro_fast.training.batches import BatchPlan, MicroBatch, TokenLogprobs, split_micro_batches
from maestro_fast.training.data import PromptDataset, Row, encode_prompt
from maestro_fast.training.forward import Layout, Sequences, score
from maestro_fast.training.head import LanguageHead
from maestro_fast.training.metrics import batch_metrics
from maestro_fast.training.reference import Reference
from maestro_fast.training.timing import StageClock
from maestro_fast.weighting import Outcome, WeightContext, WeightPolicy, Weights


@dataclass(frozen=True)
class Pipeline:
    """The fixed parts of every generation batch. ``reference`` None: no KL."""

    tokenizer: PreTrainedTokenizerBase
    dataset: PromptDataset
    rewards: RewardSet
    weights: WeightPolicy
    generator: Generator
    sampling: SamplingConfig
    plan: BatchPlan
    loss: PolicyLossConfig
    profile: AdvantageProfile
    head: LanguageHead
    layout: Layout
    reference: Reference | None
    accelerator: Accelerator
    clock: StageClock
    seed: int

    @property
    def kl_in_score(self) -> float:
        return self.loss.kl_coef if self.profile.kl_in == "score" else 0.0

    @property
    def token_loss(self) -> PolicyLossConfig:
        """The loss without a KL that the score already holds."""
        return replace(self.loss, kl_coef=0.0) if self.profile.kl_in == "score" else self.loss

    def run(
        self, model: nn.Module, rows: Sequence[Row], number: int, step: int
    ) -> tuple[list[MicroBatch], StepRecord, dict[str, float]]:
        """Generation batch ``number`` (from 0), made after ``step`` optimiser steps, from this process's prompts."""
        clock = self.clock
        prompts = self.dataset.prompts(rows, self.tokenizer).repeat(self.sampling.group_size)
        with clock.stage("generate"):
            sampler = self.accelerator.unwrap_model(model, keep_torch_compile=False)
            rollouts = self.generator.generate(sampler, prompts, seed=self._seed(number))
        sequences = Sequences(prompts.token_ids, rollouts.completion_ids)
        with clock.stage("score"):
            outputs = self._score(model, sequences)
        with clock.stage("reference"):
            ref_logprobs_C = self._reference_logprobs(sequences)
        with clock.stage("rewards"):
            rewards_BK = self._gather(self._rewards(model, rollouts, outputs).to(self.accelerator.device))
        kl_B = self._kl(rollouts, outputs, ref_logprobs_C)
        with clock.stage("weights"):
            context_Bd = None if outputs is None else outputs.context_Bd
            context = WeightContext(
                self.rewards.names,
                self.sampling.group_size,
                number,
                rewards_BK,
                None if context_Bd is None else self._gather(context_Bd),
            )
            weights = self.weights.weights(context)
        with clock.stage("advantages"):
            advantages = group_advantages(
                rewards_BK,
                weights.weights_BK,
                self.sampling.group_size,
                kl=kl_B,
                beta=self.kl_in_score,
                profile=self.profile,
            )
        with clock.stage("conductor_update"):
            self.weights.observe(Outcome(context, weights, advantages))
        record = self._record(step, rollouts, rewards_BK, weights, advantages)
        metrics = batch_metrics(record, advantages) | self.weights.metrics() | _policy_metrics(rollouts, outputs)
        logprobs = TokenLogprobs(
            outputs.logprobs_C if outputs is not None and self.plan.updates > 1 else None,
            ref_logprobs_C if self.token_loss.kl_coef > 0 else None,
            self._sampling_logprobs(rollouts),
        )
        return self._micro_batches(sequences, advantages, logprobs, number), record, metrics

    @property
    def _rank(self) -> int:
        return int(self.accelerator.process_index)

    def _seed(self, number: int) -> int:
        """Differs between batches and processes, and does not depend on what ran before: a resumed run repeats it."""
        return ((self.seed * 1_000_003 + number) * 65_537 + self._rank) % 2**63

    def _gather(self, tensor: Tensor) -> Tensor:
        gathered: Tensor = self.accelerator.gather(tensor.contiguous())
        return gathered

    def _score(self, model: nn.Module, sequences: Sequences) -> PolicyOutputs | None:
        """The scoring forward, unless nothing would read it."""
        needed = (
            self.weights.needs_context or self.rewards.needs_entropy or self.plan.updates > 1 or self.kl_in_score > 0
        )
        if not needed:
            return None
        return score(
            model,
            sequences,
            self.head,
            layout=self.layout,
            micro_batch=self.plan.responses // self.plan.micro_steps,
            temperature=self.sampling.temperature,
            entropy=True,
            context=self.weights.needs_context,
        )

    def _reference_logprobs(self, sequences: Sequences) -> Tensor | None:
        if self.reference is None:
            return None
        with self.reference() as (model, head):
            return score(
                model,
                sequences,
                head,
                layout=self.layout,
                micro_batch=self.plan.responses // self.plan.micro_steps,
                temperature=self.sampling.temperature,
            ).logprobs_C

    def _rewards(self, model: nn.Module, rollouts: Rollouts, outputs: PolicyOutputs | None) -> Tensor:
        entropies = logprobs = None
        if self.rewards.needs_entropy:
            assert outputs is not None and outputs.entropies_C is not None
            entropies = _response_means(outputs.entropies_C, rollouts).cpu()
            logprobs = _response_means(outputs.logprobs_C, rollouts).cpu()
        prompts = rollouts.prompts
        batch = RewardBatch(
            prompts.texts,
            rollouts.completions,
            rollouts.completion_ids,
            prompts.columns,
            entropies,
            self._text_scorer(model) if self.rewards.needs_policy else None,
            self.accelerator.device,
            logprobs,
        )
        return self.rewards(batch)

    def _text_scorer(self, model: nn.Module) -> Callable[[Sequence[Text], Sequence[str], Sequence[str]], list[Tensor]]:
        def score_texts(prompts: Sequence[Text], prefixes: Sequence[str], texts: Sequence[str]) -> list[Tensor]:
            def encode(text: str) -> list[int]:
                return list(self.tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []

            contexts = [
                encode_prompt(self.tokenizer, prompt) + encode(prefix)
                for prompt, prefix in zip(prompts, prefixes, strict=True)
            ]
            if not contexts:
                return []
            sequences = Sequences(contexts, [encode(text) for text in texts])
            out = score(
                model,
                sequences,
                self.head,
                layout=self.layout,
                micro_batch=self.plan.responses // self.plan.micro_steps,
                temperature=1.0,
            )
            return list(out.logprobs_C.cpu().split([len(ids) for ids in sequences.completion_ids]))

        return score_texts

    def _kl(self, rollouts: Rollouts, outputs: PolicyOutputs | None, ref_logprobs_C: Tensor | None) -> Tensor | None:
        """Per response, the token mean of log pi - log pi_ref; None unless it belongs into the score."""
        if self.kl_in_score == 0.0 or ref_logprobs_C is None:
            return None
        assert outputs is not None
        return self._gather(_response_means(outputs.logprobs_C - ref_logprobs_C, rollouts))

    def _sampling_logprobs(self, rollouts: Rollouts) -> Tensor | None:
        """Those of the sampler, if the loss corrects for them."""
        if self.loss.sampler_correction == "none":
            return None
        if rollouts.sampling_logprobs_C is None:
            raise ValueError(
                f"loss.sampler_correction: {self.loss.sampler_correction}, but the generator returns no log-probs"
            )
        return rollouts.sampling_logprobs_C

    def _micro_batches(
        self, sequences: Sequences, advantages: GroupAdvantages, logprobs: TokenLogprobs, number: int
    ) -> list[MicroBatch]:
        plan = self.plan
        own = slice(self._rank * plan.responses, (self._rank + 1) * plan.responses)
        generator = torch.Generator().manual_seed(self._seed(number))
        order = torch.randperm(plan.responses, generator=generator).tolist()
        lengths = torch.tensor([len(sequences.completion_ids[j]) for j in order], dtype=torch.float64)
        local = lengths.view(plan.updates, -1).sum(1).to(self.accelerator.device)
        tokens_per_update = self._gather(local).view(-1, plan.updates).mean(0).tolist()
        return split_micro_batches(
            plan, sequences, advantages.advantages[own], logprobs, tokens_per_update, self.loss, order
        )

    def _record(
        self, step: int, rollouts: Rollouts, rewards_BK: Tensor, weights: Weights, advantages: GroupAdvantages
    ) -> StepRecord:
        device = self.accelerator.device
        prompts = rollouts.prompts
        return StepRecord(
            step=step,
            reward_names=self.rewards.names,
            families=self._gather_objects(prompts.families),
            prompts=self._gather_objects(prompts.texts),
            completions=self._gather_objects(rollouts.completions),
            rewards_BK=rewards_BK.cpu(),
            weights_BK=weights.weights_BK.cpu(),
            expected_weights_BK=weights.expected_BK.cpu(),
            advantages_B=advantages.advantages.cpu(),
            scores_B=advantages.scores.cpu(),
            degenerate_B=advantages.degenerate.cpu(),
            lengths_B=self._gather(rollouts.completion_lengths_B.to(device)).cpu(),
            truncated_B=self._gather(rollouts.truncated_B.to(device)).cpu(),
        )

    def _gather_objects(self, values: list[Any]) -> list[Any]:
        return list(gather_object(values)) if self.accelerator.num_processes > 1 else values


def _response_means(values_C: Tensor, rollouts: Rollouts) -> Tensor:
    """[C] -> [B], the mean over each response's tokens."""
    parts = values_C.split(rollouts.completion_lengths_B.tolist())
    return torch.stack([part.mean() if part.numel() else part.new_zeros(()) for part in parts])


def _policy_metrics(rollouts: Rollouts, outputs: PolicyOutputs | None) -> dict[str, float]:
    metrics: dict[str, float] = {}
    if outputs is None:
        return metrics
    if outputs.entropies_C is not None:
        metrics["entropy"] = outputs.entropies_C.mean().item()
    if rollouts.sampling_logprobs_C is not None:
        gap = (outputs.logprobs_C.cpu() - rollouts.sampling_logprobs_C).abs()
        metrics["sampling/logprob_gap_mean"] = gap.mean().item()
        metrics["sampling/logprob_gap_max"] = gap.max().item()
    return metrics
