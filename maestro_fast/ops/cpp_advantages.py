"""Group and counterfactual advantages by C++: the launch, and the operators that ``torch.compile`` sees."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from maestro_fast.ops.cpp import _C, CPU, address, floats, library
from maestro_fast.ops.groups import Groups, GroupsLike
from maestro_fast.specs import AdvantageProfile, as_numbers


def _rewards(rewards: Tensor) -> Tensor:
    return rewards.contiguous() if rewards.dtype is torch.bfloat16 else floats(rewards)


def group_advantages(
    rewards: Tensor,
    weights: Tensor | None,
    groups: GroupsLike,
    kl: Tensor | None,
    beta: float,
    lengths: Tensor | None,
    profile: AdvantageProfile,
) -> tuple[Tensor, ...]:
    """The fields of ``GroupAdvantages``. The arguments are checked."""
    size, offsets, order = _partition(groups, rewards.shape[0])
    if torch.compiler.is_compiling():
        registered: Callable[..., tuple[Tensor, ...]] = torch.ops.maestro_fast.group_advantages
        return registered(rewards, weights, kl, float(beta), lengths, size, offsets, order, *as_numbers(profile))
    return _group_advantages(rewards, weights, kl, beta, lengths, size, offsets, order, _profile(profile))


def _group_advantages(
    rewards: Tensor,
    weights: Tensor | None,
    kl: Tensor | None,
    beta: float,
    lengths: Tensor | None,
    size: int,
    offsets: Tensor | None,
    order: Tensor | None,
    profile: _C.AdvantageProfile,
) -> tuple[Tensor, ...]:
    rewards = _rewards(rewards)
    batch = rewards.shape[0]
    K = rewards.shape[1] if rewards.ndim == 2 else 1
    weights = None if weights is None else floats(weights)
    kl = None if kl is None else floats(kl)
    lengths = None if lengths is None else floats(lengths)
    out = _empty_outputs(batch, K)
    advantages, scores, normalized, mean, std, degenerate = out
    _C.group_advantages(
        rewards.data_ptr(),
        rewards.dtype is torch.bfloat16,
        K,
        address(weights),
        weights is not None and weights.ndim == 2,
        address(kl),
        beta,
        address(lengths),
        _native_partition(size, batch) if size else _ragged(offsets, order),
        profile,
        advantages.data_ptr(),
        scores.data_ptr(),
        normalized.data_ptr(),
        mean.data_ptr(),
        std.data_ptr(),
        degenerate.data_ptr(),
        torch.get_num_threads(),
    )
    return out


def _empty_outputs(batch: int, K: int) -> tuple[Tensor, ...]:
    first, like = torch.empty(batch, dtype=torch.float32, device=CPU), torch.empty_like  # which takes half the time
    normalized = torch.empty((batch, K), dtype=torch.float32, device=CPU)
    return first, like(first), normalized, like(first), like(first), torch.empty(batch, dtype=torch.bool, device=CPU)


def counterfactual_advantages(
    rewards: Tensor,
    weights: Tensor | None,
    action_weights: Tensor,
    groups: GroupsLike,
    kl: Tensor | None,
    beta: float,
    profile: AdvantageProfile,
) -> Tensor:
    """[B, A]. The arguments are checked."""
    size, offsets, order = _partition(groups, rewards.shape[0])
    if torch.compiler.is_compiling():
        registered: Callable[..., Tensor] = torch.ops.maestro_fast.counterfactual_advantages
        return registered(rewards, weights, action_weights, kl, float(beta), size, offsets, order, *as_numbers(profile))
    return _counterfactual(rewards, weights, action_weights, kl, beta, size, offsets, order, _profile(profile))


def _counterfactual(
    rewards: Tensor,
    weights: Tensor | None,
    action_weights: Tensor,
    kl: Tensor | None,
    beta: float,
    size: int,
    offsets: Tensor | None,
    order: Tensor | None,
    profile: _C.AdvantageProfile,
) -> Tensor:
    rewards, action_weights = _rewards(rewards), floats(action_weights)
    batch, (actions, K) = rewards.shape[0], action_weights.shape
    weights = None if weights is None else floats(weights)
    kl = None if kl is None else floats(kl)
    out = torch.empty((batch, actions), dtype=torch.float32, device=CPU)
    _C.counterfactual_advantages(
        rewards.data_ptr(),
        rewards.dtype is torch.bfloat16,
        K,
        address(weights),
        weights is not None and weights.ndim == 2,
        address(kl),
        beta,
        action_weights.data_ptr(),
        actions,
        _native_partition(size, batch) if size else _ragged(offsets, order),
        profile,
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out


# --- groups and profiles ---


def _partition(groups: GroupsLike, batch: int) -> tuple[int, Tensor | None, Tensor | None]:
    """(G, None, None) for consecutive groups of G, else (0, offsets, order)."""
    if type(groups) is int and groups > 0 and batch % groups == 0:
        return groups, None, None
    known = Groups.of(groups, batch)
    if known.size:
        return known.size, None, None
    if known.offsets_N1.device.type != "cpu":
        raise ValueError(f"groups: on {known.offsets_N1.device}, expected the CPU as rewards")
    return 0, known.offsets_N1, known.order_B


@lru_cache(maxsize=1024)
def _native_partition(size: int, batch: int) -> _C.Partition:
    return _C.Partition(batch // size, batch, size, 0, 0)


def _ragged(offsets: Tensor | None, order: Tensor | None) -> _C.Partition:
    assert offsets is not None and order is not None
    return _C.Partition(offsets.numel() - 1, order.numel(), 0, offsets.data_ptr(), order.data_ptr())


def _native_profile(integers: list[int], epsilons: list[float]) -> _C.AdvantageProfile:
    reward_center, reward_scale, score_center, score_scale, ddof, raw, renormalize, in_variance = integers
    scopes = reward_center, reward_scale, score_center, score_scale
    return _C.AdvantageProfile(*scopes, epsilons[0], epsilons[1], ddof, bool(raw), bool(renormalize), bool(in_variance))


@lru_cache(maxsize=256)
def _profile(profile: AdvantageProfile) -> _C.AdvantageProfile:
    return _native_profile(*as_numbers(profile))


# --- registered operators ---

_COMMON = "int size, Tensor? offsets, Tensor? order, int[] integers, float[] epsilons"
library.define(
    f"group_advantages(Tensor rewards, Tensor? weights, Tensor? kl, float beta, Tensor? lengths, {_COMMON})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
library.define(
    "counterfactual_advantages(Tensor rewards, Tensor? weights, Tensor action_weights, Tensor? kl, float beta,"
    f" {_COMMON}) -> Tensor"
)


@torch.library.impl(library, "group_advantages", "CPU")
def _group_advantages_operator(rewards, weights, kl, beta, lengths, size, offsets, order, integers, epsilons):  # type: ignore[no-untyped-def]
    profile = _native_profile(integers, epsilons)
    return _group_advantages(rewards, weights, kl, beta, lengths, size, offsets, order, profile)


@torch.library.register_fake("maestro_fast::group_advantages", lib=library)
def _group_advantages_shapes(rewards, weights, kl, beta, lengths, size, offsets, order, integers, epsilons):  # type: ignore[no-untyped-def]
    return _empty_outputs(rewards.shape[0], rewards.shape[1] if rewards.ndim == 2 else 1)


@torch.library.impl(library, "counterfactual_advantages", "CPU")
def _counterfactual_operator(rewards, weights, action_weights, kl, beta, size, offsets, order, integers, epsilons):  # type: ignore[no-untyped-def]
    profile = _native_profile(integers, epsilons)
    return _counterfactual(rewards, weights, action_weights, kl, beta, size, offsets, order, profile)


@torch.library.register_fake("maestro_fast::counterfactual_advantages", lib=library)
def _counterfactual_shapes(rewards, weights, action_weights, kl, beta, size, offsets, order, integers, epsilons):  # type: ignore[no-untyped-def]
    return rewards.new_empty((rewards.shape[0], action_weights.shape[0]), dtype=torch.float32)
