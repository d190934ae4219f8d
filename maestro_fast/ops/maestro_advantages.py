"""The adaptive step: hidden states -> context -> reward weights -> advantages."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from maestro_fast.ops.backend import Backend, resolve
from maestro_fast.ops.conductor_weights import (
    CHOICE,
    PARAMS,
    check_is_params,
    checked_choice,
    conductor_weights,
    flat_choice,
    whole_choice,
)
from maestro_fast.ops.gpu import operator
from maestro_fast.ops.group_advantages import check_inputs, check_lengths, group_advantages
from maestro_fast.ops.groups import Groups, GroupsLike
from maestro_fast.ops.pool_hidden import PoolMode, layout, pool_hidden
from maestro_fast.ops.tensors import check_number, check_tensors, contiguous_columns
from maestro_fast.specs import (
    AdvantageProfile,
    ConductorChoice,
    ConductorParams,
    ConductorSample,
    ContextSource,
    GroupAdvantages,
    ScoreInputs,
    WeightMode,
    as_text,
    from_text,
    resolve_profile,
)

__all__ = ["maestro_advantages"]


def maestro_advantages(
    rewards: Tensor,
    conductor: ConductorParams,
    groups: GroupsLike,
    *,
    h: Tensor | None = None,
    hidden: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    pool: PoolMode = "last",
    prompt_lengths: Tensor | None = None,
    tau: float = 1.0,
    min_prob: float = 0.05,
    alpha: float = 0.3,
    mode: WeightMode = "sample",
    seed: int = 0,
    step: int = 0,
    offset: int = 0,
    kl: Tensor | None = None,
    beta: float = 0.0,
    lengths: Tensor | None = None,
    profile: str | AdvantageProfile = "maestro",
    backend: Backend | None = None,
) -> tuple[ConductorSample, GroupAdvantages]:
    """The Conductor's weights and the advantages under these weights, in one call (MAESTRO, arXiv 2601.07208).

    Args:
        rewards: [B, K], NaN where a reward abstained.
        conductor: the Conductor's network.
        groups: see ``group_advantages``.
        h: [B, d] contexts. None takes them from ``hidden``.
        hidden: [T, d] packed hidden states, which are pooled to contexts.
        cu_seqlens, pool, prompt_lengths: int [B + 1], the mode, and int [B] as in ``pool_hidden``, for ``hidden``.
        tau, min_prob, alpha, mode, seed, step, offset: see ``conductor_weights``.
        kl, beta, lengths, profile: see ``group_advantages``.
        backend: "cpp", "triton", "torch", or None. None means C++ on the CPU and Triton on a CUDA device, unless there
            is float64 or a gradient to compute. With C++, PyTorch computes the pooling and the first layer of an MLP.

    Raises:
        ValueError: not exactly one of ``h`` and ``hidden`` is given, or one of the ops named above raises one.
        TypeError: one of the ops named above raises one.
    """
    if (h is None) == (hidden is None):
        raise ValueError("h, hidden: expected exactly one of them")
    check_tensors(
        1, rewards=rewards, h=h, hidden=hidden, cu_seqlens=cu_seqlens, prompt_lengths=prompt_lengths, kl=kl,
        lengths=lengths,
    )  # fmt: skip
    if hidden is not None and cu_seqlens is None:
        raise ValueError("cu_seqlens: missing, expected int [B + 1] beside hidden")
    check_number("beta", beta)
    check_is_params("conductor", conductor)
    if h is not None and h.ndim != 2:
        raise ValueError(f"h: shape {tuple(h.shape)}, expected [B, d]")
    if rewards.ndim != 2 or rewards.shape[1] != conductor.num_rewards:
        raise ValueError(f"rewards: shape {tuple(rewards.shape)}, expected [B, {conductor.num_rewards}]")
    chosen = resolve("maestro_advantages", backend, rewards, h, hidden, *conductor.tensors, kl, lengths)
    choice = ConductorChoice(tau, min_prob, alpha, mode, seed, step, offset)
    scores = ScoreInputs(kl, float(beta), lengths)
    if chosen == "triton":
        contexts = ContextSource(h) if h is not None else _hidden_states(hidden, cu_seqlens, pool, prompt_lengths)
        _check_contexts(contexts.responses, "h" if hidden is None else "cu_seqlens", rewards)
        choice = checked_choice(contexts.x, conductor, choice)
        return _fused(rewards, conductor, groups, choice, contexts, scores, resolve_profile(profile))
    if h is None:
        assert hidden is not None
        h = pool_hidden(hidden, cu_seqlens=cu_seqlens, mode=pool, prompt_lengths=prompt_lengths, backend="torch")
    _check_contexts(len(h), "h" if hidden is None else "cu_seqlens", rewards)
    if h.device != rewards.device:
        raise ValueError(f"{'h' if hidden is None else 'hidden'}: on {h.device}, expected {rewards.device} as rewards")
    sample = conductor_weights(h, conductor, **choice._asdict(), backend=chosen)
    out = group_advantages(rewards, sample.weights, groups, **scores._asdict(), profile=profile, backend=chosen)
    return sample, out


def _hidden_states(
    hidden: Tensor | None, cu_seqlens: Tensor | None, pool: PoolMode, prompt_lengths: Tensor | None
) -> ContextSource:
    """The hidden states as a source of contexts, which the kernels pool themselves."""
    assert hidden is not None
    found = layout(hidden, pool, prompt_lengths, None, None, cu_seqlens)
    return ContextSource(found.flat, "last" if pool.endswith("last") else "mean", found.bounds, found.limit_B)


def _check_contexts(contexts: int, name: str, rewards: Tensor) -> None:
    if contexts != rewards.shape[0]:
        raise ValueError(f"{name}: {contexts} contexts, expected {rewards.shape[0]} as rewards")


def _fused(
    rewards: Tensor,
    conductor: ConductorParams,
    groups: GroupsLike,
    choice: ConductorChoice,
    contexts: ContextSource,
    scores: ScoreInputs,
    profile: AdvantageProfile,
) -> tuple[ConductorSample, GroupAdvantages]:
    """Checks the inputs of the advantages, and computes everything by Triton. The choice is checked already."""
    check_inputs(rewards, None, scores.kl, scores.beta, profile)
    check_lengths(scores.lengths, rewards, profile)
    index_NG = Groups.of(groups, rewards.shape[0]).to(rewards.device).index_NG
    return _by_triton(rewards, conductor, choice, index_NG, contexts, scores, profile)


# --- Triton ---


def _flat(
    rewards: Tensor,
    params: ConductorParams,
    choice: ConductorChoice,
    index_NG: Tensor,
    contexts: ContextSource,
    scores: ScoreInputs,
    profile: AdvantageProfile,
) -> tuple[Any, ...]:
    """The arguments of ``_by_triton`` as the operator takes them."""
    return (rewards, *params.tensors, *flat_choice(choice), index_NG, *contexts, *scores, as_text(profile))


def _whole(rewards: Tensor, *given: Any) -> tuple[Any, ...]:
    """The opposite of ``_flat``."""
    tensors, choice, index_NG = given[:6], given[6:14], given[14]
    contexts, scores, profile = given[15:19], given[19:22], given[22]
    return (
        rewards,
        ConductorParams(*tensors),
        whole_choice(*choice),
        index_NG,
        ContextSource(*contexts),
        ScoreInputs(*scores),
        from_text(AdvantageProfile, profile),
    )


@operator(
    f"triton_maestro_advantages(Tensor rewards, {PARAMS}, {CHOICE}, Tensor index, Tensor x, str kind,"
    " Tensor? bounds, Tensor? limit, Tensor? kl, float beta, Tensor? lengths, str profile)"
    f" -> ({', '.join(['Tensor'] * 11)})",
    lambda rewards, mean, rstd, weight, *rest: (
        *ConductorSample.empty(rewards.shape[0], weight),
        *GroupAdvantages.empty(rewards),
    ),
    flat=_flat,
    whole=_whole,
    result=lambda *outputs: (ConductorSample(*outputs[:5]), GroupAdvantages(*outputs[5:])),
)
def _by_triton(
    rewards: Tensor,
    params: ConductorParams,
    choice: ConductorChoice,
    index_NG: Tensor,
    contexts: ContextSource,
    scores: ScoreInputs,
    profile: AdvantageProfile,
) -> tuple[ConductorSample, GroupAdvantages]:
    from maestro_fast.kernels import maestro_advantages as kernel

    kl, lengths = (None if x is None else x.contiguous() for x in (scores.kl, scores.lengths))
    return kernel.maestro_advantages(
        rewards.float(),
        params.contiguous_floats,
        choice,
        index_NG,
        contexts._replace(x=contiguous_columns(contexts.x)),
        ScoreInputs(kl, scores.beta, lengths),
        profile,
    )
