"""One step of the Conductor: the meta-gradient in closed form, and AdamW.

    J       = mean_i [ r_i A_i log p_i(a_i) + entropy_coef H(p_i) ],      p = (1 - K m) q + m,   q = softmax(z / tau)
    dJ/dp_k = 1[k = a] r A / p_k - entropy_coef (log p_k + 1)                     r = min(p(a) / drawn, max_ratio) or 1
    J       = mean_i [ sum_a p_i(a) A_i(a) + entropy_coef H(p_i) ]                              all actions, A [N, K]
    dJ/dp_k = A_k - entropy_coef (log p_k + 1)
    dJ/dz   = (1 - K m) / tau * q * (dJ/dp - sum_k q_k dJ/dp_k)

    linear  dW = dz^T x,   db = sum dz                                          x = (h - mean) * rstd
    MLP     da = dz W2,  du = da GELU'(u),  dW2 = dz^T GELU(u),  dW1 = du^T x,  db1 = sum du

One launch for a linear head: a program owns columns of W, and forms dz of all rows for itself. Two for an MLP: units
(W2, both biases, du), then tiles of W1. ``activations`` makes z and u beforehand, where they are not at hand for these
parameters: one launch for a linear head, two for an MLP. Rows are added in their order; parameters and moments change
in place. AdamW (arXiv 1711.05101) as ``torch.optim.AdamW`` does it, weight decay on the weights alone.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from maestro_fast.kernels import conductor_weights
from maestro_fast.kernels.bound_launch import BoundLaunch, blocks
from maestro_fast.kernels.conductor_weights import head_parts, logits_tile, padded

_ROWS = 32  # responses per step
_UNIT_ROWS = 16  # of ``_units``, which spills a few registers with more
_COLUMNS = 32  # columns of d, or units, of one program
_PRODUCT_COLUMNS = 16  # the least that tl.dot takes, for tiles of rewards


@triton.jit
def _d_logits(
    n_R,
    N,
    logits_ptr,
    actions_ptr,
    advantages_ptr,
    drawn_ptr,
    live_ptr,
    tau,
    span,
    floor,
    entropy_coef,
    max_ratio,
    K: tl.constexpr,
    KP: tl.constexpr,
    ALL: tl.constexpr,
    HAS_DRAWN: tl.constexpr,
    HAS_LIVE: tl.constexpr,
):
    """-dJ/dz [R, KP] and J [R], times the number of live rows; and which rows are live, as 1 and 0."""
    k = tl.arange(0, KP)
    inside_R = n_R < N
    live_R = tl.where(inside_R, 1.0, 0.0)
    if HAS_LIVE:
        live_R = tl.where(tl.load(live_ptr + n_R, mask=inside_R, other=0) != 0, live_R, 0.0)
    mask_RK = (live_R > 0)[:, None] & (k < K)[None, :]
    z_RK = tl.load(logits_ptr + n_R[:, None] * K + k[None, :], mask=mask_RK, other=0.0)
    z_RK = tl.where((k < K)[None, :], tl.div_rn(z_RK, tl.zeros_like(z_RK) + tau), float("-inf"))
    e_RK = tl.exp(z_RK - tl.max(z_RK, 1)[:, None])
    q_RK = tl.div_rn(e_RK, tl.sum(e_RK, 1)[:, None] + tl.zeros_like(e_RK))
    p_RK = tl.where((k < K)[None, :], span * q_RK + floor, 0.0)
    possible_RK = p_RK > 0
    p_RK = tl.where(possible_RK, p_RK, 1.0)
    log_RK = tl.log(p_RK)
    if ALL:
        slope_RK = tl.load(advantages_ptr + n_R[:, None] * K + k[None, :], mask=mask_RK, other=0.0).to(tl.float32)
        gain_R = tl.sum(tl.where(possible_RK, p_RK, 0.0) * slope_RK, 1)
    else:
        chosen_RK = k[None, :] == tl.load(actions_ptr + n_R, mask=inside_R, other=0)[:, None]
        advantage_R = tl.load(advantages_ptr + n_R, mask=inside_R, other=0.0).to(tl.float32)
        if HAS_DRAWN:
            now_R = tl.sum(tl.where(chosen_RK & possible_RK, p_RK, 0.0), 1)
            drawn_R = tl.load(drawn_ptr + n_R, mask=inside_R, other=1.0).to(tl.float32)
            advantage_R = advantage_R * tl.minimum(tl.div_rn(now_R, drawn_R), max_ratio)
        slope_RK = tl.where(chosen_RK, tl.div_rn(advantage_R[:, None] + tl.zeros_like(p_RK), p_RK), 0.0)
        gain_R = advantage_R * tl.sum(tl.where(chosen_RK, log_RK, 0.0), 1)
    slope_RK = tl.where(possible_RK, slope_RK - entropy_coef * (log_RK + 1.0), 0.0)
    out_RK = -(span / tau) * q_RK * (slope_RK - tl.sum(slope_RK * q_RK, 1)[:, None])
    gain_R -= entropy_coef * tl.sum(tl.where(possible_RK, p_RK * log_RK, 0.0), 1)
    return tl.where(live_R[:, None] > 0, out_RK, 0.0), tl.where(live_R > 0, gain_R, 0.0), live_R


@triton.jit
def _adamw(
    parameter_ptr, first_ptr, second_ptr, place, mask, gradient, keep, lerp1, beta2, lerp2, step_size, root, eps
):
    """keep = 1 - lr * decay, lerp = 1 - beta, step_size = lr / (1 - beta1^t), root = sqrt(1 - beta2^t)."""
    parameter = tl.load(parameter_ptr + place, mask=mask, other=0.0) * keep
    first = tl.load(first_ptr + place, mask=mask, other=0.0)
    second = tl.load(second_ptr + place, mask=mask, other=0.0)
    first += lerp1 * (gradient - first)
    second = second * beta2 + lerp2 * gradient * gradient
    divisor = tl.div_rn(tl.sqrt_rn(second), tl.zeros_like(second) + root) + eps
    tl.store(parameter_ptr + place, parameter - step_size * tl.div_rn(first, divisor), mask=mask)
    tl.store(first_ptr + place, first, mask=mask)
    tl.store(second_ptr + place, second, mask=mask)


@triton.jit
def _standardised(h_ptr, mean_ptr, rstd_ptr, n_R, live_R, column_D, d, stride_hb):
    """x [R, BD], 0 - mean * rstd where not live."""
    mask_RD = (live_R > 0)[:, None] & (column_D < d)[None, :]
    h_RD = tl.load(h_ptr + n_R[:, None] * stride_hb + column_D[None, :], mask=mask_RD, other=0.0).to(tl.float32)
    mean_D = tl.load(mean_ptr + column_D, mask=column_D < d, other=0.0)
    rstd_D = tl.load(rstd_ptr + column_D, mask=column_D < d, other=0.0)
    return (h_RD - mean_D[None, :]) * rstd_D[None, :]


@triton.jit(do_not_specialize=["N"])
def _linear(
    h_ptr,
    mean_ptr,
    rstd_ptr,
    logits_ptr,
    actions_ptr,
    advantages_ptr,
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
    ALL: tl.constexpr,
    HAS_DRAWN: tl.constexpr,
    HAS_LIVE: tl.constexpr,
    R: tl.constexpr,
    BD: tl.constexpr,
):
    column_D = tl.program_id(0) * BD + tl.arange(0, BD)
    k = tl.arange(0, KP)
    d_weight_KD = tl.zeros([KP, BD], tl.float32)
    d_bias_K = tl.zeros([KP], tl.float32)
    gain_R = tl.zeros([R], tl.float32)
    count_R = tl.zeros([R], tl.float32)
    for n0 in range(0, N, R):
        n_R = (n0 + tl.arange(0, R)).to(tl.int64)
        dz_RK, more_R, live_R = _d_logits(
            n_R,
            N,
            logits_ptr,
            actions_ptr,
            advantages_ptr,
            drawn_ptr,
            live_ptr,
            tau,
            span,
            floor,
            entropy_coef,
            max_ratio,
            K,
            KP,
            ALL,
            HAS_DRAWN,
            HAS_LIVE,
        )
        x_RD = _standardised(h_ptr, mean_ptr, rstd_ptr, n_R, live_R, column_D, d, stride_hb)
        d_weight_KD = tl.dot(tl.trans(dz_RK), x_RD, d_weight_KD, input_precision="tf32x3")
        d_bias_K += tl.sum(dz_RK, 0)
        gain_R += more_R
        count_R += live_R
    count = tl.sum(count_R, 0)
    share = tl.div_rn(1.0, tl.maximum(count, 1.0))
    d_weight_KD = d_weight_KD * share
    d_bias_K = d_bias_K * share
    place_KD = k[:, None] * d + column_D[None, :]
    # Without a live row nothing has been learnt, and no moment may decay either.
    limit = tl.where(count > 0, K, 0)
    mask_KD = (k < limit)[:, None] & (column_D < d)[None, :]
    _adamw(
        weight_ptr,
        weight_first_ptr,
        weight_second_ptr,
        place_KD,
        mask_KD,
        d_weight_KD,
        keep,
        lerp1,
        beta2,
        lerp2,
        step_size,
        root,
        eps,
    )
    squares = tl.sum(tl.sum(tl.where(mask_KD, d_weight_KD * d_weight_KD, 0.0), 1), 0)
    if tl.program_id(0) == 0:
        _adamw(
            bias_ptr,
            bias_first_ptr,
            bias_second_ptr,
            k,
            k < limit,
            d_bias_K,
            1.0,
            lerp1,
            beta2,
            lerp2,
            step_size,
            root,
            eps,
        )
        squares += tl.sum(d_bias_K * d_bias_K, 0)
        tl.store(objective_ptr, tl.sum(gain_R, 0) * share)
    tl.store(squares_ptr + tl.program_id(0), squares)


@triton.jit(do_not_specialize=["N"])
def _units(
    u_ptr,
    logits_ptr,
    actions_ptr,
    advantages_ptr,
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
    ALL: tl.constexpr,
    HAS_DRAWN: tl.constexpr,
    HAS_LIVE: tl.constexpr,
    R: tl.constexpr,
    HT: tl.constexpr,
):
    """Some units of an MLP: d_u [N, H] of live rows, not yet divided by their number; the step of all but W1."""
    unit_H = tl.program_id(0) * HT + tl.arange(0, HT)
    k = tl.arange(0, KP)
    place_KH = k[:, None] * H + unit_H[None, :]
    weight_KH = tl.load(weight_ptr + place_KH, mask=(k < K)[:, None] & (unit_H < H)[None, :], other=0.0)
    d_weight_KH = tl.zeros([KP, HT], tl.float32)
    d_hidden_bias_H = tl.zeros([HT], tl.float32)
    d_bias_K = tl.zeros([KP], tl.float32)
    gain_R = tl.zeros([R], tl.float32)
    count_R = tl.zeros([R], tl.float32)
    for n0 in range(0, N, R):
        n_R = (n0 + tl.arange(0, R)).to(tl.int64)
        dz_RK, more_R, live_R = _d_logits(
            n_R,
            N,
            logits_ptr,
            actions_ptr,
            advantages_ptr,
            drawn_ptr,
            live_ptr,
            tau,
            span,
            floor,
            entropy_coef,
            max_ratio,
            K,
            KP,
            ALL,
            HAS_DRAWN,
            HAS_LIVE,
        )
        mask_RH = (live_R > 0)[:, None] & (unit_H < H)[None, :]
        place_RH = n_R[:, None] * H + unit_H[None, :]
        u_RH = tl.load(u_ptr + place_RH, mask=mask_RH, other=0.0)
        below_RH = 0.5 * (1.0 + tl.erf(u_RH * 0.7071067811865476))
        density_RH = 0.3989422804014327 * tl.exp(-0.5 * u_RH * u_RH)
        d_a_RH = tl.dot(dz_RK, weight_KH, input_precision="tf32x3")
        d_u_RH = d_a_RH * (below_RH + u_RH * density_RH)
        d_weight_KH = tl.dot(tl.trans(dz_RK), u_RH * below_RH, d_weight_KH, input_precision="tf32x3")
        tl.store(d_u_ptr + place_RH, d_u_RH, mask=mask_RH)
        d_hidden_bias_H += tl.sum(d_u_RH, 0)
        d_bias_K += tl.sum(dz_RK, 0)
        gain_R += more_R
        count_R += live_R
    count = tl.sum(count_R, 0)
    share = tl.div_rn(1.0, tl.maximum(count, 1.0))
    d_weight_KH = d_weight_KH * share
    d_hidden_bias_H = d_hidden_bias_H * share
    d_bias_K = d_bias_K * share
    limit = tl.where(count > 0, K, 0)
    mask_KH = (k < limit)[:, None] & (unit_H < H)[None, :]
    mask_H = unit_H < tl.where(count > 0, H, 0)
    _adamw(
        weight_ptr,
        weight_first_ptr,
        weight_second_ptr,
        place_KH,
        mask_KH,
        d_weight_KH,
        keep,
        lerp1,
        beta2,
        lerp2,
        step_size,
        root,
        eps,
    )
    _adamw(
        hidden_bias_ptr,
        hidden_bias_first_ptr,
        hidden_bias_second_ptr,
        unit_H,
        mask_H,
        d_hidden_bias_H,
        1.0,
        lerp1,
        beta2,
        lerp2,
        step_size,
        root,
        eps,
    )
    squares = tl.sum(tl.sum(tl.where(mask_KH, d_weight_KH * d_weight_KH, 0.0), 1), 0)
    squares += tl.sum(tl.where(mask_H, d_hidden_bias_H * d_hidden_bias_H, 0.0), 0)
    if tl.program_id(0) == 0:
        _adamw(
            bias_ptr,
            bias_first_ptr,
            bias_second_ptr,
            k,
            k < limit,
            d_bias_K,
            1.0,
            lerp1,
            beta2,
            lerp2,
            step_size,
            root,
            eps,
        )
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
    HAS_LIVE: tl.constexpr,
    R: tl.constexpr,
    HT: tl.constexpr,
    BD: tl.constexpr,
):
    """A tile [HT, BD] of W1."""
    unit_H = tl.program_id(0) * HT + tl.arange(0, HT)
    column_D = tl.program_id(1) * BD + tl.arange(0, BD)
    d_weight_HD = tl.zeros([HT, BD], tl.float32)
    for n0 in range(0, N, R):
        n_R = (n0 + tl.arange(0, R)).to(tl.int64)
        live_R = tl.where(n_R < N, 1.0, 0.0)
        if HAS_LIVE:
            live_R = tl.where(tl.load(live_ptr + n_R, mask=n_R < N, other=0) != 0, live_R, 0.0)
        mask_HR = (unit_H < H)[:, None] & (live_R > 0)[None, :]
        d_u_HR = tl.load(d_u_ptr + n_R[None, :] * H + unit_H[:, None], mask=mask_HR, other=0.0)
        x_RD = _standardised(h_ptr, mean_ptr, rstd_ptr, n_R, live_R, column_D, d, stride_hb)
        d_weight_HD = tl.dot(d_u_HR, x_RD, d_weight_HD, input_precision="tf32x3")
    count = tl.load(count_ptr)
    d_weight_HD = d_weight_HD * tl.div_rn(1.0, tl.maximum(count, 1.0))
    mask_HD = (unit_H < tl.where(count > 0, H, 0))[:, None] & (column_D < d)[None, :]
    place_HD = unit_H[:, None].to(tl.int64) * d + column_D[None, :]
    _adamw(
        weight_ptr,
        first_ptr,
        second_ptr,
        place_HD,
        mask_HD,
        d_weight_HD,
        keep,
        lerp1,
        beta2,
        lerp2,
        step_size,
        root,
        eps,
    )
    squares = tl.sum(tl.sum(tl.where(mask_HD, d_weight_HD * d_weight_HD, 0.0), 1), 0)
    tl.store(squares_ptr + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1), squares)


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
    """z [N, K] and, of an MLP, u [N, H], from the parts of the first launch of ``conductor_weights``."""
    n_R = (tl.program_id(0) * R + tl.arange(0, R)).to(tl.int64)
    inside_R = n_R < N
    k = tl.arange(0, KP)
    if MLP:
        for unit in range(0, H, HT):
            unit_H = unit + tl.arange(0, HT)
            mask_RH = inside_R[:, None] & (unit_H < H)[None, :]
            u_RH = tl.zeros([R, HT], tl.float32)
            for s in tl.static_range(SPLITS):
                part_R = parts_ptr + (s * N + n_R) * H
                u_RH += tl.load(part_R[:, None] + unit_H[None, :], mask=mask_RH, other=0.0)
            u_RH += tl.load(hidden_bias_ptr + unit_H, mask=unit_H < H, other=0.0)[None, :]
            tl.store(u_ptr + n_R[:, None] * H + unit_H[None, :], u_RH, mask=mask_RH)
    z_RK = logits_tile(parts_ptr, hidden_bias_ptr, weight_ptr, n_R, inside_R, N, H, K, KP, MLP, HT, SPLITS)
    z_RK += tl.load(bias_ptr + k, mask=k < K, other=0.0)[None, :]
    tl.store(logits_ptr + n_R[:, None] * K + k[None, :], z_RK, mask=inside_R[:, None] & (k < K)[None, :])


class Activations(NamedTuple):
    """Logits [N, K], and before the GELU of an MLP u [N, H]; float32."""

    logits: Tensor
    u: Tensor | None


class Moments(NamedTuple):
    """AdamW's first and second moments of one parameter, float32, contiguous, changed in place."""

    first: Tensor
    second: Tensor


