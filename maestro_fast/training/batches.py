"""Divides a generation batch into processes, optimiser steps and micro-batches.

A generation batch is all that is sampled before the policy changes. Its prompts are dealt to the processes whole, so a
group never spans two of them. Each process makes ``updates`` optimiser steps from its responses, and accumulates the
gradient of each step over ``accumulation`` micro-batches.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from torch.utils.data import Sampler
from transformers import TrainingArguments

from maestro_fast.data.order import PromptOrder
from maestro_fast.model.rows import Sequences


@dataclass(frozen=True)
class BatchConfig:
    """Sizes of a generation batch.

    Attributes:
        prompts_per_batch: the number of prompts of a generation batch, over all processes; each gets group_size
            responses.
        micro_batch: the number of responses in one training forward of a process; it bounds the memory.
        updates_per_batch: the number of optimiser steps from one generation batch, each on its share of the responses.
        no_signal: what becomes of a group whose responses all score the same, so that it has no signal: "train" keeps
            it (only a KL or an entropy bonus gives it a gradient), "drop" leaves it out of the loss, and "refill"
            samples another prompt in its place (the dynamic sampling of DAPO), see ``training/dynamic_sampling.py``.
        max_refills: how many times "refill" samples other prompts; groups that have no signal after that are dropped.
        truncated: what becomes of a response that the token limit ended: "train" keeps it, and "mask" leaves it out of
            the loss, but not out of its group's mean (TRL's mask_truncated_completions).
    """

    prompts_per_batch: int = 8
    micro_batch: int = 8
    updates_per_batch: int = 1
    no_signal: Literal["train", "drop", "refill"] = "train"
    max_refills: int = 3
    truncated: Literal["train", "mask"] = "train"

    def __post_init__(self) -> None:
        for name in ("prompts_per_batch", "micro_batch", "updates_per_batch", "max_refills"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)}, expected at least 1")


@dataclass(frozen=True)
class BatchPlan:
    """The share of a generation batch that one process has.

    Attributes:
        prompts, responses: the numbers of prompts and of responses of the process.
        accumulation: the number of micro-batches of an optimiser step.
        updates: the number of optimiser steps from the generation batch.
        drops_silent, masks_truncated: whether groups without a signal, and responses that the token limit ended, are
            left out of the loss.
    """

    prompts: int
    responses: int
    accumulation: int
    updates: int
    drops_silent: bool = False
    masks_truncated: bool = False

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
        drops, masks = config.no_signal != "train", config.truncated == "mask"
        return BatchPlan(prompts, responses, accumulation, config.updates_per_batch, drops, masks)


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
    """Yields the indices of the prompts in blocks; each block comes ``repeat`` times in a row.

    A block is one generation batch over all processes. Each repetition is one micro-step of the trainer, which samples
    responses on the first and uses them again on the others.
    """

    def __init__(self, order: PromptOrder, repeat: int) -> None:
        self.order, self.repeat = order, repeat
        self.epoch = 0

    @property
    def blocks(self) -> int:
        """The number of generation batches in an epoch."""
        return self.order.batches

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def rows(self, number: int) -> list[int]:
        """The indices of the prompts of generation batch ``number``, which counts from 0 over all epochs."""
        return self.order.rows(number)

    def spare_rows(self, number: int, round: int, count: int, used: set[int]) -> list[int]:
        """Further prompts for generation batch ``number``, see ``PromptOrder.spare_rows``."""
        return self.order.spare_rows(number, round, count, used)

    def __iter__(self) -> Iterator[int]:
        first = self.epoch * self.blocks
        for number in range(first, first + self.blocks):
            for _ in range(self.repeat):
                yield from self.rows(number)

    def __len__(self) -> int:
        return self.blocks * self.order.block * self.repeat


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

    ``_C`` tensors hold the completion tokens, response after response. ``advantages_B``, ``cu_seqlens`` and
    ``token_mask_C`` lie on the CPU, where the loss reads which rows have no gradient. ``token_mask_C`` is False where a
    token is left out of the loss; None leaves out none. ``normalizer`` and ``entropy_normalizer`` divide the sums of
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
    token_mask_C: Tensor | None = None

    @property
    def is_empty(self) -> bool:
        """Whether all of its tokens are left out of the loss."""
        return self.token_mask_C is not None and not bool(self.token_mask_C.any())

    @property
    def live_tokens(self) -> int:
        """The number of tokens that are in the loss."""
        return int(self.cu_seqlens[-1] if self.token_mask_C is None else self.token_mask_C.sum())

    def live(self, values_C: Tensor) -> Tensor:
        """The values of the tokens that are in the loss."""
        mask_C = self.token_mask_C
        return values_C if mask_C is None else values_C[mask_C.to(values_C.device)]


def group_order(plan: BatchPlan, rank: int, processes: int, own: torch.Generator, shared: torch.Generator) -> list[int]:
    """The indices of all responses of a process, whole groups in random order, the groups of each update in turn.

    So an optimiser step trains on whole groups where they fit, as in verl, and a micro-batch holds responses with a
    common prompt, which the model needs to compute only once for them.

    Where each process has a whole number of groups for each of U updates, every U groups of the batch in a row are
    dealt to the U updates. So an update trains on the same groups however many processes share the batch.

    Args:
        plan: the share of the process.
        rank, processes: the number of the process, and how many there are.
        own: draws the order of the groups of an update.
        shared: draws which group goes to which update; its state is the same in all processes.
    """
    blocks, rest = divmod(plan.prompts, plan.updates)
    if rest:
        groups = torch.randperm(plan.prompts, generator=own)
    else:
        dealt_NU = [torch.randperm(plan.updates, generator=shared) for _ in range(blocks * processes)]
        order_N = torch.randperm(blocks, generator=own)
        own_NU = torch.stack(dealt_NU[rank * blocks : (rank + 1) * blocks])
        groups = (own_NU + torch.arange(blocks)[:, None] * plan.updates)[order_N].T.flatten()
    group_size = plan.responses // plan.prompts
    return (groups[:, None] * group_size + torch.arange(group_size)).flatten().tolist()


def cut_order(plan: BatchPlan, order: list[int], live_B: Tensor) -> list[list[int]]:
    """Deals the responses that are trained on to the updates, and those of an update to its micro-batches.

    They are dealt in order and as evenly as they go. Responses that are left out of the loss need no forward, so they
    stand in no micro-batch. Whole groups stay together where an update, or a micro-batch, of the full batch holds whole
    groups. So what an update trains on does not depend on the size of the micro-batches. A process makes as many
    forwards as the others, so a micro-batch that would be empty gets a response that is left out.

    Args:
        plan: says how many updates and micro-batches there are.
        order: the responses' indices, whole groups one after another.
        live_B: bool [B], False for responses that are left out.

    Returns:
        The indices of each micro-batch.
    """
    group_size, live = plan.responses // plan.prompts, live_B.tolist()

    def deal(members: list[int], pieces: int, full: int) -> list[list[int]]:
        size = group_size if full % group_size == 0 else 1
        runs = [[*run] for _, run in groupby(members, key=lambda j: j // size)]
        bounds = [len(runs) * i // pieces for i in range(pieces + 1)]
        return [[j for run in runs[a:b] for j in run] for a, b in pairwise(bounds)]

    updates = deal([j for j in order if live[j]], plan.updates, plan.responses // plan.updates)
    cut = [members for update in updates for members in deal(update, plan.accumulation, plan.micro_batch)]
    return [members or [next(j for j in order if not live[j])] for members in cut]


@dataclass(frozen=True)
class UpdateTotals:
    """What the losses of an optimiser step are divided by, for each of the steps of a generation batch.

    Attributes:
        normalization: as in ``PolicyLossConfig``.
        tokens: the numbers of completion tokens in the loss of each step, as means over the processes, because their
            gradients are averaged, too.
        responses: the numbers of responses of each step, those with masked tokens included, as such means.
        micro_batches: the numbers of micro-batches of each step that have tokens in the loss, as such means.
    """

    normalization: str
    tokens: list[float]
    responses: list[float]
    micro_batches: list[float]

    def normalizer(self, plan: BatchPlan, micro_step: int, tokens: int) -> float:
        """The divisor of a micro-batch's summed loss under which the micro-batches of a step add up.

        A step may have no token at all, whose loss is 0; its divisor is 1. Other divisors may be below 1, because they
        are means over the processes, most of which may have nothing in the loss.

        Args:
            plan: the sizes of the batch.
            micro_step: the number of the micro-batch, from 0.
            tokens: the number of its tokens that are in the loss.
        """
        update = micro_step // plan.accumulation
        if self.normalization == "dapo":
            return self.tokens[update] or 1.0
        if self.normalization == "bnpo":  # As in TRL, each micro-batch is a mean over its own tokens.
            return max(tokens, 1) * (self.micro_batches[update] or 1.0)
        return self.responses[update] or 1.0


def split_micro_batches(
    plan: BatchPlan,
    sequences: Sequences,
    advantages_B: Tensor,
    logprobs: TokenLogprobs,
    cut: list[list[int]],
    live_B: Tensor,
    totals: UpdateTotals,
    device: torch.device,
) -> list[MicroBatch]:
    """Makes the micro-batches, in the order in which they are trained on.

    Args:
        plan: the sizes of the batch.
        sequences, advantages_B, logprobs: the responses of this process.
        cut: the indices of the responses of each micro-batch.
        live_B: bool [B], False for responses whose tokens are left out of the loss.
        totals: what the losses are divided by.
        device: the device on which the log-probs are put.
    """
    lengths = torch.tensor([len(c) for c in sequences.completion_ids])
    starts = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).tolist()
    live_B = live_B.cpu()
    advantages_B = torch.where(live_B, advantages_B.cpu(), 0.0)  # for a loss of the user's own that reads no mask
    batches = []
    for i, members in enumerate(cut):
        tokens = torch.cat([torch.arange(starts[j], starts[j + 1]) for j in members])
        mask_C = live_B[members].repeat_interleave(lengths[members])
        batches.append(
            MicroBatch(
                sequences.select(members),
                advantages_B[members],
                torch.tensor([0, *lengths[members].tolist()]).cumsum(0),
                logprobs.select(tokens.to(device)),
                totals.normalizer(plan, i, int(mask_C.sum())),
                totals.tokens[i // plan.accumulation] or 1.0,
                tuple(members),
                None if bool(live_B[members].all()) else mask_C,
            )
        )
    return batches
