"""All rows through a language-model head, chunk by chunk: forward to log-probs and entropies, and back to gradients.

    dL/dh = scale * G @ W         dL/dW = scale * G.T @ h         dL/db = sum of the rows of G

G is dL/dlogits. A float32 G takes the place of its chunk's logits, and its two products follow at once. A 16-bit G is
collected in a buffer until it has ``Head.gradient_rows`` rows. Every product that adds to dW reads and writes all of
it, so dW then passes through memory half as often, and the products read rows without gaps.

A float16 G is multiplied by a power of two, and the sums are divided by it: otherwise float16 would round a token's
share of the loss to 0. The largest gradient of a row is brought to between 2^6 and 2^7. Gradients that turn out up to
512 times larger than was foreseen still fit; beyond that they become infinite, which shows. Probabilities down to 2^-20
keep all 11 bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from maestro_fast.ops.head import Chunk, Head, Rows, empty_rows
from maestro_fast.ops.tensors import wide
from maestro_fast.specs import RowStatistics

_LARGEST = 2.0**6  # the power of two that the largest gradient of a float16 head is brought to
_EXPONENT = 0x7F800000  # the bits of a positive float32 that hold its power of two


class HeadGradients(NamedTuple):
    """The gradients of hidden [T, d], weight [V, d] and bias [V]; None where a gradient is not wanted."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


def head_forward(head: Head, hidden: Tensor, targets: Tensor) -> RowStatistics:
    """The statistics of all T rows."""
    tokens = hidden.shape[0]
    logprobs, peaks, totals = (wide(hidden).new_zeros(tokens) for _ in range(3))
    whole = RowStatistics(logprobs, peaks, totals, peaks.new_zeros(tokens if head.spec.entropy != "none" else 0))
    for chunk, rows in _chunks(head, hidden, targets):
        for all_rows, part in zip(whole, chunk.statistics(chunk.logits()), strict=True):
            if len(part):
                all_rows[rows] = part[: chunk.rows]
    return whole


def head_backward(
    head: Head,
    hidden: Tensor,
    targets: Tensor,
    stats: RowStatistics | None,
    dlogprobs: Tensor,
    dentropies: Tensor | None,
    wanted: tuple[bool, bool, bool],
) -> HeadGradients:
    """The gradients of the head's inputs, hidden and weight in their dtype, bias in that of the logits.

    Args:
        stats: what ``head_forward`` returned. None computes them again, where the forward's logits were not bitwise
            these.
        dlogprobs, dentropies: the gradients of log-probs and entropies [T]; None means 0.
        wanted: whether hidden, weight and bias want a gradient.
    """
    precision = wide(hidden[:0]).dtype
    dhidden = torch.empty_like(hidden) if wanted[0] else None
    dweight = torch.zeros_like(head.weight, dtype=precision) if wanted[1] else None
    dbias = torch.zeros_like(head.bias) if wanted[2] and head.bias is not None else None
    unit = None
    if head.scales:
        live = targets != head.spec.ignore_index  # The gradient of an ignored row may be anything.
        unit = float16_unit(
            head,
            torch.where(live, dlogprobs, 0.0),
            None if dentropies is None else torch.where(live, dentropies, 0.0),
        )
    sums = GradientSums(head, dhidden, dweight, dbias, unit)
    for chunk, rows in _chunks(head, hidden, targets):
        x = chunk.logits()
        part = chunk.statistics(x) if stats is None else _part(head, stats, rows)
        sums.add(chunk, rows, x, part, dlogprobs[rows], None if dentropies is None else dentropies[rows])
        del x  # The next chunk reuses its memory.
    sums.finish()
    return HeadGradients(dhidden, None if dweight is None else dweight.to(hidden.dtype), dbias)


def _part(head: Head, stats: RowStatistics, rows: slice) -> RowStatistics:
    """The statistics of one chunk. A gradient does not read the log-probs, so peaks stand in their place."""
    peaks, totals = head.padded(stats.peaks[rows]), head.padded(stats.totals[rows], 1.0)
    return RowStatistics(peaks, peaks, totals, head.padded(stats.entropies[rows]))


