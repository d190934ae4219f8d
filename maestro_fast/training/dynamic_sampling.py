"""Dynamic sampling: prompts whose groups have no signal are replaced by others, before anything is trained.

A group whose responses all score the same has advantage 0 throughout, so it costs a training forward and moves nothing.
DAPO (Yu et al. 2025, arXiv:2503.14476, section 3.2) samples other prompts until the batch is full of groups with a
signal. Here ``batch.no_signal: refill`` does so in the places of the silent groups, at most ``batch.max_refills``
times. What is silent then is left out of the loss.

Whether a group has a signal is judged on the scores: under the weights that the weight policy gives this very batch,
and before a KL. So a group whose rewards differ, but whose weighted sums do not, counts as silent. One whose rewards
are equal, but whose responses are weighted differently, does not, where the profile compares raw rewards. The weight
policy is asked once more for each refill, and its state is put back after that.

Which prompts come is a pure function of the seed, the number of the batch and the number of the refill, so a resumed
run draws the same. With several processes all sample as many prompts as the one that needs most, because a forward of
a sharded model needs all of them; a process that needs fewer does not use the rest.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from maestro_fast.records import PolicyOutputs, Prompts, Rollouts, take_responses
from maestro_fast.training.batches import BatchConfig
from maestro_fast.training.step import Sampled, Step, all_lengths
from maestro_fast.weighting import Comparison, compare, weigh

# ``spare_rows(number, refill, count, used)`` gives further row indices of the data, none of them in ``used``.
SpareRows = Callable[[int, int, int, set[int]], list[int]]


@dataclass(frozen=True)
class DynamicSampling:
    """Replaces the groups of a batch that have no signal.

    Attributes:
        step: the parts of a batch.
        most: the largest number of refills of a batch.
        spare_rows: gives further rows of the data.
        prompts_of: makes of rows of the data what the policy reads.
    """

    step: Step
    most: int
    spare_rows: SpareRows
    prompts_of: Callable[[list[int]], Prompts]

    def fill(
        self, model: nn.Module, sampled: Sampled, outputs: PolicyOutputs | None, rows_N: list[int]
    ) -> tuple[Sampled, PolicyOutputs | None, list[int], dict[str, float]]:
        """Judges the responses, and samples others in the place of silent groups until there are none.

        All processes call it together.

        Args:
            model: the policy.
            sampled: this process's responses.
            outputs: what the policy's forward gave for them; None where nothing reads it.
            rows_N: the data set's indices of the prompts, over all processes.

        Returns:
            The first, second and last argument of the full batch, its responses with their rewards; and what it cost,
            over all processes, for the log.
        """
        step, rows_N = self.step, [*rows_N]
        sampled = step.judged(model, sampled, outputs)
        silent_N = silent_groups(step, sampled, outputs)
        first, refills, tokens, used = silent_N.double().mean().item(), 0, 0.0, {*rows_N}
        while refills < self.most and bool(silent_N.any()):
            silent_PN = silent_N.view(step.processes.count, -1)
            spare = self._spare(sampled.number, refills + 1, int(silent_PN.sum(1).max()), used)
            if not spare:
                break
            refills += 1
            used.update(row for own in spare for row in own)
            prompts = self.prompts_of(spare[step.processes.rank])
            started = step.start(model, prompts, sampled.number, sampled.step, refills)
            try:
                fresh = step.collect(model, started)
            finally:
                started.wait()
            fresh_outputs = step.score(model, fresh)
            fresh = step.judged(model, fresh, fresh_outputs)
            tokens += float(fresh.rollouts.completion_lengths_B.sum())
            for rank, (silent, own) in enumerate(zip(silent_PN.tolist(), spare, strict=True)):
                places = [i for i, is_silent in enumerate(silent) if is_silent]
                for place, row in zip(places, own, strict=False):
                    rows_N[rank * len(silent) + place] = row
            places = silent_PN[step.processes.rank].nonzero().flatten().tolist()[: len(prompts)]
            sampled, outputs = _replaced(step, sampled, outputs, fresh, fresh_outputs, places)
            silent_N = silent_groups(step, sampled, outputs)
        extra = step.processes.gather(torch.tensor([tokens], device=step.processes.device)).sum().item()
        metrics = {
            "dynamic_sampling/no_signal": first,
            "dynamic_sampling/no_signal_left": silent_N.double().mean().item(),
            "dynamic_sampling/refills": float(refills),
            "dynamic_sampling/prompts": float(len(used)),
            "dynamic_sampling/extra_tokens": extra,
        }
        return sampled, outputs, rows_N, metrics

    def _spare(self, number: int, refill: int, count: int, used: set[int]) -> list[list[int]]:
        """At most ``count`` rows for every process, as many for each; [] if the data hold no more."""
        processes = self.step.processes.count
        rows = self.spare_rows(number, refill, count * processes, used)
        each = len(rows) // processes
        return [rows[i * each : (i + 1) * each] for i in range(processes)] if each else []


def dynamic_sampling(
    config: BatchConfig, step: Step, spare_rows: SpareRows, prompts_of: Callable[[list[int]], Prompts]
) -> DynamicSampling | None:
    """The dynamic sampling that a config asks for; None if it asks for none."""
    return DynamicSampling(step, config.max_refills, spare_rows, prompts_of) if config.no_signal == "refill" else None


def silent_groups(step: Step, sampled: Sampled, outputs: PolicyOutputs | None) -> Tensor:
    """Which groups have no signal under the weights of this batch, bool [N] on the CPU, over all processes."""
    with step.clock.stage("weights"):
        context = step.context_of(sampled, outputs)
        lengths_B = all_lengths(sampled.rollouts, step.processes) if step.profile.needs_lengths else None
        before = step.weights.state_dict()
        comparison = Comparison(step.profile, lengths_B=lengths_B)
        weights, advantages = weigh(step.weights, context, comparison)
        advantages = compare(context, weights, comparison) if advantages is None else advantages
        step.weights.load_state_dict(before)
    return advantages.degenerate.view(-1, step.sampler.group_size)[:, 0].cpu()


def _replaced(
    step: Step,
    sampled: Sampled,
    outputs: PolicyOutputs | None,
    fresh: Sampled,
    fresh_outputs: PolicyOutputs | None,
    places: list[int],
) -> tuple[Sampled, PolicyOutputs | None]:
    """The batch with the groups at ``places`` replaced by the first ones of ``fresh``."""
    size, old = step.sampler.group_size, sampled.rollouts
    order = [*range(len(old))]
    for i, place in enumerate(places):
        order[place * size : (place + 1) * size] = range(len(old) + i * size, len(old) + (i + 1) * size)
    both = Rollouts.joined(Prompts.joined([old.prompts, fresh.rollouts.prompts]), [old, fresh.rollouts])

    def rows(first: Tensor | None, second: Tensor | None) -> Tensor | None:
        return None if first is None or second is None else torch.cat([first, second])[order]

    def tokens(first: Tensor | None, second: Tensor | None) -> Tensor | None:
        return None if first is None or second is None else take_responses(torch.cat([first, second]), both, order)

    merged = replace(
        sampled,
        rollouts=both.select(order),
        rewards_BK=rows(sampled.rewards_BK, fresh.rewards_BK),
        utilities_B=rows(sampled.utilities_B, fresh.utilities_B),
    )
    if outputs is None or fresh_outputs is None:
        return merged, None
    logprobs_C = tokens(outputs.logprobs_C, fresh_outputs.logprobs_C)
    assert logprobs_C is not None
    return merged, PolicyOutputs(
        logprobs_C,
        tokens(outputs.entropies_C, fresh_outputs.entropies_C),
        rows(outputs.context_Bd, fresh_outputs.context_Bd),
    )
