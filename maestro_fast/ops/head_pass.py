"""All rows through a language-model head, chunk by chunk: forward to log-probs and entropies, and back."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from maestro_fast.ops.head_chunks import Chunk, Head
from maestro_fast.ops.head_rows import RowStatistics
from maestro_fast.ops.tensors import wide


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
    stats: RowStatistics,
    dlogprobs: Tensor,
    dentropies: Tensor | None,
    wanted: tuple[bool, bool, bool],
) -> HeadGradients:
    """From the gradients [T] of log-probs and entropies (None: 0), which ``head_forward`` gave as ``stats``.

    Args:
        weight, bias: as the caller has them; ``head`` was made of them.
        wanted: the gradients of hidden, weight and bias.
    """
    precision = stats.peaks.dtype
    dhidden = torch.empty_like(hidden) if wanted[0] else None
    dweight = torch.zeros_like(weight, dtype=precision) if wanted[1] else None
    dbias = torch.zeros_like(bias, dtype=precision) if wanted[2] and bias is not None else None
    for chunk, rows in _chunks(head, hidden, targets):
        part = RowStatistics(
            stats.peaks[rows],  # not read by what follows
            head.padded(stats.peaks[rows]),
            head.padded(stats.totals[rows], 1.0),
            None if dentropies is None or stats.entropies is None else head.padded(stats.entropies[rows]),
        )
        dlogits = chunk.dlogits(chunk.logits(), part, dlogprobs[rows], None if dentropies is None else dentropies[rows])
        if dbias is not None:
            dbias += dlogits.sum(0, dtype=precision)
        if dhidden is not None:
            dhidden[rows] = chunk.dhidden(dlogits).to(hidden.dtype)
        if dweight is not None:
            chunk.add_dweight_(dweight, dlogits)
        del dlogits  # its memory is the next chunk's
    return HeadGradients(
        dhidden,
        None if dweight is None else dweight.to(weight.dtype),
        None if dbias is None or bias is None else dbias.to(bias.dtype),
    )


def _chunks(head: Head, hidden: Tensor, targets: Tensor) -> Iterator[tuple[Chunk, slice]]:
    for start in range(0, hidden.shape[0], head.chunk):
        rows = slice(start, min(start + head.chunk, hidden.shape[0]))
        yield head.chunk_of(hidden, targets, rows), rows
