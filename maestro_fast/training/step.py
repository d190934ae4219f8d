"""One generation batch on one page: sample, score, judge, weigh, compare, and cut into micro-batches.

The page is read from top to bottom. ``Step`` holds the parts that all batches of a run share, and its four methods
are the order of a batch:

    start     The generator begins to sample G responses to each prompt.
    collect   The responses come in.
    score     A forward of the policy gives log-probs, entropies and hidden states, in the runs that need it.
    prepare   The rewards judge the responses; the weight policy weighs the rewards; within each group the weighted
              scores are compared, which gives the advantages; the responses are cut into micro-batches.

The sampler, the scorer and the judges stand in ``training/parts.py``, and the losses in ``training/loss.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from maestro_fast.model.reference import PromptContexts, Reference
from maestro_fast.model.rows import Sequences
from maestro_fast.ops import AdvantageProfile, GroupAdvantages
from maestro_fast.records import (
    PolicyOutputs,
    Prompts,
    Rollouts,
    StepRecord,
    own_copy,
    response_means,
)
from maestro_fast.training.batches import (
    BatchPlan,
    MicroBatch,
    Processes,
    TokenLogprobs,
    UpdateTotals,
    cut_order,
    group_order,
    split_micro_batches,
)
from maestro_fast.training.metrics import StageClock, batch_metrics, policy_metrics
from maestro_fast.training.overlap import Started, run_together
from maestro_fast.training.parts import Judges, Sampler, Scorer
from maestro_fast.training.plan import LossTerms, Scoring, context_mode, reads_reference
from maestro_fast.weighting import Comparison, Outcome, WeightContext, WeightPolicy, compare, weigh
from maestro_fast.weighting.diagnostics import diagnose

_PARTS = 256  # the random draws of a refill are keyed as those of a later part; no batch has as many parts


@dataclass(frozen=True)
class Sampled:
    """Responses of one process that have no weights yet.

    Attributes:
        rollouts: the responses.
        number: the number of the generation batch, from 0.
        step: the number of the first optimiser step that trains on the batch, from 1.
        rewards_BK, utilities_B: what the judges gave them while other parts were being sampled; None where nothing has
            judged them yet, and ``utilities_B`` also without an anchor.
    """

    rollouts: Rollouts
    number: int
    step: int
    rewards_BK: Tensor | None = None
    utilities_B: Tensor | None = None

    @property
    def sequences(self) -> Sequences:
        """The prompts and completions as token ids."""
        return Sequences(self.rollouts.prompts.token_ids, self.rollouts.completion_ids)


@dataclass(frozen=True)
class Step:
    """The parts that every generation batch of a run shares, and the order in which they act.

    Attributes:
        plan, terms, profile, scoring: the decisions that were made before the first batch.
        sampler, scorer, judges, weights: the parts that sample, score, judge and weigh.
        reference: gives the reference policy, see ``model.reference``; None where nothing reads it.
        prompt_contexts: gives the reference's mean hidden state over each prompt.
        processes: lets the processes of the run exchange tensors.
        clock: adds up the seconds of each stage.
    """

    plan: BatchPlan
    terms: LossTerms
    profile: AdvantageProfile
    scoring: Scoring
    sampler: Sampler
    scorer: Scorer
    judges: Judges
    weights: WeightPolicy
    reference: Reference | None
    prompt_contexts: PromptContexts
    processes: Processes
    clock: StageClock

    def start(
        self,
        model: nn.Module,
        prompts: Prompts,
        number: int,
        step: int,
        refill: int = 0,
        staleness: int | None = None,
    ) -> Started:
        """Begins generation batch ``number`` (from 0), which optimiser step ``step`` (from 1) is the first to train on.

        A generator that works elsewhere begins at once. One that works in this process waits until ``collect``.

        Args:
            model: the policy.
            prompts: this process's prompts, each once.
            refill: 0 for the batch itself, whose parts are sampled side by side; the number of the refill (from 1) for
                prompts that take the place of others in it. It keys the random draws.
            staleness: of the batch, see ``Started``. With a number, the policy may change before ``collect``.
        """
        prompts = prompts.repeat(self.sampler.group_size)
        count = self.sampler.generator.concurrent_parts
        parts = prompts.split(max(1, count) if refill == 0 else 1)
        sampler = self.sampler if staleness is None else self.sampler.renewed(model)
        calls = [partial(sampler, model, part, number, i + refill * _PARTS) for i, part in enumerate(parts)]
        if count == 0:
            return Started(prompts, [*calls], lambda: None, number, step)
        return Started(prompts, *run_together(calls, self.processes.device), number, step, staleness)

    def collect(self, model: nn.Module, started: Started) -> Sampled:
        """Waits for the responses. If they come in several parts, it judges each while the next are being sampled."""
        rollouts: list[Rollouts] = []
        rewards: list[Tensor] = []
        utilities: list[Tensor] = []
        for part in started.parts:
            with self.clock.stage("generate"):
                rollouts.append(part())
            if len(started.parts) > 1:
                with self.clock.stage("rewards"):
                    part_BK, part_B = self.judges(model, rollouts[-1], None, started.number)
                rewards.append(part_BK)
                utilities += [] if part_B is None else [part_B]
        joined = Rollouts.joined(started.prompts, rollouts)
        if started.staleness is not None:
            joined.metrics["sampling/staleness"] = float(started.staleness)
        return Sampled(
            joined,
            started.number,
            started.step,
            torch.cat(rewards) if rewards else None,
            torch.cat(utilities) if utilities else None,
        )

    def score(self, model: nn.Module, sampled: Sampled) -> PolicyOutputs | None:
        """Runs the scoring forward; returns None if the run needs none, see ``plan.choose_scoring``."""
        if self.scoring.source != "scoring":
            return None
        with self.clock.stage("score"):
            return self.scorer(model, sampled.sequences, entropy=True, context=context_mode(self.weights))

    def prepare(
        self,
        model: nn.Module,
        sampled: Sampled,
        outputs: PolicyOutputs | None,
        learn: Callable[[Outcome], None],
    ) -> tuple[list[MicroBatch], StepRecord, dict[str, float]]:
        """Judges, weighs and compares the responses, and cuts them into micro-batches.

        Args:
            model: the policy.
            sampled: this process's responses.
            outputs: what the policy's forward gave for them; None where nothing reads it.
            learn: called with the outcome, from which the weight policy learns now or later.

        Returns:
            This process's micro-batches, and the record and the figures of the batch over all processes.
        """
        rollouts, processes, clock = sampled.rollouts, self.processes, self.clock
        with clock.stage("reference"):
            ref_logprobs_C = self._reference_logprobs(sampled.sequences)
        sampled = self.judged(model, sampled, outputs)
        comparison = Comparison(
            self.profile,
            self._kl(rollouts, outputs, ref_logprobs_C),
            self.terms.kl_in_score,
            all_lengths(rollouts, processes) if self.profile.needs_lengths else None,
        )
        with clock.stage("weights"):
            context = self.context_of(sampled, outputs)
            weights, advantages = weigh(self.weights, context, comparison)
        if advantages is None:
            with clock.stage("advantages"):
                advantages = compare(context, weights, comparison)
        outcome = Outcome(context, weights, advantages, self.profile, comparison.kl_B, comparison.beta)
        with clock.stage("conductor_update"):
            learn(outcome)
        record = step_record(sampled.step, rollouts, outcome, processes)
        self.judges.watch_first(record, rollouts, self.sampler.group_size)
        metrics = batch_metrics(record, advantages) | diagnose(outcome) | self.weights.metrics() | self.judges.metrics()
        in_score = None if self.terms.needs_reference else ref_logprobs_C  # Otherwise the loss logs the KL.
        metrics |= policy_metrics(rollouts, outputs, processes.gather, in_score) | rollouts.metrics
        logprobs = TokenLogprobs(
            outputs.logprobs_C if outputs is not None and self.plan.updates > 1 else None,
            ref_logprobs_C if self.terms.needs_reference else None,
            sampling_logprobs(rollouts, self.terms, scored=outputs is not None),
        )
        live_B = self._live(rollouts, advantages)
        metrics |= {} if live_B is None else {"batch/left_out": 1.0 - _mean(live_B, processes)}
        return self._micro_batches(sampled, advantages, logprobs, live_B), record, metrics

    def judged(self, model: nn.Module, sampled: Sampled, outputs: PolicyOutputs | None) -> Sampled:
        """The responses with their rewards and utilities, which some have already."""
        if sampled.rewards_BK is not None:
            return sampled
        with self.clock.stage("rewards"):
            rewards_BK, utilities_B = self.judges(model, sampled.rollouts, outputs, sampled.number)
        return replace(sampled, rewards_BK=rewards_BK, utilities_B=utilities_B)

    def context_of(self, sampled: Sampled, outputs: PolicyOutputs | None) -> WeightContext:
        """What the weight policy may look at, over all processes, once the responses are judged."""
        processes, rollouts = self.processes, sampled.rollouts
        assert sampled.rewards_BK is not None
        utilities_B = sampled.utilities_B
        return WeightContext(
            self.judges.rewards.names,
            self.sampler.group_size,
            sampled.number,
            processes.gather(sampled.rewards_BK.to(processes.device)),
            self._hidden_states(rollouts, outputs),
            None if utilities_B is None else processes.gather(utilities_B.to(processes.device)),
            policy_columns(self.weights, rollouts.prompts, processes),
        )

    def _reference_logprobs(self, sequences: Sequences) -> Tensor | None:
        """The reference's log-probs of this process's completions, float32 [C]; None where nothing reads them."""
        if self.reference is None or not self.terms.reads_reference:
            return None
        with self.reference() as (model, head):
            return self.scorer(model, sequences, head=head).logprobs_C

    def _kl(self, rollouts: Rollouts, outputs: PolicyOutputs | None, ref_logprobs_C: Tensor | None) -> Tensor | None:
        """The token mean of log pi - log pi_ref, [B] over all processes; None unless the KL is part of the score."""
        if self.terms.kl_in_score == 0.0 or ref_logprobs_C is None:
            return None
        assert outputs is not None
        return self.processes.gather(response_means(outputs.logprobs_C - ref_logprobs_C, rollouts))

    def _hidden_states(self, rollouts: Rollouts, outputs: PolicyOutputs | None) -> Tensor | None:
        """The hidden states that the weight policy reads, [B, d] over all processes; None if it reads none."""
        if reads_reference(self.weights):
            assert self.reference is not None
            with self.reference() as (model, _):
                return self.processes.gather(self.prompt_contexts(model, rollouts.prompts.token_ids))
        if outputs is None or outputs.context_Bd is None:
            return None
        return self.processes.gather(outputs.context_Bd)

    def _live(self, rollouts: Rollouts, advantages: GroupAdvantages) -> Tensor | None:
        """Which of this process's responses are in the loss, bool [B]; None if the run leaves none out."""
        plan = self.plan
        if not (plan.drops_silent or plan.masks_truncated):
            return None
        live_B = torch.ones(plan.responses, dtype=torch.bool)
        if plan.drops_silent:
            live_B &= ~advantages.degenerate[self._own].cpu()
        return live_B & ~rollouts.truncated_B if plan.masks_truncated else live_B

    @property
    def _own(self) -> slice:
        """This process's responses among those of all processes."""
        return slice(self.processes.rank * self.plan.responses, (self.processes.rank + 1) * self.plan.responses)

    def _micro_batches(
        self, sampled: Sampled, advantages: GroupAdvantages, logprobs: TokenLogprobs, live_B: Tensor | None
    ) -> list[MicroBatch]:
        """This process's micro-batches, its groups in random order unless there has been a training forward already."""
        plan, processes, sequences = self.plan, self.processes, sampled.sequences
        dropped_B = advantages.degenerate[self._own].cpu() if plan.drops_silent else None
        live_B = torch.ones(plan.responses, dtype=torch.bool) if live_B is None else live_B
        own, shared = (
            torch.Generator().manual_seed(self.sampler.seed_of(sampled.number, rank)) for rank in (processes.rank, 0)
        )
        cut = cut_order(plan, group_order(plan, processes.rank, processes.count, own, shared), live_B)
        if self.scoring.source == "training":  # The training forward took the responses in the order of sampling.
            cut = [list(range(plan.responses))]
        lengths_B = torch.where(live_B, sampled.rollouts.completion_lengths_B, 0)
        updates = [cut[u * plan.accumulation : (u + 1) * plan.accumulation] for u in range(plan.updates)]
        tokens = [sum(int(lengths_B[members].sum()) for members in update) for update in updates]
        live = [sum(int(live_B[members].sum()) for members in update) for update in updates]
        kept = plan.responses if dropped_B is None else int((~dropped_B).sum())
        filled = [sum(bool(lengths_B[members].any()) for members in update) for update in updates]
        counts = torch.tensor([tokens, live, filled, [kept] * plan.updates], dtype=torch.float64)
        counts = processes.gather(counts[None].to(processes.device)).mean(0).cpu()
        # Responses that are kept with all their tokens masked stand in no micro-batch, so they count as spread alike.
        trained = counts[1].sum()
        counts[1] = counts[3] * (counts[1] / trained if trained else 1 / plan.updates)
        return split_micro_batches(
            plan,
            sequences,
            advantages.advantages[self._own],
            logprobs,
            cut,
            live_B,
            UpdateTotals(self.terms.normalization, *counts[:3].tolist()),
            processes.device,
        )


