"""Sequences of token ids, and how they are laid out as rows of a model's input.

Each layout (see ``attention``) has its own rows. ``rows_of`` builds them and remembers where every token went, so that
the model's output can be put back into one packed tensor, sequence after sequence.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from maestro_fast.model.attention import Layout, bounds_mask
from maestro_fast.model.prefix_tree import forest
from maestro_fast.ops import pack_sequences
from maestro_fast.records import cumulative


@dataclass(frozen=True)
class Sequences:
    """Prompt and completion of each of B responses, as token ids."""

    prompt_ids: list[list[int]]
    completion_ids: list[list[int]]

    def __len__(self) -> int:
        return len(self.prompt_ids)

    @property
    def tokens(self) -> list[list[int]]:
        """The token ids of each response: its prompt, then its completion."""
        return [p + c for p, c in zip(self.prompt_ids, self.completion_ids, strict=True)]

    @property
    def lengths(self) -> list[int]:
        """The number of tokens of each response, prompt and completion together."""
        return [len(p) + len(c) for p, c in zip(self.prompt_ids, self.completion_ids, strict=True)]

    def select(self, indices: list[int]) -> Sequences:
        """The responses with these indices, in this order."""
        return Sequences([self.prompt_ids[i] for i in indices], [self.completion_ids[i] for i in indices])


@dataclass(frozen=True)
class Rows:
    """The input of a model, and where each token of the sequences stands in it.

    Attributes:
        input_ids, position_ids: int64 [R, L], R rows of L tokens.
        attention_mask: [R, L] with 1 for tokens and 0 for padding; ``bounds_mask()`` where sequence bounds take its
            place; None where the position ids, which start again at 0 with each sequence, tell the sequences apart, and
            for ``shared`` rows.
        place_T: int64 [T], the place of each token in the flattened input, sequence after sequence; None if the input
            holds exactly these tokens in this order.
        bounds: the sequence bounds, by the names that transformers gives them (``FlashAttentionKwargs``); empty for
            layouts that need none.
        trees: what ``shared`` rows hold; None for the other layouts.
    """

    input_ids: Tensor
    position_ids: Tensor
    attention_mask: Tensor | None
    place_T: Tensor | None
    bounds: dict[str, Any]
    trees: Trees | None = None

    def model_input(self, device: torch.device) -> dict[str, Any]:
        """The keyword arguments of the model's forward, on ``device``; ``shared`` rows lack their mask."""
        tensors = {"input_ids": self.input_ids, "position_ids": self.position_ids, **self.bounds}
        moved = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in tensors.items()}
        return {**moved, "attention_mask": None if self.attention_mask is None else self.attention_mask.to(device)}


@dataclass(frozen=True)
class Trees:
    """Who sees whom in ``shared`` rows, see ``prefix_tree``.

    Attributes:
        ends_RL, positions_RL: int64 [R, L], where the descendants of each token end in its row, and its position. The
            end of padding is its own, so it sees itself and nobody sees it.
        starts, parents: the first token of each piece in the flattened input, and the index of the piece that it goes
            on from, or -1. Padding is a piece of its own.
        depth: the largest number of pieces from a root to a leaf.
        tokens: the number of tokens of all trees, without padding.
    """

    ends_RL: Tensor
    positions_RL: Tensor
    starts: list[int]
    parents: list[int]
    depth: int
    tokens: int

    @property
    def pairs(self) -> int:
        """The number of pairs of a token and one that it sees."""
        column = torch.arange(self.ends_RL.shape[1])
        return int((self.ends_RL - column).sum())


def rows_of(sequences: Sequences, layout: Layout, *, one_row: bool = False, pair_cost: float = 0.0) -> Rows:
    """Lays sequences of token ids out as rows.

    ``flash`` and ``varlen`` give the same row; only the mask differs, which keeps transformers from building one.

    Args:
        one_row: whether all trees of the layout ``shared`` stand in one row, without padding. Otherwise a row is as
            long as the longest tree, and holds as many as fit.
        pair_cost: what a pair of query and key in a row costs, in tokens; it decides on what ``shared`` rows share.
    """
    if layout == "shared":
        return _shared_rows(sequences, one_row=one_row, pair_cost=pair_cost)
    tokens = sequences.tokens
    if layout == "padded":
        return _padded_rows(tokens)
    if layout == "packed":
        return _packed_rows(tokens)
    return _one_row(tokens, bounds_mask() if layout == "varlen" else None)


