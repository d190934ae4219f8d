"""Log-probs and entropies straight from hidden states and head: no logit is written to memory.

    y_v = softcap(scale h . W_v + b_v)

``kernels/head_rows.py`` has the formulas from y on. ``_scores`` has one program for each tile of rows and each part of
the vocabulary. It multiplies one tile of the head after the other into an accumulator, and keeps for each row the
largest y, the sum of p, and for the entropy the sum of p gap, where gap = y - largest and p = exp(gap / T).
``_combine`` has one program per row. It adds up the parts in their order, and computes the logit of the target; picking
this logit out of the tiles would spill registers.

The parts and the tiles follow from the vocabulary, the dtype, the alignment and the architecture, so a row's results do
not depend on what else is in the batch. The chunked pass adds up in another order, so its bits are different.

Flops: 2 T V d. Elements moved: T d of the states, once for each tile of the head, and V d of the head, once for each
tile of rows, unless they are in the L2 cache. The sums take 12 T bytes per part, which is all memory that is needed
beyond inputs and outputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from maestro_fast.kernels.bound_launch import blocks, power_of_2
from maestro_fast.kernels.head_rows import LOG2E, LOWEST, HeadValues, Sums, cap_logits, head_arguments
from maestro_fast.specs import HeadSpec, RowStatistics

# Columns of the vocabulary for one program. 151,936 columns make 19 parts. With 1,024 rows and more there are programs
# for every processor, and ``_combine`` reads few partial sums per row.
_PART = 8192
_GROUP = 16  # tiles of rows that go through the vocabulary together, see ``_place``


@dataclass(frozen=True)
class Tiles:
    """The tile of one step of a program, and the options that it is compiled with.

    Attributes:
        rows, columns, depth: how many tokens, words of the vocabulary and elements of d a step covers.
        warps, stages: the warps of a program, and the steps whose loads are under way.
        descriptors: whether it reads by the tensor memory accelerator of sm_90 and later.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    descriptors: bool = False


# These are for sm_90 and sm_100. The accumulator takes 128 registers of each of the 256 threads, and four stages of
# operands take 192 KiB of shared memory.
_HOPPER = Tiles(128, 256, 64, warps=8, stages=4, descriptors=True)
# These are for sm_80, and for operands that descriptors cannot read. The accumulator has half the size, because
# addresses take registers, too.
_AMPERE = Tiles(128, 128, 32, warps=8, stages=4)
# These are for float32, which is multiplied without tensor cores and takes twice the shared memory.
_SINGLE = Tiles(64, 64, 32, warps=8, stages=3)


class Operands(NamedTuple):
    """Hidden states [T, d] and head [V, d]: pointers with the strides of their rows, or tensor descriptors."""

    h: tl.tensor
    w: tl.tensor
    T: tl.tensor
    V: tl.tensor
    d: tl.tensor
    stride_h: tl.tensor
    stride_w: tl.tensor


def tiles(hidden: Tensor, weight: Tensor, capability: tuple[int, int]) -> Tiles:
    """The tiles for these operands. Nothing is tuned at run time, because other tiles would add up in another order."""
    if hidden.dtype is torch.float32:
        return _SINGLE
    aligned = all(x.data_ptr() % 16 == 0 and x.stride(0) * x.element_size() % 16 == 0 for x in (hidden, weight))
    return _HOPPER if capability[0] in (9, 10) and aligned else _AMPERE


def is_faster(hidden: Tensor, weight: Tensor) -> bool:
    """Whether these kernels were faster than logits in memory on a device like this one.

    For d = 1,024 and 4,096 they took 0.78 and 0.93 of the time on an H200, with smaller errors
    (bench/results/gpu_second_h200.jsonl). They have not been timed on other architectures, nor with other tiles.
    """
    capability = torch.cuda.get_device_capability(hidden.device) if hidden.is_cuda else (0, 0)
    return capability == (9, 0) and tiles(hidden, weight, capability) is _HOPPER


