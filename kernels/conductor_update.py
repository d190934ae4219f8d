"""One step of the Conductor: the meta-gradient in closed form, and AdamW.

    p = (1 - K m) q + m,   q = softmax(z / tau)

    one drawn action per response, whose importance ratio r is min(p(a) / drawn, max_ratio) (1 without ``drawn_probs``):
        J       = mean_i [ r_i mu_i log p_i(a_i) + entropy_coef H(p_i) ]
        dJ/dp_k = 1[k = a] r mu / p_k - entropy_coef (log p_k + 1)
    all actions, mu [N, K]:
        J       = mean_i [ sum_a p_i(a) mu_i(a) + entropy_coef H(p_i) ]
        dJ/dp_k = mu_k - entropy_coef (log p_k + 1)

    dJ/dz   = (1 - K m) / tau * q * (dJ/dp - sum_k q_k dJ/dp_k)

    linear  dW = dz^T x,   db = sum dz                                          x = (h - mean) * rstd
    MLP     da = dz W2,  du = da GELU'(u),  dW2 = dz^T GELU(u),  dW1 = du^T x,  db1 = sum du

A linear network takes one launch. Each program owns some columns of W, and computes dz of all rows itself, which costs
less than another launch that would compute it once. An MLP takes two launches. The programs of the first own hidden
units (W2, both biases, du), those of the second own tiles of W1. ``activations`` computes z and u beforehand, by the
first launch of ``conductor_weights`` and one of its own.

Rows are added in their order, so two runs give the same bits. Parameters and moments change in place. The step of AdamW
(arXiv 1711.05101) is that of ``torch.optim.AdamW``, with weight decay on the weights alone.

Axis suffixes: R of the N responses, K rewards (KP with padding), H hidden units, D elements of d.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from maestro_fast.kernels import conductor_weights
from maestro_fast.kernels.bound_launch import BoundLaunch, blocks, power_of_2
from maestro_fast.kernels.conductor_weights import (
    Rows,
    Source,
    Tail,
    hidden_tile,
    logits_tile,
    network_parts,
    standardised_tile,
)
from maestro_fast.specs import ConductorBatch, ConductorParams, ConductorState, ConductorUpdateConfig, ContextSource

_ROWS = 32  # responses per step of ``_linear`` and ``_first_layer``
_UNIT_ROWS = 16  # responses per step of ``_units``, which would spill a few registers with more
_COLUMNS = 32  # elements of d, or hidden units, of one program: for d = 4096 there are 128 programs
_PRODUCT_COLUMNS = 16  # tl.dot takes no narrower tile, so a tile of rewards is padded to this


# --- records of jitted functions; see ``conductor_weights`` ---


class Responses(NamedTuple):
    """The N responses of a ``specs.ConductorBatch``, without their contexts.

    Attributes:
        logits_ptr: [N, K], the logits that ``activations`` computes.
        actions_ptr: int [N]; None if there are meta-rewards of all actions.
        meta_ptr: the meta-rewards, [N], or [N, K] of all actions.
        drawn_ptr, live_ptr: ``drawn_probs`` and ``live`` [N], or None.
        number: N.
    """

    logits_ptr: tl.tensor
    actions_ptr: tl.tensor | None
    meta_ptr: tl.tensor
    drawn_ptr: tl.tensor | None
    live_ptr: tl.tensor | None
    number: tl.tensor


class LogitGradients(NamedTuple):
    """The gradients of R responses, which are not yet divided by the number of live rows.

    Attributes:
        d_logits_RK: -dJ/dz [R, KP].
        gain_R: each row's term of J.
        live_R: 1 for live rows, else 0.
    """

    d_logits_RK: tl.tensor
    gain_R: tl.tensor
    live_R: tl.tensor


class Learned(NamedTuple):
    """A parameter and AdamW's moments of it."""

    parameter_ptr: tl.tensor
    first_ptr: tl.tensor
    second_ptr: tl.tensor


class Objective(NamedTuple):
    """The numbers in the formula of J, rounded once, on the host. The floor is min_prob, and span is 1 - K floor."""

    tau: float
    span: float
    floor: float
    entropy_coef: float
    max_ratio: float

    @staticmethod
    def of(config: ConductorUpdateConfig, rewards: int) -> Objective:
        return Objective(
            tau=float(config.tau),
            span=1.0 - rewards * config.min_prob,
            floor=float(config.min_prob),
            entropy_coef=float(config.entropy_coef),
            max_ratio=float(config.max_ratio),
        )


