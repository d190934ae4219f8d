"""Rows of logits: log-probs and entropies in one pass over a row, and their gradient in another.

    u_v = scale x_v + b_v             y_v = cap tanh(u_v / cap), or u_v        gap_v = (y_v - peak) / T
    peak = max_v y_v                  total = sum_v exp gap_v                  p_v = exp(gap_v) / total
    log p_t = gap_t - log total       H = log total - sum_v p_v gap_v
    dL/du_v = (dlp 1[v = t] - p_v (dlp + dH (log p_v + H))) / T * (1 - tanh(u_v / cap)^2)

x [C, V] is the float32 output of a matrix product of hidden states and head. One program has one row, so that no row
depends on other rows. Sums are kept relative to the largest y so far, so that an offset that all logits share costs no
precision.

dL/du is written in the dtype that the next matrix product reads: float32 over x, or 16-bit into a buffer of its own.

Bytes moved: 4 V C for the statistics, and for the gradient 8 V C in float32 or 6 V C in 16 bits. Ignored rows are not
read. Rows without a gradient are not read in the backward pass either; their gradient is only set to zero.
"""

from __future__ import annotations

from typing import NamedTuple, TypedDict

import triton
import triton.language as tl
from torch import Tensor

from maestro_fast.specs import HeadSpec, RowStatistics

# One step of a program covers 4 folds of 1,024 columns, 16 values for each of its 256 threads. So enough loads
# are under way to keep the memory busy, and the sums of the statistics (3 x 1,024 lanes, 12 registers a thread) fit
# into registers beside them. A warp reads 512 adjacent bytes.
_LANES = 1024  # columns whose sums are kept apart, so that no step adds across threads
_FOLDS = 4  # how many times _LANES columns one step covers
_WARPS = 8
LOG2E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-1.0e30)  # finite, because the difference of two infinities would be NaN


class HeadValues(NamedTuple):
    """The steps from the product's output to y: a pointer to the bias, the scale, and the bound of the soft cap.

    None leaves a step out. Triton knows a None in a tuple when it compiles a kernel. A flag would not do, because
    Triton turns the flags in a tuple into run-time values.
    """

    bias: tl.tensor
    scale: tl.tensor
    softcap: tl.tensor


class Sums(NamedTuple):
    """Sums over the columns that were read so far, for every lane or row, with gap = y - largest and p = exp(gap / T).

    Attributes:
        largest: the largest y.
        total: the sum of p.
        moment: the sum of p * gap.
    """

    largest: tl.tensor
    total: tl.tensor
    moment: tl.tensor


class RowGradient(NamedTuple):
    """The numbers that the gradient of one row is computed from: its target, its statistics, dL/dlog p and dL/dH.

    ``dentropy`` and ``entropy`` are None where dL/dH is 0, ``temperature`` is None where it is 1.
    """

    target: tl.tensor
    peak: tl.tensor
    log_total: tl.tensor
    entropy: tl.tensor
    dlogprob: tl.tensor
    dentropy: tl.tensor
    temperature: tl.tensor


@triton.jit
def _tanh(u):
    """tanh(u) with a relative error of at most 1.5e-7, which 1 - 2 / (exp(2 u) + 1) would not reach near 0.

    The polynomial fits tanh(u) / u up to 0.55 by weighted least squares; in float64 it is off by 1e-9. An infinite u
    gives NaN.
    """
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
def cap_logits(x, head, column, inside, MASKED: tl.constexpr):
    """y, and tanh(u / cap) for the derivative of the soft cap. Without a soft cap y is returned twice.

    ``MASKED`` says that some columns may not be ``inside`` the vocabulary.
    """
    if head.scale is not None:
        x = x * head.scale
    if head.bias is not None:
        if MASKED:
            x += tl.load(head.bias + column, mask=inside, other=0.0).to(tl.float32)
        else:
            x += tl.load(head.bias + column).to(tl.float32)
    if head.softcap is not None:
        bent = _tanh(x / head.softcap)
        return bent * head.softcap, bent
    else:
        return x, x


