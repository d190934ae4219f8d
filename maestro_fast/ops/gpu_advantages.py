"""Advantages, the Conductor's weights and pooling by Triton: the launches, and the operators that compilation sees."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from maestro_fast.ops.conductor_params import ConductorParams
from maestro_fast.ops.gpu import floats, library
from maestro_fast.ops.groups import Groups, GroupsLike
from maestro_fast.ops.profiles import AdvantageProfile

Choice = tuple[float, float, float, bool, int, int, int]  # tau, min_prob, alpha, soft, seed, step, offset


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
    index_NG = Groups.of(groups, rewards.shape[0]).to(rewards.device).index_NG
    arguments = rewards, weights, kl, float(beta), lengths, index_NG
    if torch.compiler.is_compiling():
        registered: Callable[..., tuple[Tensor, ...]] = torch.ops.maestro_fast.triton_group_advantages
        return registered(*arguments, *_fields(profile))
    return _group_advantages(*arguments, profile)


def _group_advantages(
    rewards: Tensor,
    weights: Tensor | None,
    kl: Tensor | None,
    beta: float,
    lengths: Tensor | None,
    index_NG: Tensor,
    profile: AdvantageProfile,
) -> tuple[Tensor, ...]:
    from maestro_fast.kernels import group_advantages as kernel

    rewards_BK, weights_BK = _matrices(rewards, weights)
    kl, lengths = (None if x is None else x.contiguous() for x in (kl, lengths))
    return kernel.group_advantages(rewards_BK, weights_BK, index_NG, profile=profile, kl=kl, beta=beta, lengths=lengths)


def counterfactual_advantages(
    rewards: Tensor,
    weights: Tensor | None,
    action_weights: Tensor,
    groups: GroupsLike,
    kl: Tensor | None,
    beta: float,
    profile: AdvantageProfile,
) -> Tensor:
    """[B, A]. The arguments are checked.

    Raises:
        ValueError: a group is larger than the kernel's tile.
    """
    index_NG = Groups.of(groups, rewards.shape[0]).to(rewards.device).index_NG
    arguments = rewards, weights, action_weights, kl, float(beta), index_NG
    if torch.compiler.is_compiling():
        registered: Callable[..., Tensor] = torch.ops.maestro_fast.triton_counterfactual_advantages
        return registered(*arguments, *_fields(profile))
    return _counterfactual_advantages(*arguments, profile)


def _counterfactual_advantages(
    rewards: Tensor,
    weights: Tensor | None,
    action_weights: Tensor,
    kl: Tensor | None,
    beta: float,
    index_NG: Tensor,
    profile: AdvantageProfile,
) -> Tensor:
    from maestro_fast.kernels import counterfactual_advantages as kernel

    rewards_BK, weights_BK = _matrices(rewards, weights)
    kl = None if kl is None else kl.contiguous()
    return kernel.counterfactual_advantages(
        rewards_BK, weights_BK, floats(action_weights), index_NG, profile=profile, kl=kl, beta=beta
    )


def conductor_weights(h: Tensor, params: ConductorParams, choice: Choice) -> tuple[Tensor, ...]:
    """The fields of ``ConductorSample``. The arguments are checked."""
    if torch.compiler.is_compiling():
        registered: Callable[..., tuple[Tensor, ...]] = torch.ops.maestro_fast.triton_conductor_weights
        return registered(h, *params.tensors, *_halved(choice))
    return _conductor_weights(h, params, choice)


def _conductor_weights(h: Tensor, params: ConductorParams, choice: Choice) -> tuple[Tensor, ...]:
    from maestro_fast.kernels import conductor_weights as kernel

    return kernel.conductor_weights(_rows(h), _plain(params), _draw(params.weight.shape[0], choice), soft=choice[3])


def pool_hidden(flat: Tensor, start_B: Tensor, length_B: Tensor, mean: bool, longest: int | None) -> Tensor:
    """float32 [B, d]. The arguments are checked."""
    if torch.compiler.is_compiling():
        registered: Callable[..., Tensor] = torch.ops.maestro_fast.triton_pool_hidden
        return registered(flat, start_B, length_B, mean, longest)
    return _pool_hidden(flat, start_B, length_B, mean, longest)


def _pool_hidden(flat: Tensor, start_B: Tensor, length_B: Tensor, mean: bool, longest: int | None) -> Tensor:
    from maestro_fast.kernels import pool_hidden as kernel

    return kernel.pool_hidden(_rows(flat), start_B, length_B, mean=mean, longest=longest)


def maestro_advantages(
    rewards: Tensor,
    params: ConductorParams,
    choice: Choice,
    groups: GroupsLike,
    x: Tensor,
    source: str,
    start_B: Tensor | None,
    length_B: Tensor | None,
    kl: Tensor | None,
    beta: float,
    lengths: Tensor | None,
    profile: AdvantageProfile,
) -> tuple[Tensor, ...] | None:
    """The five fields of ``ConductorSample``, then the six of ``GroupAdvantages``, from contexts ``x`` [B, d] (source
    "context") or hidden states [T, d] ("last", "mean"). None where a group is larger than the fused kernel's tile: the
    single ops serve it. The arguments are checked."""
    from maestro_fast.kernels.maestro_advantages import LARGEST_GROUP

    grouping = Groups.of(groups, rewards.shape[0])
    if grouping.index_NG.shape[1] > LARGEST_GROUP:
        return None
    index_NG = grouping.to(rewards.device).index_NG
    head, tail = (rewards, *params.tensors), (index_NG, x, source, start_B, length_B, kl, float(beta), lengths)
    if torch.compiler.is_compiling():
        registered: Callable[..., tuple[Tensor, ...]] = torch.ops.maestro_fast.triton_maestro_advantages
        return registered(*head, *_halved(choice), *tail, *_fields(profile))
    return _maestro_advantages(rewards, params, choice, *tail, profile)


def _maestro_advantages(
    rewards: Tensor,
    params: ConductorParams,
    choice: Choice,
    index_NG: Tensor,
    x: Tensor,
    source: str,
    start_B: Tensor | None,
    length_B: Tensor | None,
    kl: Tensor | None,
    beta: float,
    lengths: Tensor | None,
    profile: AdvantageProfile,
) -> tuple[Tensor, ...]:
    from maestro_fast.kernels import maestro_advantages as kernel

    kl, lengths = (None if y is None else y.contiguous() for y in (kl, lengths))
    sample, out = kernel.maestro_advantages(
        floats(rewards) if rewards.dtype is not torch.float32 else rewards,
        _plain(params),
        _draw(params.weight.shape[0], choice),
        index_NG,
        _rows(x),
        soft=choice[3],
        source=source,
        start_B=start_B,
        length_B=length_B,
        profile=profile,
        kl=kl,
        beta=beta,
        lengths=lengths,
    )
    return (*sample, *out)


# --- arguments as the kernels take them ---


def _matrices(rewards: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """float32 [B, K], weights expanded: a stride of 0 costs nothing."""
    rewards_BK = rewards.float() if rewards.ndim == 2 else rewards.float()[:, None]
    weights = rewards_BK.new_ones(1) if weights is None else weights.float()
    return rewards_BK, weights.expand_as(rewards_BK)


def _rows(x: Tensor) -> Tensor:
    """Columns contiguous, as the kernels read them."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _plain(params: ConductorParams) -> ConductorParams:
    if all(x is None or (x.dtype is torch.float32 and x.is_contiguous()) for x in params.tensors):
        return params
    return ConductorParams(*(None if x is None else floats(x) for x in params.tensors))  # type: ignore[arg-type]


