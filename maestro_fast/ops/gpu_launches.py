"""Launches of the Triton kernels, on arguments that the ops have checked."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from maestro_fast.ops.conductor_params import ConductorParams
from maestro_fast.ops.conductor_state import ConductorBatch, ConductorState, ConductorUpdateConfig
from maestro_fast.ops.gpu import floats
from maestro_fast.ops.profiles import AdvantageProfile

Choice = tuple[float, float, float, bool, int, int, int]  # tau, min_prob, alpha, soft, seed, step, offset


def group_advantages(
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
    from maestro_fast.kernels import conductor_weights as kernel

    return kernel.conductor_weights(_rows(h), _plain(params), _draw(params.weight.shape[0], choice), soft=choice[3])


def conductor_update(
    state: ConductorState, batch: ConductorBatch, config: ConductorUpdateConfig
) -> tuple[Tensor, Tensor]:
    """Objective and norm of the gradient; ``state.step`` counts this update."""
    from maestro_fast.kernels import conductor_update as kernel

    h, params = _rows(batch.h), state.params
    others = (batch.actions, batch.meta, batch.drawn_probs, batch.live)
    actions, meta, drawn_probs, live = (None if x is None else x.contiguous() for x in others)
    assert meta is not None
    update = kernel.conductor_update(
        h,
        actions,
        meta,
        params,
        {name: kernel.Moments(first, state.second[name]) for name, first in state.first.items()},
        kernel.activations(h, params),
        tau=config.tau,
        min_prob=config.min_prob,
        entropy_coef=config.entropy_coef,
        adamw=kernel.AdamW(
            state.step, config.learning_rate, config.weight_decay, config.beta1, config.beta2, config.eps
        ),
        drawn_probs=drawn_probs,
        max_ratio=config.max_ratio,
        live=live,
    )
    return update.objective, update.grad_norm


def maestro_advantages(
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
        rewards.float(),
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
