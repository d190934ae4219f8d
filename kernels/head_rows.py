"""Rows of logits: log-probs and entropies in one pass, and their gradient.

    u_v = scale x_v + b_v             y_v = cap tanh(u_v / cap), or u_v        gap_v = (y_v - peak) / T
    peak = max_v y_v                  total = sum_v exp gap_v                  p_v = exp(gap_v) / total
    log p_t = gap_t - log total       H = log total - sum_v p_v gap_v
    dL/du_v = (dlp 1[v = t] - p_v (dlp + dH (log p_v + H))) / T * (1 - tanh(u_v / cap)^2)

x [C, V] float32 is what a matrix product of hidden states and head wrote. One program has one row, so that nothing of
a row depends on the others. Sums are kept relative to the largest y so far: an offset that all logits share costs no
precision.

dL/du is written in the dtype that the next matrix product reads: as float32 in the place of x, or as 16-bit numbers to
a buffer of their own, which that product then reads row after row without gaps.

Bytes moved: 4 V C for the statistics, 8 V C or 6 V C for the gradient. A row that is ignored is not read, nor is one
without a gradient, which is only zeroed.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

_LANES = 1024  # columns that are folded apart: a warp reads 512 bytes in a row
_FOLDS = 4  # of _LANES columns in one step
_WARPS = 8
LOG2E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-1.0e30)  # finite: the difference of two such is 0, not NaN


@triton.jit
def _tanh(u):
    """Off by at most 1.5e-7 of tanh(u), unlike 1 - 2 / (exp(2 u) + 1) near 0. The polynomial fits tanh(u) / u up to
    0.55 by weighted least squares; in float64 it is off by 1e-9. An infinite u gives NaN."""
    square = u * u
    slope = -0.00623556 * square + 0.02103968
    slope = slope * square - 0.05384271
    slope = slope * square + 0.13332461
    slope = slope * square - 0.33333311
    size = tl.abs(u)
    small = tl.exp(-2.0 * size)
    far = 1.0 - 2.0 * small / (1.0 + small)
    return tl.where(size < 0.55, u * (slope * square + 1.0), tl.where(u < 0, -far, far))


@triton.jit
def cap_logits(
    x,
    bias_ptr,
    column,
    inside,
    scale,
    softcap,
    HAS_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    MASKED: tl.constexpr,
):
    """y before the temperature, and tanh(u / cap), which is y without a softcap."""
    if HAS_SCALE:
        x = x * scale
    if HAS_BIAS:
        if MASKED:
            x += tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)
        else:
            x += tl.load(bias_ptr + column).to(tl.float32)
    if HAS_SOFTCAP:
        bent = _tanh(x / softcap)
        return bent * softcap, bent
    else:
        return x, x


@triton.jit
def _fold(y, largest, total, moment, per_nat, ENTROPY: tl.constexpr):
    """Adds the folds of y [F, L] to each lane's largest y, sum of p, and sum of p gap, where gap = y - largest and
    p = exp(gap / T) = exp2(gap per_nat)."""
    most = tl.maximum(largest, tl.max(y, 0))
    shrunk = tl.exp2((largest - most) * per_nat)
    gap = y - most[None, :]
    p = tl.exp2(gap * per_nat)
    if ENTROPY:
        moment = (moment + total * (largest - most)) * shrunk + tl.sum(tl.where(p > 0, p * gap, 0.0), 0)
    return most, total * shrunk + tl.sum(p, 0), moment


@triton.jit
def _statistics(
    x_ptr,
    targets_ptr,
    bias_ptr,
    logprobs_ptr,
    peaks_ptr,
    totals_ptr,
    entropies_ptr,
    V,
    stride_x,
    ignore_index,
    scale,
    softcap,
    temperature,
    HAS_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    F: tl.constexpr,
    L: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets_ptr + row)
    if target == ignore_index:
        tl.store(logprobs_ptr + row, 0.0)
        tl.store(peaks_ptr + row, 0.0)
        tl.store(totals_ptr + row, 1.0)
        if ENTROPY:
            tl.store(entropies_ptr + row, 0.0)
    else:
        row_ptr = x_ptr + row * stride_x
        fold = tl.arange(0, F)[:, None] * L + tl.arange(0, L)[None, :]
        per_nat = LOG2E / temperature
        largest = tl.full([L], LOWEST, tl.float32)
        total = tl.zeros([L], tl.float32)
        moment = tl.zeros([L], tl.float32)
        whole = V // (F * L) * (F * L)
        for v in range(0, whole, F * L):
            y, _ = cap_logits(
                tl.load(row_ptr + v + fold), bias_ptr, v + fold, None, scale, softcap,
                HAS_SCALE, HAS_BIAS, HAS_SOFTCAP, False,
            )  # fmt: skip
            largest, total, moment = _fold(y, largest, total, moment, per_nat, ENTROPY)
        if whole < V:
            column = whole + fold
            inside = column < V
            y, _ = cap_logits(
                tl.load(row_ptr + column, mask=inside, other=0.0), bias_ptr, column, inside, scale, softcap,
                HAS_SCALE, HAS_BIAS, HAS_SOFTCAP, True,
            )  # fmt: skip
            largest, total, moment = _fold(tl.where(inside, y, LOWEST), largest, total, moment, per_nat, ENTROPY)
        most = tl.max(largest, 0)
        share = tl.exp2((largest - most) * per_nat)
        whole_total = tl.sum(total * share, 0)
        log_total = tl.log(whole_total)
        known = (target >= 0) & (target < V)  # any other gives NaN, and no access out of bounds
        x = tl.load(row_ptr + target, mask=known, other=float("nan"))
        y, _ = cap_logits(x, bias_ptr, target, known, scale, softcap, HAS_SCALE, HAS_BIAS, HAS_SOFTCAP, True)
        tl.store(logprobs_ptr + row, tl.div_rn(y - most, temperature) - log_total)
        tl.store(peaks_ptr + row, most)
        tl.store(totals_ptr + row, whole_total)
        if ENTROPY:
            # a lane without columns has a share of 0, and a gap that may overflow
            gaps = tl.sum(tl.where(share > 0, (moment + total * (largest - most)) * share, 0.0), 0)
            tl.store(entropies_ptr + row, log_total - tl.div_rn(tl.div_rn(gaps, whole_total), temperature))


@triton.jit
def _slope(
    x,
    bias_ptr,
    column,
    inside,
    target,
    peak,
    log_total,
    entropy,
    dlogprob,
    dentropy,
    scale,
    softcap,
    temperature,
    HAS_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
    ENTROPY: tl.constexpr,
    MASKED: tl.constexpr,
):
    y, bent = cap_logits(x, bias_ptr, column, inside, scale, softcap, HAS_SCALE, HAS_BIAS, HAS_SOFTCAP, MASKED)
    gap = y - peak
    logp = (gap / temperature if HAS_TEMPERATURE else gap) - log_total
    if MASKED:
        logp = tl.where(inside, logp, LOWEST)
    p = tl.exp2(logp * LOG2E)
    down = p * dlogprob
    if ENTROPY:
        down += tl.where(p > 0, p * dentropy * (logp + entropy), 0.0)  # log p may be -inf
    g = tl.where(column == target, dlogprob, 0.0) - down
    if HAS_TEMPERATURE:
        g = g / temperature
    if HAS_SOFTCAP:
        g *= 1.0 - bent * bent
    return g


@triton.jit
def _dlogits(
    x_ptr,
    out_ptr,
    targets_ptr,
    bias_ptr,
    peaks_ptr,
    totals_ptr,
    entropies_ptr,
    dlogprobs_ptr,
    dentropies_ptr,
    V,
    stride_x,
    stride_out,
    ignore_index,
    scale,
    softcap,
    temperature,
    HAS_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
    ENTROPY: tl.constexpr,
    BV: tl.constexpr,
):
    """out is x, or lies apart from it."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets_ptr + row)
    dlogprob = tl.load(dlogprobs_ptr + row).to(tl.float32)
    peak = tl.load(peaks_ptr + row)
    log_total = tl.log(tl.load(totals_ptr + row))
    entropy = peak
    dentropy = dlogprob * 0.0
    live = dlogprob != 0
    if ENTROPY:
        entropy = tl.load(entropies_ptr + row)
        dentropy = tl.load(dentropies_ptr + row).to(tl.float32)
        live = live | (dentropy != 0)
    live = live & (target != ignore_index)
    row_ptr = x_ptr + row * stride_x
    to_ptr = out_ptr + row * stride_out
    lane = tl.arange(0, BV)
    whole = V // BV * BV
    if live:
        for v in range(0, whole, BV):
            g = _slope(
                tl.load(row_ptr + v + lane), bias_ptr, v + lane, None, target, peak, log_total, entropy,
                dlogprob, dentropy, scale, softcap, temperature,
                HAS_SCALE, HAS_BIAS, HAS_SOFTCAP, HAS_TEMPERATURE, ENTROPY, False,
            )  # fmt: skip
            tl.store(to_ptr + v + lane, g.to(out_ptr.dtype.element_ty))
        if whole < V:
            column = whole + lane
            x = tl.load(row_ptr + column, mask=column < V, other=0.0)
            g = _slope(
                x, bias_ptr, column, column < V, target, peak, log_total, entropy,
                dlogprob, dentropy, scale, softcap, temperature,
                HAS_SCALE, HAS_BIAS, HAS_SOFTCAP, HAS_TEMPERATURE, ENTROPY, True,
            )  # fmt: skip
            tl.store(to_ptr + column, g.to(out_ptr.dtype.element_ty), mask=column < V)
    else:
        zeros = tl.zeros([BV], out_ptr.dtype.element_ty)
        for v in range(0, whole, BV):
            tl.store(to_ptr + v + lane, zeros)
        if whole < V:
            tl.store(to_ptr + whole + lane, zeros, mask=whole + lane < V)


