"""How a generation batch divides into processes, micro-batches and optimiser steps."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from maestro_fast.model.forward import Sequences
from maestro_fast.ops import PolicyLossConfig


@dataclass(frozen=True)
class BatchConfig:
    """Sizes of a step.

    Attributes:
        prompts_per_batch: prompts sampled for at a time, over all processes; times group_size responses.
        micro_batch: responses per training forward on one process; bounds the memory.
        updates_per_batch: optimiser steps made from one generation batch, each on its share of the responses.
    """

    prompts_per_batch: int = 8
    micro_batch: int = 8
    updates_per_batch: int = 1

    def __post_init__(self) -> None:
        for name in ("prompts_per_batch", "micro_batch", "updates_per_batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)}, expected at least 1")


@dataclass(frozen=True)
class BatchPlan:
    """The same, divided: ``prompts`` and ``responses`` of one process, ``accumulation`` micro-batches per update."""

    prompts: int
    responses: int
    accumulation: int
    updates: int

    @property
    def micro_steps(self) -> int:
        return self.accumulation * self.updates

    @staticmethod
    def of(config: BatchConfig, group_size: int, processes: int) -> BatchPlan:
        """
        Raises:
            ValueError: the numbers do not divide.
        """
        prompts, rest = divmod(config.prompts_per_batch, processes)
        if rest:
            raise ValueError(
                f"batch.prompts_per_batch: {config.prompts_per_batch}, expected a multiple of the {processes} processes"
            )
        responses = prompts * group_size
        if responses % (config.micro_batch * config.updates_per_batch):
            raise ValueError(
                f"batch.micro_batch: {config.micro_batch} responses times updates_per_batch {config.updates_per_batch} "
                f"do not divide the {responses} responses of a process ({prompts} prompts x {group_size})"
            )
        accumulation = responses // (config.micro_batch * config.updates_per_batch)
        return BatchPlan(prompts, responses, accumulation, config.updates_per_batch)


@dataclass(frozen=True)
class TokenLogprobs:
    """Log-probs [C] that the loss compares with: of the policy before the updates, the reference and the sampler."""

    old_C: Tensor | None = None
    ref_C: Tensor | None = None
    sampling_C: Tensor | None = None

    def select(self, tokens: Tensor) -> TokenLogprobs:
        """Those of some tokens, int64 [n], on the device of the indices."""
        each = (self.old_C, self.ref_C, self.sampling_C)
        return TokenLogprobs(*(None if x is None else x.to(tokens.device)[tokens] for x in each))


@dataclass(frozen=True)
class MicroBatch:
    """What one training forward needs; ``_C`` tensors hold the completion tokens, response after response.

    ``advantages_B`` and ``cu_seqlens`` are on the CPU, where the loss reads which rows have no gradient.
    ``normalizer`` and ``entropy_normalizer`` divide the sums of ``policy_loss``, see there.
    """

    sequences: Sequences
    advantages_B: Tensor
    cu_seqlens: Tensor
    logprobs: TokenLogprobs
    normalizer: float
    entropy_normalizer: float


def split_micro_batches(
    plan: BatchPlan,
    sequences: Sequences,
    advantages_B: Tensor,
    logprobs: TokenLogprobs,
    tokens_per_update: list[float],
    loss: PolicyLossConfig,
    order: list[int],
    device: torch.device,
) -> list[MicroBatch]:
    """Micro-batches in the order in which they are trained on, each a run of ``order``.

    Args:
        tokens_per_update: completion tokens of each optimiser step, averaged over processes, whose gradients are
            averaged, too.
        device: where the log-probs go.
    """
    lengths = [len(c) for c in sequences.completion_ids]
    starts = torch.tensor([0, *lengths]).cumsum(0).tolist()
    size = plan.responses // plan.micro_steps
    advantages_B = advantages_B.cpu()
    batches = []
    for i in range(plan.micro_steps):
        members = order[i * size : (i + 1) * size]
        tokens = torch.cat([torch.arange(starts[j], starts[j + 1]) for j in members])
        update_tokens = tokens_per_update[i // plan.accumulation]
        batches.append(
            MicroBatch(
                sequences.select(members),
                advantages_B[members],
                torch.tensor([0, *(lengths[j] for j in members)]).cumsum(0),
                logprobs.select(tokens.to(device)),
                _normalizer(plan, loss, tokens.numel(), update_tokens),
                update_tokens,
            )
        )
    return batches


def _normalizer(plan: BatchPlan, loss: PolicyLossConfig, tokens: int, update_tokens: float) -> float:
    """Divisor of a micro-batch's summed loss, so that the micro-batches of an update add up."""
    if loss.normalization == "dapo":
        return update_tokens
    if loss.normalization == "bnpo":  # each micro-batch's own mean, as in TRL
        return float(tokens * plan.accumulation)
    return float(plan.responses // plan.updates)