def _mean(values: Tensor, processes: Processes) -> float:
    return processes.gather(values.double().to(processes.device)).mean().item()


def policy_columns(weights: WeightPolicy, prompts: Prompts, processes: Processes) -> dict[str, list[Any]]:
    """The data set columns that a weight policy asked for, over all processes, as copies that it may change.

    Raises:
        ValueError: the data has no such column.
    """
    for name in weights.needs_columns:
        if name not in prompts.columns:
            raise ValueError(
                f"weights: policy {weights.name!r} reads the column {name!r}, the data has "
                f"{', '.join(sorted(prompts.columns)) or 'none beside the prompts'}"
            )
    return {name: own_copy(processes.gather_objects(prompts.columns[name])) for name in weights.needs_columns}


def sampling_logprobs(rollouts: Rollouts, terms: LossTerms, *, scored: bool) -> Tensor | None:
    """The sampler's log-probs that a micro-batch carries; None if nothing reads them there.

    The loss may read them. And if the responses were not ``scored`` before the training forward, that forward is
    compared with them for the log.

    Raises:
        ValueError: the loss needs them, and the generator returned none.
    """
    if not terms.wants_sampling:
        return None if scored else rollouts.sampling_logprobs_C
    if terms.needs_sampling and rollouts.sampling_logprobs_C is None:
        correction = getattr(terms.function, "sampler_correction", None)
        raise ValueError(f"loss.sampler_correction: {correction}, but the generator returns no log-probs")
    return rollouts.sampling_logprobs_C


