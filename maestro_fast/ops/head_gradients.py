"""The gradients of hidden states, head and bias, summed over chunks of rows: dL/dlogits, then its two GEMMs.

    dL/dh = scale * G @ W         dL/dW = scale * G.T @ h         dL/db = sum of the rows of G

G is dL/dlogits. Where it is float32, it takes the place of a chunk's logits, and its GEMMs follow at once. Where it is
16-bit, it is gathered in a buffer until ``Head.gradient_rows`` are there: dW, which is read and written as a whole by
every GEMM that adds to it, then passes through memory half as often, and the GEMMs read rows without gaps.

A float16 G is multiplied by a power of two, and the sums are divided by it: unscaled, a token's share of the loss
would be rounded to 0. The largest slope is put at 2^6 to 2^7. That leaves a factor of 512 for slopes which turn out
larger than was foreseen (beyond that the gradient becomes infinite, and shows), and probabilities down to 2^-20 keep
all 11 bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from maestro_fast.ops import gpu_head_rows
from maestro_fast.ops.head_chunks import Chunk, Head, Rows
from maestro_fast.specs import RowStatistics

_LARGEST = 2.0**6  # where the power of two of the largest slope of a float16 gradient goes
_EXPONENT = 0x7F800000  # the bits of a positive float32 that are its power of two


class GradientSums:
    """Adds up what chunks of rows give; ``finish`` completes the sums.

    Attributes:
        hidden: [T, d], whose rows are written in the order of the chunks, or None where it is not wanted.
        weight, bias: wide [V, d] and [V], added to; None where not wanted.
    """

    def __init__(
        self, head: Head, hidden: Tensor | None, weight: Tensor | None, bias: Tensor | None, unit: Tensor | None
    ) -> None:
        """
        Args:
            unit: what the slopes are multiplied by, ``float16_unit`` of them; None: 1.
        """
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
        """Adds the gradients of one chunk, which stands in ``rows`` of the batch. Its logits ``x`` are overwritten."""
        if self.unit is not None:
            dlogprobs = dlogprobs * self.unit
            dentropies = None if dentropies is None else dentropies * self.unit
        if not self.head.gathers:
            self._multiply(chunk, [rows], chunk.dlogits(x, stats, dlogprobs, dentropies, None))
            return
        if self._filled + chunk.rows > self.head.gradient_rows:
            self._empty()
        if self._buffer is None:
            self._buffer = gpu_head_rows.empty_rows(self.head.gradient_rows, x.shape[1], x, chunk.hidden.dtype)
        chunk.dlogits(x, stats, dlogprobs, dentropies, self._buffer[self._filled : self._filled + chunk.rows])
        self._waiting.append((chunk, rows))
        self._filled += chunk.rows

    def finish(self) -> None:
        self._empty()
        if self.unit is not None:
            for total in (self.weight, self.bias):
                if total is not None:
                    total /= self.unit

    def _empty(self) -> None:
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
    """The power of two [] for slopes about as large as these [T]; the device finds it, the host does not wait."""
    largest = _largest(dlogprobs) if dentropies is None else _largest(dlogprobs) + _largest(dentropies)
    largest = (largest / head.spec.temperature).clamp(min=2.0**-60)
    power = (largest.view(torch.int32) & _EXPONENT).view(torch.float32)
    return _LARGEST / power


def _largest(x: Tensor) -> Tensor:
    return x.abs().amax() if x.numel() else x.new_zeros(())
