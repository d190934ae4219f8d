"""Attention over the trees of ``shared`` rows: each token sees itself and the tokens that it descends from.

SDPA and eager attention get a mask of every row, which transformers hands to each layer as it is. It holds what is
added to the scores, 0 or minus infinity, because SDPA makes such numbers of a bool mask in every layer anew and keeps
them all for the backward. Layers with a sliding window get a mask of their own: a token sees the last tokens of its
sequence, by position and not by place in the row.

Our own implementation ``VARLEN`` takes all trees as one row and no mask, but a ``SharedRow``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from maestro_fast.model.attention import VARLEN, bounds_mask
from maestro_fast.model.flex_tree import FlexTree
from maestro_fast.model.merged_attention import Pieces, merging_obstacle
from maestro_fast.model.rows import Trees
from maestro_fast.model.shared_row import SharedRow


def tree_mask(trees: Trees, device: torch.device, window: int | None = None) -> Tensor:
    """Which key each query sees: bool [R, 1, L, L], queries first.

    Args:
        window: the number of tokens of its sequence that a token sees, itself among them; None for all.
    """
    ends, positions = trees.ends_RL.to(device), trees.positions_RL.to(device)
    place = torch.arange(ends.shape[1], device=device)
    sees = (place[None, None, :] <= place[None, :, None]) & (place[None, :, None] < ends[:, None, :])
    if window is not None:
        sees &= positions[:, :, None] - positions[:, None, :] < window
    return sees[:, None]


def shared_inputs(
    trees: Trees, config: Any, implementation: str, dtype: torch.dtype, device: torch.device, *, kernel: bool = False
) -> dict[str, Any]:
    """What a model's forward gets beside ids and positions, by the names of its arguments, for ``shared`` rows.

    Args:
        config: the model's text config.
        implementation: the name of its attention in transformers.
        dtype: the dtype in which it computes.
        kernel: whether all trees stand in one row, for an implementation that skips the pairs which do not see each
            other. ``VARLEN`` does; the others get a mask, as ``VARLEN`` does for several rows, which SDPA serves.

    Returns:
        ``attention_mask``: [R, 1, L, L], or a dict of such masks by the type of layer where the model has layers of
        several types. With ``VARLEN`` and ``kernel`` it is ``bounds_mask()``, and ``shared_row`` takes its place.

    Raises:
        ValueError: the model has layers of a type that sees other tokens than these masks say.
    """

    def mask(window: int | None) -> Tensor:
        sees = tree_mask(trees, device, window)
        return torch.zeros(sees.shape, dtype=dtype, device=device).masked_fill_(~sees, -torch.inf)

    window = getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or ())
    if unknown := kinds - {"full_attention", "sliding_attention"}:
        raise ValueError(f"layers of the types {', '.join(sorted(unknown))} have no mask for shared prompts")
    if implementation == VARLEN and kernel:
        return {"attention_mask": bounds_mask().to(device), "shared_row": _row(trees, window, device)}
    if not kinds:
        return {"attention_mask": mask(window)}
    windows = {"full_attention": None, "sliding_attention": window}
    return {"attention_mask": {kind: mask(windows[kind]) for kind in sorted(kinds)}}


def _row(trees: Trees, window: int | None, device: torch.device) -> SharedRow:
    (ends_T,), (positions_T,) = trees.ends_RL, trees.positions_RL
    mergeable = trees.depth <= 2 and merging_obstacle() is None
    return SharedRow(
        Pieces.of(trees.starts, trees.parents, len(ends_T), device) if mergeable else None,
        FlexTree(ends_T.int().to(device), positions_T.int().to(device)),
        window,
        int(positions_T.max()) + 1,
    )
