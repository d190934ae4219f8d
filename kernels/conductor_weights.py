"""The Conductor's forward: reward weights for each response from its context vector.

    z = network((h - mean) * rstd)      q = softmax(z / tau)      p = (1 - K m) q + m,   m = min_prob
    sample: a ~ p, w = (1 - alpha) / K + alpha onehot(a)         soft: w = p, a = argmax p

There are two launches. The first one computes parts of the layer that reads the context: each program takes only some
of the d elements, so that a small batch fills the GPU, too. The parts are [splits, B, K] for a linear network and
[splits, B, H] for the first layer of an MLP. The second launch adds the parts up in their order, and makes weights from
them. Neither the number of parts nor the tiles depend on B, so the result of a response does not depend on B either.

Times of the launches for B = 512, d = 4096, K = 8 in bfloat16, from a CUDA graph (``bench/results/gpu_tiles.md``):

    first, linear      3 us were predicted: 4 MB of contexts at 3 TB/s take 1.4 us, and 2,900 instructions per scheduler
                       take 1.7 us. 6.0 us were measured on an H100. The prediction left out that 1,024 programs of 4
                       responses read 24 MB of weights and moments, mostly from the L2 cache. Programs of 16 responses
                       read a fourth of that, but they move each tile through shared memory, with barriers, and took 7
                       to 12 us.
    first, MLP 256     11 us were predicted: 1.6 G multiply-adds of TF32 at 1,024 per cycle and processor take 7 us, and
                       latencies come on top. 27.7 us were measured on an H200. There both operands are split into two
                       halves in registers, and the weights pass through shared memory a second time. Six products of
                       bfloat16 with weights that were split beforehand took 17.0 us, but every update would have to
                       split them.
    second             3 us were predicted, for three waits for memory. On an H200 3.0 us were measured for a linear
                       network and 9.5 us for an MLP, both with a loop over the parts. Since then the loop is unrolled,
                       so that all parts load at once: 2.5 us and 4 us are expected, not measured.

A linear network, and the last layer of an MLP, are computed by plain multiply-adds in float32. The tiles of the tensor
cores are at least 16 wide, so most of their work would be for rewards that do not exist. The first layer of an MLP goes
through the tensor cores as three products of TF32. Their error is about 1e-6 of the sum of the terms' sizes, as with
float32. There is no backward kernel: ``kernels/conductor_update.py`` has the meta-gradient in closed form, and autograd
goes through the reference of ``ops/conductor_weights.py``.

Axis suffixes: R responses of a program, K rewards (KP with padding), H hidden units, D elements of d.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from maestro_fast.kernels.bound_launch import BoundLaunch, blocks, power_of_2
from maestro_fast.kernels.pool_hidden import first_slot, segment
from maestro_fast.specs import ConductorChoice, ConductorParams, ConductorSample, ContextSource, SourceKind

# Sizes of tiles. The tests make some of them smaller.
ROWS = 16  # responses of one program of the second launch
UNITS = 64  # hidden units that the second launch holds in registers at a time
_LINEAR_ROWS = 4  # responses of one program of ``_linear``, which is one warp
_LINEAR_INNER = 64  # elements of d that ``_linear`` takes per step
_LINEAR_UNROLLED = 4  # steps of ``_linear`` whose loads are under way together
_LINEAR_SPLIT = 512  # elements of d of one part of a linear network
_ACCUMULATORS = 2048  # partial sums of one program of ``_linear``, which take 64 registers of each thread
_HIDDEN_ROWS = 64  # responses of one program of ``_hidden``
_HIDDEN = 64  # hidden units of one program of ``_hidden``
_HIDDEN_INNER = 32  # elements of d that ``_hidden`` takes per step
_HIDDEN_SPLIT = 512  # elements of d of one part of an MLP's first layer


@triton.jit
def uniform(seed, step, index_R):
    """The random numbers of ``ops/philox.py`` for global response indices (int64), multiples of 2^-24 in [0, 1)."""
    # The counter is (low word of the index, high word of the index, step, 0), the key is the seed.
    low_R = index_R.to(tl.uint32)
    high_R = (index_R >> 32).to(tl.uint32)
    zero_R = low_R * 0
    word_R, _, _, _ = tl.philox(seed, low_R, high_R, zero_R + step.to(tl.uint32), zero_R)
    # The upper 24 bits fit into a float32 exactly.
    return (word_R >> 8).to(tl.float32) * 5.9604644775390625e-08


# --- records of jitted functions: arguments that travel together ---
#
# Records hold values that are known at run time. Compile-time constants, in capitals, are separate arguments, because
# Triton would turn those fields of a record into tensors where the record is assigned to a variable.


class Source(NamedTuple):
    """Where the contexts are, see ``specs.ContextSource``.

    Attributes:
        x_ptr, stride: the rows and the distance between them. For means the rows are the sums of chunks [slots, d] that
            ``kernels/pool_hidden.py`` made of the hidden states.
        bounds_ptr: where each response begins and ends; None for contexts.
        limit_ptr: how many hidden states of each response count; None for all.
    """

    x_ptr: tl.tensor
    stride: tl.tensor
    bounds_ptr: tl.tensor | None
    limit_ptr: tl.tensor | None


class Rows(NamedTuple):
    """R responses.

    Attributes:
        row_R: the first row of x of each response.
        there_R: whether the response has a context. One without tokens has none.
        length_R: the number of its tokens.
    """

    row_R: tl.tensor
    there_R: tl.tensor
    length_R: tl.tensor


class Tail(NamedTuple):
    """The inputs of the step from the parts of the first launch to logits.

    Attributes:
        parts_ptr: [splits, B, K] for a linear network, [splits, B, H] for an MLP.
        hidden_bias_ptr, weight_ptr: the hidden bias and the last layer's weight of an MLP; not read for a linear one.
        batch, units: B, and H or K.
    """

    parts_ptr: tl.tensor
    hidden_bias_ptr: tl.tensor | None
    weight_ptr: tl.tensor | None
    batch: tl.tensor
    units: tl.tensor


class Draw(NamedTuple):
    """A ``specs.ConductorChoice`` as the kernels take it. Its numbers are rounded once, on the host.

    Attributes:
        tau, floor, alpha: tau, min_prob and alpha of the choice.
        span: 1 - K floor.
        equal: (1 - alpha) / K.
        seed, step, offset: the key of the draws.
    """

    tau: float
    span: float
    floor: float
    equal: float
    alpha: float
    seed: int
    step: int
    offset: int

    @staticmethod
    def of(choice: ConductorChoice, rewards: int) -> Draw:
        """The numbers for K = ``rewards``."""
        return Draw(
            tau=float(choice.tau),
            span=1.0 - rewards * choice.min_prob,
            floor=float(choice.min_prob),
            equal=(1.0 - choice.alpha) / rewards,
            alpha=float(choice.alpha),
            seed=choice.seed,
            step=choice.step,
            offset=choice.offset,
        )


# --- tiles ---


@triton.jit
def context_rows(source, b_R, inside_R, SOURCE: tl.constexpr, HAS_LIMIT: tl.constexpr, CHUNK: tl.constexpr):
    """The ``Rows`` of the responses b (int64); ``inside`` says which of them exist. SOURCE is a ``SourceKind``."""
    if SOURCE == "context":
        return Rows(row_R=b_R, there_R=inside_R, length_R=b_R)
    else:
        start_R, length_R = segment(source.bounds_ptr, source.limit_ptr, b_R, inside_R, HAS_LIMIT)
        if SOURCE == "last":
            # The last token stands for the response. A response without tokens has a context of zeros.
            return Rows(row_R=start_R + length_R - 1, there_R=inside_R & (length_R > 0), length_R=length_R)
        else:
            return Rows(row_R=first_slot(start_R, b_R, CHUNK), there_R=inside_R, length_R=length_R)


@triton.jit
def context_tile(source, rows, column_D, d, SOURCE: tl.constexpr, CHUNK: tl.constexpr):
    """Some columns of the contexts, float32 [R, BD]. They are 0 for a response without a context."""
    mask_RD = rows.there_R[:, None] & (column_D < d)[None, :]
    if SOURCE == "mean":
        h_RD = tl.zeros(mask_RD.shape, tl.float32)
        # The loop walks over the chunks of the longest of these responses, in their order.
        for c in range(0, tl.cdiv(tl.max(rows.length_R, 0), CHUNK)):
            more_RD = mask_RD & (c * CHUNK < rows.length_R)[:, None]
            row_R = rows.row_R + c
            h_RD += tl.load(source.x_ptr + row_R[:, None] * source.stride + column_D[None, :], mask=more_RD, other=0.0)
        tokens_R = tl.maximum(rows.length_R, 1).to(tl.float32)
        return tl.div_rn(h_RD, tokens_R[:, None] + tl.zeros_like(h_RD))
    else:
        place_RD = rows.row_R[:, None] * source.stride + column_D[None, :]
        return tl.load(source.x_ptr + place_RD, mask=mask_RD, other=0.0).to(tl.float32)


@triton.jit
def standardised_tile(source, rows, mean_ptr, rstd_ptr, column_D, d, SOURCE: tl.constexpr, CHUNK: tl.constexpr):
    """x = (h - mean) * rstd, float32 [R, BD]. It is -mean * rstd for a response without a context, whose h is 0."""
    h_RD = context_tile(source, rows, column_D, d, SOURCE, CHUNK)
    mean_D = tl.load(mean_ptr + column_D, mask=column_D < d, other=0.0)
    rstd_D = tl.load(rstd_ptr + column_D, mask=column_D < d, other=0.0)
    return (h_RD - mean_D[None, :]) * rstd_D[None, :]


@triton.jit
def hidden_tile(tail, b_R, inside_R, unit_H, SPLITS: tl.constexpr):
    """The hidden layer before its GELU, u [R, HT]: the parts of the first launch, added in their order, and the bias.

    The loop over the parts is unrolled, so that the loads of all of them are under way at once.
    """
    mask_RH = inside_R[:, None] & (unit_H < tail.units)[None, :]
    u_RH = tl.zeros(mask_RH.shape, tl.float32)
    for s in tl.static_range(SPLITS):
        part_R = tail.parts_ptr + (s * tail.batch + b_R) * tail.units
        u_RH += tl.load(part_R[:, None] + unit_H[None, :], mask=mask_RH, other=0.0)
    u_RH += tl.load(tail.hidden_bias_ptr + unit_H, mask=unit_H < tail.units, other=0.0)[None, :]
    return u_RH


@triton.jit
def logits_tile(
    tail, b_R, inside_R, K: tl.constexpr, KP: tl.constexpr, MLP: tl.constexpr, HT: tl.constexpr, SPLITS: tl.constexpr
):
    """The logits z [R, KP] without the last layer's bias. An MLP takes HT hidden units at a time."""
    R: tl.constexpr = b_R.shape[0]
    k = tl.arange(0, KP)
    if MLP:
        # Products are kept apart by hidden unit until the end, so that one reduction over units is enough. The tile
        # [16, 8, 64] takes 64 registers of each thread of four warps.
        sum_RKH = tl.zeros([R, KP, HT], tl.float32)
        for unit in range(0, tail.units, HT):
            unit_H = unit + tl.arange(0, HT)
            u_RH = hidden_tile(tail, b_R, inside_R, unit_H, SPLITS)
            a_RH = u_RH * 0.5 * (1.0 + tl.erf(u_RH * 0.7071067811865476))  # GELU with erf
            mask_KH = (k < K)[:, None] & (unit_H < tail.units)[None, :]
            place_KH = k[:, None] * tail.units + unit_H[None, :]
            weight_KH = tl.load(tail.weight_ptr + place_KH, mask=mask_KH, other=0.0)
            sum_RKH += a_RH[:, None, :] * weight_KH[None, :, :]
        return tl.sum(sum_RKH, 2)
    else:
        # The parts of a linear network are parts of the logits. The loop is unrolled as in ``hidden_tile``.
        mask_RK = inside_R[:, None] & (k < K)[None, :]
        z_RK = tl.zeros([R, KP], tl.float32)
        for s in tl.static_range(SPLITS):
            part_R = (s * tail.batch + b_R) * K
            z_RK += tl.load(tail.parts_ptr + part_R[:, None] + k[None, :], mask=mask_RK, other=0.0)
        return z_RK