def _draw(rewards: int, choice: Choice) -> Any:
    from maestro_fast.kernels.conductor_weights import Draw

    tau, min_prob, alpha, _, seed, step, offset = choice
    return Draw.of(rewards, tau=tau, min_prob=min_prob, alpha=alpha, seed=seed, step=step, offset=offset)


_ORDER: tuple[Any, ...] = ("none", "group", "batch", "leave_one_out", "tokens")


def _fields(profile: AdvantageProfile) -> tuple[list[int], list[float]]:
    """A profile as an operator can take it: integers and epsilons."""
    scopes = profile.reward_center, profile.reward_scale, profile.score_center, profile.score_scale
    switches = profile.singleton == "raw", profile.missing == "renormalize", profile.score_eps_in == "variance"
    integers = [*(_ORDER.index(scope) for scope in scopes), profile.ddof, *map(int, switches)]
    return integers, [float(profile.reward_eps), float(profile.score_eps)]


def _profile(integers: list[int], epsilons: list[float]) -> AdvantageProfile:
    return _known_profile(tuple(integers), tuple(epsilons))


@lru_cache(maxsize=256)
def _known_profile(integers: tuple[int, ...], epsilons: tuple[float, ...]) -> AdvantageProfile:
    *scopes, ddof, raw, renormalize, in_variance = integers
    reward_center, reward_scale, score_center, score_scale = (_ORDER[scope] for scope in scopes)
    return AdvantageProfile(
        reward_center,
        reward_scale,
        score_center,
        score_scale,
        reward_eps=epsilons[0],
        score_eps=epsilons[1],
        ddof=ddof,
        singleton="raw" if raw else "zero",
        missing="renormalize" if renormalize else "zero",
        score_eps_in="variance" if in_variance else "std",
    )