def _chunks(head: Head, hidden: Tensor, targets: Tensor) -> Iterator[tuple[Chunk, slice]]:
    for start in range(0, hidden.shape[0], head.chunk):
        rows = slice(start, min(start + head.chunk, hidden.shape[0]))
        yield head.chunk_of(hidden, targets, rows), rows


class GradientSums:
    """The gradients of a head's inputs, to which chunks of rows are added; ``finish`` completes them.

    Attributes:
        hidden: [T, d], of which every chunk writes its rows; None where it is not wanted.
        weight, bias: [V, d] and [V], float32 or float64, to which every chunk adds; None where they are not wanted.
        unit: what gradients are multiplied by until ``finish``, see ``float16_unit``; None multiplies them by nothing.
    """

    def __init__(
        self, head: Head, hidden: Tensor | None, weight: Tensor | None, bias: Tensor | None, unit: Tensor | None
    ) -> None:
        self.head, self.hidden, self.weight, self.bias, self.unit = head, hidden, weight, bias, unit
        self._waiting: list[tuple[Chunk, Rows]] = []
        self._filled = 0
        self._buffer: Tensor | None = None

    def add(
        self,
        chunk: Chunk,
        rows: Rows,
        x: Tensor,
        stats: RowStatistics,
        dlogprobs: Tensor,
        dentropies: Tensor | None,
    ) -> None:
        """Adds one chunk, which holds the ``rows`` of the batch. Its logits ``x`` are overwritten."""
        if self.unit is not None:
            dlogprobs = dlogprobs * self.unit
            dentropies = None if dentropies is None else dentropies * self.unit
        if not self.head.collects:
            self._multiply(chunk, [rows], chunk.dlogits(x, stats, dlogprobs, dentropies, None))
            return
        if self._filled + chunk.rows > self.head.gradient_rows:
            self._empty()
        if self._buffer is None:
            self._buffer = empty_rows(self.head.gradient_rows, x.shape[1], x, chunk.hidden.dtype)
        chunk.dlogits(x, stats, dlogprobs, dentropies, self._buffer[self._filled : self._filled + chunk.rows])
        self._waiting.append((chunk, rows))
        self._filled += chunk.rows

    def finish(self) -> None:
        """Adds the chunks that still wait, and divides the sums by ``unit``."""
        self._empty()
        if self.unit is not None:
            for total in (self.weight, self.bias):
                if total is not None:
                    total /= self.unit

    def _empty(self) -> None:
        """Multiplies the rows that were collected."""
        if self._buffer is not None and self._waiting:
            chunks, places = zip(*self._waiting, strict=True)
            self._multiply(Chunk.joined(chunks), list(places), self._buffer[: self._filled])
        self._waiting, self._filled = [], 0

    def _multiply(self, chunk: Chunk, places: list[Rows], dlogits: Tensor) -> None:
        if self.bias is not None:
            self.bias += dlogits.sum(0, dtype=self.bias.dtype)
        if self.hidden is not None:
            found = chunk.dhidden(dlogits)
            found = found if self.unit is None else found.div_(self.unit)
            counts = [_count(rows) for rows in places]
            for rows, part in zip(places, found.split(counts), strict=True):
                self.hidden[rows] = part.to(self.hidden.dtype)
        if self.weight is not None:
            chunk.add_dweight_(self.weight, dlogits)


def _count(rows: Rows) -> int:
    return len(rows) if isinstance(rows, Tensor) else rows.stop - rows.start


def float16_unit(head: Head, dlogprobs: Tensor, dentropies: Tensor | None) -> Tensor:
    """The power of two, a scalar, for gradients about as large as these [T]. The device finds it; the host does not
    wait."""
    largest = _largest(dlogprobs) if dentropies is None else _largest(dlogprobs) + _largest(dentropies)
    largest = (largest / head.spec.temperature).clamp(min=2.0**-60)
    power = (largest.view(torch.int32) & _EXPONENT).view(torch.float32)
    return _LARGEST / power


def _largest(x: Tensor) -> Tensor:
    return x.abs().amax() if x.numel() else x.new_zeros(())
