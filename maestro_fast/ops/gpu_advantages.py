"""Advantages and the Conductor's weights by Triton: the launches, and the operators that compilation sees."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple
from typing import Any

import torch
from torch import Tensor

from maestro_fast.ops import gpu_launches
from maestro_fast.ops.conductor_params import ConductorParams
from maestro_fast.ops.conductor_state import ConductorBatch, ConductorState, ConductorUpdateConfig
from maestro_fast.ops.gpu import define
from maestro_fast.ops.groups import Groups, GroupsLike
from maestro_fast.ops.profiles import AdvantageProfile, as_numbers, from_numbers

Choice = gpu_launches.Choice
_LEARNED = ("weight", "bias", "hidden_weight", "hidden_bias")


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
        return registered(*arguments, *as_numbers(profile))
    return gpu_launches.group_advantages(*arguments, profile)


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
        return registered(*arguments, *as_numbers(profile))
    return gpu_launches.counterfactual_advantages(*arguments, profile)


def conductor_weights(h: Tensor, params: ConductorParams, choice: Choice) -> tuple[Tensor, ...]:
    """The fields of ``ConductorSample``. The arguments are checked."""
    if torch.compiler.is_compiling():
        registered: Callable[..., tuple[Tensor, ...]] = torch.ops.maestro_fast.triton_conductor_weights
        return registered(h, *params.tensors, *_halved(choice))
    return gpu_launches.conductor_weights(h, params, choice)


def conductor_update(
    state: ConductorState, batch: ConductorBatch, config: ConductorUpdateConfig
) -> tuple[Tensor, Tensor]:
    """Objective and norm of the gradient; ``state.step`` counts this update. The arguments are checked."""
    if torch.compiler.is_compiling():
        registered: Callable[..., tuple[Tensor, Tensor]] = torch.ops.maestro_fast.triton_conductor_update
        moments = (x.get(name) for x in (state.first, state.second) for name in _LEARNED)
        given = batch.h, batch.meta, batch.actions, batch.drawn_probs, batch.live
        return registered(*state.params.tensors, *moments, *given, state.step, [float(x) for x in astuple(config)])
    return gpu_launches.conductor_update(state, batch, config)


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
        return registered(*head, *_halved(choice), *tail, *as_numbers(profile))
    return gpu_launches.maestro_advantages(rewards, params, choice, *tail, profile)


def _halved(choice: Choice) -> tuple[float | int | bool, ...]:
    """An operator's integers are signed: the seed goes in two halves."""
    tau, min_prob, alpha, soft, seed, step, offset = choice
    return float(tau), float(min_prob), float(alpha), soft, seed & 0xFFFFFFFF, seed >> 32, step, offset


# --- registered operators ---

_GROUPED = "Tensor? kl, float beta"
_PROFILE = "int[] integers, float[] epsilons"
_PARAMS = "Tensor mean, Tensor rstd, Tensor weight, Tensor bias, Tensor? hidden_weight, Tensor? hidden_bias"
_CHOICE = "float tau, float min_prob, float alpha, bool soft, int seed_low, int seed_high, int step, int offset"


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


def _state(given: tuple[Any, ...]) -> ConductorState:
    first, second = (
        {name: x for name, x in zip(_LEARNED, given[at : at + 4], strict=True) if x is not None} for at in (6, 10)
    )
    return ConductorState(ConductorParams(*given[:6]), first, second, given[19])


def _choice(arguments: tuple[Any, ...]) -> Choice:
    tau, min_prob, alpha, soft, low, high, step, offset = arguments
    return tau, min_prob, alpha, soft, low | high << 32, step, offset


define(
    f"triton_group_advantages(Tensor rewards, Tensor? weights, {_GROUPED}, Tensor? lengths, Tensor index, {_PROFILE})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    lambda rewards, weights, kl, beta, lengths, index, integers, epsilons: gpu_launches.group_advantages(
        rewards, weights, kl, beta, lengths, index, from_numbers(integers, epsilons)
    ),
    lambda rewards, *rest: _advantage_shapes(rewards),
)
define(
    f"triton_counterfactual_advantages(Tensor rewards, Tensor? weights, Tensor actions, {_GROUPED}, Tensor index,"
    f" {_PROFILE}) -> Tensor",
    lambda rewards, weights, actions, kl, beta, index, integers, epsilons: gpu_launches.counterfactual_advantages(
        rewards, weights, actions, kl, beta, index, from_numbers(integers, epsilons)
    ),
    lambda rewards, weights, actions, *rest: rewards.new_empty(
        (rewards.shape[0], actions.shape[0]), dtype=torch.float32
    ),
)
define(
    f"triton_conductor_weights(Tensor h, {_PARAMS}, {_CHOICE}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    lambda h, *rest: gpu_launches.conductor_weights(h, ConductorParams(*rest[:6]), _choice(rest[6:])),
    lambda h, *rest: _sample_shapes(h.shape[0], rest[2]),
)
define(
    "triton_conductor_update(Tensor mean, Tensor rstd, Tensor(a!) weight, Tensor(b!) bias, Tensor(c!)? hidden_weight,"
    " Tensor(d!)? hidden_bias, Tensor(e!) weight_first, Tensor(f!) bias_first, Tensor(g!)? hidden_weight_first,"
    " Tensor(h!)? hidden_bias_first, Tensor(i!) weight_second, Tensor(j!) bias_second,"
    " Tensor(k!)? hidden_weight_second, Tensor(l!)? hidden_bias_second, Tensor h, Tensor meta,"
    " Tensor? actions, Tensor? drawn_probs, Tensor? live, int step, float[] config) -> (Tensor, Tensor)",
    lambda *given: gpu_launches.conductor_update(
        _state(given), ConductorBatch(*given[14:19]), ConductorUpdateConfig(*given[20])
    ),
    lambda *given: (given[2].new_empty(()), given[2].new_empty(())),
)
define(
    f"triton_maestro_advantages(Tensor rewards, {_PARAMS}, {_CHOICE}, Tensor index, Tensor x, str source,"
    f" Tensor? start, Tensor? length, {_GROUPED}, Tensor? lengths, {_PROFILE})"
    f" -> ({', '.join(['Tensor'] * 11)})",
    lambda rewards, *rest: gpu_launches.maestro_advantages(
        rewards, ConductorParams(*rest[:6]), _choice(rest[6:14]), *(*rest[14:-2], from_numbers(*rest[-2:]))
    ),
    lambda rewards, *rest: (*_sample_shapes(rewards.shape[0], rest[2]), *_advantage_shapes(rewards)),
)
