"""The order in which rows go through a language-model head, where loss and gradient come from one sweep.

A row's gradient follows from its own log-prob, or from those of its whole response. Rows without a gradient need the
forward alone. What the host knows about the rows decides; where it knows nothing, every row is swept.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from maestro_fast.ops.head_chunks import Rows
from maestro_fast.ops.pack_sequences import pack_sequences


class Step(NamedTuple):
    """Rows of one chunk; ``gradient``: log-probs and gradient, else log-probs alone."""

    rows: Rows
    gradient: bool


class Known(NamedTuple):
    """What the host can read, CPU tensors; None: nothing.

    Attributes:
        bounds: int64 [B + 1] of the responses.
        worked_T: bool, rows that are live and wanted.
        loud_B: bool, responses that may have a gradient.
    """

    bounds: Tensor | None = None
    worked_T: Tensor | None = None
    loud_B: Tensor | None = None


def sweep_steps(tokens: int, chunk: int, known: Known, *, gradient: bool, whole: bool) -> list[Step]:
    """All rows that are worked, at most ``chunk`` at a time; steps with a gradient come last.

    Args:
        gradient: whether any is wanted.
        whole: a row's gradient needs the log-probs of its whole response. Then a response's rows share a step; one that
            is longer than a chunk, and every response where the host does not know the bounds, is swept twice: first
            for the log-probs.
    """
    if all(x is None for x in known):  # nothing that a graph of torch.compile would have to read
        kinds = [False, True] if gradient and whole else [gradient]
        starts = range(0, tokens, chunk)
        return [Step(slice(start, min(start + chunk, tokens)), kind) for kind in kinds for start in starts]
    rows = torch.arange(tokens) if known.worked_T is None else known.worked_T.nonzero()[:, 0]
    if not gradient:
        return [*_steps(rows, chunk, gradient=False)]
    quiet = rows[:0]
    if known.bounds is not None and known.loud_B is not None:
        loud = known.loud_B[torch.bucketize(rows, known.bounds[1:], right=True)]
        quiet, rows = rows[~loud], rows[loud]
    if not whole:
        return [*_steps(quiet, chunk, gradient=False), *_steps(rows, chunk, gradient=True)]
    bins, long = _by_response(rows, chunk, known.bounds)
    return [
        *_steps(torch.cat([quiet, long]), chunk, gradient=False),
        *(step for members in bins for step in _steps(members, chunk, gradient=True)),
        *_steps(long, chunk, gradient=True),
    ]


def _by_response(rows: Tensor, chunk: int, bounds: Tensor | None) -> tuple[list[Tensor], Tensor]:
    """Rows of whole responses, at most ``chunk`` together, and the rows of responses that have more than that."""
    if bounds is None:
        return [], rows
    response = torch.bucketize(rows, bounds[1:], right=True)
    counts_B = torch.bincount(response, minlength=len(bounds) - 1)
    members = rows.split(counts_B.tolist())
    short = (counts_B <= chunk).nonzero()[:, 0]
    bins = pack_sequences(counts_B[short], chunk)
    packed = [torch.cat([members[short[i]] for i in sorted(packed)]) for packed in bins]
    return packed, rows[counts_B[response] > chunk]


def _steps(rows: Tensor, chunk: int, *, gradient: bool) -> Iterator[Step]:
    for part in rows.split(chunk):
        if len(part):
            yield Step(_range_or_indices(part), gradient)


def _range_or_indices(rows: Tensor) -> Rows:
    """A range is a view where indices copy."""
    first, last = int(rows[0]), int(rows[-1])
    return slice(first, last + 1) if last - first + 1 == len(rows) and bool((rows.diff() == 1).all()) else rows
