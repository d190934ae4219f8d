"""The adaptive step: hidden states -> context -> reward weights -> advantages."""

from __future__ import annotations

from torch import Tensor

from maestro_fast.ops import gpu_advantages
from maestro_fast.ops.backend import Backend, resolve
from maestro_fast.ops.conductor_params import ConductorParams
from maestro_fast.ops.conductor_weights import ConductorSample, WeightMode, check_choice, conductor_weights
from maestro_fast.ops.group_advantages import GroupAdvantages, check_inputs, check_lengths, group_advantages
from maestro_fast.ops.groups import GroupsLike
from maestro_fast.ops.philox import check_key
from maestro_fast.ops.pool_hidden import PoolMode, pool_hidden, segments
from maestro_fast.ops.profiles import AdvantageProfile, resolve_profile


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
            or a gradient to compute. With C++, pooling and the first layer of an MLP head are PyTorch's; Triton takes
            one launch for a linear head on contexts or last states, two for an MLP head or a mean, three for an MLP
            head on means, and the launches of the single ops for groups of more than 64.

    Raises:
        ValueError, TypeError: as the ops it is made of, and unless exactly one of ``h`` and ``hidden`` is given.
    """
    if (h is None) == (hidden is None):
        raise ValueError("h, hidden: expected exactly one of them")
    if rewards.ndim != 2 or rewards.shape[1] != conductor.num_rewards:
        raise ValueError(f"rewards: shape {tuple(rewards.shape)}, expected [B, {conductor.num_rewards}]")
    chosen = resolve("maestro_advantages", backend, rewards, h, hidden, *conductor.tensors, kl, lengths)
    if chosen == "triton":
        fused = _fused(
            rewards,
            conductor,
            groups,
            (h, hidden, cu_seqlens, pool, prompt_lengths),
            (tau, min_prob, alpha, mode, seed, step, offset),
            (kl, beta, lengths, resolve_profile(profile)),
        )
        if fused is not None:
            return fused
    if h is None:
        assert hidden is not None
        pooled_by: Backend = "triton" if chosen == "triton" else "torch"
        h = pool_hidden(hidden, cu_seqlens=cu_seqlens, mode=pool, prompt_lengths=prompt_lengths, backend=pooled_by)
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
    if contexts != len(rewards):
        raise ValueError(f"{name}: {contexts} contexts, expected {len(rewards)} as rewards")


def _fused(
    rewards: Tensor,
    conductor: ConductorParams,
    groups: GroupsLike,
    contexts: tuple[Tensor | None, Tensor | None, Tensor | None, PoolMode, Tensor | None],
    chance: tuple[float, float, float, WeightMode, int, int, int],
    comparison: tuple[Tensor | None, float, Tensor | None, AdvantageProfile],
) -> tuple[ConductorSample, GroupAdvantages] | None:
    """All in one or two Triton launches; None for groups that are too large for it."""
    (h, hidden, cu_seqlens, pool, prompt_lengths), (tau, min_prob, alpha, mode, *key) = contexts, chance
    kl, beta, lengths, profile = comparison
    source, start_B, length_B, x = "context", None, None, h
    if hidden is not None:
        _, start_B, length_B, x = segments(hidden, pool, prompt_lengths, None, None, cu_seqlens)
        source = "last" if pool.endswith("last") else "mean"
        _check_contexts(len(start_B), "cu_seqlens", rewards)
    else:
        assert h is not None
        _check_contexts(len(h), "h", rewards)
    assert x is not None
    check_choice(x, conductor, tau, min_prob, alpha, mode)
    check_inputs(rewards, None, kl, beta, profile)
    check_lengths(lengths, rewards, profile)
    if mode == "sample":
        check_key(*key)
    choice = (tau, min_prob, alpha, mode == "soft", *(key if mode == "sample" else (0, 0, 0)))
    done = gpu_advantages.maestro_advantages(
        rewards, conductor, choice, groups, x, source, start_B, length_B, kl, beta, lengths, profile
    )
    return None if done is None else (ConductorSample(*done[:5]), GroupAdvantages(*done[5:]))
