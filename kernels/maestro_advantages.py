"""The adaptive step: contexts -> weights -> advantages.

A linear network takes two launches: the first launch of ``conductor_weights.py``, then ``_groups``. Three launches are
needed for an MLP, for groups of more than ``_LARGEST`` responses, and for a profile with a batch or token scope, which
may take a launch or two more: both of ``conductor_weights.py``, then that of ``group_advantages.py``. If contexts are
means of hidden states, one launch comes before, which sums up chunks of hidden states.

The first launch forms parts of the logits. A program of ``_groups`` takes whole groups. It adds the parts of their
logits up, makes their weights, and then their advantages, for which it loads the weights that it has just stored. Both
halves are the functions of ``conductor_weights.py`` and ``group_advantages.py``, with tiles of the same shape and the
same number of warps, so the results have the same bits. That is why an MLP is not fused: its second layer needs four
warps, and four warps add up a group in another order than one warp.

A single launch would have to hold all of d in one program. For B = 512, d = 4096, K = 8 it would have 32 programs for
132 processors, and each scheduler would issue 7,600 instructions. That takes 4.5 us at 1.7 GHz, and twice as long for
d = 8192.

For these sizes, bfloat16 contexts and G = 16, 14.2 us were measured from a CUDA graph on an H200. Of these the first
launch took 8.4 with other tiles than now, and ``_groups`` took 5.8 with a loop over the parts. Since then the tiles are
those that took 6.0 us on an H100, and the loop is unrolled: 6 + 4 us are expected, not measured. With an MLP 41.4 us
were measured, and 27.7 + 4 + 3.8 us are expected now. In a training step of 64 responses (d = 1024, K = 4) the op took
16 us of 3.16 s.
"""

from __future__ import annotations

from functools import lru_cache

import triton
import triton.language as tl
from torch import Tensor

from maestro_fast.kernels import pool_hidden
from maestro_fast.kernels.bound_launch import BoundLaunch, blocks, power_of_2
from maestro_fast.kernels.conductor_weights import (
    Draw,
    Tail,
    decide,
    logits_tile,
    network_parts,
    sample_pointers,
    tail_warps,
    weights_of,
)
from maestro_fast.kernels.group_advantages import (
    TILE,
    Inputs,
    Rules,
    advantage_tile,
    group_advantages,
    is_wide,
    rewards_at_once,
    switches,
    tile_rows,
)
from maestro_fast.specs import (
    AdvantageProfile,
    ConductorChoice,
    ConductorParams,
    ConductorSample,
    ContextSource,
    GroupAdvantages,
    ScoreInputs,
)

_LARGEST = 32  # responses of the largest group of the fused launch: one warp holds it and needs no barriers


