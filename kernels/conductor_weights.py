"""The Conductor's forward: reward weights per response from its context vector.

    z = head((h - mean) * rstd)      q = softmax(z / tau)      p = (1 - K m) q + m,   m = min_prob
    sample: a ~ p, w = (1 - alpha) / K + alpha onehot(a)         soft: w = p, a = argmax p

One launch for a linear head: a program takes 16 responses over all of d. Two for an MLP, where a program that did so
would stream all of the first layer: parts of d by themselves, [splits, B, H], then their sums in order and the rest.
The number of splits depends on d alone, and tiles do not depend on B, so neither does the result of a response.

Products of float32 go through the tensor cores as three of TF32 (relative error about 1e-6 of the sum of the terms'
sizes, as for float32). There is no backward kernel: ``kernels/conductor_update.py`` has the meta-gradient in closed
form, and autograd goes through the reference of ``ops/conductor_weights.py``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from maestro_fast.kernels.allocation import empty_floats

_ROWS = 16  # responses of one program, the least that tl.dot takes
_INNER = 128  # elements of d per step of a linear head
_HIDDEN_ROWS, _HIDDEN, _HIDDEN_INNER = 32, 32, 64  # tile of the first layer of an MLP
_SPLIT = 1024  # elements of d of one part of the first layer


@triton.jit
def uniform(seed, step, index_R):
    """ops/philox.py: [0, 1) in multiples of 2^-24 for the global response indices, int64."""
    low_R = index_R.to(tl.uint32)
    high_R = (index_R >> 32).to(tl.uint32)
    zero_R = low_R * 0
    word_R, _, _, _ = tl.philox(seed, low_R, high_R, zero_R + step.to(tl.uint32), zero_R)
    return (word_R >> 8).to(tl.float32) * 5.9604644775390625e-08


@triton.jit
def context_rows(start_ptr, length_ptr, b_R, inside_R, SOURCE: tl.constexpr, CHUNK: tl.constexpr):
    """Where the contexts of responses b are: row of x, whether there is one, and tokens. SOURCE says what x is:

    "context": the contexts [B, d]; "last": hidden states [T, d], of which the last token counts; "mean": the sums
    of chunks [slots, d] of ``kernels/pool_hidden.py``.
    """
    if SOURCE == "context":
        return b_R, inside_R, b_R
    else:
        start_R = tl.load(start_ptr + b_R, mask=inside_R, other=0).to(tl.int64)
        length_R = tl.load(length_ptr + b_R, mask=inside_R, other=0).to(tl.int64)
        if SOURCE == "last":
            return start_R + length_R - 1, inside_R & (length_R > 0), length_R
        else:
            return start_R // CHUNK + b_R, inside_R, length_R


@triton.jit
def context_tile(x_ptr, row_R, there_R, length_R, column_D, d, stride_xb, SOURCE: tl.constexpr, CHUNK: tl.constexpr):
    """Contexts [R, BD], float32, 0 where there is none."""
    mask_RD = there_R[:, None] & (column_D < d)[None, :]
    if SOURCE == "mean":
        h_RD = tl.zeros(mask_RD.shape, tl.float32)
        for c in range(0, tl.cdiv(tl.max(length_R, 0), CHUNK)):
            more_RD = mask_RD & (c * CHUNK < length_R)[:, None]
            h_RD += tl.load(x_ptr + (row_R + c)[:, None] * stride_xb + column_D[None, :], mask=more_RD, other=0.0)
        return tl.div_rn(h_RD, tl.maximum(length_R, 1).to(tl.float32)[:, None] + tl.zeros_like(h_RD))
    else:
        return tl.load(x_ptr + row_R[:, None] * stride_xb + column_D[None, :], mask=mask_RD, other=0.0).to(tl.float32)


@triton.jit
def project(
    x_ptr,
    row_R,
    there_R,
    length_R,
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    unit_H,
    units,
    begin,
    end,
    d,
    stride_xb,
    SOURCE: tl.constexpr,
    CHUNK: tl.constexpr,
    R: tl.constexpr,
    HT: tl.constexpr,
    BD: tl.constexpr,
):
    """(h - mean) * rstd times weight [units, d] transposed, [R, HT], over the elements begin .. end of d."""
    out_RH = tl.zeros([R, HT], tl.float32)
    for i in range(begin, end, BD):
        column_D = i + tl.arange(0, BD)
        there_D = column_D < end
        h_RD = context_tile(x_ptr, row_R, there_R, length_R, column_D, end, stride_xb, SOURCE, CHUNK)
        mean_D = tl.load(mean_ptr + column_D, mask=there_D, other=0.0)
        rstd_D = tl.load(rstd_ptr + column_D, mask=there_D, other=0.0)
        x_RD = (h_RD - mean_D[None, :]) * rstd_D[None, :]
        mask_HD = (unit_H < units)[:, None] & there_D[None, :]
        weight_HD = tl.load(weight_ptr + unit_H[:, None] * d + column_D[None, :], mask=mask_HD, other=0.0)
        out_RH = tl.dot(x_RD, tl.trans(weight_HD), out_RH, input_precision="tf32x3")
    return out_RH


@triton.jit
def hidden_tile(
    parts_ptr, bias_ptr, weight_ptr, b_R, inside_R, B, H, splits, K: tl.constexpr, KP: tl.constexpr, HT: tl.constexpr
):
    """z [R, KP] without its bias, from the parts [splits, B, H] of the first layer, added in their order."""
    k = tl.arange(0, KP)
    z_RK = tl.zeros([b_R.shape[0], KP], tl.float32)
    for unit in range(0, H, HT):
        unit_H = unit + tl.arange(0, HT)
        mask_RH = inside_R[:, None] & (unit_H < H)[None, :]
        u_RH = tl.zeros(mask_RH.shape, tl.float32)
        for s in range(0, splits):
            part_R = parts_ptr + (s * B + b_R) * H
            u_RH += tl.load(part_R[:, None] + unit_H[None, :], mask=mask_RH, other=0.0)
        u_RH += tl.load(bias_ptr + unit_H, mask=unit_H < H, other=0.0)[None, :]
        a_RH = u_RH * 0.5 * (1.0 + tl.erf(u_RH * 0.7071067811865476))
        mask_HK = (unit_H < H)[:, None] & (k < K)[None, :]
        weight_HK = tl.load(weight_ptr + k[None, :] * H + unit_H[:, None], mask=mask_HK, other=0.0)
        z_RK = tl.dot(a_RH, weight_HK, z_RK, input_precision="tf32x3")
    return z_RK


@triton.jit
def decide(
    z_RK,
    b_R,
    inside_R,
    bias_ptr,
    weights_ptr,
    actions_ptr,
    log_probs_ptr,
    entropy_ptr,
    probs_ptr,
    tau,
    span,
    floor,
    equal,
    alpha,
    seed,
    step,
    offset,
    K: tl.constexpr,
    KP: tl.constexpr,
    SOFT: tl.constexpr,
):
    """Stores what follows from the logits. span = 1 - K floor, equal = (1 - alpha) / K, rounded on the host."""
    k = tl.arange(0, KP)
    z_RK = z_RK + tl.load(bias_ptr + k, mask=k < K, other=0.0)[None, :]
    z_RK = tl.where((k < K)[None, :], tl.div_rn(z_RK, tl.zeros_like(z_RK) + tau), float("-inf"))
    e_RK = tl.exp(z_RK - tl.max(z_RK, 1)[:, None])
    p_RK = span * tl.div_rn(e_RK, tl.sum(e_RK, 1)[:, None] + tl.zeros_like(e_RK)) + floor
    p_RK = tl.where((k < K)[None, :], p_RK, 0.0)
    if SOFT:
        a_R = tl.argmax(tl.where((k < K)[None, :], p_RK, -1.0), 1)
    else:
        u_R = uniform(seed, step, b_R + offset)
        total_R = tl.zeros_like(u_R)
        a_R = tl.zeros(u_R.shape, tl.int32)
        for i in tl.static_range(K - 1):  # the order of every backend
            total_R += tl.sum(tl.where(k[None, :] == i, p_RK, 0.0), 1)
            a_R += (u_R >= total_R).to(tl.int32)
    chosen_RK = k[None, :] == a_R[:, None]
    log_RK = tl.log(tl.where(p_RK > 0, p_RK, 1.0))
    log_R = tl.sum(tl.where(chosen_RK, tl.where(p_RK > 0, log_RK, float("-inf")), 0.0), 1)
    w_RK = p_RK if SOFT else equal + tl.where(chosen_RK, alpha, 0.0)
    mask_RK = inside_R[:, None] & (k < K)[None, :]
    tl.store(weights_ptr + b_R[:, None] * K + k[None, :], w_RK, mask=mask_RK)
    tl.store(probs_ptr + b_R[:, None] * K + k[None, :], p_RK, mask=mask_RK)
    tl.store(actions_ptr + b_R, a_R.to(tl.int64), mask=inside_R)
    tl.store(log_probs_ptr + b_R, log_R, mask=inside_R)
    tl.store(entropy_ptr + b_R, -tl.sum(p_RK * log_RK, 1), mask=inside_R)


@triton.jit(do_not_specialize=["B", "seed", "step", "offset"])
def _linear(
    h_ptr,
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    bias_ptr,
    weights_ptr,
    actions_ptr,
    log_probs_ptr,
    entropy_ptr,
    probs_ptr,
    B,
    d,
    stride_hb,
    tau,
    span,
    floor,
    equal,
    alpha,
    seed,
    step,
    offset,
    K: tl.constexpr,
    KP: tl.constexpr,
    SOFT: tl.constexpr,
    R: tl.constexpr,
    BD: tl.constexpr,
):
    b_R = (tl.program_id(0) * R + tl.arange(0, R)).to(tl.int64)
    inside_R = b_R < B
    k = tl.arange(0, KP)
    z_RK = project(
        h_ptr,
        b_R,
        inside_R,
        b_R,
        mean_ptr,
        rstd_ptr,
        weight_ptr,
        k,
        K,
        0,
        d,
        d,
        stride_hb,
        "context",
        1,
        R,
        KP,
        BD,
    )
    decide(
        z_RK,
        b_R,
        inside_R,
        bias_ptr,
        weights_ptr,
        actions_ptr,
        log_probs_ptr,
        entropy_ptr,
        probs_ptr,
        tau,
        span,
        floor,
        equal,
        alpha,
        seed,
        step,
        offset,
        K,
        KP,
        SOFT,
    )


@triton.jit(do_not_specialize=["B"])
def _hidden(
    x_ptr,
    start_ptr,
    length_ptr,
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    parts_ptr,
    B,
    H,
    d,
    stride_xb,
    SOURCE: tl.constexpr,
    CHUNK: tl.constexpr,
    SPLIT: tl.constexpr,
    R: tl.constexpr,
    HT: tl.constexpr,
    BD: tl.constexpr,
):
    """parts [splits, B, H]: the first layer over SPLIT elements of d."""
    b_R = (tl.program_id(0) * R + tl.arange(0, R)).to(tl.int64)
    inside_R = b_R < B
    unit_H = tl.program_id(1) * HT + tl.arange(0, HT)
    s = tl.program_id(2)
    row_R, there_R, length_R = context_rows(start_ptr, length_ptr, b_R, inside_R, SOURCE, CHUNK)
    end = tl.minimum((s + 1) * SPLIT, d)
    part_RH = project(
        x_ptr,
        row_R,
        there_R,
        length_R,
        mean_ptr,
        rstd_ptr,
        weight_ptr,
        unit_H,
        H,
        s * SPLIT,
        end,
        d,
        stride_xb,
        SOURCE,
        CHUNK,
        R,
        HT,
        BD,
    )
    mask_RH = inside_R[:, None] & (unit_H < H)[None, :]
    tl.store(parts_ptr + (s * B + b_R)[:, None] * H + unit_H[None, :], part_RH, mask=mask_RH)


@triton.jit(do_not_specialize=["B", "seed", "step", "offset"])
def _output(
    parts_ptr,
    hidden_bias_ptr,
    weight_ptr,
    bias_ptr,
    weights_ptr,
    actions_ptr,
    log_probs_ptr,
    entropy_ptr,
    probs_ptr,
    B,
    H,
    splits,
    tau,
    span,
    floor,
    equal,
    alpha,
    seed,
    step,
    offset,
    K: tl.constexpr,
    KP: tl.constexpr,
    SOFT: tl.constexpr,
    R: tl.constexpr,
    HT: tl.constexpr,
):
    b_R = (tl.program_id(0) * R + tl.arange(0, R)).to(tl.int64)
    inside_R = b_R < B
    z_RK = hidden_tile(parts_ptr, hidden_bias_ptr, weight_ptr, b_R, inside_R, B, H, splits, K, KP, HT)
    decide(
        z_RK,
        b_R,
        inside_R,
        bias_ptr,
        weights_ptr,
        actions_ptr,
        log_probs_ptr,
        entropy_ptr,
        probs_ptr,
        tau,
        span,
        floor,
        equal,
        alpha,
        seed,
        step,
        offset,
        K,
        KP,
        SOFT,
    )


class Sample(NamedTuple):
    """Tensors of an ``ops.ConductorSample``, in its order."""

    weights: Tensor
    actions: Tensor
    log_probs: Tensor
    entropy: Tensor
    probs: Tensor

    @staticmethod
    def empty(batch: int, rewards: int, device: torch.device) -> Sample:
        table, one = (batch, rewards), (batch,)
        weights, log_probs, entropy, probs = empty_floats(device, table, one, one, table)
        return Sample(weights, torch.empty(batch, device=device, dtype=torch.int64), log_probs, entropy, probs)


class Draw(NamedTuple):
    """How logits become weights, in the order of the kernels' arguments; see ``ops.conductor_weights``."""

    tau: float
    span: float
    floor: float
    equal: float
    alpha: float
    seed: int
    step: int
    offset: int

    @staticmethod
    def of(
        rewards: int, *, tau: float, min_prob: float, alpha: float, seed: int = 0, step: int = 0, offset: int = 0
    ) -> Draw:
        return Draw(
            float(tau),
            1.0 - rewards * min_prob,
            float(min_prob),
            (1.0 - alpha) / rewards,
            float(alpha),
            seed,
            step,
            offset,
        )


