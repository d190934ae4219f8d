"""How a generation batch divides into processes, micro-batches and optimiser steps."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from maestro_fast.ops import PolicyLossConfig
from maestro_fast.training.forward import Sequences


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
class MicroBatch:
    """What one training forward needs; ``_C`` tensors hold the completion tokens, response after response."""

    sequences: Sequences
    advantages_B: Tensor
    cu_seqlens: Tensor
    old_logprobs_C: Tensor | None
    ref_logprobs_C: Tensor | None
    normalizer: float | None


def split_micro_batches(
    plan: BatchPlan,
    sequences: Sequences,
    advantages_B: Tensor,
    old_logprobs_C: Tensor | None,
    ref_logprobs_C: Tensor | None,
    tokens_per_update: list[float] | None,
    loss: PolicyLossConfig,
    order: list[int],
) -> list[MicroBatch]:
    """Micro-batches in the order in which they are trained on, each a run of ``order``.

    Args:
        tokens_per_update: completion tokens of each optimiser step, averaged over processes (whose gradients are
            averaged, too); the normalizer of "dapo". None for other normalizations.
    """
    lengths = [len(c) for c in sequences.completion_ids]
    starts = torch.tensor([0, *lengths]).cumsum(0).tolist()
    size = plan.responses // plan.micro_steps
    batches = []
    for i in range(plan.micro_steps):
        members = order[i * size : (i + 1) * size]
        tokens = torch.cat([torch.arange(starts[j], starts[j + 1]) for j in members]).to(advantages_B.device)
        bounds = torch.tensor([0, *(lengths[j] for j in members)]).cumsum(0)
        batches.append(
            MicroBatch(
                sequences.select(members),
                advantages_B[members],
                bounds.to(advantages_B.device),
                None if old_logprobs_C is None else old_logprobs_C[tokens],
                None if ref_logprobs_C is None else ref_logprobs_C[tokens],
                _normalizer(
                    plan,
                    loss,
                    None if tokens_per_update is None else tokens_per_update[i // plan.accumulation],
                ),
            )
        )
    return batches


def _normalizer(plan: BatchPlan, loss: PolicyLossConfig, tokens: float | None) -> float | None:
    """Divisor of a micro-batch's summed loss, so that the micro-batches of an update add up; None for "bnpo"."""
    if loss.normalization == "dapo":
        return tokens
    if loss.normalization in ("grpo", "dr_grpo"):
        return float(plan.responses // plan.updates)
    return None