class AdamW(NamedTuple):
    """Options of one step; ``step`` counts from 1."""

    step: int
    learning_rate: float
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8

    def numbers(self) -> tuple[float, ...]:
        """The arguments of the kernel ``_adamw`` after the gradient, rounded once, here."""
        return (
            1.0 - self.learning_rate * self.weight_decay,
            1.0 - self.beta1,
            self.beta2,
            1.0 - self.beta2,
            self.learning_rate / (1.0 - self.beta1**self.step),
            float((1.0 - self.beta2**self.step) ** 0.5),
            self.eps,
        )


class Update(NamedTuple):
    """J before the step, 0-dim, and the squares of the gradient in parts; float32."""

    objective: Tensor
    squares: Tensor

    @property
    def grad_norm(self) -> Tensor:
        """Of -J, over all parameters; 0-dim. Two launches of torch, so only where it is asked for."""
        return self.squares.sum().sqrt()


def activations(h: Tensor, params: Any) -> Activations:
    """z, and u of an MLP, of contexts [N, d] under an ``ops.ConductorParams``; N at least 1."""
    number, rewards = h.shape[0], params.weight.shape[0]
    mlp = params.hidden_weight is not None
    parts = head_parts(h, params, number)
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
    constants = {"K": rewards, "KP": padded(rewards), "MLP": mlp, "R": rows, "HT": units, "SPLITS": splits}
    return BoundLaunch(_logits, constants, num_warps=conductor_weights.tail_warps(mlp))