class AdamW(NamedTuple):
    """The numbers of a step of AdamW, rounded once, on the host.

    Attributes:
        keep: 1 - learning rate * decay.
        lerp1, beta2, lerp2: 1 - beta1, beta2 and 1 - beta2.
        step_size: learning rate / (1 - beta1^t), where t counts the steps from 1.
        root: sqrt(1 - beta2^t).
        eps: is added to the root of the second moment.
    """

    keep: float
    lerp1: float
    beta2: float
    lerp2: float
    step_size: float
    root: float
    eps: float

    @staticmethod
    def of(config: ConductorUpdateConfig, step: int) -> AdamW:
        return AdamW(
            keep=1.0 - config.learning_rate * config.weight_decay,
            lerp1=1.0 - config.beta1,
            beta2=float(config.beta2),
            lerp2=1.0 - config.beta2,
            step_size=config.learning_rate / (1.0 - config.beta1**step),
            root=float((1.0 - config.beta2**step) ** 0.5),
            eps=float(config.eps),
        )


# --- tiles ---


@triton.jit
def _live_rows(responses, n_R):
    """[R], 1 for live rows, and 0 for other rows and beyond N."""
    inside_R = n_R < responses.number
    live_R = tl.where(inside_R, 1.0, 0.0)
    if responses.live_ptr is not None:
        live_R = tl.where(tl.load(responses.live_ptr + n_R, mask=inside_R, other=0) != 0, live_R, 0.0)
    return live_R


@triton.jit
def _d_logits(responses, objective, n_R, K: tl.constexpr, KP: tl.constexpr):
    """The ``LogitGradients`` of the responses with the indices n."""
    k = tl.arange(0, KP)
    inside_R = n_R < responses.number
    live_R = _live_rows(responses, n_R)
    # p and q follow from the logits. Columns beyond K have a logit of -inf; rows that are not live have logits of 0.
    mask_RK = (live_R > 0)[:, None] & (k < K)[None, :]
    place_RK = n_R[:, None] * K + k[None, :]
    z_RK = tl.load(responses.logits_ptr + place_RK, mask=mask_RK, other=0.0)
    z_RK = tl.where((k < K)[None, :], tl.div_rn(z_RK, tl.zeros_like(z_RK) + objective.tau), float("-inf"))
    e_RK = tl.exp(z_RK - tl.max(z_RK, 1)[:, None])
    q_RK = tl.div_rn(e_RK, tl.sum(e_RK, 1)[:, None] + tl.zeros_like(e_RK))
    p_RK = tl.where((k < K)[None, :], objective.span * q_RK + objective.floor, 0.0)
    # Without a floor p may be 0, where log p has no finite derivative. There p counts as 1, its slope as 0. NaN stays.
    possible_RK = p_RK != 0
    p_RK = tl.where(possible_RK, p_RK, 1.0)
    log_RK = tl.log(p_RK)
    # The first term of J, and of dJ/dp, is that of the meta-rewards.
    if responses.actions_ptr is None:
        slope_RK = tl.load(responses.meta_ptr + place_RK, mask=mask_RK, other=0.0).to(tl.float32)
        gain_R = tl.sum(tl.where(possible_RK, p_RK, 0.0) * slope_RK, 1)
    else:
        chosen_RK = k[None, :] == tl.load(responses.actions_ptr + n_R, mask=inside_R, other=0)[:, None]
        meta_R = tl.load(responses.meta_ptr + n_R, mask=inside_R, other=0.0).to(tl.float32)
        if responses.drawn_ptr is not None:
            now_R = tl.sum(tl.where(chosen_RK & possible_RK, p_RK, 0.0), 1)
            drawn_R = tl.load(responses.drawn_ptr + n_R, mask=inside_R, other=1.0).to(tl.float32)
            meta_R = meta_R * tl.minimum(tl.div_rn(now_R, drawn_R), objective.max_ratio)
        slope_RK = tl.where(chosen_RK, tl.div_rn(meta_R[:, None] + tl.zeros_like(p_RK), p_RK), 0.0)
        gain_R = meta_R * tl.sum(tl.where(chosen_RK, log_RK, 0.0), 1)
    # The second term is that of the entropy. Then follows the step from dJ/dp to dJ/dz.
    slope_RK = tl.where(possible_RK, slope_RK - objective.entropy_coef * (log_RK + 1.0), 0.0)
    centred_RK = slope_RK - tl.sum(slope_RK * q_RK, 1)[:, None]
    out_RK = -(objective.span / objective.tau) * q_RK * centred_RK
    gain_R -= objective.entropy_coef * tl.sum(tl.where(possible_RK, p_RK * log_RK, 0.0), 1)
    return LogitGradients(
        d_logits_RK=tl.where(live_R[:, None] > 0, out_RK, 0.0),
        gain_R=tl.where(live_R > 0, gain_R, 0.0),
        live_R=live_R,
    )


