"""The adaptive step in one or two launches: contexts -> weights -> advantages.

    linear head, contexts or last tokens   _linear                                      1 launch
    MLP, contexts or last tokens           _hidden, _output                             2
    linear head, means                     the chunks' sums, _linear                    2
    MLP, means                             the chunks' sums, _hidden, _output           3

A program of the last launch takes whole groups: it makes their weights, and then their advantages, which read the
weights where they were just stored. So both halves are the very code of ``conductor_weights.py`` and
``group_advantages.py``, and the numbers are theirs. Profiles whose scopes cross groups need the further launches of
``group_advantages.py``: one for the scores, one for rewards over the batch.

An MLP over means cannot do with two launches unless programs wait for each other: a mean is only known once all chunks
are, and the second layer needs all of the first.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from maestro_fast.kernels import pool_hidden as pooling
from maestro_fast.kernels.conductor_weights import (
    Draw,
    Sample,
    context_rows,
    decide,
    hidden_parts,
    hidden_tile,
    padded,
    project,
)
from maestro_fast.kernels.group_advantages import (
    Outputs,
    advantage_tile,
    finish,
    reward_moments,
    scratch,
    switches,
    tile_rows,
)

_ROWS = 16  # responses of one program, the least that tl.dot takes
_INNER = 128  # elements of d per step of a linear head, and half as many for groups of more than 32
_HIDDEN = 64  # units per step of an MLP's second layer
LARGEST_GROUP = 64  # a program holds [responses, _INNER] of its group


@triton.jit(do_not_specialize=["N", "B", "splits", "seed", "step", "offset"])
def _groups(
    x_ptr,
    start_ptr,
    length_ptr,
    mean_ptr,
    rstd_ptr,
    hidden_bias_ptr,
    weight_ptr,
    bias_ptr,
    weights_ptr,
    actions_ptr,
    log_probs_ptr,
    entropy_ptr,
    probs_ptr,
    index_ptr,
    rewards_ptr,
    kl_ptr,
    lengths_ptr,
    moments_ptr,
    advantages_ptr,
    scores_ptr,
    normalized_ptr,
    mean_out_ptr,
    std_ptr,
    degenerate_ptr,
    state_ptr,
    N,
    G,
    B,
    d,
    H,
    splits,
    stride_xb,
    stride_rb,
    stride_rk,
    tau,
    span,
    floor,
    equal,
    alpha,
    seed,
    step,
    offset,
    beta,
    reward_eps,
    score_eps,
    K: tl.constexpr,
    KP: tl.constexpr,
    SOFT: tl.constexpr,
    MLP: tl.constexpr,
    SOURCE: tl.constexpr,
    CHUNK: tl.constexpr,
    HAS_KL: tl.constexpr,
    REWARD_CENTER: tl.constexpr,
    REWARD_SCALE: tl.constexpr,
    SCORE_CENTER: tl.constexpr,
    SCORE_SCALE: tl.constexpr,
    DDOF: tl.constexpr,
    RAW: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    IN_VARIANCE: tl.constexpr,
    BN: tl.constexpr,
    BG: tl.constexpr,
    BD: tl.constexpr,
    HT: tl.constexpr,
):
    """MLP: x holds the parts of the first layer, else what SOURCE says."""
    R: tl.constexpr = BN * BG
    r = tl.arange(0, R)
    n_R = (tl.program_id(0) * BN + r // BG).to(tl.int64)
    g_R = r % BG
    b_R = tl.load(index_ptr + n_R * G + g_R, mask=(n_R < N) & (g_R < G), other=B)
    inside_R = b_R < B
    if MLP:
        z_RK = hidden_tile(x_ptr, hidden_bias_ptr, weight_ptr, b_R, inside_R, B, H, splits, K, KP, HT)
    else:
        row_R, there_R, length_R = context_rows(start_ptr, length_ptr, b_R, inside_R, SOURCE, CHUNK)
        z_RK = project(
            x_ptr,
            row_R,
            there_R,
            length_R,
            mean_ptr,
            rstd_ptr,
            weight_ptr,
            tl.arange(0, KP),
            K,
            0,
            d,
            d,
            stride_xb,
            SOURCE,
            CHUNK,
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
    tl.debug_barrier()  # other threads of this program load the weights that these stored
    rows_NG, inside_NG = tile_rows(index_ptr, N, G, B, BN, BG)
    advantage_tile(
        rows_NG,
        inside_NG,
        rewards_ptr,
        weights_ptr,
        kl_ptr,
        lengths_ptr,
        moments_ptr,
        advantages_ptr,
        scores_ptr,
        normalized_ptr,
        mean_out_ptr,
        std_ptr,
        degenerate_ptr,
        state_ptr,
        stride_rb,
        stride_rk,
        K,
        1,
        beta,
        reward_eps,
        score_eps,
        K,
        HAS_KL,
        REWARD_CENTER,
        REWARD_SCALE,
        SCORE_CENTER,
        SCORE_SCALE,
        DDOF,
        RAW,
        RENORMALIZE,
        IN_VARIANCE,
    )


def maestro_advantages(
    rewards_BK: Tensor,
    params: Any,
    draw: Draw,
    index_NG: Tensor,
    x: Tensor,
    *,
    soft: bool,
    source: str = "context",
    start_B: Tensor | None = None,
    length_B: Tensor | None = None,
    profile: Any,
    kl: Tensor | None = None,
    beta: float = 0.0,
    lengths: Tensor | None = None,
) -> tuple[Sample, Outputs]:
    """Launches what ``ops.maestro_advantages`` has checked.

    Args:
        rewards_BK: float32 [B, K], any strides; NaN where a reward abstained.
        params: an ``ops.ConductorParams`` of contiguous float32.
        draw, soft: as in ``conductor_weights``.
        index_NG: int64 [N, G_max] of ``ops.Groups``, G_max at most ``LARGEST_GROUP``.
        x: [B, d] contexts, or with source "last" or "mean" [T, d] hidden states; any floating dtype but float64.
        start_B, length_B: int [B] for these sources, as in ``pool_hidden``.
        profile, kl, beta, lengths: as in ``group_advantages``.

    Raises:
        ValueError: a larger group; the ops by themselves serve it, in one launch more.
    """
    number, size = index_NG.shape
    if size > LARGEST_GROUP:
        raise ValueError(f"groups: one of {size} responses, expected at most {LARGEST_GROUP} with backend='triton'")
    batch, rewards = rewards_BK.shape
    sample, out = Sample.empty(batch, rewards, rewards_BK.device), Outputs.empty(rewards_BK)
    if batch == 0:
        return sample, out
    chunk = 1
    if source == "mean":
        assert start_B is not None and length_B is not None
        chunk = pooling._CHUNK
        x = pooling.chunk_sums(x, torch.cat([start_B, start_B[-1:] + length_B[-1:]]), length_B)
    units, splits = 1, 1
    mlp = params.hidden_weight is not None
    if mlp:
        x = hidden_parts(x, params, batch, source=source, start_B=start_B, length_B=length_B, chunk=chunk)
        splits, _, units = x.shape
    width = triton.next_power_of_2(size)
    groups = max(1, _ROWS // width)
    state_B = scratch(out, profile, False)
    _groups[(triton.cdiv(number, groups),)](
        x,
        start_B,
        length_B,
        params.mean,
        params.rstd,
        params.hidden_bias,
        params.weight,
        params.bias,
        *sample,
        index_NG,
        rewards_BK,
        rewards_BK if kl is None else kl,
        rewards_BK if lengths is None else lengths,
        reward_moments(rewards_BK, profile, False),
        *out,
        state_B,
        number,
        size,
        batch,
        params.mean.shape[0],
        units,
        splits,
        x.stride(0),
        rewards_BK.stride(0),
        rewards_BK.stride(1),
        *draw,
        float(beta),
        float(profile.reward_eps),
        float(profile.score_eps),
        K=rewards,
        KP=padded(rewards),
        SOFT=soft,
        MLP=mlp,
        SOURCE=source,
        CHUNK=chunk,
        HAS_KL=kl is not None,
        **switches(profile, False),
        BN=groups,
        BG=width,
        BD=_INNER if groups * width <= 32 else _INNER // 2,
        HT=_HIDDEN,
        num_warps=4 if groups * width <= 32 else 8,
        num_stages=3,
        enable_fp_fusion=False,
    )
    finish(out, state_B, lengths, profile, False)
    return sample, out
