"""One context vector per response from its hidden states.

last                        the hidden state of the last token of the sequence
mean                        the mean over all tokens of the sequence, that is of prompt and completion
prompt_last, prompt_mean    the same for the tokens of the prompt alone
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from maestro_fast.ops.backend import Backend, resolve
from maestro_fast.ops.gpu import on_its_device, operator
from maestro_fast.ops.tensors import check_tensors, contiguous_columns, is_integer, readable, wide

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
        hidden: padded [B, L, d] with either ``mask`` or ``lengths``, or packed [T, d] with ``cu_seqlens``.
        mask: [B, L], nonzero on tokens. Each row is padded on the left or on the right.
        lengths: int [B], the number of tokens of each row, which is padded on the right.
        cu_seqlens: int [B + 1]; sequence b is ``hidden[cu_seqlens[b]:cu_seqlens[b + 1]]``.
        mode: one of the four modes at the top of the module.
        prompt_lengths: int [B], the tokens of each prompt, which the prompt modes need. The prompt comes first.
        backend: "triton" or "torch". None takes Triton on a CUDA device, unless there is float64 or a gradient to
            compute.

    Returns:
        [B, d], float32 (float64 for float64 input). An empty sequence pools to 0. Differentiable.

    Raises:
        ValueError: a shape is wrong, the mode is unknown, or not exactly one of mask, lengths and cu_seqlens is given.
        TypeError: a dtype is wrong.
    """
    if resolve("pool_hidden", backend, hidden) == "triton":
        rows = layout(hidden, mode, prompt_lengths, mask, lengths, cu_seqlens)
        return _by_triton(rows.flat, rows.bounds, rows.limit_B, rows.width, mode.endswith("mean"))
    where = segments(hidden, mode, prompt_lengths, mask, lengths, cu_seqlens)
    flat, length_B = where.flat, where.length_B
    if flat.shape[0] == 0:  # all sequences are empty, and row_B needs a row to point at
        flat = torch.cat([flat, flat.new_zeros(1, flat.shape[1])])
    if mode.endswith("last"):
        row_B = (where.start_B + length_B - 1).clamp(0, flat.shape[0] - 1)
        return torch.where(length_B[:, None] > 0, wide(flat[row_B]), 0.0)
    if length_B.numel() == 0:
        return wide(flat).new_zeros(0, flat.shape[-1])
    return _segment_mean(flat, where.bounds, where.start_B, length_B)


# --- checks ---


