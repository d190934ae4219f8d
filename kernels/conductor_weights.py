"""The Conductor's forward: reward weights per response from its context vector.

    z = head((h - mean) * rstd)      q = softmax(z / tau)      p = (1 - K m) q + m,   m = min_prob
    sample: a ~ p, w = (1 - alpha) / K + alpha onehot(a)         soft: w = p, a = argmax p

Two launches. The first forms parts of the layer that is as long as a context: programs take some elements of d
by themselves, so that a small batch fills the GPU too. parts is [splits, B, K] for a linear head and [splits, B, H] for
the first layer of an MLP. The second launch adds the parts in their order and does the rest. Neither the number of
parts nor the tiles depend on B, so neither does the result of a response.

What the launches take for B = 512, d = 4096, K = 8 in bfloat16, from a CUDA graph (``bench/results/gpu_tiles.md``):

    first, linear      predicted 3 us: 4 MB of contexts at 3 TB/s, 1.4 us, and 2,900 instructions a scheduler, 1.7 us.
                       Measured 6.0 us on an H100. What was not counted: 1,024 programs of 4 responses read 24 MB of
                       weights and moments, mostly from L2. Programs of 16 responses read a fourth, but move each tile
                       through shared memory behind barriers, and took 7 to 12 us.
    first, MLP 256     predicted 11 us: 1.6 G multiply-adds of TF32 at 1,024 a cycle and processor, 7 us, and latencies.
                       Measured 27.7 us on an H200: both operands are split into two halves in registers, and the
                       weights pass through shared memory a second time. Six products of bfloat16 with weights split
                       beforehand took 17.0 us, which would want them split at every update.
    second             predicted 3 us, three waits for memory. Measured on an H200 3.0 us for a linear head and 9.5 us
                       for an MLP, both with a loop over the parts. It is unrolled since, so that all parts load at
                       once: 2.5 us and 4 us are expected, not measured.

A linear head, and the last layer of an MLP, are plain multiply-adds in float32: the tensor cores' tiles are at least 16
wide, so most of their work would be for rewards that do not exist. The first layer of an MLP goes through the tensor
cores as three products of TF32 (relative error about 1e-6 of the sum of the terms' sizes, as for float32). There is no
backward kernel: ``kernels/conductor_update.py`` has the meta-gradient in closed form, and autograd goes through the
reference of ``ops/conductor_weights.py``.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from maestro_fast.kernels.bound_launch import BoundLaunch, blocks
from maestro_fast.kernels.pool_hidden import first_slot, segment

ROWS = 16  # responses of one program of the second launch
_LINEAR_ROWS, _LINEAR_INNER = 4, 64  # responses, and elements of d per step, of one program of a linear head: a warp
_LINEAR_UNROLLED = 4  # steps whose loads are under way together
_LINEAR_SPLIT = 512  # elements of d of one part of a linear head
_ACCUMULATORS = 2048  # of one program: 64 registers of a thread
_HIDDEN_ROWS, _HIDDEN, _HIDDEN_INNER = 64, 64, 32  # tile of the first layer of an MLP
UNITS = 64  # of an MLP's hidden layer, per step of the second launch
_HIDDEN_SPLIT = 512  # elements of d of one part of it


@triton.jit
def uniform(seed, step, index_R):
    """ops/philox.py: [0, 1) in multiples of 2^-24 for the global response indices, int64."""
    low_R = index_R.to(tl.uint32)
    high_R = (index_R >> 32).to(tl.uint32)
    zero_R = low_R * 0
    word_R, _, _, _ = tl.philox(seed, low_R, high_R, zero_R + step.to(tl.uint32), zero_R)
    return (word_R >> 8).to(tl.float32) * 5.9604644775390625e-08


@triton.jit
def context_rows(
    bounds_ptr, limit_ptr, b_R, inside_R, SOURCE: tl.constexpr, HAS_LIMIT: tl.constexpr, CHUNK: tl.constexpr
):
    """Where the contexts of responses b are: row of x, whether there is one, and tokens. SOURCE says what x is:

    "context": the contexts [B, d]; "last": hidden states [T, d], of which the last token counts; "mean": the sums
    of chunks [slots, d] of ``kernels/pool_hidden.py``, whose bounds and limit these are.
    """
    if SOURCE == "context":
        return b_R, inside_R, b_R
    else:
        start_R, length_R = segment(bounds_ptr, limit_ptr, b_R, inside_R, HAS_LIMIT)
        if SOURCE == "last":
            return start_R + length_R - 1, inside_R & (length_R > 0), length_R
        else:
            return first_slot(start_R, b_R, CHUNK), inside_R, length_R


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
def logits_tile(
    parts_ptr,
    hidden_bias_ptr,
    weight_ptr,
    b_R,
    inside_R,
    B,
    H,
    K: tl.constexpr,
    KP: tl.constexpr,
    MLP: tl.constexpr,
    HT: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """z [R, KP] without its bias, from the parts of the first launch, added in their order.

    The loops over the parts are unrolled, so that the loads of all of them are under way at once.
    """
    R: tl.constexpr = b_R.shape[0]
    k = tl.arange(0, KP)
    if MLP:
        sum_RKH = tl.zeros([R, KP, HT], tl.float32)
        for unit in range(0, H, HT):
            unit_H = unit + tl.arange(0, HT)
            mask_RH = inside_R[:, None] & (unit_H < H)[None, :]
            u_RH = tl.zeros([R, HT], tl.float32)
            for s in tl.static_range(SPLITS):
                part_R = parts_ptr + (s * B + b_R) * H
                u_RH += tl.load(part_R[:, None] + unit_H[None, :], mask=mask_RH, other=0.0)
            u_RH += tl.load(hidden_bias_ptr + unit_H, mask=unit_H < H, other=0.0)[None, :]
            a_RH = u_RH * 0.5 * (1.0 + tl.erf(u_RH * 0.7071067811865476))
            mask_KH = (k < K)[:, None] & (unit_H < H)[None, :]
            weight_KH = tl.load(weight_ptr + k[:, None] * H + unit_H[None, :], mask=mask_KH, other=0.0)
            sum_RKH += a_RH[:, None, :] * weight_KH[None, :, :]
        return tl.sum(sum_RKH, 2)
    else:
        mask_RK = inside_R[:, None] & (k < K)[None, :]
        z_RK = tl.zeros([R, KP], tl.float32)
        for s in tl.static_range(SPLITS):
            z_RK += tl.load(parts_ptr + (s * B + b_R)[:, None] * K + k[None, :], mask=mask_RK, other=0.0)
        return z_RK


@triton.jit
def over_rewards(x_RK, K: tl.constexpr):
    """Sum [R] of x [R, KP] over the K rewards in their order, so that the layout of the tile cannot change its bits."""
    k = tl.arange(0, x_RK.shape[1])
    total_R = tl.sum(tl.where((k == 0)[None, :], x_RK, 0.0), 1)
    for i in tl.static_range(1, K):
        total_R += tl.sum(tl.where((k == i)[None, :], x_RK, 0.0), 1)
    return total_R


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
    p_RK = span * tl.div_rn(e_RK, over_rewards(e_RK, K)[:, None] + tl.zeros_like(e_RK)) + floor
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
    tl.store(entropy_ptr + b_R, -over_rewards(p_RK * log_RK, K), mask=inside_R)


@triton.jit(do_not_specialize=["B"])
def _linear(
    x_ptr,
    bounds_ptr,
    limit_ptr,
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    parts_ptr,
    B,
    d,
    stride_xb,
    K: tl.constexpr,
    KP: tl.constexpr,
    SOURCE: tl.constexpr,
    HAS_LIMIT: tl.constexpr,
    CHUNK: tl.constexpr,
    R: tl.constexpr,
    BD: tl.constexpr,
    STEPS: tl.constexpr,
    UNROLLED: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """parts [splits, B, K]: a linear head over STEPS * UNROLLED * BD elements of d.

    The inner loop is unrolled, so that loads of later steps are under way while earlier ones are multiplied. Sums stay
    apart by column until the end: then one reduction for each response and reward is enough, where every step would
    need one. Neighbouring programs take the parts of d of the same responses.
    """
    b_R = (tl.program_id(0) // SPLITS).to(tl.int64) * R + tl.arange(0, R)
    inside_R = b_R < B
    s = tl.program_id(0) % SPLITS
    row_R, there_R, length_R = context_rows(bounds_ptr, limit_ptr, b_R, inside_R, SOURCE, HAS_LIMIT, CHUNK)
    k = tl.arange(0, KP)
    sum_RKD = tl.zeros([R, KP, BD], tl.float32)
    for i in range(0, STEPS):
        for j in tl.static_range(UNROLLED):
            column_D = ((s * STEPS + i) * UNROLLED + j) * BD + tl.arange(0, BD)
            there_D = column_D < d
            h_RD = context_tile(x_ptr, row_R, there_R, length_R, column_D, d, stride_xb, SOURCE, CHUNK)
            mean_D = tl.load(mean_ptr + column_D, mask=there_D, other=0.0)
            rstd_D = tl.load(rstd_ptr + column_D, mask=there_D, other=0.0)
            x_RD = (h_RD - mean_D[None, :]) * rstd_D[None, :]
            mask_KD = (k < K)[:, None] & there_D[None, :]
            weight_KD = tl.load(weight_ptr + k[:, None] * d + column_D[None, :], mask=mask_KD, other=0.0)
            sum_RKD += x_RD[:, None, :] * weight_KD[None, :, :]
    mask_RK = inside_R[:, None] & (k < K)[None, :]
    tl.store(parts_ptr + (s * B + b_R)[:, None] * K + k[None, :], tl.sum(sum_RKD, 2), mask=mask_RK)


@triton.jit(do_not_specialize=["B"])
def _hidden(
    x_ptr,
    bounds_ptr,
    limit_ptr,
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    parts_ptr,
    B,
    H,
    d,
    stride_xb,
    SOURCE: tl.constexpr,
    HAS_LIMIT: tl.constexpr,
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
    row_R, there_R, length_R = context_rows(bounds_ptr, limit_ptr, b_R, inside_R, SOURCE, HAS_LIMIT, CHUNK)
    end = tl.minimum((s + 1) * SPLIT, d)
    part_RH = tl.zeros([R, HT], tl.float32)
    for i in range(s * SPLIT, end, BD):
        column_D = i + tl.arange(0, BD)
        there_D = column_D < end
        h_RD = context_tile(x_ptr, row_R, there_R, length_R, column_D, end, stride_xb, SOURCE, CHUNK)
        mean_D = tl.load(mean_ptr + column_D, mask=there_D, other=0.0)
        rstd_D = tl.load(rstd_ptr + column_D, mask=there_D, other=0.0)
        x_RD = (h_RD - mean_D[None, :]) * rstd_D[None, :]
        mask_HD = (unit_H < H)[:, None] & there_D[None, :]
        weight_HD = tl.load(weight_ptr + unit_H[:, None] * d + column_D[None, :], mask=mask_HD, other=0.0)
        part_RH = tl.dot(x_RD, tl.trans(weight_HD), part_RH, input_precision="tf32x3")
    mask_RH = inside_R[:, None] & (unit_H < H)[None, :]
    tl.store(parts_ptr + (s * B + b_R)[:, None] * H + unit_H[None, :], part_RH, mask=mask_RH)


@triton.jit(do_not_specialize=["B", "seed", "step", "offset"])
def _weights(
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
    MLP: tl.constexpr,
    R: tl.constexpr,
    HT: tl.constexpr,
    SPLITS: tl.constexpr,
):
    b_R = (tl.program_id(0) * R + tl.arange(0, R)).to(tl.int64)
    inside_R = b_R < B
    z_RK = logits_tile(parts_ptr, hidden_bias_ptr, weight_ptr, b_R, inside_R, B, H, K, KP, MLP, HT, SPLITS)
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
        return Sample(
            weights=torch.empty(batch, rewards, device=device, dtype=torch.float32),
            actions=torch.empty(batch, device=device, dtype=torch.int64),
            log_probs=torch.empty(batch, device=device, dtype=torch.float32),
            entropy=torch.empty(batch, device=device, dtype=torch.float32),
            probs=torch.empty(batch, rewards, device=device, dtype=torch.float32),
        )

    def pointers(self) -> dict[str, Tensor]:
        """By the names of the kernels' arguments."""
        return {
            "weights_ptr": self.weights,
            "actions_ptr": self.actions,
            "log_probs_ptr": self.log_probs,
            "entropy_ptr": self.entropy,
            "probs_ptr": self.probs,
        }


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
    """Columns of a tile of logits."""
    return 1 << (rewards - 1).bit_length()


