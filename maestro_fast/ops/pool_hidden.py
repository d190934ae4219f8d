"""One context vector per response from its hidden states.

last: the last token's state      mean: the mean over all tokens of the response's sequence
prompt_last, prompt_mean: the same over the prompt's tokens alone
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from maestro_fast.ops.backend import Backend, resolve
from maestro_fast.ops.gpu import operator
from maestro_fast.ops.tensors import is_integer, readable, wide

PoolMode = Literal["last", "mean", "prompt_last", "prompt_mean"]


def pool_hidden(
    hidden: Tensor,
    *,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    mode: PoolMode = "last",
    prompt_lengths: Tensor | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """Pools hidden states to [B, d].

    Args:
        hidden: [B, L, d] padded (exactly one of ``mask``, ``lengths``) or [T, d] packed (``cu_seqlens``).
        mask: [B, L], nonzero on tokens; padding on the left or on the right.
        lengths: int [B], tokens per row, padding on the right.
        cu_seqlens: int [B + 1], sequence b is ``hidden[cu_seqlens[b]:cu_seqlens[b + 1]]``.
        mode: see the module.
        prompt_lengths: int [B], required by the prompt modes; the prompt comes first in each sequence.
        backend: "triton", "torch", or None: Triton on a CUDA device, unless there is float64 or a gradient to compute.

    Returns:
        [B, d], float32 (float64 for float64 input). An empty sequence pools to 0. Differentiable.

    Raises:
        ValueError: shapes, or not exactly one description of the layout, or an unknown mode.
        TypeError: dtypes.
    """
    chosen = resolve("pool_hidden", backend, hidden)
    bounds, start_B, length_B, flat = segments(hidden, mode, prompt_lengths, mask, lengths, cu_seqlens)
    if chosen == "triton":
        longest = None if hidden.ndim == 2 else hidden.shape[1]
        return _by_triton(flat, start_B, length_B, mode.endswith("mean"), longest)
    if flat.shape[0] == 0:  # all sequences are empty: one row to point at
        flat = torch.cat([flat, flat.new_zeros(1, flat.shape[1])])
    if mode.endswith("last"):
        row_B = (start_B + length_B - 1).clamp(0, flat.shape[0] - 1)
        return torch.where(length_B[:, None] > 0, wide(flat[row_B]), 0.0)
    if start_B.numel() == 0:
        return wide(flat).new_zeros(0, flat.shape[-1])
    return _segment_mean(flat, bounds, start_B, length_B)


# Segment bounds [B + 1], first token [B] and tokens [B] of each sequence, and the flattened states [*, d].
Layout = tuple[Tensor, Tensor, Tensor, Tensor]


def segments(
    hidden: Tensor,
    mode: str,
    prompt_lengths: Tensor | None,
    mask: Tensor | None,
    lengths: Tensor | None,
    cu_seqlens: Tensor | None,
) -> Layout:
    """What ``pool_hidden`` pools in this mode, checked."""
    bounds, start_B, length_B, flat = _layout(hidden, mask, lengths, cu_seqlens)
    if mode not in get_args(PoolMode):
        raise ValueError(f"mode: {mode!r}, expected one of {get_args(PoolMode)}")
    if mode.startswith("prompt"):
        if prompt_lengths is None:
            raise ValueError(f"prompt_lengths: missing, expected int [B] with mode={mode!r}")
        _check_lengths("prompt_lengths", prompt_lengths, start_B.shape[0], None)
        length_B = torch.minimum(prompt_lengths.to(length_B), length_B)
    return bounds, start_B, length_B, flat


def _layout(hidden: Tensor, mask: Tensor | None, lengths: Tensor | None, cu_seqlens: Tensor | None) -> Layout:
    named = (("mask", mask), ("lengths", lengths), ("cu_seqlens", cu_seqlens))
    given = [name for name, x in named if x is not None]
    if len(given) != 1:
        raise ValueError(f"mask, lengths, cu_seqlens: got {given or 'none'}, expected exactly one of them")
    if not hidden.is_floating_point():
        raise TypeError(f"hidden: dtype {hidden.dtype}, expected a floating dtype")
    if cu_seqlens is not None:
        return _packed_layout(hidden, cu_seqlens)
    if hidden.ndim != 3:
        raise ValueError(f"hidden: shape {tuple(hidden.shape)}, expected [B, L, d] beside {given[0]}")
    batch, width = hidden.shape[:2]
    bounds = torch.arange(batch + 1, device=hidden.device) * width
    if mask is not None:
        start_B, length_B = _masked_rows(mask, batch, width, hidden.device)
        return bounds, bounds[:-1] + start_B, length_B, hidden.flatten(0, 1)
    assert lengths is not None
    _check_lengths("lengths", lengths, batch, width)
    return bounds, bounds[:-1], lengths.to(hidden.device, torch.int64), hidden.flatten(0, 1)


def _packed_layout(hidden: Tensor, cu_seqlens: Tensor) -> Layout:
    if hidden.ndim != 2 or cu_seqlens.ndim != 1 or cu_seqlens.numel() < 1:
        raise ValueError(
            f"cu_seqlens: shape {tuple(cu_seqlens.shape)} beside hidden {tuple(hidden.shape)}, "
            "expected [B + 1] beside [T, d]"
        )
    if not is_integer(cu_seqlens):
        raise TypeError(f"cu_seqlens: dtype {cu_seqlens.dtype}, expected an integer dtype")
    if readable(cu_seqlens):
        first, last = int(cu_seqlens[0]), int(cu_seqlens[-1])
        if first < 0 or last > hidden.shape[0] or bool((cu_seqlens.diff() < 0).any()):
            raise ValueError(
                f"cu_seqlens: from {first} to {last}, expected non-decreasing in [0, T = {hidden.shape[0]}]"
            )
    bounds = cu_seqlens.to(hidden.device, torch.int64)
    return bounds, bounds[:-1], bounds.diff(), hidden


def _masked_rows(mask: Tensor, batch: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """First token [B] and tokens [B] of each row."""
    if mask.shape != (batch, width):
        raise ValueError(f"mask: shape {tuple(mask.shape)}, expected ({batch}, {width})")
    live = mask.to(device) != 0
    if readable(live):
        begins = live & ~torch.cat([live.new_zeros(batch, 1), live], 1)[:, :-1]
        if bool((begins.sum(1) > 1).any()):
            row = int((begins.sum(1) > 1).nonzero()[0])
            raise ValueError(f"mask: row {row} has gaps, expected padding on the left or on the right alone")
    return (live.cumsum(1) == 0).sum(1), live.sum(1)  # argmax cannot take a width of 0


def _check_lengths(name: str, lengths: Tensor, batch: int, most: int | None) -> None:
    if lengths.shape != (batch,):
        raise ValueError(f"{name}: shape {tuple(lengths.shape)}, expected ({batch},)")
    if not is_integer(lengths):
        raise TypeError(f"{name}: dtype {lengths.dtype}, expected an integer dtype")
    if readable(lengths):
        wrong = (lengths < 0) if most is None else (lengths < 0) | (lengths > most)
        if bool(wrong.any()):
            bound = "at least 0" if most is None else f"0 to L = {most}"
            raise ValueError(f"{name}: {int(lengths[wrong][0])}, expected {bound}")


def _segment_mean(flat: Tensor, bounds: Tensor, start_B: Tensor, length_B: Tensor) -> Tensor:
    """Mean over the tokens [start, start + length) that each segment of ``bounds`` [B + 1] holds; no atomics."""
    position_T = torch.arange(flat.shape[0], device=flat.device)
    segment_T = torch.bucketize(position_T, bounds[1:], right=True).clamp(max=start_B.shape[0] - 1)
    offset_T = position_T - start_B[segment_T]
    inside_T = (offset_T >= 0) & (offset_T < length_B[segment_T])
    clean = torch.where(inside_T[:, None], wide(flat), 0.0)  # padding may hold anything, NaN too
    total = torch.segment_reduce(clean, "sum", offsets=bounds, axis=0, initial=0)
    return total / length_B.clamp(min=1)[:, None]


@operator(
    "triton_pool_hidden(Tensor flat, Tensor start, Tensor length, bool mean, int? longest) -> Tensor",
    lambda flat, start, *rest: flat.new_empty((start.shape[0], flat.shape[1]), dtype=torch.float32),
)
def _by_triton(flat: Tensor, start_B: Tensor, length_B: Tensor, mean: bool, longest: int | None) -> Tensor:
    from maestro_fast.kernels import pool_hidden as kernel

    flat = flat if flat.stride(-1) == 1 or flat.shape[-1] == 1 else flat.contiguous()
    return kernel.pool_hidden(flat, start_B, length_B, mean=mean, longest=longest)