@triton.jit
def _product(
    x,
    row,
    column,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    WHOLE_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """h . W for BM rows from ``row`` on and BN columns from ``column`` on. Results beyond T and V are meaningless.

    The accumulator [BM, BN] stays in registers, while the operands of the next ``STAGES`` steps are being loaded into
    shared memory.
    """
    acc = tl.zeros([BM, BN], tl.float32)
    k_K = tl.arange(0, BK)
    h_ptr = x.h
    w_ptr = x.w
    if not DESCRIPTORS:
        # A row beyond the last one reads another row, which costs less than a mask.
        h_ptr = x.h + ((row + tl.arange(0, BM)) % x.T)[:, None].to(tl.int64) * x.stride_h + k_K[None, :]
        w_ptr = x.w + ((column + tl.arange(0, BN)) % x.V)[None, :].to(tl.int64) * x.stride_w + k_K[:, None]
    # The loop walks over d, BK elements at a time.
    for k in tl.range(0, x.d, BK, num_stages=STAGES):
        if DESCRIPTORS:
            acc = tl.dot(x.h.load([row, k]), x.w.load([column, k]).T, acc, input_precision="ieee")
        else:
            if WHOLE_K:
                h_MK = tl.load(h_ptr)
                w_KN = tl.load(w_ptr)
            else:
                h_MK = tl.load(h_ptr, mask=(k + k_K < x.d)[None, :], other=0.0)
                w_KN = tl.load(w_ptr, mask=(k + k_K < x.d)[:, None], other=0.0)
            acc = tl.dot(h_MK, w_KN, acc, input_precision="ieee")
            h_ptr += BK
            w_ptr += BK
    return acc


@triton.jit
def _add_pairs(a0, a1, b0, b1):
    return a0 + b0, a1 + b1


@triton.jit
def _fold(x_MN, sums, head, column_N, end, per_nat, ENTROPY: tl.constexpr):
    """Adds the logits x [M, N] to the sums of their rows."""
    inside = (column_N < end)[None, :]
    y_MN, _ = cap_logits(x_MN, head, column_N[None, :], inside, True)
    y_MN = tl.where(inside, y_MN, LOWEST)
    most_M = tl.maximum(sums.largest, tl.max(y_MN, 1))
    # The sums so far are relative to a smaller y, and are brought to the new one.
    shrunk_M = tl.exp2((sums.largest - most_M) * per_nat)
    gap_MN = y_MN - most_M[:, None]
    p_MN = tl.exp2(gap_MN * per_nat)
    moment_M = sums.moment
    if ENTROPY:
        # One reduction for both sums exchanges values between threads only once.
        sum_M, gaps_M = tl.reduce((p_MN, tl.where(p_MN > 0, p_MN * gap_MN, 0.0)), 1, _add_pairs)
        moment_M = (moment_M + sums.total * (sums.largest - most_M)) * shrunk_M + gaps_M
    else:
        sum_M = tl.sum(p_MN, 1)
    return Sums(most_M, sums.total * shrunk_M + sum_M, moment_M)


@triton.jit
def _halves(x_MN):
    return tl.split(tl.permute(tl.reshape(x_MN, [x_MN.shape[0], 2, x_MN.shape[1] // 2]), [0, 2, 1]))


@triton.jit
def _place(T, PARTS: tl.constexpr, BM: tl.constexpr, GROUP: tl.constexpr):
    """The tile of rows and the part of the vocabulary of this program.

    GROUP tiles, whose states stay in the L2 cache, go through all parts before the next GROUP.
    """
    pid = tl.program_id(0)
    first = pid // (GROUP * PARTS) * GROUP
    size = tl.minimum(tl.cdiv(T, BM) - first, GROUP)
    within = pid % (GROUP * PARTS)
    return first + within % size, within // size


@triton.jit(do_not_specialize=["T"])
def _scores(
    h,
    w,
    bias_ptr,
    largest_ptr,
    totals_ptr,
    moments_ptr,
    T,
    V,
    d,
    stride_h,
    stride_w,
    scale,
    softcap,
    temperature,
    ENTROPY: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    WHOLE_K: tl.constexpr,
    PART: tl.constexpr,
    PARTS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    STAGES: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Writes the sums [PARTS, T] of BM rows over one part of the vocabulary.

    h and w are pointers, or tensor descriptors made on the host.
    """
    head = HeadValues(bias=bias_ptr, scale=scale, softcap=softcap)
    operands = Operands(h, w, T, V, d, stride_h, stride_w)
    tile, part = _place(T, PARTS, BM, GROUP)
    row = tile * BM
    begin = part * PART
    end = tl.minimum(begin + PART, V)
    per_nat = LOG2E / temperature
    sums = Sums(tl.full([BM], LOWEST, tl.float32), tl.zeros([BM], tl.float32), tl.zeros([BM], tl.float32))
    # The loop walks over the columns of the part, BN at a time. Each product walks over all of d.
    for column in range(begin, end, BN):
        x_MN = _product(operands, row, column, BM, BN, BK, DESCRIPTORS, WHOLE_K, STAGES)
        # y and p of a whole tile do not fit into the registers beside x. So the tile is folded in halves, and with a
        # softcap, whose tanh needs more registers, in quarters.
        low_MN, high_MN = _halves(x_MN)
        for i in tl.static_range(2):
            half_MN = low_MN if i == 0 else high_MN
            begin_N = column + i * (BN // 2)
            if softcap is not None:
                left_MN, right_MN = _halves(half_MN)
                for j in tl.static_range(2):
                    column_N = begin_N + j * (BN // 4) + tl.arange(0, BN // 4)
                    sums = _fold(left_MN if j == 0 else right_MN, sums, head, column_N, end, per_nat, ENTROPY)
            else:
                column_N = begin_N + tl.arange(0, BN // 2)
                sums = _fold(half_MN, sums, head, column_N, end, per_nat, ENTROPY)
    row_M = row + tl.arange(0, BM)
    to_M = part.to(tl.int64) * T + row_M
    tl.store(largest_ptr + to_M, sums.largest, mask=row_M < T)
    tl.store(totals_ptr + to_M, sums.total, mask=row_M < T)
    if ENTROPY:
        tl.store(moments_ptr + to_M, sums.moment, mask=row_M < T)


@triton.jit(do_not_specialize=["T"])
def _combine(
    h_ptr,
    w_ptr,
    targets_ptr,
    bias_ptr,
    largest_ptr,
    totals_ptr,
    moments_ptr,
    logprobs_ptr,
    out_peaks_ptr,
    out_totals_ptr,
    entropies_ptr,
    T,
    V,
    d,
    stride_h,
    stride_w,
    ignore_index,
    scale,
    softcap,
    temperature,
    ENTROPY: tl.constexpr,
    PARTS: tl.constexpr,
    BP: tl.constexpr,
    BD: tl.constexpr,
):
    """The statistics of one row: the logit of its target, and its parts [PARTS, T] added up."""
    head = HeadValues(bias=bias_ptr, scale=scale, softcap=softcap)
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets_ptr + row)
    if target == ignore_index:
        tl.store(logprobs_ptr + row, 0.0)
        tl.store(out_peaks_ptr + row, 0.0)
        tl.store(out_totals_ptr + row, 1.0)
        if ENTROPY:
            tl.store(entropies_ptr + row, 0.0)
    else:
        # A target out of range gives NaN, and no access out of bounds.
        known = (target >= 0) & (target < V)
        # The logit of the target is summed lane by lane, BD elements of d at a time.
        product_D = tl.zeros([BD], tl.float32)
        for k in range(0, d, BD):
            k_D = k + tl.arange(0, BD)
            h_D = tl.load(h_ptr + row * stride_h + k_D, mask=k_D < d, other=0.0).to(tl.float32)
            w_D = tl.load(w_ptr + target * stride_w + k_D, mask=k_D < tl.where(known, d, 0), other=0.0).to(tl.float32)
            product_D += h_D * w_D
        x = tl.where(known, tl.sum(product_D, 0), float("nan"))
        y, _ = cap_logits(x, head, target, known, True)
        # The parts are few: all of them are in registers at once, each relative to the largest y of the row.
        part = tl.arange(0, BP)
        largest_P = tl.load(largest_ptr + part.to(tl.int64) * T + row, mask=part < PARTS, other=LOWEST)
        total_P = tl.load(totals_ptr + part.to(tl.int64) * T + row, mask=part < PARTS, other=0.0)
        most = tl.max(largest_P, 0)
        share_P = tl.exp2((largest_P - most) * (LOG2E / temperature))
        total = tl.sum(total_P * share_P, 0)
        log_total = tl.log(total)
        logprob = tl.div_rn(y - most, temperature) - log_total
        # y and the largest y are sums in different orders, so y may be larger by a rounding error.
        tl.store(logprobs_ptr + row, tl.where(logprob > 0, 0.0, logprob))
        tl.store(out_peaks_ptr + row, most)
        tl.store(out_totals_ptr + row, total)
        if ENTROPY:
            moment_P = tl.load(moments_ptr + part.to(tl.int64) * T + row, mask=part < PARTS, other=0.0)
            gaps_P = (moment_P + total_P * (largest_P - most)) * share_P
            gaps = tl.sum(tl.where(share_P > 0, gaps_P, 0.0), 0)
            tl.store(entropies_ptr + row, log_total - tl.div_rn(tl.div_rn(gaps, total), temperature))


def token_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, spec: HeadSpec, by: Tiles | None = None
) -> RowStatistics:
    """Launches the statistics of T rows, in float32.

    Args:
        hidden, weight: [T, d] and [V, d] of one dtype, float32, float16 or bfloat16; columns contiguous.
        targets: int64 [T], in [0, V) or ``spec.ignore_index``; the log-prob of any other is NaN.
        bias: [V], contiguous, or None.
        spec: scale, soft cap, temperature, and whether entropies are wanted.
        by: tiles that replace those that ``tiles`` gives.
    """
    tokens, size, vocabulary = *hidden.shape, weight.shape[0]
    wants_entropy = spec.entropy != "none"
    logprobs, peaks, totals = (hidden.new_empty(tokens, dtype=torch.float32) for _ in range(3))
    entropies = logprobs.new_empty(tokens if wants_entropy else 0)
    statistics = RowStatistics(logprobs, peaks, totals, entropies)
    if not tokens:
        return statistics
    by = by or tiles(hidden, weight, torch.cuda.get_device_capability(hidden.device) if hidden.is_cuda else (8, 0))
    parts = blocks(vocabulary, _PART)
    partial = hidden.new_empty((3 if wants_entropy else 2, parts, tokens), dtype=torch.float32)
    common = {
        "largest_ptr": partial[0],
        "totals_ptr": partial[1],
        "moments_ptr": partial[2] if wants_entropy else None,
        "T": tokens,
        "V": vocabulary,
        "d": size,
        "stride_h": hidden.stride(0),
        "stride_w": weight.stride(0),
        **head_arguments(spec, bias),
        "temperature": float(spec.temperature),
        "ENTROPY": wants_entropy,
        "PARTS": parts,
        "enable_fp_fusion": False,
    }
    _scores[(blocks(tokens, by.rows) * parts,)](
        h=_descriptor(hidden, by.rows, by.depth) if by.descriptors else hidden,
        w=_descriptor(weight, by.columns, by.depth) if by.descriptors else weight,
        DESCRIPTORS=by.descriptors,
        WHOLE_K=size % by.depth == 0,
        PART=_PART,
        BM=by.rows,
        BN=by.columns,
        BK=by.depth,
        STAGES=by.stages,
        GROUP=_GROUP,
        num_warps=by.warps,
        **common,
    )
    _combine[(tokens,)](
        h_ptr=hidden,
        w_ptr=weight,
        targets_ptr=targets,
        logprobs_ptr=logprobs,
        out_peaks_ptr=peaks,
        out_totals_ptr=totals,
        entropies_ptr=entropies if wants_entropy else None,
        ignore_index=spec.ignore_index,
        BP=power_of_2(parts),
        BD=min(1024, power_of_2(size)),
        num_warps=4,
        **common,
    )
    return statistics


def _descriptor(x: Tensor, rows: int, depth: int) -> TensorDescriptor:
    return TensorDescriptor.from_tensor(x, [rows, depth])