def all_lengths(rollouts: Rollouts, processes: Processes) -> Tensor:
    """The number of tokens of each completion, int64 [B] over all processes."""
    return processes.gather(rollouts.completion_lengths_B.to(processes.device))


def step_record(step: int, rollouts: Rollouts, outcome: Outcome, processes: Processes) -> StepRecord:
    """Makes the record of a batch, over all processes, for the observers and the log."""
    context, weights, advantages = outcome.context, outcome.weights, outcome.advantages
    return StepRecord(
        step=step,
        reward_names=context.reward_names,
        families=processes.gather_objects(rollouts.prompts.families),
        prompts=own_copy(processes.gather_objects(rollouts.prompts.texts)),  # An observer may change its record.
        completions=own_copy(processes.gather_objects(rollouts.completions)),
        rewards_BK=context.rewards_BK.cpu(),
        weights_BK=weights.weights_BK.cpu(),
        expected_weights_BK=weights.expected_BK.cpu(),
        advantages_B=advantages.advantages.cpu(),
        scores_B=advantages.scores.cpu(),
        degenerate_B=advantages.degenerate.cpu(),
        lengths_B=all_lengths(rollouts, processes).cpu(),
        truncated_B=processes.gather(rollouts.truncated_B.to(processes.device)).cpu(),
        utilities_B=None if context.utilities_B is None else context.utilities_B.cpu(),
        residuals_B=None if weights.residual_B is None else weights.residual_B.cpu(),
    )
