"""Divides a generation batch into processes, optimiser steps and micro-batches.

A generation batch is all that is sampled before the policy changes. Its prompts are dealt to the processes whole, so a
group never spans two of them. Each process makes ``updates`` optimiser steps from its responses, and accumulates the
gradient of each step over ``accumulation`` micro-batches.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from torch.utils.data import Sampler
from transformers import TrainingArguments

from maestro_fast.model.rows import Sequences


@dataclass(frozen=True)
class BatchConfig:
    """Sizes of a generation batch.

    Attributes:
        prompts_per_batch: the number of prompts of a generation batch, over all processes; each gets group_size
            responses.
        micro_batch: the number of responses in one training forward of a process; it bounds the memory.
        updates_per_batch: the number of optimiser steps from one generation batch, each on its share of the responses.
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
    """The share of a generation batch that one process has.

    Attributes:
        prompts, responses: the numbers of prompts and of responses of the process.
        accumulation: the number of micro-batches of an optimiser step.
        updates: the number of optimiser steps from the generation batch.
    """

    prompts: int
    responses: int
    accumulation: int
    updates: int

    @property
    def micro_steps(self) -> int:
        """The number of micro-batches of the generation batch."""
        return self.accumulation * self.updates

    @property
    def micro_batch(self) -> int:
        """The number of responses of a micro-batch."""
        return self.responses // self.micro_steps

    def set_sizes(self, args: TrainingArguments) -> None:
        """Has transformers' data loader deliver the prompts of one process, as plain rows, for every micro-step."""
        args.per_device_train_batch_size = self.prompts
        args.gradient_accumulation_steps = self.accumulation
        args.remove_unused_columns = False
        args.dataloader_pin_memory = False

    @staticmethod
    def of(config: BatchConfig, group_size: int, processes: int) -> BatchPlan:
        """Divides a batch over ``processes``.

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
class Processes:
    """Lets the processes of a run exchange tensors and objects, through accelerate."""

    accelerator: Accelerator

    @property
    def rank(self) -> int:
        return int(self.accelerator.process_index)

    @property
    def count(self) -> int:
        return int(self.accelerator.num_processes)

    @property
    def device(self) -> torch.device:
        """The device on which this process trains."""
        device: torch.device = self.accelerator.device
        return device

    def gather(self, tensor: Tensor) -> Tensor:
        """Concatenates the tensors of all processes; each lies on the device of its process, and all have one shape."""
        gathered: Tensor = self.accelerator.gather(tensor.contiguous())
        return gathered

    def gather_rows(self, own: Tensor, count: int) -> Tensor:
        """Returns, on the CPU, the first ``count`` rows of a tensor whose rows were dealt to the processes in turn."""
        gathered = self.gather(own.to(self.device)).cpu()
        return gathered.view(self.count, *own.shape).transpose(0, 1).flatten(0, 1)[:count]

    def gather_objects(self, values: list[Any]) -> list[Any]:
        """Concatenates the lists of all processes."""
        return list(gather_object(values)) if self.count > 1 else values


class GroupSampler(Sampler[int]):
    """Yields shuffled prompt indices in blocks; each block of ``block`` prompts comes ``repeat`` times in a row.

    A block is one generation batch over all processes. Each repetition is one micro-step of the trainer, which samples
    responses on the first and uses them again on the others. A last block that is not full is left out, as in TRL.
    """

    def __init__(self, size: int, block: int, repeat: int, seed: int) -> None:
        self.size, self.block, self.repeat, self.seed = size, block, repeat, seed
        self.epoch = 0

    @property
    def blocks(self) -> int:
        """The number of generation batches in an epoch."""
        return self.size // self.block

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def rows(self, number: int) -> list[int]:
        """The indices of the prompts of generation batch ``number``, which counts from 0 over all epochs."""
        epoch, place = divmod(number, self.blocks)
        return self._order(epoch)[place * self.block : (place + 1) * self.block]

    def _order(self, epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(self.seed + epoch)
        order: list[int] = torch.randperm(self.size, generator=generator).tolist()
        return order

    def __iter__(self) -> Iterator[int]:
        order = self._order(self.epoch)
        for start in range(0, self.size - self.block + 1, self.block):
            for _ in range(self.repeat):
                yield from order[start : start + self.block]

    def __len__(self) -> int:
        return self.blocks * self.block * self.repeat


@dataclass(frozen=True)
class TokenLogprobs:
    """The log-probs [C] with which the loss compares the policy's own; a None means that it does not compare.

    ``old_C`` comes from the policy before the updates, ``ref_C`` from the reference, ``sampling_C`` from the sampler.
    """

    old_C: Tensor | None = None
    ref_C: Tensor | None = None
    sampling_C: Tensor | None = None

    def select(self, tokens: Tensor) -> TokenLogprobs:
        """The log-probs of the tokens with the indices ``tokens``, int64 [n], on the device of the indices."""
        each = (self.old_C, self.ref_C, self.sampling_C)
        return TokenLogprobs(*(None if x is None else x.to(tokens.device)[tokens] for x in each))


@dataclass(frozen=True)
class MicroBatch:
    """The responses of one training forward, with everything that their loss needs.

    ``_C`` tensors hold the completion tokens, response after response. ``advantages_B`` and ``cu_seqlens`` lie on the
    CPU, where the loss reads which rows have no gradient. ``normalizer`` and ``entropy_normalizer`` divide the sums of
    ``policy_loss``, whose documentation explains them. ``members`` are the indices of the responses among those of this
    process; they are empty where a checkpoint of version 0.1 did not hold them.
    """

    sequences: Sequences
    advantages_B: Tensor
    cu_seqlens: Tensor
    logprobs: TokenLogprobs
    normalizer: float
    entropy_normalizer: float
    members: tuple[int, ...] = ()


def group_order(prompts: int, group_size: int, generator: torch.Generator) -> list[int]:
    """The indices of all responses, whole groups in random order.

    So an optimiser step trains on whole groups where they fit, as in verl, and a micro-batch holds responses with a
    common prompt, which the model needs to compute only once for them.
    """
    groups = torch.randperm(prompts, generator=generator)
    return (groups[:, None] * group_size + torch.arange(group_size)).flatten().tolist()


def split_micro_batches(
    plan: BatchPlan,
    sequences: Sequences,
    advantages_B: Tensor,
    logprobs: TokenLogprobs,
    tokens_per_update: list[float],
    normalization: str,
    order: list[int],
    device: torch.device,
) -> list[MicroBatch]:
    """Cuts the responses into micro-batches, in the order in which they are trained on.

    Args:
        plan: says how many micro-batches there are.
        sequences, advantages_B, logprobs: the responses of this process.
        tokens_per_update: the number of completion tokens of each optimiser step. It is a mean over the processes,
            because their gradients are averaged, too.
        normalization: the normalization of the loss, as in ``PolicyLossConfig``.
        order: the responses' indices; each micro-batch takes the next ones.
        device: the device on which the log-probs are put.
    """
    lengths = [len(c) for c in sequences.completion_ids]
    starts = torch.tensor([0, *lengths]).cumsum(0).tolist()
    size = plan.micro_batch
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
                _normalizer(plan, normalization, tokens.numel(), update_tokens),
                update_tokens,
                tuple(members),
            )
        )
    return batches


def _normalizer(plan: BatchPlan, normalization: str, tokens: int, update_tokens: float) -> float:
    """The divisor of a micro-batch's summed loss under which the micro-batches of an update add up."""
    if normalization == "dapo":
        return update_tokens
    if normalization == "bnpo":  # As in TRL, each micro-batch is a mean over its own tokens.
        return float(tokens * plan.accumulation)
    return float(plan.responses // plan.updates)