def padded(rewards: int) -> int:
    """Columns of a tile of logits: the least power of 2 that tl.dot takes."""
    return max(16, 1 << (rewards - 1).bit_length())


def hidden_parts(
    x: Tensor,
    params: Any,
    batch: int,
    *,
    source: str = "context",
    start_B: Tensor | None = None,
    length_B: Tensor | None = None,
    chunk: int = 1,
) -> Tensor:
    """Parts [splits, B, H] of an MLP's first layer, without its bias; see ``context_rows`` for the sources."""
    units, size = params.hidden_weight.shape
    splits = triton.cdiv(size, _SPLIT)
    parts = torch.empty(splits, batch, units, device=x.device, dtype=torch.float32)
    _hidden[(triton.cdiv(batch, _HIDDEN_ROWS), triton.cdiv(units, _HIDDEN), splits)](
        x,
        start_B,
        length_B,
        params.mean,
        params.rstd,
        params.hidden_weight,
        parts,
        batch,
        units,
        size,
        x.stride(0),
        SOURCE=source,
        CHUNK=chunk,
        SPLIT=_SPLIT,
        R=_HIDDEN_ROWS,
        HT=_HIDDEN,
        BD=_HIDDEN_INNER,
        num_warps=4,
        num_stages=3,
        enable_fp_fusion=False,
    )
    return parts


