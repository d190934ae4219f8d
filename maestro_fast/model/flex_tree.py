"""FlexAttention over a row of trees: it serves sliding windows, capped scores and deep trees without a mask of [T, T].

FlexAttention computes blocks of 128 queries and 128 keys, and leaves out those in which no token sees another. Which
blocks these are follows from a few numbers of every block, without comparing all pairs of tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

__all__ = ["FlexTree", "flex_tree_attention"]

_BLOCK = 128  # Tokens, as many as FlexAttention's own default.


@dataclass(frozen=True)
class FlexTree:
    """Who sees whom in a row, see ``prefix_tree``.

    Attributes:
        ends_T, positions_T: int32 [T], where the descendants of each token end in the row, and its position.
        masks: the block masks that are built already, by their window. The layers of a forward share them.
    """

    ends_T: Tensor
    positions_T: Tensor
    masks: dict[int | None, BlockMask] = field(default_factory=dict)

    def mask(self, window: int | None) -> BlockMask:
        """Which blocks are computed, and which pairs of a block count.

        Args:
            window: the number of tokens of its sequence that a token sees, itself among them; None for all.
        """
        if window not in self.masks:
            self.masks[window] = self._mask(window)
        return self.masks[window]

    def _mask(self, window: int | None) -> BlockMask:
        ends_T, positions_T = self.ends_T, self.positions_T
        # A token sees positions above its floor. It is a tensor, since a number would be compiled into the kernel.
        floors_T = torch.full_like(positions_T, -1) if window is None else positions_T - window

        def sees(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return (key <= query) & (query < ends_T[key]) & (positions_T[key] > floors_T[query])

        some, every = _blocks(ends_T, positions_T, floors_T)
        return BlockMask.from_kv_blocks(
            *_listed(some & ~every),
            *_listed(every),
            BLOCK_SIZE=_BLOCK,
            mask_mod=sees,
            seq_lengths=(len(ends_T), len(ends_T)),
        )


def _blocks(ends_T: Tensor, positions_T: Tensor, floors_T: Tensor) -> tuple[Tensor, Tensor]:
    """In which blocks some pair may count, and in which every pair does: bool [blocks, blocks], queries first.

    A block in which no pair counts may be among the first, which costs time alone. The last block of queries may have
    places behind the row's end, where nothing ends, so not every pair of it counts.
    """
    first, last = _extremes(ends_T)
    start = torch.arange(len(first), device=ends_T.device) * _BLOCK
    earlier = start[None, :] < start[:, None]
    some, every = earlier & (last[None, :] > start[:, None]), earlier & (first[None, :] >= start[:, None] + _BLOCK)
    lowest_key, highest_key = _extremes(positions_T)
    lowest_floor, highest_floor = _extremes(floors_T)
    some &= highest_key[None, :] > lowest_floor[:, None]
    every &= lowest_key[None, :] > highest_floor[:, None]
    return some | torch.eye(len(start), dtype=torch.bool, device=ends_T.device), every


def _extremes(values_T: Tensor) -> tuple[Tensor, Tensor]:
    """The smallest and the largest number of each block."""
    missing = -len(values_T) % _BLOCK
    blocks = torch.cat([values_T, values_T[-1:].expand(missing)]).view(-1, _BLOCK)
    return blocks.amin(1), blocks.amax(1)


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks of keys each block of queries has, int32 [1, 1, n], and which: first in [1, 1, n, n]."""
    order = blocks.int().argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32)[None, None], order.int()[None, None]


def flex_tree_attention(
    query: Tensor, key: Tensor, value: Tensor, tree: FlexTree, window: int | None, softcap: float | None, scale: float
) -> Tensor:
    """Attention of each token to those that it descends from, and to itself.

    On CUDA devices FlexAttention is compiled at the first call. Elsewhere it runs as it is: on CPUs for tests, since
    torch has no gradients for it there.

    Args:
        query: [1, H, T, D]; key and value are [1, H_kv, T, D], and H is a multiple of H_kv.
        window: the number of tokens of its sequence that a token sees, itself among them; None for all.
        softcap: scores are capped to ``softcap * tanh(score / softcap)``; None for none.

    Returns:
        The output [1, H, T, D].
    """
    compiling = query.device.type == "cuda" and not torch.compiler.is_compiling()  # A compiled model compiles it, too.
    attend = _compiled() if compiling else flex_attention
    out: Tensor = attend(
        query,
        key,
        value,
        score_mod=None if softcap is None else _capped(softcap, query.device),
        block_mask=tree.mask(window),
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out


@functools.cache
def _capped(softcap: float, device: torch.device) -> Callable[..., Tensor]:
    cap = torch.tensor(softcap, device=device)  # Inductor refuses a number here under dynamic shapes.

    def capped(score: Tensor, _batch: Tensor, _head: Tensor, _query: Tensor, _key: Tensor) -> Tensor:
        return cap * torch.tanh(score / cap)

    return capped


@functools.cache
def _compiled() -> Any:
    # Rows differ in length from forward to forward; without dynamic shapes each length would be compiled.
    return torch.compile(flex_attention, dynamic=True)