def _check(
    hidden: Tensor,
    mode: str,
    prompt_lengths: Tensor | None,
    mask: Tensor | None,
    lengths: Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:
    """Raises an error that names the argument."""
    check_tensors(1, hidden=hidden, mask=mask, lengths=lengths, cu_seqlens=cu_seqlens, prompt_lengths=prompt_lengths)
    named = (("mask", mask), ("lengths", lengths), ("cu_seqlens", cu_seqlens))
    given = [name for name, x in named if x is not None]
    if len(given) != 1:
        raise ValueError(f"mask, lengths, cu_seqlens: got {given or 'none'}, expected exactly one of them")
    for name, x in (*named, ("prompt_lengths", prompt_lengths)):
        if x is not None and x.device.type == "meta" != hidden.device.type:
            raise ValueError(f"{name}: on meta, expected values beside hidden on {hidden.device}")
    if not hidden.is_floating_point():
        raise TypeError(f"hidden: dtype {hidden.dtype}, expected a floating dtype")
    if cu_seqlens is not None:
        _check_bounds(hidden, cu_seqlens)
        batch = cu_seqlens.shape[0] - 1
    elif hidden.ndim != 3:
        raise ValueError(f"hidden: shape {tuple(hidden.shape)}, expected [B, L, d] beside {given[0]}")
    else:
        batch, width = hidden.shape[:2]
        if mask is not None:
            _check_mask(mask, batch, width)
        if lengths is not None:
            _check_lengths("lengths", lengths, batch, width)
    if mode not in get_args(PoolMode):
        raise ValueError(f"mode: {mode!r}, expected one of {get_args(PoolMode)}")
    if mode.startswith("prompt"):
        if prompt_lengths is None:
            raise ValueError(f"prompt_lengths: missing, expected int [B] with mode={mode!r}")
        _check_lengths("prompt_lengths", prompt_lengths, batch, None)


def _check_bounds(hidden: Tensor, cu_seqlens: Tensor) -> None:
    if hidden.ndim != 2 or cu_seqlens.ndim != 1 or cu_seqlens.numel() < 1:
        raise ValueError(
            f"cu_seqlens: shape {tuple(cu_seqlens.shape)} beside hidden {tuple(hidden.shape)}, "
            "expected [B + 1] beside [T, d]"
        )
    if not is_integer(cu_seqlens):
        raise TypeError(f"cu_seqlens: dtype {cu_seqlens.dtype}, expected a signed integer dtype")
    if readable(cu_seqlens):
        first, last = int(cu_seqlens[0]), int(cu_seqlens[-1])
        if first < 0 or last > hidden.shape[0] or bool((cu_seqlens.diff() < 0).any()):
            raise ValueError(
                f"cu_seqlens: from {first} to {last}, expected non-decreasing in [0, T = {hidden.shape[0]}]"
            )


def _check_mask(mask: Tensor, batch: int, width: int) -> None:
    if mask.shape != (batch, width):
        raise ValueError(f"mask: shape {tuple(mask.shape)}, expected ({batch}, {width})")
    if readable(mask):
        live = mask != 0
        begins = live & ~torch.cat([live.new_zeros(batch, 1), live], 1)[:, :-1]
        if bool((begins.sum(1) > 1).any()):
            row = int((begins.sum(1) > 1).nonzero()[0])
            raise ValueError(f"mask: row {row} has gaps, expected padding on the left or on the right alone")


def _check_lengths(name: str, lengths: Tensor, batch: int, most: int | None) -> None:
    if lengths.shape != (batch,):
        raise ValueError(f"{name}: shape {tuple(lengths.shape)}, expected ({batch},)")
    if not is_integer(lengths):
        raise TypeError(f"{name}: dtype {lengths.dtype}, expected a signed integer dtype")
    if readable(lengths):
        wrong = (lengths < 0) if most is None else (lengths < 0) | (lengths > most)
        if bool(wrong.any()):
            bound = "at least 0" if most is None else f"0 to L = {most}"
            raise ValueError(f"{name}: {int(lengths[wrong][0])}, expected {bound}")


# --- PyTorch, the reference ---


class Segments(NamedTuple):
    """Where the sequences are in the flattened hidden states.

    Attributes:
        bounds: int64 [B + 1], the rows between which each sequence lies, including its padding.
        start_B, length_B: int64 [B], the first row and the number of tokens that are pooled.
        flat: [*, d], the flattened hidden states.
    """

    bounds: Tensor
    start_B: Tensor
    length_B: Tensor
    flat: Tensor


def segments(
    hidden: Tensor,
    mode: str,
    prompt_lengths: Tensor | None,
    mask: Tensor | None,
    lengths: Tensor | None,
    cu_seqlens: Tensor | None,
) -> Segments:
    """Checks the arguments of ``pool_hidden``, and finds the tokens that are pooled in this mode."""
    _check(hidden, mode, prompt_lengths, mask, lengths, cu_seqlens)
    if cu_seqlens is not None:
        bounds, flat = cu_seqlens.to(hidden.device, torch.int64), hidden
        start_B, length_B = bounds[:-1], bounds.diff()
    else:
        batch, width = hidden.shape[:2]
        bounds, flat = torch.arange(batch + 1, device=hidden.device) * width, hidden.flatten(0, 1)
        start_B = bounds[:-1]
        if mask is not None:
            live = mask.to(hidden.device) != 0
            start_B, length_B = start_B + _first_live(live), live.sum(1)
        else:
            assert lengths is not None
            length_B = lengths.to(hidden.device, torch.int64)
    if mode.startswith("prompt"):
        assert prompt_lengths is not None
        length_B = torch.minimum(prompt_lengths.to(length_B), length_B)
    return Segments(bounds, start_B, length_B, flat)


def _first_live(live: Tensor) -> Tensor:
    """[B], the place of each row's first token, or the width where a row has none. argmax would refuse a width of 0."""
    return (live.cumsum(1) == 0).sum(1)


def _segment_mean(flat: Tensor, bounds: Tensor, start_B: Tensor, length_B: Tensor) -> Tensor:
    """The mean over the tokens [start, start + length) of each segment of ``bounds`` [B + 1], without atomics."""
    position_T = torch.arange(flat.shape[0], device=flat.device)
    segment_T = torch.bucketize(position_T, bounds[1:], right=True).clamp(max=start_B.shape[0] - 1)
    offset_T = position_T - start_B[segment_T]
    inside_T = (offset_T >= 0) & (offset_T < length_B[segment_T])
    clean = torch.where(inside_T[:, None], wide(flat), 0.0)  # padding may hold anything, NaN too
    total = torch.segment_reduce(clean, "sum", offsets=bounds, axis=0, initial=0)
    return total / length_B.clamp(min=1)[:, None]


# --- Triton ---


class Layout(NamedTuple):
    """Where the Triton kernels find the sequences.

    Almost nothing is computed to make it: only a mask is read, and the minimum of ``lengths`` and ``prompt_lengths`` is
    taken.

    Attributes:
        flat, bounds, limit_B: arguments of ``pool_hidden`` in ``kernels/pool_hidden.py``.
        width: the width of padded rows, or None for packed sequences.
    """

    flat: Tensor
    bounds: Tensor | None
    limit_B: Tensor | None
    width: int | None


def layout(
    hidden: Tensor,
    mode: str,
    prompt_lengths: Tensor | None,
    mask: Tensor | None,
    lengths: Tensor | None,
    cu_seqlens: Tensor | None,
) -> Layout:
    """Checks the arguments of ``pool_hidden``, and lays the sequences out as the Triton kernels take them."""
    _check(hidden, mode, prompt_lengths, mask, lengths, cu_seqlens)
    limit_B = None
    if mode.startswith("prompt"):
        assert prompt_lengths is not None
        limit_B = prompt_lengths.to(hidden.device).contiguous()
    if cu_seqlens is not None:
        return Layout(contiguous_columns(hidden), cu_seqlens.to(hidden.device).contiguous(), limit_B, None)
    flat, width = contiguous_columns(hidden.flatten(0, 1)), hidden.shape[1]
    if mask is not None:
        return Layout(flat, *_mask_segments(mask.to(hidden.device), limit_B), width)
    assert lengths is not None
    length_B = lengths.to(hidden.device).contiguous()
    return Layout(flat, None, length_B if limit_B is None else torch.minimum(length_B, limit_B), width)


def _mask_segments(mask: Tensor, prompt_B: Tensor | None) -> tuple[Tensor, Tensor]:
    """The bounds [B + 1] and the limit [B] of the rows of a mask. Under torch.compile PyTorch computes them."""
    if not torch.compiler.is_compiling():
        from maestro_fast.kernels import pool_hidden as kernel

        return on_its_device(kernel.mask_segments)(mask, prompt_B)
    batch, width = mask.shape
    live = mask != 0
    bounds = torch.arange(batch + 1, device=mask.device) * width
    length_B = live.sum(1)
    start_B = bounds[:-1] + _first_live(live)
    return torch.cat([start_B, bounds[-1:]]), length_B if prompt_B is None else torch.minimum(length_B, prompt_B)


def _shapes(flat: Tensor, bounds: Tensor | None, limit_B: Tensor | None, *rest: object) -> Tensor:
    """The empty output of the operator."""
    if bounds is not None:
        batch = bounds.shape[0] - 1
    else:
        assert limit_B is not None
        batch = limit_B.shape[0]
    return flat.new_empty((batch, flat.shape[1]), dtype=torch.float32)


@operator(
    "triton_pool_hidden(Tensor flat, Tensor? bounds, Tensor? limit, int? width, bool mean) -> Tensor",
    _shapes,
)
def _by_triton(flat: Tensor, bounds: Tensor | None, limit_B: Tensor | None, width: int | None, mean: bool) -> Tensor:
    from maestro_fast.kernels import pool_hidden as kernel

    return kernel.pool_hidden(flat, bounds, limit_B, mean=mean, width=width)