def conductor_weights(h: Tensor, params: Any, draw: Draw, *, soft: bool) -> Sample:
    """Launches what ``ops.conductor_weights`` has checked.

    Args:
        h: [B, d], float32, float16 or bfloat16, columns contiguous.
        params: an ``ops.ConductorParams`` of contiguous float32.
        draw: numbers of the softmax and the key of the draws; ``offset`` + B below 2^63.
        soft: weights are the probabilities; else an action is drawn.
    """
    batch, rewards = h.shape[0], params.weight.shape[0]
    out = Sample.empty(batch, rewards, h.device)
    if batch == 0:
        return out
    columns = padded(rewards)
    grid = (triton.cdiv(batch, _ROWS),)
    if params.hidden_weight is None:
        _linear[grid](
            h,
            params.mean,
            params.rstd,
            params.weight,
            params.bias,
            *out,
            batch,
            h.shape[1],
            h.stride(0),
            *draw,
            K=rewards,
            KP=columns,
            SOFT=soft,
            R=_ROWS,
            BD=_INNER,
            num_warps=4,
            num_stages=3,
            enable_fp_fusion=False,
        )
        return out
    parts = hidden_parts(h, params, batch)
    _output[grid](
        parts,
        params.hidden_bias,
        params.weight,
        params.bias,
        *out,
        batch,
        parts.shape[2],
        parts.shape[0],
        *draw,
        K=rewards,
        KP=columns,
        SOFT=soft,
        R=_ROWS,
        HT=_HIDDEN,
        num_warps=4,
        num_stages=3,
        enable_fp_fusion=False,
    )
    return out
