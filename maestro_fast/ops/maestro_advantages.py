"""The adaptive step: hidden states -> context -> reward weights -> advantages."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from maestro_fast.ops.backend import Backend, resolve
from maestro_fast.ops.conductor_weights import (
    CHOICE,
    PARAMS,
    Choice,
    ConductorSample,
    WeightMode,
    check_choice,
    conductor_weights,
    kernel_draw,
    kernel_rows,
    sample_shapes,
)
from maestro_fast.ops.gpu import operator
from maestro_fast.ops.group_advantages import (
    GroupAdvantages,
    advantage_shapes,
    check_inputs,
    check_lengths,
    group_advantages,
)
from maestro_fast.ops.groups import Groups, GroupsLike
from maestro_fast.ops.philox import check_key
from maestro_fast.ops.pool_hidden import PoolMode, layout, pool_hidden
from maestro_fast.specs import AdvantageProfile, ConductorParams, as_text, from_text, resolve_profile


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
    """Weights from the Conductor and the advantages under them (MAESTRO, arXiv 2601.07208).

    Args:
        rewards: [B, K], NaN where a reward abstained.
        conductor: the head's parameters.
        groups: as in ``group_advantages``.
        h: [B, d] contexts, or
        hidden, cu_seqlens: packed [T, d] hidden states and their int [B + 1] bounds, pooled by ``pool``
            (``prompt_lengths`` int [B] for its prompt modes).
        tau, min_prob, alpha, mode, seed, step, offset: as in ``conductor_weights``.
        kl, beta, lengths, profile: as in ``group_advantages``.
        backend: "cpp", "triton", "torch", or None: C++ on the CPU and Triton on a CUDA device, unless there is float64
            or a gradient to compute. With C++, pooling and the first layer of an MLP head are PyTorch's. Triton takes
            two launches for a linear head; one more for an MLP head, groups of more than 32, and profiles with a batch
            or token scope; and one more for means.

    Raises:
        ValueError, TypeError: as the ops it is made of, and unless exactly one of ``h`` and ``hidden`` is given.
    """
    if (h is None) == (hidden is None):
        raise ValueError("h, hidden: expected exactly one of them")
    if rewards.ndim != 2 or rewards.shape[1] != conductor.num_rewards:
        raise ValueError(f"rewards: shape {tuple(rewards.shape)}, expected [B, {conductor.num_rewards}]")
    chosen = resolve("maestro_advantages", backend, rewards, h, hidden, *conductor.tensors, kl, lengths)
    if chosen == "triton":
        return _fused(
            rewards,
            conductor,
            groups,
            (h, hidden, cu_seqlens, pool, prompt_lengths),
            (tau, min_prob, alpha, mode, seed, step, offset),
            (kl, beta, lengths, resolve_profile(profile)),
        )
    if h is None:
        assert hidden is not None
        h = pool_hidden(hidden, cu_seqlens=cu_seqlens, mode=pool, prompt_lengths=prompt_lengths, backend="torch")
    _check_contexts(len(h), "h" if hidden is None else "cu_seqlens", rewards)
    sample = conductor_weights(
        h,
        conductor,
        tau=tau,
        min_prob=min_prob,
        alpha=alpha,
        mode=mode,
        seed=seed,
        step=step,
        offset=offset,
        backend=chosen,
    )
    advantages = group_advantages(
        rewards, sample.weights, groups, kl=kl, beta=beta, lengths=lengths, profile=profile, backend=chosen
    )
    return sample, advantages


def _check_contexts(contexts: int, name: str, rewards: Tensor) -> None:
    if contexts != rewards.shape[0]:
        raise ValueError(f"{name}: {contexts} contexts, expected {rewards.shape[0]} as rewards")


def _fused(
    rewards: Tensor,
    conductor: ConductorParams,
    groups: GroupsLike,
    contexts: tuple[Tensor | None, Tensor | None, Tensor | None, PoolMode, Tensor | None],
    chance: tuple[float, float, float, WeightMode, int, int, int],
    comparison: tuple[Tensor | None, float, Tensor | None, AdvantageProfile],
) -> tuple[ConductorSample, GroupAdvantages]:
    """All of it by Triton, from the contexts or straight from the hidden states."""
    (h, hidden, cu_seqlens, pool, prompt_lengths), (tau, min_prob, alpha, mode, *key) = contexts, chance
    kl, beta, lengths, profile = comparison
    source, bounds, limit_B, x = "context", None, None, h
    if hidden is not None:
        x, bounds, limit_B, _ = layout(hidden, pool, prompt_lengths, None, None, cu_seqlens)
        source = "last" if pool.endswith("last") else "mean"
        assert bounds is not None
        _check_contexts(bounds.shape[0] - 1, "cu_seqlens", rewards)
    else:
        assert h is not None
        _check_contexts(h.shape[0], "h", rewards)
    assert x is not None
    check_choice(x, conductor, tau, min_prob, alpha, mode)
    check_inputs(rewards, None, kl, beta, profile)
    check_lengths(lengths, rewards, profile)
    if mode == "sample":
        check_key(*key)
    choice = Choice(tau, min_prob, alpha, mode == "soft", *(key if mode == "sample" else (0, 0, 0)))
    index_NG = Groups.of(groups, rewards.shape[0]).to(rewards.device).index_NG
    done = _by_triton(
        rewards, conductor, choice, index_NG, x, source, bounds, limit_B, kl, float(beta), lengths, profile
    )
    return ConductorSample(*done[:5]), GroupAdvantages(*done[5:])


@operator(
    f"triton_maestro_advantages(Tensor rewards, {PARAMS}, {CHOICE}, Tensor index, Tensor x, str source,"
    " Tensor? bounds, Tensor? limit, Tensor? kl, float beta, Tensor? lengths, str profile)"
    f" -> ({', '.join(['Tensor'] * 11)})",
    lambda rewards, *rest: (*sample_shapes(rewards.shape[0], rest[2]), *advantage_shapes(rewards)),
    flat=lambda rewards, params, choice, *rest: (
        *(rewards, *params.tensors, *choice.plain()),
        *(*rest[:-1], as_text(rest[-1])),
    ),
    whole=lambda rewards, *rest: (
        *(rewards, ConductorParams(*rest[:6]), Choice.of_plain(rest[6:14])),
        *(*rest[14:-1], from_text(AdvantageProfile, rest[-1])),
    ),
)
def _by_triton(
    rewards: Tensor,
    params: ConductorParams,
    choice: Choice,
    index_NG: Tensor,
    x: Tensor,
    source: str,
    bounds: Tensor | None,
    limit_B: Tensor | None,
    kl: Tensor | None,
    beta: float,
    lengths: Tensor | None,
    profile: AdvantageProfile,
) -> tuple[Any, ...]:
    """The five fields of ``ConductorSample``, then the six of ``GroupAdvantages``.

    Contexts ``x`` are [B, d] (source "context") or hidden states [T, d] ("last", "mean").
    """
    from maestro_fast.kernels import maestro_advantages as kernel

    kl, lengths = (None if y is None else y.contiguous() for y in (kl, lengths))
    sample, out = kernel.maestro_advantages(
        rewards.float(),
        params.contiguous_floats,
        kernel_draw(params.num_rewards, choice),
        index_NG,
        kernel_rows(x),
        soft=choice.soft,
        source=source,
        bounds=bounds,
        limit_B=limit_B,
        profile=profile,
        kl=kl,
        beta=beta,
        lengths=lengths,
    )
    return (*sample, *out)
