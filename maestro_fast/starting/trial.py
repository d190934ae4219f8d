"""Tries a step of a run on a few prompts: real responses, each reward on them, and one training pass.

Everything is done by the parts of the run's own steps (``training.step.Step``), with fewer prompts and mostly with
shorter responses. Nothing is learnt: the gradients are dropped, and the optimiser and the weight policy are left alone.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from maestro_fast.error_report import explain
from maestro_fast.records import PolicyOutputs, Prompts, Rollouts, plain_text
from maestro_fast.reporting.tables import Table
from maestro_fast.rewards import RewardSet
from maestro_fast.training.batches import MicroBatch
from maestro_fast.training.metrics import StageClock
from maestro_fast.training.plan import context_mode
from maestro_fast.training.step import Sampled, Step
from maestro_fast.training.trainer import MaestroTrainer

_SHOWN = 500  # characters of a response


@dataclass(frozen=True)
class Judged:
    """What one reward gave to the responses.

    Attributes:
        name: the reward's name.
        values_B: float32 [B], NaN where it abstained; None if it failed.
        seconds: how long it took.
        error: what went wrong, "" if nothing did.
    """

    name: str
    values_B: Tensor | None
    seconds: float
    error: str = ""

    def row(self, group_size: int) -> tuple[str, str, float | None, float | None, str, str]:
        """Name, mean, spread within groups, share of groups that it tells apart, share abstained, and seconds."""
        if self.values_B is None:
            return self.name, "failed", None, None, "-", f"{self.seconds:.2f}"
        live = self.values_B[~self.values_B.isnan()]
        groups = self.values_B.view(-1, group_size)
        spreads = [own[~own.isnan()].std(correction=0).item() for own in groups if int((~own.isnan()).sum()) > 1]
        tells = sum(spread > 0 for spread in spreads)
        mean = f"{live.mean().item():.3f}" if len(live) else "-"
        spread = sum(spreads) / len(spreads) if spreads else math.nan
        abstained = f"{100 - 100 * len(live) / len(self.values_B):.0f} %"
        return self.name, mean, spread, f"{tells} of {len(groups)}", abstained, f"{self.seconds:.2f}"  # type: ignore[return-value]


@dataclass
class Trial:
    """What was seen.

    Attributes:
        rollouts: the responses, group by group.
        group_size: the number of responses to a prompt.
        judged: what each reward gave, and last the anchor.
        scores: the weighted score of each response; empty if a reward failed.
        silent: the number of groups whose responses all score alike.
        micro_batches: what would be trained on; empty if a reward failed.
        seconds: how long each stage took.
        trained: the tokens of the training pass, and of its completions; 0 before there was one.
    """

    rollouts: Rollouts
    group_size: int
    judged: list[Judged]
    scores: list[float]
    silent: int
    micro_batches: list[MicroBatch]
    seconds: dict[str, float] = field(default_factory=dict)
    trained: int = 0

    @property
    def tokens(self) -> int:
        """The tokens of all sequences, prompts and completions."""
        prompts = sum(map(len, self.rollouts.prompts.token_ids))
        return prompts + int(self.rollouts.completion_lengths_B.sum())

    @property
    def steps_sampled(self) -> int:
        """The tokens of the longest response of each group, which is how often the policy was called."""
        return int(self.rollouts.completion_lengths_B.view(-1, self.group_size).amax(1).sum())

    def rewards_table(self) -> Table:
        """One row for each reward."""
        groups = len(self.rollouts) // self.group_size
        caption = f"Rewards of {len(self.rollouts)} responses ({groups} prompts x {self.group_size})"
        header = ("reward", "mean", "spread in a group", "tells apart", "abstained", "seconds")
        return Table(caption, header, tuple(each.row(self.group_size) for each in self.judged))

    def shown_responses(self) -> list[str]:
        """Two responses with their rewards: of all groups the one with the largest score, and that with the least."""
        order = [0, len(self.rollouts) - 1]
        if len(set(self.scores)) > 1:
            order = [self.scores.index(max(self.scores)), self.scores.index(min(self.scores))]
        return [self._shown(i) for i in dict.fromkeys(order)]

    def _shown(self, i: int) -> str:
        text = plain_text(self.rollouts.completions[i])
        cut = f"{text[:_SHOWN]} ..." if len(text) > _SHOWN else text
        values = [(own.name, own.values_B[i].item()) for own in self.judged if own.values_B is not None]
        rewards = ", ".join(f"{name} {'abstained' if math.isnan(x) else f'{x + 0.0:.3g}'}" for name, x in values)
        tokens = int(self.rollouts.completion_lengths_B[i])
        ended = "cut off" if bool(self.rollouts.truncated_B[i]) else "ended by itself"
        prompt = self.rollouts.prompts.texts[i]
        asked = " ".join(plain_text(prompt if isinstance(prompt, str) else prompt[-1:]).split())
        asked = f"... {asked[-60:]}" if len(asked) > 64 else asked
        lines = textwrap.wrap(f'A response to "{asked}", {tokens} tokens, {ended}: {rewards or "no rewards"}', 100)
        return "\n".join([*lines, *(f"  | {line}" for line in cut.splitlines() or [""])])


def try_step(trainer: MaestroTrainer, model: nn.Module, prompts: Prompts) -> Trial:
    """Samples a group for each of a few prompts, and judges the responses.

    Args:
        trainer: the trainer of the run; it is not trained.
        model: the policy.
        prompts: the prompts, each once.
    """
    step, clock = trainer.step, StageClock(trainer.args.device)
    G = step.sampler.group_size
    repeated, parts = prompts.repeat(G), []
    with tqdm(total=len(prompts), desc="sampling groups", leave=False, disable=None) as bar, clock.stage("sampling"):
        for number, part in enumerate(prompts.split(len(prompts))):
            parts.append(step.sampler(model, part.repeat(G), number))
            bar.update()
    rollouts = Rollouts.joined(repeated, parts)
    sequences = Sampled(rollouts, 0, 1).sequences
    with clock.stage("scoring"):
        outputs = step.scorer(model, sequences, entropy=True, context=context_mode(step.weights))
    judged = list(_judged(step, model, rollouts, outputs))
    scores, silent, micro_batches = list[float](), 0, list[MicroBatch]()
    if not any(each.error for each in judged):
        values = [each.values_B for each in judged if each.values_B is not None]
        K = len(step.judges.rewards)
        utilities = values[K] if step.judges.anchor is not None else None
        sampled = Sampled(rollouts, 0, 1, torch.stack(values[:K], 1), utilities)
        small = _small(step, len(prompts))
        micro_batches, record, _ = small.prepare(model, sampled, outputs, lambda outcome: None)
        scores, silent = record.scores_B.tolist(), int(record.degenerate_B.view(-1, G).all(1).sum())
    return Trial(rollouts, G, judged, scores, silent, micro_batches, clock.lap())


def try_training(trainer: MaestroTrainer, model: nn.Module, trial: Trial) -> None:
    """Runs the forward and the backward of one micro-batch, and drops its gradients."""
    batch, clock = trial.micro_batches[0], StageClock(trainer.args.device)
    was = model.training
    model.train()
    try:
        with clock.stage("training"):
            with trainer.step.scorer.autocast():
                loss = trainer.compute_loss(model, batch)
            loss.backward()
    finally:
        model.zero_grad(set_to_none=True)
        model.train(was)
    trial.seconds["training"] = clock.lap()["training"]
    trial.trained = sum(batch.sequences.lengths)


def _judged(step: Step, model: nn.Module, rollouts: Rollouts, outputs: PolicyOutputs) -> Iterator[Judged]:
    """Calls each reward by itself, so that one that fails does not hide what the others give."""
    sets = [(own.name, RewardSet([own])) for own in step.judges.rewards.rewards]
    anchor = step.judges.anchor
    if anchor is not None:
        sets.append((f"anchor: {anchor.names[0]}", anchor))
    for name, own in tqdm(sets, desc="judging", leave=False, disable=None):
        clock = StageClock(step.processes.device)
        values, error = None, ""
        with clock.stage("reward"), _reported() as failures:
            values = replace(step.judges, rewards=own, anchor=None)(model, rollouts, outputs, 0)[0][:, 0]
        error = failures[0] if failures else ""
        yield Judged(name, values, clock.lap()["reward"], error)


@contextmanager
def _reported() -> Iterator[list[str]]:
    """Keeps what an error of the body says, with the lines of the user's own code where it was raised."""
    failures: list[str] = []
    try:
        yield failures
    except Exception as error:
        said = explain(error) or f"{type(error).__name__}: {error}"
        failures.append(said.removeprefix("maestro-fast: "))


def _small(step: Step, prompts: int) -> Step:
    """The step with so many prompts, whose micro-batches are as large as the run's if the responses are enough."""
    responses = prompts * step.sampler.group_size
    size = step.plan.micro_batch
    accumulation = responses // size if responses % size == 0 else 1
    return replace(
        step, plan=replace(step.plan, prompts=prompts, responses=responses, accumulation=accumulation, updates=1)
    )
