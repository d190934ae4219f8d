"""Several data sets in one run, each with its share of every generation batch.

A batch of n prompts has n times its share from each set. Where that is no whole number, it has one prompt more or less:
n points at equal distances, which are moved together by an offset that depends on the batch, fall into intervals as
long as the shares (systematic sampling). In expectation over the seeds each batch has the shares exactly. The offsets
of successive batches differ by the golden ratio, so that over a run the shares are met to a few prompts.

Each set is shuffled by itself and begins anew when it has been used up, in the middle of a batch if need be, in which
no prompt then stands twice. So every row of a set comes once before any comes again. An epoch of the run is as many
batches as all sets together hold, although a small set with a large share has begun anew several times by then.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from maestro_fast.data.dataset import Changes, PromptDataset
from maestro_fast.data.order import PromptOrder, seed_of, shuffled
from maestro_fast.model.chat import ChatConfig

_GOLDEN = (5**0.5 - 1) / 2
_OFFSETS, _SETS, _BATCHES, _SPARE = range(4)  # what a key of the random draws is for
_ALIKE = 1e-9  # a boundary between two shares that lies so close to a whole number is one


class MixedPrompts(PromptDataset):
    """Several data sets as one, whose rows stand one set after the other.

    Where the sets call the column of the prompts, or of the families, by different names, it becomes "prompt", or
    "family".

    Attributes:
        parts: the data sets.
        shares: the share of each in a generation batch; None shuffles them as one.
    """

    def __init__(self, parts: Sequence[PromptDataset], shares: Sequence[float] | None, chat: ChatConfig) -> None:
        """
        Raises:
            ValueError: a set has another column of the name that its prompts or families are to have.
        """
        self.parts, self.chat, self.streaming = [*parts], chat, False
        self.shares = None if shares is None else [share / sum(shares) for share in shares]
        self.prompt_column = _common([part.prompt_column for part in parts], "prompt")
        self.family_column = _common([part.family_column for part in parts], "family")
        for part in parts:
            part.rename_columns(self.prompt_column, self.family_column)
        self._columns = list(dict.fromkeys(name for part in parts for name in part.columns))
        self._join()

    def _join(self) -> None:
        self.rows = [row for part in self.parts for row in part.rows]
        self.changes = Changes.of([part.changes for part in self.parts])

    def check_prompts(self, tokenizer: PreTrainedTokenizerBase, vocabulary: int | None = None) -> int:
        longest = max(part.check_prompts(tokenizer, vocabulary) for part in self.parts)
        self._join()
        return longest

    def order(self, block: int, seed: int, batches: int) -> PromptOrder:
        if self.shares is None:
            return super().order(block, seed, batches)
        self.check_enough(block)
        return MixedOrder([len(part) for part in self.parts], self.shares, block, seed)

    def check_enough(self, block: int) -> None:
        super().check_enough(block)
        for part, share in zip(self.parts, self.shares or (), strict=False):
            most = math.ceil(block * share - _ALIKE)
            if len(part) < most:
                raise ValueError(
                    f"{part.field}.share: {share:.3g} of batch.prompts_per_batch {block} is up to {most} prompts, but "
                    f"the set holds {len(part)}, expected at least as many"
                )

    def name_of(self, index: int) -> str:
        for part in self.parts:
            if index < len(part):
                return f"{part.name_of(index)} of {part.field}"
            index -= len(part)
        raise IndexError(index)

    def keep(self, indices: Sequence[int]) -> None:
        start = 0
        for part in self.parts:
            stop = start + len(part)
            part.keep([i - start for i in indices if start <= i < stop])
            start = stop
        self._join()

    def describe(self) -> list[str]:
        lines = [line for part in self.parts for line in part.describe()]
        if self.shares is not None:
            named = (f"{part.field} {share:.3g}" for part, share in zip(self.parts, self.shares, strict=True))
            lines.append(f"shares of every generation batch: {', '.join(named)}")
        return lines


class MixedOrder:
    """The order of prompts in which every batch has the shares of the sets.

    The random draws of a batch and of a set have keys of their own, so a batch does not depend on which others have
    been asked for.
    """

    def __init__(self, sizes: Sequence[int], shares: Sequence[float], block: int, seed: int) -> None:
        """
        Args:
            sizes: the number of rows of each set, at least as many as a batch can have of it.
            shares: the share of each set; they add up to 1.
            block: the number of prompts of a batch.
            seed: the seed of the run.
        """
        self.block, self.seed = block, seed
        self._sizes, self._starts = [*sizes], np.cumsum([0, *sizes]).tolist()
        bounds = np.cumsum(np.array(shares, np.float64)) * block
        bounds = np.where(np.abs(bounds - bounds.round()) < _ALIKE, bounds.round(), bounds)
        self._bounds: NDArray[np.float64] = bounds.astype(np.float64)
        self._taken = np.zeros((1, len(sizes)), np.int64)  # [n, set]: how many prompts the batches before n have had
        self._sets = [_SetOrder(size, (seed, _SETS, i)) for i, size in enumerate(sizes)]

    @property
    def batches(self) -> int:
        return sum(self._sizes) // self.block

    def counts(self, number: int) -> list[int]:
        """How many prompts of each set generation batch ``number`` has."""
        taken = self._taken_before(number + 1)
        counts: list[int] = (taken[number + 1] - taken[number]).tolist()
        return counts

    def rows(self, number: int) -> list[int]:
        taken = self._taken_before(number + 1)
        rows = []
        for i, (start, order) in enumerate(zip(self._starts, self._sets, strict=False)):
            drawn = order.between(int(taken[number, i]), int(taken[number + 1, i]), taken[: number + 2, i])
            rows += [start + row for row in drawn]
        return [rows[place] for place in shuffled(len(rows), self.seed, _BATCHES, number)]

    def spare_rows(self, number: int, round: int, count: int, used: set[int]) -> list[int]:
        key = (self.seed, _SPARE, number, round)
        offset = seed_of(*key) / 2**63
        wanted = _counts(self._bounds * count / self.block, count, np.array([offset]))[0]
        chosen: list[int] = []
        left: list[int] = []
        for i, (start, size) in enumerate(zip(self._starts, self._sizes, strict=False)):
            unused = [start + row for row in shuffled(size, *key, i) if start + row not in used]
            chosen += unused[: wanted[i]]
            left += unused[wanted[i] :]
        missing = count - len(chosen)  # A set that is used up leaves its places to the others.
        chosen += [left[place] for place in shuffled(len(left), *key, len(self._sizes))[:missing]] if missing else []
        return [chosen[place] for place in shuffled(len(chosen), *key, len(self._sizes) + 1)]

    def _taken_before(self, number: int) -> NDArray[np.int64]:
        """How many prompts of each set the batches before batch 0, 1, ... have; at least up to ``number``."""
        if number >= len(self._taken):
            batches = np.arange(max(1024, 2 * number), dtype=np.float64)
            offsets: NDArray[np.float64] = (seed_of(self.seed, _OFFSETS) / 2**63 + batches * _GOLDEN) % 1
            counts = _counts(self._bounds, self.block, offsets)
            self._taken = np.concatenate([np.zeros_like(counts[:1]), counts.cumsum(0)])
        return self._taken


class _SetOrder:
    """The order of the rows of one set over its own epochs.

    An epoch may end within a batch. The rows that this batch has had already come later in the next epoch.
    """

    def __init__(self, size: int, key: tuple[int, ...]) -> None:
        self._size, self._key = size, key
        self._epochs: dict[int, list[int]] = {}  # the last two that were asked for

    def between(self, start: int, stop: int, bounds: NDArray[np.int64]) -> list[int]:
        """The draws from ``start`` up to ``stop``; ``bounds`` are the numbers of draws before each batch until then."""
        rows: list[int] = []
        for epoch in range(start // self._size, (stop - 1) // self._size + 1 if stop > start else 0):
            first = epoch * self._size
            rows += self._epoch(epoch, bounds)[max(0, start - first) : stop - first]
        return rows

    def _epoch(self, epoch: int, bounds: NDArray[np.int64]) -> list[int]:
        if epoch not in self._epochs:
            known = max((e for e in self._epochs if e < epoch), default=-1)
            for e in range(known + 1, epoch + 1):
                order = shuffled(self._size, *self._key, e)
                end = e * self._size
                batch = int(np.searchsorted(bounds, end, "right")) - 1  # the batch in which epoch e begins
                before = end - int(bounds[batch])
                if before and e:
                    had = {*self._epochs[e - 1][-before:]}
                    free = [row for row in order if row not in had][: int(bounds[batch + 1]) - end]
                    first = {*free}
                    order = free + [row for row in order if row not in first]
                self._epochs[e] = order
                for old in [each for each in self._epochs if each < e - 1]:
                    del self._epochs[old]
        return self._epochs[epoch]


def _counts(bounds: NDArray[np.float64], block: int, offsets: NDArray[np.float64]) -> NDArray[np.int64]:
    """How many of the points i + offset (i < block) lie in each interval between two ``bounds``, [offset, set]."""
    below = np.ceil(bounds[None] - offsets[:, None]).clip(0, block).astype(np.int64)
    below[:, -1] = block
    return np.diff(below, prepend=0)


def _common(names: Sequence[str], otherwise: str) -> str:
    return names[0] if len({*names}) == 1 else otherwise