def _shared_rows(sequences: Sequences, *, one_row: bool, pair_cost: float) -> Rows:
    """Puts trees of sequences into rows, each prompt once for all responses to it."""
    trees = forest(sequences.prompt_ids, sequences.completion_ids, pair_cost=pair_cost, across_prompts=not one_row)
    sizes = [len(tree) for tree in trees]
    bins = [list(range(len(trees)))] if one_row else _bins(sizes, pair_cost)
    width = max(sum(sizes[i] for i in members) for members in bins)
    ids, positions = (torch.zeros(len(bins), width, dtype=torch.int64) for _ in range(2))
    ends = torch.arange(1, width + 1).repeat(len(bins), 1)
    starts: list[int] = []
    parents: list[int] = []
    places: list[Tensor] = [torch.empty(0, dtype=torch.int64)] * len(sequences)
    for r, members in enumerate(bins):
        at = 0
        for tree in (trees[i] for i in members):
            stop = at + len(tree)
            ids[r, at:stop] = torch.tensor(tree.ids)
            positions[r, at:stop] = torch.tensor(tree.positions)
            ends[r, at:stop] = torch.tensor(tree.ends) + at
            first = len(starts)
            starts += [r * width + at + start for start in tree.starts]
            parents += [parent if parent < 0 else parent + first for parent in tree.parents]
            for i, place in tree.places.items():
                places[i] = place + r * width + at
            at = stop
        if at < width:
            starts.append(r * width + at)
            parents.append(-1)
    depth = max(tree.depth for tree in trees)
    return Rows(ids, positions, None, torch.cat(places), {}, Trees(ends, positions, starts, parents, depth, sum(sizes)))


def _bins(sizes: list[int], pair_cost: float) -> list[list[int]]:
    """Deals trees to rows as long as the longest one, or somewhat longer if that costs less, having less padding."""
    dealt = [pack_sequences(sizes, max(sizes) * quarters // 4) for quarters in (4, 5, 6, 8)]

    def cost(bins: list[list[int]]) -> float:
        width = max(sum(sizes[i] for i in members) for members in bins)
        return len(bins) * (width + pair_cost * width**2)

    return min(dealt, key=cost)


def _one_row(tokens: list[list[int]], mask: Tensor | None) -> Rows:
    """Puts all tokens into one row; the sequence bounds tell the sequences apart."""
    lengths = [len(sequence) for sequence in tokens]
    cu_seqlens = cumulative(torch.tensor(lengths)).to(torch.int32)
    return Rows(
        torch.tensor([token for sequence in tokens for token in sequence])[None],
        torch.cat([torch.arange(length) for length in lengths])[None],
        mask,
        None,
        {
            "cu_seq_lens_q": cu_seqlens,
            "cu_seq_lens_k": cu_seqlens,
            "max_length_q": max(lengths),
            "max_length_k": max(lengths),
        },
    )


def _padded_rows(tokens: list[list[int]]) -> Rows:
    """Puts one sequence into each row and pads it on the right to the length of the longest."""
    width = max(map(len, tokens))
    ids, mask = (
        torch.zeros(len(tokens), width, dtype=torch.int64),
        torch.zeros(len(tokens), width, dtype=torch.int64),
    )
    for i, sequence in enumerate(tokens):
        ids[i, : len(sequence)] = torch.tensor(sequence)
        mask[i, : len(sequence)] = 1
    positions = torch.arange(width).expand(len(tokens), width)
    return Rows(ids, positions, mask, mask.flatten().nonzero()[:, 0], {})


def _packed_rows(tokens: list[list[int]]) -> Rows:
    """Puts several sequences into a row; transformers tells them apart by position ids that start again at 0."""
    lengths = [len(sequence) for sequence in tokens]
    width = max(lengths)
    bins = pack_sequences(lengths, width)
    ids = torch.zeros(len(bins), width, dtype=torch.int64)
    positions = torch.zeros(len(bins), width, dtype=torch.int64)
    places: list[Tensor] = [torch.empty(0)] * len(tokens)
    for r, members in enumerate(bins):
        start = 0
        for i in members:
            end = start + lengths[i]
            ids[r, start:end] = torch.tensor(tokens[i])
            positions[r, start:end] = torch.arange(lengths[i])
            places[i] = torch.arange(start, end) + r * width
            start = end
        # The rest of the row is padding, which counts as one more sequence.
        positions[r, start:] = torch.arange(width - start)
    return Rows(ids, positions, None, torch.cat(places), {})