def conductor_update(
    h: Tensor,
    actions: Tensor | None,
    advantages: Tensor,
    params: Any,
    moments: dict[str, Moments],
    made: Activations,
    *,
    tau: float,
    min_prob: float,
    entropy_coef: float,
    adamw: AdamW,
    drawn_probs: Tensor | None = None,
    max_ratio: float = 2.0,
    live: Tensor | None = None,
) -> Update:
    """Changes ``params`` and ``moments`` by one step of AdamW that maximises J.

    Args:
        h: [N, d] contexts, N at least 1, columns contiguous, any floating dtype but float64.
        actions: int [N] and advantages [N], contiguous; or None, and those of all actions [N, K].
        params: an ``ops.ConductorParams`` of contiguous float32 tensors; mean and rstd stay as they are.
        moments: by the names of the parameters: "weight", "bias", and of an MLP "hidden_weight" and "hidden_bias".
        made: the ``activations`` of h under these parameters.
        tau, min_prob, entropy_coef: as in ``weighting.conductor``.
        drawn_probs: [N], probabilities that the actions were drawn with, if not these parameters'; then advantages
            count p / drawn_probs fold, at most ``max_ratio``.
        live: bool [N], rows that count; all if None. The others may hold anything. Without any, nothing changes.
    """
    number, rewards = h.shape[0], params.weight.shape[0]
    objective = torch.empty((), device=h.device, dtype=torch.float32)
    objective_numbers = (float(tau), 1.0 - rewards * min_prob, float(min_prob), float(entropy_coef), float(max_ratio))
    batch = (made.logits, actions, advantages, drawn_probs, live)
    last = (params.weight, *moments["weight"], params.bias, *moments["bias"])
    shared = {"R": _ROWS, "num_warps": 4, "enable_fp_fusion": False}
    columns = max(_PRODUCT_COLUMNS, padded(rewards))
    head = {"K": rewards, "KP": columns, "ALL": actions is None, "HAS_DRAWN": drawn_probs is not None}
    given = {"HAS_LIVE": live is not None}
    tiles = blocks(h.shape[1], _COLUMNS)
    if made.u is None:
        squares = torch.empty(tiles, device=h.device, dtype=torch.float32)
        _linear[(tiles,)](
            h,
            params.mean,
            params.rstd,
            *batch,
            *last,
            objective,
            squares,
            number,
            h.shape[1],
            h.stride(0),
            *objective_numbers,
            *adamw.numbers(),
            BD=_COLUMNS,
            **head,
            **given,
            **shared,
        )
        return Update(objective, squares)
    units = made.u.shape[1]
    rows = blocks(units, _COLUMNS)
    squares = torch.empty(rows + rows * tiles, device=h.device, dtype=torch.float32)
    d_u, count = torch.empty_like(made.u), torch.empty_like(objective)
    _units[(rows,)](
        made.u,
        *batch,
        d_u,
        *last,
        params.hidden_bias,
        *moments["hidden_bias"],
        objective,
        squares,
        count,
        number,
        units,
        *objective_numbers,
        *adamw.numbers(),
        HT=_COLUMNS,
        **head,
        **given,
        **shared | {"R": _UNIT_ROWS},
    )
    _first_layer[(rows, tiles)](
        h,
        params.mean,
        params.rstd,
        d_u,
        live,
        count,
        params.hidden_weight,
        *moments["hidden_weight"],
        squares[rows:],
        number,
        units,
        h.shape[1],
        h.stride(0),
        *adamw.numbers(),
        HT=_COLUMNS,
        BD=_COLUMNS,
        **given,
        **shared,
    )
    return Update(objective, squares)