@triton.jit
def _adamw(learned, place, mask, gradient, keep, adamw):
    """Moves the elements at ``place`` by one step. ``keep`` is 1 for parameters without decay, else ``adamw.keep``."""
    parameter = tl.load(learned.parameter_ptr + place, mask=mask, other=0.0) * keep
    first = tl.load(learned.first_ptr + place, mask=mask, other=0.0)
    second = tl.load(learned.second_ptr + place, mask=mask, other=0.0)
    first += adamw.lerp1 * (gradient - first)
    second = second * adamw.beta2 + adamw.lerp2 * gradient * gradient
    divisor = tl.div_rn(tl.sqrt_rn(second), tl.zeros_like(second) + adamw.root) + adamw.eps
    tl.store(learned.parameter_ptr + place, parameter - adamw.step_size * tl.div_rn(first, divisor), mask=mask)
    tl.store(learned.first_ptr + place, first, mask=mask)
    tl.store(learned.second_ptr + place, second, mask=mask)


# --- a linear network ---


@triton.jit(do_not_specialize=["N"])
def _linear(
    h_ptr,
    mean_ptr,
    rstd_ptr,
    logits_ptr,
    actions_ptr,
    meta_ptr,
    drawn_ptr,
    live_ptr,
    weight_ptr,
    weight_first_ptr,
    weight_second_ptr,
    bias_ptr,
    bias_first_ptr,
    bias_second_ptr,
    objective_ptr,
    squares_ptr,
    N,
    d,
    stride_hb,
    tau,
    span,
    floor,
    entropy_coef,
    max_ratio,
    keep,
    lerp1,
    beta2,
    lerp2,
    step_size,
    root,
    eps,
    K: tl.constexpr,
    KP: tl.constexpr,
    R: tl.constexpr,
    BD: tl.constexpr,
):
    """The step of BD columns of W. The first program moves the bias too, and stores J."""
    source = Source(x_ptr=h_ptr, stride=stride_hb, bounds_ptr=None, limit_ptr=None)
    responses = Responses(logits_ptr, actions_ptr, meta_ptr, drawn_ptr, live_ptr, N)
    objective = Objective(tau, span, floor, entropy_coef, max_ratio)
    adamw = AdamW(keep, lerp1, beta2, lerp2, step_size, root, eps)
    weight = Learned(weight_ptr, weight_first_ptr, weight_second_ptr)
    bias = Learned(bias_ptr, bias_first_ptr, bias_second_ptr)
    column_D = tl.program_id(0) * BD + tl.arange(0, BD)
    k = tl.arange(0, KP)
    # Registers hold the gradients of this program, and for each row of a step the sums of J and of live rows.
    d_weight_KD = tl.zeros([KP, BD], tl.float32)
    d_bias_K = tl.zeros([KP], tl.float32)
    gain_R = tl.zeros([R], tl.float32)
    count_R = tl.zeros([R], tl.float32)
    # The loop walks over all N responses, R at a time.
    for n0 in range(0, N, R):
        n_R = (n0 + tl.arange(0, R)).to(tl.int64)
        gradients = _d_logits(responses, objective, n_R, K, KP)
        rows = Rows(row_R=n_R, there_R=gradients.live_R > 0, length_R=n_R)
        x_RD = standardised_tile(source, rows, mean_ptr, rstd_ptr, column_D, d, "context", 1)
        d_weight_KD = tl.dot(tl.trans(gradients.d_logits_RK), x_RD, d_weight_KD, input_precision="tf32x3")
        d_bias_K += tl.sum(gradients.d_logits_RK, 0)
        gain_R += gradients.gain_R
        count_R += gradients.live_R
    # Sums become means over the live rows.
    count = tl.sum(count_R, 0)
    share = tl.div_rn(1.0, tl.maximum(count, 1.0))
    d_weight_KD = d_weight_KD * share
    d_bias_K = d_bias_K * share
    # Without a live row nothing may change, not even by the decay of moments. So the masks are empty then.
    limit = tl.where(count > 0, K, 0)
    place_KD = k[:, None] * d + column_D[None, :]
    mask_KD = (k < limit)[:, None] & (column_D < d)[None, :]
    _adamw(weight, place_KD, mask_KD, d_weight_KD, keep, adamw)
    squares = tl.sum(tl.sum(tl.where(mask_KD, d_weight_KD * d_weight_KD, 0.0), 1), 0)
    if tl.program_id(0) == 0:
        _adamw(bias, k, k < limit, d_bias_K, 1.0, adamw)
        squares += tl.sum(d_bias_K * d_bias_K, 0)
        tl.store(objective_ptr, tl.sum(gain_R, 0) * share)
    tl.store(squares_ptr + tl.program_id(0), squares)