@triton.jit
def _fold(y, sums, per_nat, ENTROPY: tl.constexpr):
    """Adds y [F, L] to the sums of the L lanes. exp(gap / T) is computed as exp2(gap * per_nat)."""
    most = tl.maximum(sums.largest, tl.max(y, 0))
    # The sums so far are relative to a smaller y, and are brought to the new one.
    shrunk = tl.exp2((sums.largest - most) * per_nat)
    gap = y - most[None, :]
    p = tl.exp2(gap * per_nat)
    moment = sums.moment
    if ENTROPY:
        moved = (moment + sums.total * (sums.largest - most)) * shrunk
        moment = moved + tl.sum(tl.where(p > 0, p * gap, 0.0), 0)
    return Sums(most, sums.total * shrunk + tl.sum(p, 0), moment)


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
    ENTROPY: tl.constexpr,
    F: tl.constexpr,
    L: tl.constexpr,
):
    """The statistics of one row, which is read once."""
    head = HeadValues(bias=bias_ptr, scale=scale, softcap=softcap)
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
        sums = Sums(tl.full([L], LOWEST, tl.float32), tl.zeros([L], tl.float32), tl.zeros([L], tl.float32))
        # Whole steps over the columns need no mask. One more step takes the remaining columns.
        whole = V // (F * L) * (F * L)
        for v in range(0, whole, F * L):
            y, _ = cap_logits(tl.load(row_ptr + v + fold), head, v + fold, None, False)
            sums = _fold(y, sums, per_nat, ENTROPY)
        if whole < V:
            column = whole + fold
            inside = column < V
            y, _ = cap_logits(tl.load(row_ptr + column, mask=inside, other=0.0), head, column, inside, True)
            sums = _fold(tl.where(inside, y, LOWEST), sums, per_nat, ENTROPY)
        # The lanes are added up, each relative to the largest y of all.
        most = tl.max(sums.largest, 0)
        share = tl.exp2((sums.largest - most) * per_nat)
        whole_total = tl.sum(sums.total * share, 0)
        log_total = tl.log(whole_total)
        # The logit of the target is read again. A target out of range gives NaN, and no access out of bounds.
        known = (target >= 0) & (target < V)
        x = tl.load(row_ptr + target, mask=known, other=float("nan"))
        y, _ = cap_logits(x, head, target, known, True)
        tl.store(logprobs_ptr + row, tl.div_rn(y - most, temperature) - log_total)
        tl.store(peaks_ptr + row, most)
        tl.store(totals_ptr + row, whole_total)
        if ENTROPY:
            # A lane without columns has a share of 0, but its gap may overflow.
            moved = (sums.moment + sums.total * (sums.largest - most)) * share
            gaps = tl.sum(tl.where(share > 0, moved, 0.0), 0)
            tl.store(entropies_ptr + row, log_total - tl.div_rn(tl.div_rn(gaps, whole_total), temperature))


@triton.jit
def _slope(x, head, row, column, inside, MASKED: tl.constexpr):
    """dL/du of the given columns of a row."""
    y, bent = cap_logits(x, head, column, inside, MASKED)
    gap = y - row.peak
    if row.temperature is not None:
        gap = gap / row.temperature
    logp = gap - row.log_total
    if MASKED:
        logp = tl.where(inside, logp, LOWEST)
    p = tl.exp2(logp * LOG2E)
    down = p * row.dlogprob
    if row.dentropy is not None:
        down += tl.where(p > 0, p * row.dentropy * (logp + row.entropy), 0.0)  # log p may be -inf
    g = tl.where(column == row.target, row.dlogprob, 0.0) - down
    if row.temperature is not None:
        g = g / row.temperature
    if head.softcap is not None:
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
    BV: tl.constexpr,
):
    """Writes the gradient of one row into ``out``, which is x itself or does not overlap it.

    ``dentropies_ptr`` and ``temperature`` may be None, see ``RowGradient``.
    """
    head = HeadValues(bias=bias_ptr, scale=scale, softcap=softcap)
    program = tl.program_id(0).to(tl.int64)
    target = tl.load(targets_ptr + program)
    dlogprob = tl.load(dlogprobs_ptr + program).to(tl.float32)
    peak = tl.load(peaks_ptr + program)
    log_total = tl.log(tl.load(totals_ptr + program))
    entropy = None
    dentropy = None
    live = dlogprob != 0
    if dentropies_ptr is not None:
        entropy = tl.load(entropies_ptr + program)
        dentropy = tl.load(dentropies_ptr + program).to(tl.float32)
        live = live | (dentropy != 0)
    live = live & (target != ignore_index)
    row = RowGradient(
        target=target,
        peak=peak,
        log_total=log_total,
        entropy=entropy,
        dlogprob=dlogprob,
        dentropy=dentropy,
        temperature=temperature,
    )
    row_ptr = x_ptr + program * stride_x
    to_ptr = out_ptr + program * stride_out
    lane = tl.arange(0, BV)
    # Whole steps over the columns need no mask. One more step takes the remaining columns.
    whole = V // BV * BV
    if live:
        for v in range(0, whole, BV):
            g = _slope(tl.load(row_ptr + v + lane), head, row, v + lane, None, False)
            tl.store(to_ptr + v + lane, g.to(out_ptr.dtype.element_ty))
        if whole < V:
            column = whole + lane
            x = tl.load(row_ptr + column, mask=column < V, other=0.0)
            g = _slope(x, head, row, column, column < V, True)
            tl.store(to_ptr + column, g.to(out_ptr.dtype.element_ty), mask=column < V)
    else:
        zeros = tl.zeros([BV], out_ptr.dtype.element_ty)
        for v in range(0, whole, BV):
            tl.store(to_ptr + v + lane, zeros)
        if whole < V:
            tl.store(to_ptr + whole + lane, zeros, mask=whole + lane < V)


