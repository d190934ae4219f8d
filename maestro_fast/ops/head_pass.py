"""All rows through a language-model head, chunk by chunk: forward to log-probs and entropies, and back."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from maestro_fast.ops.head_chunks import Chunk, Head
from maestro_fast.ops.head_gradients import GradientSums, float16_unit
from maestro_fast.ops.tensors import wide
from maestro_fast.specs import RowStatistics


class HeadGradients(NamedTuple):
    """Of hidden [T, d], weight [V, d] and bias [V], in their dtypes; None where not wanted."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


def head_forward(head: Head, hidden: Tensor, targets: Tensor) -> RowStatistics:
    """Of all T rows; the entropies have no elements with ``entropy="none"``."""
    tokens = hidden.shape[0]
    logprobs, peaks, totals = (wide(hidden).new_zeros(tokens) for _ in range(3))
    entropies = peaks.new_zeros(tokens if head.spec.entropy != "none" else 0)
    for chunk, rows in _chunks(head, hidden, targets):
        stats = chunk.statistics(chunk.logits())
        for whole, part in zip((logprobs, peaks, totals, entropies), stats, strict=True):
            if part is not None:
                whole[rows] = part[: chunk.rows]
    return RowStatistics(logprobs, peaks, totals, entropies)


def head_backward(
    head: Head,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    stats: RowStatistics | None,
    dlogprobs: Tensor,
    dentropies: Tensor | None,
    wanted: tuple[bool, bool, bool],
) -> HeadGradients:
    """From the gradients [T] of log-probs and entropies (None: 0).

    Args:
        weight, bias: as the caller has them; ``head`` was made of them.
        stats: what ``head_forward`` gave; None: taken again, where the forward's logits were not quite these.
        wanted: the gradients of hidden, weight and bias.
    """
    precision = wide(hidden[:0]).dtype
    dhidden = torch.empty_like(hidden) if wanted[0] else None
    dweight = torch.zeros_like(weight, dtype=precision) if wanted[1] else None
    dbias = torch.zeros_like(bias, dtype=precision) if wanted[2] and bias is not None else None
    unit = None
    if head.scales:
        live = targets != head.spec.ignore_index  # an ignored row may be sent anything
        unit = float16_unit(
            head,
            torch.where(live, dlogprobs, 0.0),
            None if dentropies is None else torch.where(live, dentropies, 0.0),
        )
    sums = GradientSums(head, dhidden, dweight, dbias, unit)
    for chunk, rows in _chunks(head, hidden, targets):
        x = chunk.logits()
        part = chunk.statistics(x) if stats is None else _part(head, stats, rows, dentropies is not None)
        sums.add(chunk, rows, x, part, dlogprobs[rows], None if dentropies is None else dentropies[rows])
        del x  # its memory is the next chunk's
    sums.finish()
    return HeadGradients(
        dhidden,
        None if dweight is None else dweight.to(weight.dtype),
        None if dbias is None or bias is None else dbias.to(bias.dtype),
    )


def _part(head: Head, stats: RowStatistics, rows: slice, with_entropy: bool) -> RowStatistics:
    """Of one chunk; its log-probs are not read."""
    peaks, totals = head.padded(stats.peaks[rows]), head.padded(stats.totals[rows], 1.0)
    return RowStatistics(
        peaks,
        peaks,
        totals,
        head.padded(stats.entropies[rows]) if with_entropy and stats.entropies is not None else None,
    )


def _chunks(head: Head, hidden: Tensor, targets: Tensor) -> Iterator[tuple[Chunk, slice]]:
    for start in range(0, hidden.shape[0], head.chunk):
        rows = slice(start, min(start + head.chunk, hidden.shape[0]))
        yield head.chunk_of(hidden, targets, rows), rows