# --- an MLP ---


@triton.jit(do_not_specialize=["N"])
def _units(
    u_ptr,
    logits_ptr,
    actions_ptr,
    meta_ptr,
    drawn_ptr,
    live_ptr,
    d_u_ptr,
    weight_ptr,
    weight_first_ptr,
    weight_second_ptr,
    bias_ptr,
    bias_first_ptr,
    bias_second_ptr,
    hidden_bias_ptr,
    hidden_bias_first_ptr,
    hidden_bias_second_ptr,
    objective_ptr,
    squares_ptr,
    count_ptr,
    N,
    H,
    tau,
    span,
    floor,
    entropy_coef,
    max_ratio,
    keep,
    lerp1,
    beta2,
    lerp2,
    step_size,
    root,
    eps,
    K: tl.constexpr,
    KP: tl.constexpr,
    R: tl.constexpr,
    HT: tl.constexpr,
):
    """The step of HT hidden units of an MLP: of their columns of W2 and of their biases.

    It also stores du [N, H] of live rows, not yet divided by their number. The first program moves the last layer's
    bias too, and stores J and the number of live rows.
    """
    responses = Responses(logits_ptr, actions_ptr, meta_ptr, drawn_ptr, live_ptr, N)
    objective = Objective(tau, span, floor, entropy_coef, max_ratio)
    adamw = AdamW(keep, lerp1, beta2, lerp2, step_size, root, eps)
    weight = Learned(weight_ptr, weight_first_ptr, weight_second_ptr)
    bias = Learned(bias_ptr, bias_first_ptr, bias_second_ptr)
    hidden_bias = Learned(hidden_bias_ptr, hidden_bias_first_ptr, hidden_bias_second_ptr)
    unit_H = tl.program_id(0) * HT + tl.arange(0, HT)
    k = tl.arange(0, KP)
    # Registers hold these columns of W2 as they are before the step, and the gradients of this program.
    place_KH = k[:, None] * H + unit_H[None, :]
    weight_KH = tl.load(weight_ptr + place_KH, mask=(k < K)[:, None] & (unit_H < H)[None, :], other=0.0)
    d_weight_KH = tl.zeros([KP, HT], tl.float32)
    d_hidden_bias_H = tl.zeros([HT], tl.float32)
    d_bias_K = tl.zeros([KP], tl.float32)
    gain_R = tl.zeros([R], tl.float32)
    count_R = tl.zeros([R], tl.float32)
    # The loop walks over all N responses, R at a time.
    for n0 in range(0, N, R):
        n_R = (n0 + tl.arange(0, R)).to(tl.int64)
        gradients = _d_logits(responses, objective, n_R, K, KP)
        mask_RH = (gradients.live_R > 0)[:, None] & (unit_H < H)[None, :]
        place_RH = n_R[:, None] * H + unit_H[None, :]
        # GELU(u) = u * below, and its derivative is below + u * density. Both are of the normal distribution.
        u_RH = tl.load(u_ptr + place_RH, mask=mask_RH, other=0.0)
        below_RH = 0.5 * (1.0 + tl.erf(u_RH * 0.7071067811865476))
        density_RH = 0.3989422804014327 * tl.exp(-0.5 * u_RH * u_RH)
        d_a_RH = tl.dot(gradients.d_logits_RK, weight_KH, input_precision="tf32x3")
        d_u_RH = d_a_RH * (below_RH + u_RH * density_RH)
        d_weight_KH = tl.dot(tl.trans(gradients.d_logits_RK), u_RH * below_RH, d_weight_KH, input_precision="tf32x3")
        tl.store(d_u_ptr + place_RH, d_u_RH, mask=mask_RH)
        d_hidden_bias_H += tl.sum(d_u_RH, 0)
        d_bias_K += tl.sum(gradients.d_logits_RK, 0)
        gain_R += gradients.gain_R
        count_R += gradients.live_R
    # Sums become means over the live rows. Without one the masks are empty, as in ``_linear``.
    count = tl.sum(count_R, 0)
    share = tl.div_rn(1.0, tl.maximum(count, 1.0))
    d_weight_KH = d_weight_KH * share
    d_hidden_bias_H = d_hidden_bias_H * share
    d_bias_K = d_bias_K * share
    limit = tl.where(count > 0, K, 0)
    mask_KH = (k < limit)[:, None] & (unit_H < H)[None, :]
    mask_H = unit_H < tl.where(count > 0, H, 0)
    _adamw(weight, place_KH, mask_KH, d_weight_KH, keep, adamw)
    _adamw(hidden_bias, unit_H, mask_H, d_hidden_bias_H, 1.0, adamw)
    squares = tl.sum(tl.sum(tl.where(mask_KH, d_weight_KH * d_weight_KH, 0.0), 1), 0)
    squares += tl.sum(tl.where(mask_H, d_hidden_bias_H * d_hidden_bias_H, 0.0), 0)
    if tl.program_id(0) == 0:
        _adamw(bias, k, k < limit, d_bias_K, 1.0, adamw)
        squares += tl.sum(d_bias_K * d_bias_K, 0)
        tl.store(objective_ptr, tl.sum(gain_R, 0) * share)
        tl.store(count_ptr, count)
    tl.store(squares_ptr + tl.program_id(0), squares)