def head_parts(
    x: Tensor,
    params: Any,
    batch: int,
    *,
    source: str = "context",
    bounds: Tensor | None = None,
    limit_B: Tensor | None = None,
    chunk: int = 1,
) -> Tensor:
    """Parts [splits, B, K] of a linear head, or [splits, B, H] of an MLP's first layer, without their bias.

    Args:
        x, bounds, limit_B: see ``context_rows`` for the sources; contexts have neither bounds nor limit.
        params: an ``ops.ConductorParams`` of contiguous float32.
        batch: B, at least 1.
    """
    mlp = params.hidden_weight is not None
    weight = params.hidden_weight if mlp else params.weight
    units, size = weight.shape
    splits = blocks(size, _HIDDEN_SPLIT if mlp else _LINEAR_SPLIT)
    parts = torch.empty(splits, batch, units, device=x.device, dtype=torch.float32)
    arguments = {
        "x_ptr": x,
        "bounds_ptr": bounds,
        "limit_ptr": limit_B,
        "mean_ptr": params.mean,
        "rstd_ptr": params.rstd,
        "weight_ptr": weight,
        "parts_ptr": parts,
        "B": batch,
        "d": size,
        "stride_xb": x.stride(0),
    }
    if mlp:
        grid = (blocks(batch, _HIDDEN_ROWS), blocks(units, _HIDDEN), splits)
        _hidden_launch(source, limit_B is not None, chunk, _HIDDEN_SPLIT, _HIDDEN_ROWS, _HIDDEN, _HIDDEN_INNER)(
            grid, H=units, **arguments
        )
    else:
        tiles = _LINEAR_ROWS, _LINEAR_INNER, _LINEAR_UNROLLED, _ACCUMULATORS
        launch = _linear_launch(source, limit_B is not None, chunk, units, splits, min(size, _LINEAR_SPLIT), *tiles)
        launch((splits * blocks(batch, launch.constants["R"]),), **arguments)
    return parts


