"""Attention over the trees of ``shared`` rows: each token sees itself and the tokens that it descends from.

SDPA and eager attention get a mask of every row, which transformers hands to each layer as it is: a bool mask to SDPA,
one of numbers that are added to the scores to eager attention. Layers with a sliding window get a mask of their own: a
token sees the last tokens of its sequence, by position and not by place in the row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from maestro_fast.model.rows import Trees

_ADDED = "eager"  # The implementation that adds its mask to the scores.


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
    trees: Trees, config: Any, implementation: str, dtype: torch.dtype, device: torch.device
) -> dict[str, Any]:
    """What a model's forward gets beside ids and positions, by the names of its arguments, for ``shared`` rows.

    Args:
        config: the model's text config.
        implementation: the name of its attention in transformers.
        dtype: the dtype in which it computes.

    Returns:
        ``attention_mask``: [R, 1, L, L], or a dict of such masks by the type of layer where the model has layers of
        several types.

    Raises:
        ValueError: the model has layers of a type that sees other tokens than these masks say.
    """

    def mask(window: int | None) -> Tensor:
        sees = tree_mask(trees, device, window)
        if implementation != _ADDED:
            return sees
        return torch.zeros(sees.shape, dtype=dtype, device=device).masked_fill_(~sees, torch.finfo(dtype).min)

    window = getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or ())
    if unknown := kinds - {"full_attention", "sliding_attention"}:
        raise ValueError(f"layers of the types {', '.join(sorted(unknown))} have no mask for shared prompts")
    if not kinds:
        return {"attention_mask": mask(window)}
    windows = {"full_attention": None, "sliding_attention": window}
    return {"attention_mask": {kind: mask(windows[kind]) for kind in sorted(kinds)}}