def _halved(choice: Choice) -> tuple[float | int | bool, ...]:
    """An operator's integers are signed: the seed goes in two halves."""
    tau, min_prob, alpha, soft, seed, step, offset = choice
    return float(tau), float(min_prob), float(alpha), soft, seed & 0xFFFFFFFF, seed >> 32, step, offset


# --- registered operators ---

_GROUPED = "Tensor? kl, float beta"
_PROFILE = "int[] integers, float[] epsilons"
_PARAMS = "Tensor mean, Tensor rstd, Tensor weight, Tensor bias, Tensor? hidden_weight, Tensor? hidden_bias"
_CHOICE = "float tau, float min_prob, float alpha, bool soft, int seed_low, int seed_high, int step, int offset"


def _define(signature: str, launch: Callable[..., Any], shapes: Callable[..., Any]) -> None:
    def run(*arguments: Any) -> Any:
        return _apart(launch(*arguments))

    name = signature.partition("(")[0]
    library.define(signature)
    library.impl(name, run, "CUDA")
    library.impl(name, run, "CPU")  # Triton's interpreter
    torch.library.register_fake(f"maestro_fast::{name}", shapes, lib=library)


def _apart(outputs: Any) -> Any:
    """An operator's results must not share a storage, which those of an eager launch do to save allocations."""
    if isinstance(outputs, Tensor):
        return outputs
    seen: set[int] = set()
    apart = []
    for x in outputs:
        storage = x.untyped_storage().data_ptr()
        apart.append(x.clone() if storage in seen else x)
        seen.add(storage)
    return tuple(apart)


def _advantage_shapes(rewards: Tensor) -> tuple[Tensor, ...]:
    batch, K = rewards.shape[0], rewards.shape[1] if rewards.ndim == 2 else 1
    one = [rewards.new_empty(batch, dtype=torch.float32) for _ in range(4)]
    normalized = rewards.new_empty((batch, K), dtype=torch.float32)
    return one[0], one[1], normalized, one[2], one[3], rewards.new_empty(batch, dtype=torch.bool)


def _sample_shapes(batch: int, weight: Tensor) -> tuple[Tensor, ...]:
    def floating(*shape: int) -> Tensor:
        return weight.new_empty(shape, dtype=torch.float32)

    K, actions = weight.shape[0], weight.new_empty(batch, dtype=torch.int64)
    return floating(batch, K), actions, floating(batch), floating(batch), floating(batch, K)


def _choice(arguments: tuple[Any, ...]) -> Choice:
    tau, min_prob, alpha, soft, low, high, step, offset = arguments
    return tau, min_prob, alpha, soft, low | high << 32, step, offset


_define(
    f"triton_group_advantages(Tensor rewards, Tensor? weights, {_GROUPED}, Tensor? lengths, Tensor index, {_PROFILE})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    lambda rewards, weights, kl, beta, lengths, index, integers, epsilons: _group_advantages(
        rewards, weights, kl, beta, lengths, index, _profile(integers, epsilons)
    ),
    lambda rewards, *rest: _advantage_shapes(rewards),
)
_define(
    f"triton_counterfactual_advantages(Tensor rewards, Tensor? weights, Tensor actions, {_GROUPED}, Tensor index,"
    f" {_PROFILE}) -> Tensor",
    lambda rewards, weights, actions, kl, beta, index, integers, epsilons: _counterfactual_advantages(
        rewards, weights, actions, kl, beta, index, _profile(integers, epsilons)
    ),
    lambda rewards, weights, actions, *rest: rewards.new_empty(
        (rewards.shape[0], actions.shape[0]), dtype=torch.float32
    ),
)
_define(
    f"triton_conductor_weights(Tensor h, {_PARAMS}, {_CHOICE}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    lambda h, *rest: _conductor_weights(h, ConductorParams(*rest[:6]), _choice(rest[6:])),
    lambda h, *rest: _sample_shapes(h.shape[0], rest[2]),
)
_define(
    "triton_pool_hidden(Tensor flat, Tensor start, Tensor length, bool mean, int? longest) -> Tensor",
    _pool_hidden,
    lambda flat, start, *rest: flat.new_empty((start.shape[0], flat.shape[1]), dtype=torch.float32),
)
_define(
    f"triton_maestro_advantages(Tensor rewards, {_PARAMS}, {_CHOICE}, Tensor index, Tensor x, str source,"
    f" Tensor? start, Tensor? length, {_GROUPED}, Tensor? lengths, {_PROFILE})"
    f" -> ({', '.join(['Tensor'] * 11)})",
    lambda rewards, *rest: _maestro_advantages(
        rewards, ConductorParams(*rest[:6]), _choice(rest[6:14]), *(*rest[14:-2], _profile(*rest[-2:]))
    ),
    lambda rewards, *rest: (*_sample_shapes(rewards.shape[0], rest[2]), *_advantage_shapes(rewards)),
)
