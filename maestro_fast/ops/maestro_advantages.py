"""The adaptive step: hidden states -> context -> reward weights -> advantages."""

from __future__ import annotations

from torch import Tensor

from maestro_fast.ops.backend import Backend, resolve
from maestro_fast.ops.conductor_weights import ConductorParams, ConductorSample, WeightMode, conductor_weights
from maestro_fast.ops.group_advantages import GroupAdvantages, group_advantages
from maestro_fast.ops.groups import GroupsLike
from maestro_fast.ops.pool_hidden import PoolMode, pool_hidden
from maestro_fast.ops.profiles import AdvantageProfile


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
        backend: "cpp", "torch", or None: C++ on the CPU unless there is float64 or a gradient to compute. Pooling and
            the first layer of an MLP head are PyTorch's in either.

    Raises:
        ValueError, TypeError: as the ops it is made of, and unless exactly one of ``h`` and ``hidden`` is given.
    """
    if (h is None) == (hidden is None):
        raise ValueError("h, hidden: expected exactly one of them")
    if rewards.ndim != 2 or rewards.shape[1] != conductor.num_rewards:
        raise ValueError(f"rewards: shape {tuple(rewards.shape)}, expected [B, {conductor.num_rewards}]")
    if h is None:
        assert hidden is not None
        h = pool_hidden(hidden, cu_seqlens=cu_seqlens, mode=pool, prompt_lengths=prompt_lengths)
    if h.shape[:1] != rewards.shape[:1]:
        name = "h" if hidden is None else "cu_seqlens"
        raise ValueError(f"{name}: {len(h)} contexts, expected {len(rewards)} as rewards")
    chosen = resolve("maestro_advantages", backend, rewards, h, *conductor.tensors, kl, lengths)
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