@lru_cache(maxsize=256)
def _linear_launch(
    source: str,
    has_limit: bool,
    chunk: int,
    rewards: int,
    splits: int,
    split: int,
    rows: int,
    inner: int,
    unrolled: int,
    accumulators: int,
) -> BoundLaunch:
    """More rewards than eight leave room for fewer responses, then for fewer columns. All are powers of 2."""
    columns = padded(rewards)
    rows = max(1, min(rows, accumulators // (columns * inner)))
    inner = max(16, min(inner, accumulators // (columns * rows)))
    steps = max(1, blocks(split, inner))
    unrolled = min(unrolled, steps)
    constants = {
        "K": rewards,
        "KP": columns,
        "SOURCE": source,
        "HAS_LIMIT": has_limit,
        "CHUNK": chunk,
        "R": rows,
        "BD": inner,
        "STEPS": blocks(steps, unrolled),
        "UNROLLED": unrolled,
        "SPLITS": splits,
    }
    # Left to itself the compiler gives a program of one warp 168 registers at times, and spills.
    return BoundLaunch(_linear, constants, num_warps=1, maxnreg=248, enable_fp_fusion=True)


@lru_cache(maxsize=256)
def _hidden_launch(
    source: str, has_limit: bool, chunk: int, split: int, rows: int, units: int, inner: int
) -> BoundLaunch:
    where = {"SOURCE": source, "HAS_LIMIT": has_limit, "CHUNK": chunk}
    constants = {**where, "SPLIT": split, "R": rows, "HT": units, "BD": inner}
    return BoundLaunch(_hidden, constants, num_warps=4, num_stages=3)


@lru_cache(maxsize=256)
def _weights_launch(rewards: int, soft: bool, mlp: bool, rows: int, units: int, splits: int) -> BoundLaunch:
    constants = {"K": rewards, "KP": padded(rewards), "SOFT": soft, "MLP": mlp, "R": rows, "HT": units}
    return BoundLaunch(_weights, constants | {"SPLITS": splits}, num_warps=tail_warps(mlp))


def tail_warps(mlp: bool) -> int:
    """One warp needs no barriers; the units of a hidden layer are too many for it."""
    return 4 if mlp else 1


def conductor_weights(h: Tensor, params: Any, draw: Draw, *, soft: bool) -> Sample:
    """Launches what ``ops.conductor_weights`` has checked.

    Args:
        h: [B, d], float32, float16 or bfloat16, columns contiguous.
        params: an ``ops.ConductorParams`` of contiguous float32.
        draw: numbers of the softmax and the key of the draws; ``offset`` + B below 2^63.
        soft: weights are the probabilities; else an action is drawn.
    """
    if h.shape[0] == 0:
        return Sample.empty(0, params.weight.shape[0], h.device)
    return weights_of(head_parts(h, params, h.shape[0]), params, draw, soft=soft)


def weights_of(parts: Tensor, params: Any, draw: Draw, *, soft: bool) -> Sample:
    """The second launch, from the ``head_parts`` of at least one response."""
    splits, batch, units = parts.shape
    rewards = params.weight.shape[0]
    out = Sample.empty(batch, rewards, parts.device)
    _weights_launch(rewards, soft, params.hidden_weight is not None, ROWS, UNITS, splits)(
        (blocks(batch, ROWS),),
        parts_ptr=parts,
        hidden_bias_ptr=params.hidden_bias,
        weight_ptr=params.weight,
        bias_ptr=params.bias,
        **out.pointers(),
        B=batch,
        H=units,
        **draw._asdict(),
    )
    return out
