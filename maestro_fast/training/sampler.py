"""The order in which prompts are visited, in whole generation batches."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler


class GroupSampler(Sampler[int]):
    """Shuffled prompt indices in blocks: each block of ``block`` prompts comes ``repeat`` times in a row.

    A block is one generation batch over all processes; each repetition is one micro-step of the trainer, which samples
    on the first and reuses the responses on the others. Prompts are dealt whole, so a group never spans processes.
    A last block that is not full is left out, as in TRL.
    """

    def __init__(self, size: int, block: int, repeat: int, seed: int) -> None:
        if size < block:
            raise ValueError(f"prompts_per_batch: {block} over all processes, but the data holds {size} prompts only")
        self.size, self.block, self.repeat, self.seed = size, block, repeat, seed
        self.epoch = 0

    @property
    def blocks(self) -> int:
        """Generation batches in an epoch."""
        return self.size // self.block

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(self.size, generator=generator).tolist()
        for start in range(0, self.size - self.block + 1, self.block):
            for _ in range(self.repeat):
                yield from order[start : start + self.block]

    def __len__(self) -> int:
        return self.blocks * self.block * self.repeat
