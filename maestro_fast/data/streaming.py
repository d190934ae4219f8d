"""A data set that is read as a run needs it: the rows of a stream, a bounded number of which is held.

The rows of a stream that are kept are shuffled in chunks of ``data.shuffle_buffer``: each chunk in an order of its own,
which depends on the seed and the number of the chunk. So the place of a row depends on the seed and the stream alone,
and every process and every resumed run sees the same order. A resumed run reads the stream from its beginning up to its
place, and judges again which rows are too long.

Where a stream ends, it begins anew.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count, islice
from typing import Any

from transformers import PreTrainedTokenizerBase

from maestro_fast.data.dataset import Changes, PromptDataset
from maestro_fast.data.files import Row
from maestro_fast.data.order import PromptOrder, StreamOrder, shuffled
from maestro_fast.data.template import TemplateCheck

logger = logging.getLogger(__name__)
_Named = tuple[str, Row]


@dataclass(frozen=True)
class _Chunk:
    """Rows that are held, with their names, and the place of the first."""

    start: int
    rows: list[_Named]

    @property
    def stop(self) -> int:
        return self.start + len(self.rows)


class StreamPrompts(PromptDataset):
    """The prompts of a stream. An index is a place in the run, from 0, and any place can be asked for.

    One that lies further back than what is held takes reading from the beginning.

    Attributes:
        rows: the first rows; they tell the columns.
    """

    streaming = True

    def __init__(self, source: Callable[[], Iterator[Row]], chunk: int, **options: Any) -> None:
        """
        Args:
            source: begins to read the rows.
            chunk: the number of rows that are shuffled at a time.
            options: as ``PromptDataset`` takes them.

        Raises:
            ValueError: as ``PromptDataset``, about the first rows.
        """
        super().__init__(list(islice(source(), chunk)), **options)
        self._source, self._size_of_chunk, self._seed = source, chunk, 0
        self._check: TemplateCheck | None = None
        self._vocabulary: int | None = None
        self._behind = 0  # how many places are held in front of the chunk that was read last
        self._restart()

    def _restart(self) -> None:
        self._reader, self._number, self._end = self._read(), 0, 0
        self._chunks: list[_Chunk] = []

    def __len__(self) -> int:
        raise TypeError("a stream of prompts has no length")

    def __bool__(self) -> bool:
        return True

    def __getitem__(self, index: int) -> Row:
        return self._at(index)[1]

    def name_of(self, index: int) -> str:
        return self._at(index)[0]

    def order(self, block: int, seed: int, batches: int) -> PromptOrder:
        if batches < 1:
            raise ValueError(
                "trainer.max_steps: missing, and the data is a stream, expected the number of steps, because a stream "
                "has no known end"
            )
        if self._check is None:
            raise ValueError(f"{self.field}: a stream is checked as it comes, expected a call of check_prompts before")
        order = StreamOrder(block, seed, batches)
        self._seed = seed
        # The batch before, this one, and those that are sampled ahead or that spare rows are drawn from.
        self._behind = (order.ahead + 2) * block
        self._restart()
        return order

    def check_enough(self, block: int) -> None:
        """Does nothing: a stream that ends begins anew."""

    def _size(self) -> str:
        return f"a stream, whose rows are shuffled {self._size_of_chunk} at a time; of those that were read until now"

    def check_prompts(self, tokenizer: PreTrainedTokenizerBase, vocabulary: int | None = None) -> int:
        """Checks the prompts of the first chunk. Every other row is checked when it is read.

        Returns:
            The largest number of tokens that a prompt may have.
        """
        assert self._limit is not None
        self._check, self._vocabulary = TemplateCheck(tokenizer, self.chat, self.field), vocabulary
        self.rows = [row for _, row in next(self._read())]
        self._restart()
        return self._limit

    def _at(self, place: int) -> _Named:
        held = next((chunk for chunk in self._chunks if chunk.start <= place), None)
        if held is None and place < self._end:
            self._restart()
        while place >= self._end:
            rows = next(self._reader)
            order = shuffled(len(rows), self._seed, self._number)
            self._chunks = [chunk for chunk in self._chunks if chunk.stop > self._end - self._behind]
            self._chunks.append(_Chunk(self._end, [rows[i] for i in order]))
            self._number, self._end = self._number + 1, self._end + len(rows)
            if self._number & (self._number - 1) == 0:  # About twice as much was read as when it was said last.
                logger.info("%s", *self.describe())
        (chunk,) = (chunk for chunk in self._chunks if chunk.start <= place < chunk.stop)
        return chunk.rows[place - chunk.start]

    def _read(self) -> Iterator[list[_Named]]:
        """The rows that are kept, in chunks without end. A pass over the stream ends a chunk."""
        self.changes = Changes()
        for number in count(1):
            kept, chunk = 0, list[_Named]()
            for i, row in enumerate(self._source()):
                checked = self._checked(row, i)
                fitted = None if self._check is None else self._fitted(checked, i, self._check, self._vocabulary)
                if fitted is not None:
                    kept += 1
                    chunk.append((f"row {i}" + (f" of pass {number}" if number > 1 else ""), fitted[0]))
                if len(chunk) == self._size_of_chunk:
                    yield chunk
                    chunk = []
            if chunk:
                yield chunk
            if not kept:
                raise ValueError(
                    f"{self.field}.max_prompt_tokens: {self._limit}, but all prompts of the stream have more tokens, "
                    "expected a larger limit, or too_long: cut"
                )
            if number == 1:
                logger.info("%s: the stream has ended after %d prompts, and begins anew", self.field, kept)