def head_arguments(spec: Any, bias: Tensor | None) -> dict[str, Any]:
    """What of a head is done to a logit, as the kernels take it."""
    return {
        "bias_ptr": bias,
        "scale": float(spec.scale),
        "softcap": float(spec.softcap or 1.0),
        "temperature": float(spec.temperature),
        "HAS_SCALE": spec.scale != 1.0,
        "HAS_BIAS": bias is not None,
        "HAS_SOFTCAP": spec.softcap is not None,
    }


def row_statistics(
    x: Tensor, targets: Tensor, bias: Tensor | None, spec: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The fields of ``ops.head_rows.RowStatistics``, float32 [C].

    Args:
        x: float32 [C, V], columns contiguous, any stride of rows.
        targets: int64 [C], in [0, V) or ``spec.ignore_index``; the log-prob of any other is NaN.
        bias: [V], contiguous, or None.
        spec: an ``ops.head_rows.HeadSpec``.
    """
    rows = x.shape[0]
    wants_entropy = spec.entropy != "none"
    logprobs, peaks, totals = (x.new_empty(rows) for _ in range(3))
    entropies = x.new_empty(rows) if wants_entropy else None
    if rows:
        _statistics[(rows,)](
            x,
            targets,
            logprobs_ptr=logprobs,
            peaks_ptr=peaks,
            totals_ptr=totals,
            entropies_ptr=entropies,
            V=x.shape[1],
            stride_x=x.stride(0),
            ignore_index=spec.ignore_index,
            **head_arguments(spec, bias),
            ENTROPY=wants_entropy,
            F=_FOLDS,
            L=_LANES,
            num_warps=_WARPS,
            enable_fp_fusion=False,
        )
    return logprobs, peaks, totals, entropies


def dlogits(
    x: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    stats: Any,
    dlogprobs: Tensor,
    dentropies: Tensor | None,
    spec: Any,
    out: Tensor,
) -> None:
    """dL/du of C rows. A row that is ignored, or whose gradients are 0, becomes exactly 0, whatever ``x`` holds there.

    Args:
        x, targets, bias, spec: as for ``row_statistics``.
        stats: its result.
        dlogprobs, dentropies: [C], contiguous; None stands for 0.
        out: [C, V], float32 or 16-bit, columns contiguous: ``x`` itself, or apart from it.
    """
    if not x.shape[0]:
        return
    _dlogits[(x.shape[0],)](
        x,
        out,
        targets,
        peaks_ptr=stats.peaks,
        totals_ptr=stats.totals,
        entropies_ptr=None if dentropies is None else stats.entropies,
        dlogprobs_ptr=dlogprobs,
        dentropies_ptr=dentropies,
        V=x.shape[1],
        stride_x=x.stride(0),
        stride_out=out.stride(0),
        ignore_index=spec.ignore_index,
        **head_arguments(spec, bias),
        HAS_TEMPERATURE=spec.temperature != 1.0,
        ENTROPY=dentropies is not None,
        BV=_LANES * _FOLDS,
        num_warps=_WARPS,
        enable_fp_fusion=False,
    )
