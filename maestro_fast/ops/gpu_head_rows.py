"""Rows of logits by Triton: their matrix product, their statistics and their gradient, see ``kernels/head_rows.py``."""

from __future__ import annotations

from dataclasses import astuple
from typing import Any

import torch
from torch import Tensor

from maestro_fast.ops.gpu import define
from maestro_fast.ops.head_rows import HeadSpec, RowStatistics
from maestro_fast.ops.tensors import without_autocast

_PRODUCT_ROWS = 1024  # enough for the tensor cores, and at most as many rows of padding
_ALIGNED = 16  # columns: 64 bytes, so that every row can be read in whole vectors
SPEC = "float scale, float? softcap, float temperature, int ignore_index, str entropy"


def logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """h @ W.T, float32 [n, V]; what lies between its rows is rubbish.

    Products of one shape, the last padded with zeros, whatever n is: a row does not depend on how many there are.
    """
    rows, vocabulary = hidden.shape[0], weight.shape[0]
    padded = -(-rows // _PRODUCT_ROWS) * _PRODUCT_ROWS
    stride = -(-vocabulary // _ALIGNED) * _ALIGNED
    buffer = torch.empty(padded, stride, device=hidden.device, dtype=torch.float32)
    with without_autocast(hidden):
        for start in range(0, padded, _PRODUCT_ROWS):
            part = hidden[start : start + _PRODUCT_ROWS]
            missing = _PRODUCT_ROWS - part.shape[0]
            if missing:
                part = torch.cat([part, part.new_zeros(missing, part.shape[1])])
            out = buffer[start : start + _PRODUCT_ROWS, :vocabulary]
            if part.dtype is torch.float32:
                torch.mm(part, weight.T, out=out)
            else:
                torch.mm(part, weight.T, out_dtype=torch.float32, out=out)
    return buffer[:rows, :vocabulary]


def row_statistics(x: Tensor, targets: Tensor, bias: Tensor | None, spec: HeadSpec) -> RowStatistics:
    """See ``head_rows.row_statistics``; a target out of range gives NaN."""
    if torch.compiler.is_compiling():
        found = RowStatistics(*torch.ops.maestro_fast.triton_row_statistics(x, targets, bias, *astuple(spec)))
        return found._replace(entropies=None) if spec.entropy == "none" else found
    from maestro_fast.kernels import head_rows as kernel

    return RowStatistics(*kernel.row_statistics(x, targets, bias, spec))


def dlogits_(
    x: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    stats: RowStatistics,
    dlogprobs: Tensor,
    dentropies: Tensor | None,
    spec: HeadSpec,
    dtype: torch.dtype,
) -> Tensor:
    """See ``head_rows.dlogits_``. The result, float32 or 16-bit, has the memory of ``x``."""
    entropies = None if dentropies is None else stats.entropies
    dentropies = None if dentropies is None else dentropies.contiguous()
    tensors = x, targets, bias, stats.peaks, stats.totals, entropies, dlogprobs.contiguous(), dentropies
    if torch.compiler.is_compiling():
        torch.ops.maestro_fast.triton_dlogits_(*tensors, *astuple(spec), dtype)
    else:
        _launch_dlogits(*tensors, spec, dtype)
    return _place(x, dtype)


def _place(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x`` [n, V] itself, or as many narrower numbers at the start of each row."""
    return x if dtype is x.dtype else x.view(dtype)[:, : x.shape[1]]


def _launch_dlogits(
    x: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    peaks: Tensor,
    totals: Tensor,
    entropies: Tensor | None,
    dlogprobs: Tensor,
    dentropies: Tensor | None,
    spec: HeadSpec,
    dtype: torch.dtype,
) -> None:
    from maestro_fast.kernels import head_rows as kernel

    stats = RowStatistics(peaks, peaks, totals, entropies)  # its log-probs are not read
    kernel.dlogits(x, targets, bias, stats, dlogprobs, dentropies, spec, _place(x, dtype))


# --- operators that compilation sees ---


def _statistics(x: Tensor, targets: Tensor, bias: Tensor | None, *spec: Any) -> tuple[Tensor, ...]:
    from maestro_fast.kernels import head_rows as kernel

    found = kernel.row_statistics(x, targets, bias, HeadSpec(*spec))
    return tuple(x.new_empty(0) if y is None else y for y in found)


def _statistics_shapes(x: Tensor, targets: Tensor, bias: Tensor | None, *spec: Any) -> tuple[Tensor, ...]:
    rows = x.shape[0]
    return *(x.new_empty(rows) for _ in range(3)), x.new_empty(0 if spec[-1] == "none" else rows)


define(
    f"triton_row_statistics(Tensor x, Tensor targets, Tensor? bias, {SPEC}) -> (Tensor, Tensor, Tensor, Tensor)",
    _statistics,
    _statistics_shapes,
)
define(
    "triton_dlogits_(Tensor(a!) x, Tensor targets, Tensor? bias, Tensor peaks, Tensor totals, Tensor? entropies,"
    f" Tensor dlogprobs, Tensor? dentropies, {SPEC}, ScalarType dtype) -> ()",
    lambda *given: _launch_dlogits(*given[:8], HeadSpec(*given[8:-1]), given[-1]),  # type: ignore[call-arg]
    lambda *given: None,
)
