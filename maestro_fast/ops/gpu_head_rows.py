"""Rows of logits by Triton: their matrix product, their statistics and their gradient, see ``kernels/head_rows.py``."""

from __future__ import annotations

from dataclasses import astuple
from typing import Any

import torch
from torch import Tensor

from maestro_fast.ops.gpu import define, on_its_device
from maestro_fast.ops.head_products import product_into
from maestro_fast.specs import HeadSpec, RowStatistics

# Rows of one product of hidden states and head. On the 132 processors of an H100 or H200, tiles of 128 x 256 over a
# vocabulary of 151,936 make 36.0 waves for 1,024 rows, 72.0 for 2,048 and 144.0 for 4,096; over 129,280 they make 30.6,
# 61.2 and 122.4, over 128,256 30.4, 60.7 and 121.5, over 32,000 7.6, 15.2 and 30.3: the last wave, which is not full,
# costs 1,024 rows 0, 1.3, 2.1 and 5.6 %, and 2,048 rows 0, 1.3, 0.4 and 5.6 %. Measured on an H100, V = 151,936, into
# float32: 728, 747 and 676 TFLOP/s for 1,024, 2,048 and 4,096 rows at d = 4,096, and 501, 516 and 560 at d = 1,024
# (bench/results/gpu_tiles.md). So 2,048 rows gain 3 %. They would cost 512 rows more of padding in the mean of every
# call and of every chunk that is not full, and twice the time of a call of few rows: all products have one shape, so
# that a row's bits do not depend on its batch.
_PRODUCT_ROWS = 1024
_ALIGNED = 16  # columns: 64 bytes, so that every row can be read in whole vectors
SPEC = "float scale, float? softcap, float temperature, int ignore_index, str entropy"


def logit_rows(chunk: int) -> int:
    """How many rows have float32 logits at once, where 16-bit gradients of ``chunk`` rows lie beside them: as many as
    fill the other half of that memory, in whole products."""
    return max(chunk // 2 // _PRODUCT_ROWS, 1) * _PRODUCT_ROWS


def empty_rows(rows: int, columns: int, x: Tensor, dtype: torch.dtype) -> Tensor:
    """Uninitialised [rows, columns] beside ``x``; what lies between the rows, so that each is aligned, is rubbish."""
    stride = -(-columns // _ALIGNED) * _ALIGNED
    return torch.empty(rows, stride, device=x.device, dtype=dtype)[:, :columns]


def logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """h @ W.T, float32 [n, V]; what lies between its rows is rubbish.

    Products of one shape, the last padded with zeros, whatever n is: a row does not depend on how many there are.
    """
    rows = hidden.shape[0]
    padded = -(-rows // _PRODUCT_ROWS) * _PRODUCT_ROWS
    out = empty_rows(padded, weight.shape[0], hidden, torch.float32)
    for start in range(0, padded, _PRODUCT_ROWS):
        part = hidden[start : start + _PRODUCT_ROWS]
        missing = _PRODUCT_ROWS - part.shape[0]
        if missing:
            part = torch.cat([part, part.new_zeros(missing, part.shape[1])])
        product_into(out[start : start + _PRODUCT_ROWS], part, weight.T)
    return out[:rows]


def row_statistics(x: Tensor, targets: Tensor, bias: Tensor | None, spec: HeadSpec) -> RowStatistics:
    """See ``head_rows.row_statistics``; a target out of range gives NaN."""
    if torch.compiler.is_compiling():
        found = RowStatistics(*torch.ops.maestro_fast.triton_row_statistics(x, targets, bias, *astuple(spec)))
        return found._replace(entropies=None) if spec.entropy == "none" else found
    return _launch_statistics(x, targets, bias, spec)


@on_its_device
def _launch_statistics(x: Tensor, targets: Tensor, bias: Tensor | None, spec: HeadSpec) -> RowStatistics:
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
    out: Tensor | None = None,
) -> Tensor:
    """See ``head_rows.dlogits_``. The result is ``out``, or ``x`` where it is None."""
    entropies = None if dentropies is None else stats.entropies
    dentropies = None if dentropies is None else dentropies.contiguous()
    tensors = targets, bias, stats.peaks, stats.totals, entropies, dlogprobs.contiguous(), dentropies
    if not torch.compiler.is_compiling():
        _launch_dlogits(x, x if out is None else out, *tensors, spec)
    elif out is None:
        torch.ops.maestro_fast.triton_dlogits_(x, *tensors, *astuple(spec))
    else:
        torch.ops.maestro_fast.triton_dlogits_into(out, x, *tensors, *astuple(spec))
    return x if out is None else out


@on_its_device
def _launch_dlogits(
    x: Tensor,
    out: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    peaks: Tensor,
    totals: Tensor,
    entropies: Tensor | None,
    dlogprobs: Tensor,
    dentropies: Tensor | None,
    spec: HeadSpec,
) -> None:
    from maestro_fast.kernels import head_rows as kernel

    stats = RowStatistics(peaks, peaks, totals, entropies)  # its log-probs are not read
    kernel.dlogits(x, targets, bias, stats, dlogprobs, dentropies, spec, out)


# --- operators that compilation sees ---


def _statistics(x: Tensor, targets: Tensor, bias: Tensor | None, *spec: Any) -> tuple[Tensor, ...]:
    found = _launch_statistics(x, targets, bias, HeadSpec(*spec))
    return tuple(x.new_empty(0) if y is None else y for y in found)


def _statistics_shapes(x: Tensor, targets: Tensor, bias: Tensor | None, *spec: Any) -> tuple[Tensor, ...]:
    rows = x.shape[0]
    return *(x.new_empty(rows) for _ in range(3)), x.new_empty(0 if spec[-1] == "none" else rows)


define(
    f"triton_row_statistics(Tensor x, Tensor targets, Tensor? bias, {SPEC}) -> (Tensor, Tensor, Tensor, Tensor)",
    _statistics,
    _statistics_shapes,
)
_SLOPES = (
    "Tensor targets, Tensor? bias, Tensor peaks, Tensor totals, Tensor? entropies, Tensor dlogprobs,"
    f" Tensor? dentropies, {SPEC}"
)
define(
    f"triton_dlogits_(Tensor(a!) x, {_SLOPES}) -> ()",
    lambda x, *given: _launch_dlogits(x, x, *given[:7], HeadSpec(*given[7:])),  # type: ignore[call-arg]
    lambda *given: None,
)
define(
    f"triton_dlogits_into(Tensor(a!) out, Tensor x, {_SLOPES}) -> ()",
    lambda out, x, *given: _launch_dlogits(x, out, *given[:7], HeadSpec(*given[7:])),  # type: ignore[call-arg]
    lambda *given: None,
)
