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
            place; None where the position ids, which start again at 0 with each sequence, tell the sequences apart.
        place_T: int64 [T], the place of each token in the flattened input, sequence after sequence; None if the input
            holds exactly these tokens in this order.
        bounds: the sequence bounds, by the names that transformers gives them (``FlashAttentionKwargs``); empty for
            layouts that need none.
    """

    input_ids: Tensor
    position_ids: Tensor
    attention_mask: Tensor | None
    place_T: Tensor | None
    bounds: dict[str, Any]

    def model_input(self, device: torch.device) -> dict[str, Any]:
        """The keyword arguments of the model's forward, on ``device``."""
        tensors = {"input_ids": self.input_ids, "position_ids": self.position_ids, **self.bounds}
        moved = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in tensors.items()}
        return {**moved, "attention_mask": None if self.attention_mask is None else self.attention_mask.to(device)}

    def tokens_of(self, output_RLd: Tensor) -> Tensor:
        """Takes the states [T, d] of the sequences' tokens, sequence after sequence, out of an output [R, L, d]."""
        flat = output_RLd.flatten(0, 1)
        return flat if self.place_T is None else flat[self.place_T.to(flat.device)]


def rows_of(tokens: list[list[int]], layout: Layout) -> Rows:
    """Lays sequences of token ids out as rows.

    ``flash`` and ``varlen`` give the same row; only the mask differs, which keeps transformers from building one.
    """
    if layout == "padded":
        return _padded_rows(tokens)
    if layout == "packed":
        return _packed_rows(tokens)
    return _one_row(tokens, bounds_mask() if layout == "varlen" else None)


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