@triton.jit(do_not_specialize=["N"])
def _first_layer(
    h_ptr,
    mean_ptr,
    rstd_ptr,
    d_u_ptr,
    live_ptr,
    count_ptr,
    weight_ptr,
    first_ptr,
    second_ptr,
    squares_ptr,
    N,
    H,
    d,
    stride_hb,
    keep,
    lerp1,
    beta2,
    lerp2,
    step_size,
    root,
    eps,
    R: tl.constexpr,
    HT: tl.constexpr,
    BD: tl.constexpr,
):
    """The step of a tile [HT, BD] of W1."""
    source = Source(x_ptr=h_ptr, stride=stride_hb, bounds_ptr=None, limit_ptr=None)
    responses = Responses(None, None, None, None, live_ptr, N)
    adamw = AdamW(keep, lerp1, beta2, lerp2, step_size, root, eps)
    weight = Learned(weight_ptr, first_ptr, second_ptr)
    unit_H = tl.program_id(0) * HT + tl.arange(0, HT)
    column_D = tl.program_id(1) * BD + tl.arange(0, BD)
    # Registers hold the gradient [32, 32], 8 values a thread. The loop walks over all N responses, R at a time.
    d_weight_HD = tl.zeros([HT, BD], tl.float32)
    for n0 in range(0, N, R):
        n_R = (n0 + tl.arange(0, R)).to(tl.int64)
        live_R = _live_rows(responses, n_R)
        mask_HR = (unit_H < H)[:, None] & (live_R > 0)[None, :]
        d_u_HR = tl.load(d_u_ptr + n_R[None, :] * H + unit_H[:, None], mask=mask_HR, other=0.0)
        rows = Rows(row_R=n_R, there_R=live_R > 0, length_R=n_R)
        x_RD = standardised_tile(source, rows, mean_ptr, rstd_ptr, column_D, d, "context", 1)
        d_weight_HD = tl.dot(d_u_HR, x_RD, d_weight_HD, input_precision="tf32x3")
    # ``_units`` has counted the live rows. Without one the mask is empty.
    count = tl.load(count_ptr)
    d_weight_HD = d_weight_HD * tl.div_rn(1.0, tl.maximum(count, 1.0))
    mask_HD = (unit_H < tl.where(count > 0, H, 0))[:, None] & (column_D < d)[None, :]
    place_HD = unit_H[:, None].to(tl.int64) * d + column_D[None, :]
    _adamw(weight, place_HD, mask_HD, d_weight_HD, keep, adamw)
    squares = tl.sum(tl.sum(tl.where(mask_HD, d_weight_HD * d_weight_HD, 0.0), 1), 0)
    tl.store(squares_ptr + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1), squares)


