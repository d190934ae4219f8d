"""The order of the prompts in a run: which rows of the data make generation batch 0, 1, 2 and so on.

Every order is a pure function of the seed and the number of the batch. So a resumed run goes on with the same prompts,
and a batch can be asked for before its turn, or once more.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch


class PromptOrder(Protocol):
    """Says which rows of the data a generation batch has.

    Attributes:
        block: the number of prompts of a generation batch, over all processes.
    """

    block: int

    @property
    def batches(self) -> int:
        """The number of generation batches in an epoch."""

    def rows(self, number: int) -> list[int]:
        """The indices of the prompts of generation batch ``number``, which counts from 0 over all epochs."""

    def spare_rows(self, number: int, round: int, count: int, used: set[int]) -> list[int]:
        """Further prompts for generation batch ``number``, whose own ones gave no signal.

        Args:
            number: the generation batch, from 0.
            round: the refill of this batch.
            count: how many prompts are asked for.
            used: the indices that the batch has had already.

        Returns:
            Up to ``count`` indices, none of which is in ``used``; fewer where the data hold no more.
        """


class ShuffledOrder:
    """All rows in random order, again in another one in every epoch.

    A last block of an epoch that is not full is left out, as in TRL.
    """

    def __init__(self, size: int, block: int, seed: int) -> None:
        self.size, self.block, self.seed = size, block, seed
        self._epoch, self._order = -1, [0]  # the epoch that was asked for last

    @property
    def batches(self) -> int:
        return self.size // self.block

    def rows(self, number: int) -> list[int]:
        epoch, place = divmod(number, self.batches)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self.seed + epoch)
            self._epoch, self._order = epoch, torch.randperm(self.size, generator=generator).tolist()
        return self._order[place * self.block : (place + 1) * self.block]

    def spare_rows(self, number: int, round: int, count: int, used: set[int]) -> list[int]:
        order = shuffled(self.size, self.seed, number, round)
        return [row for row in order if row not in used][:count]


class StreamOrder:
    """The rows of a stream one after another; ``StreamPrompts`` shuffles them.

    Spare rows are those of the next batches, because no others are read. They come once more in their own turn.
    """

    def __init__(self, block: int, seed: int, batches: int) -> None:
        self.block, self.seed, self.batches = block, seed, batches
        self.ahead = 4  # the number of batches that spare rows are drawn from

    def rows(self, number: int) -> list[int]:
        return [*range(number * self.block, (number + 1) * self.block)]

    def spare_rows(self, number: int, round: int, count: int, used: set[int]) -> list[int]:
        first = (number + 1) * self.block
        order = (first + place for place in shuffled(self.ahead * self.block, self.seed, number, round))
        return [row for row in order if row not in used][:count]


def shuffled(size: int, *key: int) -> list[int]:
    """The numbers below ``size`` in an order that depends on the key alone, whose parts are at least 0."""
    generator = torch.Generator().manual_seed(seed_of(*key))
    order: list[int] = torch.randperm(size, generator=generator).tolist()
    return order


def seed_of(*key: int) -> int:
    """A seed of 63 bits for a key; keys that differ in one part have nothing to do with each other."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0]) >> 1