# --- the launches ---


class HeadArguments(TypedDict):
    """The arguments that every kernel of a head takes, see ``HeadValues``."""

    bias_ptr: Tensor | None
    scale: float | None
    softcap: float | None


def head_arguments(spec: HeadSpec, bias: Tensor | None) -> HeadArguments:
    """The arguments for these options. A scale of 1 becomes None, so that it is not compiled into the kernel."""
    return {
        "bias_ptr": bias,
        "scale": None if spec.scale == 1.0 else float(spec.scale),
        "softcap": None if spec.softcap is None else float(spec.softcap),
    }


def row_statistics(x: Tensor, targets: Tensor, bias: Tensor | None, spec: HeadSpec) -> RowStatistics:
    """Launches the statistics of C rows, in float32.

    Args:
        x: float32 [C, V], columns contiguous, any stride of rows.
        targets: int64 [C], in [0, V) or ``spec.ignore_index``; the log-prob of any other is NaN.
        bias: [V], contiguous, or None.
        spec: scale, soft cap, temperature, and whether entropies are wanted.
    """
    rows = x.shape[0]
    wants_entropy = spec.entropy != "none"
    logprobs, peaks, totals = (x.new_empty(rows) for _ in range(3))
    entropies = x.new_empty(rows if wants_entropy else 0)
    if rows:
        _statistics[(rows,)](
            x_ptr=x,
            targets_ptr=targets,
            logprobs_ptr=logprobs,
            peaks_ptr=peaks,
            totals_ptr=totals,
            entropies_ptr=entropies if wants_entropy else None,
            V=x.shape[1],
            stride_x=x.stride(0),
            ignore_index=spec.ignore_index,
            **head_arguments(spec, bias),
            temperature=float(spec.temperature),
            ENTROPY=wants_entropy,
            F=_FOLDS,
            L=_LANES,
            num_warps=_WARPS,
            enable_fp_fusion=False,
        )
    return RowStatistics(logprobs, peaks, totals, entropies)


def dlogits(
    x: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    stats: RowStatistics,
    dlogprobs: Tensor,
    dentropies: Tensor | None,
    spec: HeadSpec,
    out: Tensor,
) -> None:
    """Launches dL/du of C rows. It is exactly 0 in ignored rows and where both gradients are 0, whatever ``x`` holds.

    Args:
        x, targets, bias, spec: the arguments of ``row_statistics``.
        stats: the result of ``row_statistics``.
        dlogprobs, dentropies: dL/dlog p and dL/dH [C], contiguous; None means that dL/dH is 0.
        out: [C, V], float32 or 16-bit, columns contiguous. It is ``x`` itself, or does not overlap it.
    """
    if not x.shape[0]:
        return
    _dlogits[(x.shape[0],)](
        x_ptr=x,
        out_ptr=out,
        targets_ptr=targets,
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
        temperature=None if spec.temperature == 1.0 else float(spec.temperature),
        BV=_LANES * _FOLDS,
        num_warps=_WARPS,
        enable_fp_fusion=False,
    )
