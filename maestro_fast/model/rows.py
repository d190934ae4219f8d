"""Sequences as rows of model input, in each layout."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from maestro_fast.model.attention import Layout
from maestro_fast.model.varlen import bounds_mask
from maestro_fast.ops import pack_sequences
from maestro_fast.records import cumulative


@dataclass(frozen=True)
class Rows:
    """Model input [R, L], and for each token of the sequences, in order, its place in the flattened input.

    Attributes:
        attention_mask: None: the position ids, which start again at 0 with each sequence, tell sequences apart.
        place_T: None: the tokens stand in order and nothing else does.
        kwargs: the rest of the model's input.
    """

    input_ids: Tensor
    position_ids: Tensor
    attention_mask: Tensor | None
    place_T: Tensor | None
    kwargs: dict[str, Any]

    def model_input(self, device: torch.device) -> dict[str, Any]:
        """Keyword arguments of the model."""
        tensors = {"input_ids": self.input_ids, "position_ids": self.position_ids, **self.kwargs}
        moved = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in tensors.items()}
        return {**moved, "attention_mask": None if self.attention_mask is None else self.attention_mask.to(device)}

    def tokens_of(self, output_RLd: Tensor) -> Tensor:
        """[T, d]: the states of the sequences' tokens, sequence after sequence."""
        flat = output_RLd.flatten(0, 1)
        return flat if self.place_T is None else flat[self.place_T.to(flat.device)]


def rows_of(tokens: list[list[int]], layout: Layout) -> Rows:
    """Rows of a layout; ``flash`` and ``varlen`` differ in how the model is told not to build a mask."""
    if layout == "padded":
        return _padded_rows(tokens)
    if layout == "packed":
        return _packed_rows(tokens)
    return _one_row(tokens, bounds_mask() if layout == "varlen" else None)


def _one_row(tokens: list[list[int]], mask: Tensor | None) -> Rows:
    """All tokens in one row, with the bounds by the names that transformers gives them (FlashAttentionKwargs)."""
    lengths = [len(sequence) for sequence in tokens]
    bounds = cumulative(torch.tensor(lengths)).to(torch.int32)
    return Rows(
        torch.tensor([token for sequence in tokens for token in sequence])[None],
        torch.cat([torch.arange(length) for length in lengths])[None],
        mask,
        None,
        {
            "cu_seq_lens_q": bounds,
            "cu_seq_lens_k": bounds,
            "max_length_q": max(lengths),
            "max_length_k": max(lengths),
        },
    )


def _padded_rows(tokens: list[list[int]]) -> Rows:
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
    """Several sequences to a row, told apart by position ids that start again at 0, as transformers reads them."""
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
        positions[r, start:] = torch.arange(width - start)  # the rest of the row is one more sequence, of padding
    return Rows(ids, positions, None, torch.cat(places), {})