@triton.jit
def over_rewards(x_RK, K: tl.constexpr):
    """The sum [R] of x [R, KP] over the K rewards in their order, so that the tile's layout cannot change its bits."""
    k = tl.arange(0, x_RK.shape[1])
    total_R = tl.sum(tl.where((k == 0)[None, :], x_RK, 0.0), 1)
    for i in tl.static_range(1, K):
        total_R += tl.sum(tl.where((k == i)[None, :], x_RK, 0.0), 1)
    return total_R


@triton.jit
def decide(z_RK, b_R, inside_R, bias_ptr, out, draw, K: tl.constexpr, SOFT: tl.constexpr):
    """Stores weights, actions, log-probs, entropy and probabilities that follow from the logits z [R, KP].

    ``out`` is a ``ConductorSample`` of pointers.
    """
    k = tl.arange(0, z_RK.shape[1])
    z_RK = z_RK + tl.load(bias_ptr + k, mask=k < K, other=0.0)[None, :]
    # p = span * softmax(z / tau) + floor; columns beyond K have a logit of -inf and a probability of 0.
    z_RK = tl.where((k < K)[None, :], tl.div_rn(z_RK, tl.zeros_like(z_RK) + draw.tau), float("-inf"))
    e_RK = tl.exp(z_RK - tl.max(z_RK, 1)[:, None])
    p_RK = draw.span * tl.div_rn(e_RK, over_rewards(e_RK, K)[:, None] + tl.zeros_like(e_RK)) + draw.floor
    p_RK = tl.where((k < K)[None, :], p_RK, 0.0)
    if SOFT:
        a_R = tl.argmax(tl.where((k < K)[None, :], p_RK, -1.0), 1)
    else:
        # The action is the first one whose cumulative probability exceeds u. The probabilities are added one after the
        # other, as on every backend, so that all backends draw the same action.
        u_R = uniform(draw.seed, draw.step, b_R + draw.offset)
        total_R = tl.zeros_like(u_R)
        a_R = tl.zeros(u_R.shape, tl.int32)
        for i in tl.static_range(K - 1):
            total_R += tl.sum(tl.where(k[None, :] == i, p_RK, 0.0), 1)
            a_R += (u_R >= total_R).to(tl.int32)
    chosen_RK = k[None, :] == a_R[:, None]
    # Without a floor a probability may be 0. Its logarithm is -inf if it was chosen, and counts as 0 in the entropy.
    log_RK = tl.log(tl.where(p_RK != 0, p_RK, 1.0))
    log_R = tl.sum(tl.where(chosen_RK, tl.where(p_RK != 0, log_RK, float("-inf")), 0.0), 1)
    w_RK = p_RK if SOFT else draw.equal + tl.where(chosen_RK, draw.alpha, 0.0)
    mask_RK = inside_R[:, None] & (k < K)[None, :]
    place_RK = b_R[:, None] * K + k[None, :]
    tl.store(out.weights + place_RK, w_RK, mask=mask_RK)
    tl.store(out.probs + place_RK, p_RK, mask=mask_RK)
    tl.store(out.actions + b_R, a_R.to(tl.int64), mask=inside_R)
    tl.store(out.log_probs + b_R, log_R, mask=inside_R)
    tl.store(out.entropy + b_R, -over_rewards(p_RK * log_RK, K), mask=inside_R)