# --- logits before the update ---


@triton.jit(do_not_specialize=["N"])
def _logits(
    parts_ptr,
    hidden_bias_ptr,
    weight_ptr,
    bias_ptr,
    u_ptr,
    logits_ptr,
    N,
    H,
    K: tl.constexpr,
    KP: tl.constexpr,
    MLP: tl.constexpr,
    R: tl.constexpr,
    HT: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """z [N, K], and for an MLP u [N, H], from the parts that the first launch of ``conductor_weights`` made."""
    tail = Tail(parts_ptr=parts_ptr, hidden_bias_ptr=hidden_bias_ptr, weight_ptr=weight_ptr, batch=N, units=H)
    n_R = (tl.program_id(0) * R + tl.arange(0, R)).to(tl.int64)
    inside_R = n_R < N
    k = tl.arange(0, KP)
    if MLP:
        # u is stored here. ``logits_tile`` computes it once more, from parts that are in the cache by then.
        for unit in range(0, H, HT):
            unit_H = unit + tl.arange(0, HT)
            mask_RH = inside_R[:, None] & (unit_H < H)[None, :]
            u_RH = hidden_tile(tail, n_R, inside_R, unit_H, SPLITS)
            tl.store(u_ptr + n_R[:, None] * H + unit_H[None, :], u_RH, mask=mask_RH)
    z_RK = logits_tile(tail, n_R, inside_R, K, KP, MLP, HT, SPLITS)
    z_RK += tl.load(bias_ptr + k, mask=k < K, other=0.0)[None, :]
    tl.store(logits_ptr + n_R[:, None] * K + k[None, :], z_RK, mask=inside_R[:, None] & (k < K)[None, :])


class Activations(NamedTuple):
    """What an update reads of the network's forward, float32: logits [N, K], and u [N, H] before an MLP's GELU."""

    logits: Tensor
    u: Tensor | None


def activations(h: Tensor, params: ConductorParams) -> Activations:
    """Computes the activations of contexts [N, d]. N is at least 1."""
    number, rewards = h.shape[0], params.num_rewards
    mlp = params.hidden_weight is not None
    parts = network_parts(ContextSource(h), params, number)
    splits, _, units = parts.shape
    logits = torch.empty(number, rewards, device=h.device, dtype=torch.float32)
    u = torch.empty(number, units, device=h.device, dtype=torch.float32) if mlp else None
    _logits_launch(rewards, mlp, conductor_weights.ROWS, conductor_weights.UNITS, splits)(
        (blocks(number, conductor_weights.ROWS),),
        parts_ptr=parts,
        hidden_bias_ptr=params.hidden_bias,
        weight_ptr=params.weight,
        bias_ptr=params.bias,
        u_ptr=u,
        logits_ptr=logits,
        N=number,
        H=units,
    )
    return Activations(logits, u)


@lru_cache(maxsize=64)
def _logits_launch(rewards: int, mlp: bool, rows: int, units: int, splits: int) -> BoundLaunch:
    constants = {"K": rewards, "KP": power_of_2(rewards), "MLP": mlp, "R": rows, "HT": units, "SPLITS": splits}
    return BoundLaunch(_logits, constants, num_warps=conductor_weights.tail_warps(mlp))


# --- the update ---


class Update(NamedTuple):
    """J before the step as a scalar tensor, and parts of the sum of the gradient's squares; float32."""

    objective: Tensor
    squares: Tensor

    @property
    def grad_norm(self) -> Tensor:
        """The norm of J's gradient over all parameters, as a scalar tensor. It costs two launches when it is read."""
        return self.squares.sum().sqrt()


def conductor_update(
    state: ConductorState, batch: ConductorBatch, config: ConductorUpdateConfig, made: Activations
) -> Update:
    """Changes the parameters and moments of ``state`` in place by one step of AdamW that maximises J.

    Without a live row nothing changes.

    Args:
        state: contiguous float32 tensors; its ``step`` counts this update.
        batch: at least one row. ``h`` has contiguous columns and any floating dtype but float64; the others are
            contiguous.
        config: the options of the update.
        made: the ``activations`` of the batch's contexts under these parameters.
    """
    rewards = state.params.num_rewards
    objective = torch.empty((), device=batch.h.device, dtype=torch.float32)
    shared: dict[str, Tensor | float | None] = {
        "logits_ptr": made.logits,
        "actions_ptr": batch.actions,
        "meta_ptr": batch.meta,
        "drawn_ptr": batch.drawn_probs,
        "live_ptr": batch.live,
        **_learned_pointers(state, "weight"),
        **_learned_pointers(state, "bias"),
        "objective_ptr": objective,
        "N": batch.h.shape[0],
        **Objective.of(config, rewards)._asdict(),
        **AdamW.of(config, state.step)._asdict(),
        "K": rewards,
        "KP": max(_PRODUCT_COLUMNS, power_of_2(rewards)),
    }
    if made.u is None:
        return Update(objective, _update_linear(state.params, batch.h, shared))
    return Update(objective, _update_mlp(state, batch, made.u, AdamW.of(config, state.step), shared))


def _learned_pointers(state: ConductorState, name: str) -> dict[str, Tensor]:
    """A parameter and its moments, by the names that the kernels' arguments have."""
    return {
        f"{name}_ptr": state.params.learned[name],
        f"{name}_first_ptr": state.first[name],
        f"{name}_second_ptr": state.second[name],
    }


def _update_linear(params: ConductorParams, h: Tensor, shared: dict[str, Tensor | float | None]) -> Tensor:
    """Launches the update of a linear network. Returns the sum of the gradient's squares of each program."""
    tiles = blocks(h.shape[1], _COLUMNS)
    squares = torch.empty(tiles, device=h.device, dtype=torch.float32)
    _linear[(tiles,)](
        h_ptr=h,
        mean_ptr=params.mean,
        rstd_ptr=params.rstd,
        squares_ptr=squares,
        d=h.shape[1],
        stride_hb=h.stride(0),
        R=_ROWS,
        BD=_COLUMNS,
        **shared,
        num_warps=4,
        enable_fp_fusion=False,
    )
    return squares


def _update_mlp(
    state: ConductorState,
    batch: ConductorBatch,
    u: Tensor,
    adamw: AdamW,
    shared: dict[str, Tensor | float | None],
) -> Tensor:
    """Launches the update of an MLP. Returns the sum of the gradient's squares of each program of both launches."""
    h, units = batch.h, u.shape[1]
    rows, tiles = blocks(units, _COLUMNS), blocks(h.shape[1], _COLUMNS)
    squares = torch.empty(rows + rows * tiles, device=h.device, dtype=torch.float32)
    d_u, count = torch.empty_like(u), torch.empty((), device=h.device, dtype=torch.float32)
    _units[(rows,)](
        u_ptr=u,
        d_u_ptr=d_u,
        **_learned_pointers(state, "hidden_bias"),
        squares_ptr=squares,
        count_ptr=count,
        H=units,
        R=_UNIT_ROWS,
        HT=_COLUMNS,
        **shared,
        num_warps=4,
        enable_fp_fusion=False,
    )
    _first_layer[(rows, tiles)](
        h_ptr=h,
        mean_ptr=state.params.mean,
        rstd_ptr=state.params.rstd,
        d_u_ptr=d_u,
        live_ptr=batch.live,
        count_ptr=count,
        weight_ptr=state.params.hidden_weight,
        first_ptr=state.first["hidden_weight"],
        second_ptr=state.second["hidden_weight"],
        squares_ptr=squares[rows:],
        N=h.shape[0],
        H=units,
        d=h.shape[1],
        stride_hb=h.stride(0),
        **adamw._asdict(),
        R=_ROWS,
        HT=_COLUMNS,
        BD=_COLUMNS,
        num_warps=4,
        enable_fp_fusion=False,
    )
    return squares