@triton.jit(do_not_specialize=["N", "B", "seed", "step", "offset"])
def _groups(
    parts_ptr,
    bias_ptr,
    weights_ptr,
    actions_ptr,
    log_probs_ptr,
    entropy_ptr,
    probs_ptr,
    index_ptr,
    rewards_ptr,
    kl_ptr,
    advantages_ptr,
    scores_ptr,
    normalized_ptr,
    mean_ptr,
    std_ptr,
    degenerate_ptr,
    N,
    G,
    B,
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
    KB: tl.constexpr,
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
    SPLITS: tl.constexpr,
):
    """Weights and advantages of BN groups of at most BG responses; the tile has R = BN * BG slots."""
    tail = Tail(parts_ptr=parts_ptr, hidden_bias_ptr=None, weight_ptr=None, batch=B, units=K)
    sample = ConductorSample(weights_ptr, actions_ptr, log_probs_ptr, entropy_ptr, probs_ptr)
    draw = Draw(tau, span, floor, equal, alpha, seed, step, offset)
    # First the weights. The tile has one row for each slot of the groups; slots without a response hold B.
    R: tl.constexpr = BN * BG
    r = tl.arange(0, R)
    n_R = (tl.program_id(0) * BN + r // BG).to(tl.int64)
    g_R = r % BG
    b_R = tl.load(index_ptr + n_R * G + g_R, mask=(n_R < N) & (g_R < G), other=B)
    inside_R = b_R < B
    z_RK = logits_tile(tail, b_R, inside_R, K, KP, False, 1, SPLITS)
    decide(z_RK, b_R, inside_R, bias_ptr, sample, draw, K, SOFT)
    # Then the advantages. Threads load weights that other threads of this program have stored, hence the barrier.
    tl.debug_barrier()
    rows_NG, inside_NG = tile_rows(index_ptr, N, G, B, BN, BG)
    inputs = Inputs(
        rewards_ptr=rewards_ptr,
        weights_ptr=weights_ptr,
        kl_ptr=kl_ptr,
        lengths_ptr=None,
        moments_ptr=None,
        stride_rb=stride_rb,
        stride_rk=stride_rk,
        stride_wb=K,
        stride_wk=1,
        beta=beta,
    )
    out = GroupAdvantages(
        advantages=advantages_ptr,
        scores=scores_ptr,
        normalized_rewards=normalized_ptr,
        mean=mean_ptr,
        std=std_ptr,
        degenerate=degenerate_ptr,
    )
    advantage_tile(
        rows_NG,
        inside_NG,
        inputs,
        Rules(
            reward_eps=reward_eps,
            score_eps=score_eps,
            REWARD_CENTER=REWARD_CENTER,
            REWARD_SCALE=REWARD_SCALE,
            SCORE_CENTER=SCORE_CENTER,
            SCORE_SCALE=SCORE_SCALE,
            DDOF=DDOF,
            RAW=RAW,
            RENORMALIZE=RENORMALIZE,
            IN_VARIANCE=IN_VARIANCE,
        ),
        out,
        None,
        K,
        KB,
    )


def maestro_advantages(
    rewards_BK: Tensor,
    params: ConductorParams,
    choice: ConductorChoice,
    index_NG: Tensor,
    contexts: ContextSource,
    scores: ScoreInputs,
    profile: AdvantageProfile,
) -> tuple[ConductorSample, GroupAdvantages]:
    """Launches the kernels on arguments that ``ops.maestro_advantages`` has checked.

    Args:
        rewards_BK: float32 [B, K], any strides; NaN where a reward abstained.
        params: contiguous float32.
        choice: how weights are chosen, see ``conductor_weights``.
        index_NG: int64 [N, G_max] of ``ops.Groups``.
        contexts: contexts or hidden states, in any floating dtype but float64.
        scores, profile: the other inputs of ``group_advantages``.

    Raises:
        ValueError: a group has more than 8,192 responses, see ``group_advantages``.
    """
    batch = rewards_BK.shape[0]
    if batch == 0:
        return ConductorSample.empty(0, params.weight), GroupAdvantages.empty(rewards_BK)
    chunk = 1
    if contexts.kind == "mean":
        chunk = pool_hidden.CHUNK_TOKENS
        contexts = contexts._replace(x=pool_hidden.chunk_sums(contexts.x, contexts.bounds, contexts.limit_B))
    parts = network_parts(contexts, params, batch, chunk)
    if params.hidden_weight is None and index_NG.shape[1] <= _LARGEST and not is_wide(profile):
        return _fused(rewards_BK, parts, params, choice, index_NG, scores, profile)
    sample = weights_of(parts, params, choice)
    out = group_advantages(rewards_BK, sample.weights, index_NG, profile=profile, **scores._asdict())
    return sample, out


def _fused(
    rewards_BK: Tensor,
    parts: Tensor,
    params: ConductorParams,
    choice: ConductorChoice,
    index_NG: Tensor,
    scores: ScoreInputs,
    profile: AdvantageProfile,
) -> tuple[ConductorSample, GroupAdvantages]:
    """The launch of ``_groups``, from the parts of a linear network's logits."""
    (number, size), (batch, rewards) = index_NG.shape, rewards_BK.shape
    sample, out = ConductorSample.empty(batch, params.weight), GroupAdvantages.empty(rewards_BK)
    width = power_of_2(size)
    groups = max(1, TILE // width)
    _groups_launch(profile, rewards, choice.soft, groups, width, parts.shape[0])(
        (blocks(number, groups),),
        parts_ptr=parts,
        bias_ptr=params.bias,
        **sample_pointers(sample),
        index_ptr=index_NG,
        rewards_ptr=rewards_BK,
        kl_ptr=scores.kl,
        advantages_ptr=out.advantages,
        scores_ptr=out.scores,
        normalized_ptr=out.normalized_rewards,
        mean_ptr=out.mean,
        std_ptr=out.std,
        degenerate_ptr=out.degenerate,
        N=number,
        G=size,
        B=batch,
        stride_rb=rewards_BK.stride(0),
        stride_rk=rewards_BK.stride(1),
        **Draw.of(choice, rewards)._asdict(),
        beta=float(scores.beta),
        reward_eps=float(profile.reward_eps),
        score_eps=float(profile.score_eps),
    )
    return sample, out


@lru_cache(maxsize=256)
def _groups_launch(
    profile: AdvantageProfile, rewards: int, soft: bool, groups: int, width: int, splits: int
) -> BoundLaunch:
    warps = tail_warps(False)
    constants = {
        "K": rewards,
        "KP": power_of_2(rewards),
        "SOFT": soft,
        "KB": rewards_at_once(rewards, groups * width, warps),
        **switches(profile, False),
        "BN": groups,
        "BG": width,
        "SPLITS": splits,
    }
    return BoundLaunch(_groups, constants, num_warps=warps)