# --- the first launch ---


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
    """One part of the logits of R responses, from STEPS * UNROLLED * BD elements of d. The parts are [splits, B, K]."""
    source = Source(x_ptr=x_ptr, stride=stride_xb, bounds_ptr=bounds_ptr, limit_ptr=limit_ptr)
    # Neighbouring programs take different parts of d of the same responses.
    b_R = (tl.program_id(0) // SPLITS).to(tl.int64) * R + tl.arange(0, R)
    inside_R = b_R < B
    s = tl.program_id(0) % SPLITS
    rows = context_rows(source, b_R, inside_R, SOURCE, HAS_LIMIT, CHUNK)
    k = tl.arange(0, KP)
    # Products are kept apart by column until the end, so that one reduction for each response and reward is enough,
    # instead of one per step. The tile [4, 8, 64] takes 64 registers of each thread of the only warp.
    sum_RKD = tl.zeros([R, KP, BD], tl.float32)
    # The loops walk over this part of d. The inner one is unrolled, so that loads of later steps are under way while
    # earlier ones are multiplied.
    for i in range(0, STEPS):
        for j in tl.static_range(UNROLLED):
            column_D = ((s * STEPS + i) * UNROLLED + j) * BD + tl.arange(0, BD)
            x_RD = standardised_tile(source, rows, mean_ptr, rstd_ptr, column_D, d, SOURCE, CHUNK)
            mask_KD = (k < K)[:, None] & (column_D < d)[None, :]
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
    """One part of HT hidden units of R responses, from SPLIT elements of d. The parts are [splits, B, H]."""
    source = Source(x_ptr=x_ptr, stride=stride_xb, bounds_ptr=bounds_ptr, limit_ptr=limit_ptr)
    b_R = (tl.program_id(0) * R + tl.arange(0, R)).to(tl.int64)
    inside_R = b_R < B
    unit_H = tl.program_id(1) * HT + tl.arange(0, HT)
    s = tl.program_id(2)
    rows = context_rows(source, b_R, inside_R, SOURCE, HAS_LIMIT, CHUNK)
    end = tl.minimum((s + 1) * SPLIT, d)
    # The accumulators [64, 64] take 32 registers of each thread of four warps.
    part_RH = tl.zeros([R, HT], tl.float32)
    # The loop walks over this part of d. tf32x3 splits both operands into two halves in registers; the halves of the
    # weights then go back to shared memory, where the tensor cores read them.
    for i in range(s * SPLIT, end, BD):
        column_D = i + tl.arange(0, BD)
        x_RD = standardised_tile(source, rows, mean_ptr, rstd_ptr, column_D, end, SOURCE, CHUNK)
        mask_HD = (unit_H < H)[:, None] & (column_D < end)[None, :]
        weight_HD = tl.load(weight_ptr + unit_H[:, None] * d + column_D[None, :], mask=mask_HD, other=0.0)
        part_RH = tl.dot(x_RD, tl.trans(weight_HD), part_RH, input_precision="tf32x3")
    mask_RH = inside_R[:, None] & (unit_H < H)[None, :]
    tl.store(parts_ptr + (s * B + b_R)[:, None] * H + unit_H[None, :], part_RH, mask=mask_RH)


def network_parts(contexts: ContextSource, params: ConductorParams, batch: int, chunk: int = 1) -> Tensor:
    """The first launch: parts of a linear network [splits, B, K], or of an MLP's first layer [splits, B, H]; no bias.

    Args:
        contexts: contexts or hidden states. With the kind "mean", ``x`` has to be ``pool_hidden.chunk_sums`` of them.
        params: contiguous float32.
        batch: B, at least 1.
        chunk: the tokens of a chunk with the kind "mean".
    """
    mlp = params.hidden_weight is not None
    weight = params.weight if params.hidden_weight is None else params.hidden_weight
    units, size = weight.shape
    splits = blocks(size, _HIDDEN_SPLIT if mlp else _LINEAR_SPLIT)
    parts = torch.empty(splits, batch, units, device=contexts.x.device, dtype=torch.float32)
    has_limit = contexts.limit_B is not None
    arguments = {
        "x_ptr": contexts.x,
        "bounds_ptr": contexts.bounds,
        "limit_ptr": contexts.limit_B,
        "mean_ptr": params.mean,
        "rstd_ptr": params.rstd,
        "weight_ptr": weight,
        "parts_ptr": parts,
        "B": batch,
        "d": size,
        "stride_xb": contexts.x.stride(0),
    }
    if mlp:
        tile = _HiddenTile(_HIDDEN_SPLIT, _HIDDEN_ROWS, _HIDDEN, _HIDDEN_INNER)
        grid = (blocks(batch, tile.rows), blocks(units, tile.units), splits)
        _hidden_launch(contexts.kind, has_limit, chunk, tile)(grid, H=units, **arguments)
    else:
        linear_tile = _LinearTile.of(units, min(size, _LINEAR_SPLIT), splits)
        launch = _linear_launch(contexts.kind, has_limit, chunk, units, linear_tile)
        launch((splits * blocks(batch, linear_tile.rows),), **arguments)
    return parts


class _LinearTile(NamedTuple):
    """How the work of ``_linear`` is divided. The fields are its constants R, BD, STEPS, UNROLLED and SPLITS."""

    rows: int
    inner: int
    steps: int
    unrolled: int
    splits: int

    @staticmethod
    def of(rewards: int, split: int, splits: int) -> _LinearTile:
        """The tile for ``split`` elements of d, with powers of 2 as sizes.

        With more than eight rewards there is room for fewer responses, and with still more for fewer columns.
        """
        columns = power_of_2(rewards)
        rows = max(1, min(_LINEAR_ROWS, _ACCUMULATORS // (columns * _LINEAR_INNER)))
        inner = max(16, min(_LINEAR_INNER, _ACCUMULATORS // (columns * rows)))
        steps = max(1, blocks(split, inner))
        unrolled = min(_LINEAR_UNROLLED, steps)
        return _LinearTile(rows, inner, blocks(steps, unrolled), unrolled, splits)


class _HiddenTile(NamedTuple):
    """How the work of ``_hidden`` is divided. The fields are its constants SPLIT, R, HT and BD."""

    split: int
    rows: int
    units: int
    inner: int


@lru_cache(maxsize=256)
def _linear_launch(kind: SourceKind, has_limit: bool, chunk: int, rewards: int, tile: _LinearTile) -> BoundLaunch:
    constants = {
        "K": rewards,
        "KP": power_of_2(rewards),
        "SOURCE": kind,
        "HAS_LIMIT": has_limit,
        "CHUNK": chunk,
        "R": tile.rows,
        "BD": tile.inner,
        "STEPS": tile.steps,
        "UNROLLED": tile.unrolled,
        "SPLITS": tile.splits,
    }
    # Without maxnreg the compiler sometimes gives a program of one warp only 168 registers, and spills.
    return BoundLaunch(_linear, constants, num_warps=1, maxnreg=248, enable_fp_fusion=True)


@lru_cache(maxsize=256)
def _hidden_launch(kind: SourceKind, has_limit: bool, chunk: int, tile: _HiddenTile) -> BoundLaunch:
    constants = {
        "SOURCE": kind,
        "HAS_LIMIT": has_limit,
        "CHUNK": chunk,
        "SPLIT": tile.split,
        "R": tile.rows,
        "HT": tile.units,
        "BD": tile.inner,
    }
    return BoundLaunch(_hidden, constants, num_warps=4, num_stages=3)


# --- the second launch ---


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
    """Weights and actions of R responses, from the parts of the first launch."""
    tail = Tail(parts_ptr=parts_ptr, hidden_bias_ptr=hidden_bias_ptr, weight_ptr=weight_ptr, batch=B, units=H)
    out = ConductorSample(weights_ptr, actions_ptr, log_probs_ptr, entropy_ptr, probs_ptr)
    draw = Draw(tau, span, floor, equal, alpha, seed, step, offset)
    b_R = (tl.program_id(0) * R + tl.arange(0, R)).to(tl.int64)
    inside_R = b_R < B
    z_RK = logits_tile(tail, b_R, inside_R, K, KP, MLP, HT, SPLITS)
    decide(z_RK, b_R, inside_R, bias_ptr, out, draw, K, SOFT)


def conductor_weights(h: Tensor, params: ConductorParams, choice: ConductorChoice) -> ConductorSample:
    """Launches the kernels on arguments that ``ops.conductor_weights`` has checked.

    Args:
        h: [B, d], float32, float16 or bfloat16; columns are contiguous.
        params: contiguous float32.
        choice: how weights are chosen; ``offset`` + B is below 2^63.
    """
    if h.shape[0] == 0:
        return ConductorSample.empty(0, params.weight)
    return weights_of(network_parts(ContextSource(h), params, h.shape[0]), params, choice)


def weights_of(parts: Tensor, params: ConductorParams, choice: ConductorChoice) -> ConductorSample:
    """The second launch, which takes the ``network_parts`` of at least one response."""
    splits, batch, units = parts.shape
    rewards = params.num_rewards
    out = ConductorSample.empty(batch, params.weight)
    _weights_launch(rewards, choice.soft, params.hidden_weight is not None, ROWS, UNITS, splits)(
        (blocks(batch, ROWS),),
        parts_ptr=parts,
        hidden_bias_ptr=params.hidden_bias,
        weight_ptr=params.weight,
        bias_ptr=params.bias,
        **sample_pointers(out),
        B=batch,
        H=units,
        **Draw.of(choice, rewards)._asdict(),
    )
    return out


@lru_cache(maxsize=256)
def _weights_launch(rewards: int, soft: bool, mlp: bool, rows: int, units: int, splits: int) -> BoundLaunch:
    constants = {
        "K": rewards,
        "KP": power_of_2(rewards),
        "SOFT": soft,
        "MLP": mlp,
        "R": rows,
        "HT": units,
        "SPLITS": splits,
    }
    return BoundLaunch(_weights, constants, num_warps=tail_warps(mlp))


def sample_pointers(out: ConductorSample) -> dict[str, Tensor]:
    """The outputs, by the names that the kernels' arguments have."""
    return {f"{name}_ptr": tensor for name, tensor in out._asdict().items()}


def tail_warps(mlp: bool) -> int:
    """The warps of a program that adds parts up. One warp needs no barriers, but is too small for a hidden layer."""
    return 4 if mlp else 1
