"""One update of the Conductor: the meta-gradient in closed form, and a step of AdamW (arXiv 1711.05101).

    p = (1 - K m) q + m,   q = softmax(z / tau),   z = network((h - mean) * rstd)
    one drawn action per response, whose importance ratio r = min(p(a) / drawn, max_ratio) counts as a constant:
        J = mean_i [ r_i mu_i log p_i(a_i) + entropy_coef H(p_i) ]
        dJ/dp_k = 1[k = a] r mu / p_k - entropy_coef (log p_k + 1)
    all actions:
        J = mean_i [ sum_a p_i(a) mu_i(a)  + entropy_coef H(p_i) ]
        dJ/dp_k = mu_k                - entropy_coef (log p_k + 1)

    dJ/dz   = (1 - K m) / tau * q * (dJ/dp - sum_k q_k dJ/dp_k)

    linear  dW = dz^T x,   db = sum dz                                              x = (h - mean) * rstd
    MLP     dW2 = dz^T GELU(u),   du = dz W2 GELU'(u),   dW1 = du^T x,   db1 = sum du          u = W1 x + b1

mu is the meta-reward. For REINFORCE it is the advantage of the drawn action (MAESTRO, arXiv 2601.07208), from which a
baseline may be subtracted. The sum over all actions takes one meta-reward for each action. Any other objective whose
derivative by p is known, such as ``pathwise`` of ``weighting.conductor``, passes that derivative as mu of all actions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from maestro_fast.ops.backend import Backend, resolve
from maestro_fast.ops.conductor_weights import check_params
from maestro_fast.ops.gpu import operator
from maestro_fast.ops.tensors import check_tensors, contiguous_columns, is_integer, readable, without_autocast
from maestro_fast.specs import (
    ConductorBatch,
    ConductorParams,
    ConductorState,
    ConductorUpdateConfig,
    as_text,
    from_text,
)


def conductor_update(
    state: ConductorState,
    batch: ConductorBatch,
    config: ConductorUpdateConfig | None = None,
    *,
    backend: Backend | None = None,
) -> tuple[ConductorState, dict[str, Tensor]]:
    """One step of AdamW that maximises J, without a graph of autograd.

    Without a live row no tensor changes, and both metrics are 0. A CUDA graph keeps the ``step`` and the options that
    it was captured with, because they are numbers on the host.

    Args:
        state: the parameters and their moments, whose tensors **change in place**, as an optimizer's do.
        batch: the N responses to learn from.
        config: the options; None means the defaults.
        backend: "triton", "torch", or None. None means Triton on a CUDA device unless there is float64.

    Returns:
        The state after the update, which holds the same tensors and counts one more step. Then the metrics, 0-dim
        tensors of the parameters' dtype: ``objective``, J before the step, and ``grad_norm``, the 2-norm of J's
        gradient over all parameters.

    Raises:
        ValueError: a shape, device or stride does not fit, there are no rows, the moments belong to other parameters,
            an action is out of range (where the host can read it), or a number is out of its range.
        TypeError: a dtype does not fit, or an argument is something else.
    """
    config = ConductorUpdateConfig() if config is None else config
    check_update(state, batch, config)
    tensors = batch.h, batch.meta, batch.drawn_probs, *state.params.tensors
    with torch.no_grad():
        chosen = resolve("conductor_update", backend, *tensors)
        after = replace(state, step=state.step + 1)
        if chosen == "triton":
            objective, norm = _by_triton(batch.h, after, batch, config)
        else:
            objective, gradients = meta_gradient(state.params, batch, config)
            norm = torch.stack([g.square().sum() for g in gradients.values()]).sum().sqrt()
            learns = None if batch.live is None else batch.live.any()
            for name, gradient in gradients.items():
                _adamw(name, after, -gradient, config, learns)
    return after, {"objective": objective, "grad_norm": norm}


# --- checks ---


def check_update(state: ConductorState, batch: ConductorBatch, config: ConductorUpdateConfig) -> None:
    """Raises a ValueError or TypeError that names the argument."""
    if not isinstance(state, ConductorState):
        raise TypeError(f"state: got {type(state).__name__}, expected a ConductorState")
    check_experience(state.params, batch, config)
    learned = state.params.learned
    if isinstance(state.step, bool) or not isinstance(state.step, int):
        raise TypeError(f"state.step: got {type(state.step).__name__}, expected an int")
    if not 0 <= state.step < 2**62:
        raise ValueError(f"state.step: {state.step}, expected the number of updates so far")
    for kind in ("first", "second"):
        moments = getattr(state, kind)
        if not isinstance(moments, Mapping):
            raise TypeError(f"state.{kind}: got {type(moments).__name__}, expected tensors by name")
        if moments.keys() != learned.keys():
            raise ValueError(f"state.{kind}: of {', '.join(moments) or 'nothing'}, expected {', '.join(learned)}")
        for name, x in learned.items():
            moment = moments[name]
            check_tensors(1, **{f"state.{kind}.{name}": moment})
            if (moment.shape, moment.dtype, moment.device) != (x.shape, x.dtype, x.device):
                came = f"{moment.dtype} {tuple(moment.shape)} on {moment.device}"
                raise ValueError(
                    f"state.{kind}.{name}: {came}, expected {x.dtype} {tuple(x.shape)} on {x.device} as the parameter"
                )
            if not moment.is_contiguous():
                raise ValueError(f"state.{kind}.{name}: strides {moment.stride()}, expected a contiguous tensor")
    for name, x in learned.items():
        if x.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"state.params.{name}: dtype {x.dtype}, expected float32 or float64")
        if not x.is_contiguous():
            raise ValueError(f"state.params.{name}: strides {x.stride()}, expected a contiguous tensor")


def check_experience(params: ConductorParams, batch: ConductorBatch, config: ConductorUpdateConfig) -> None:
    """Checks batch and config against the parameters; raises a ValueError or TypeError that names the argument."""
    if not isinstance(batch, ConductorBatch):
        raise TypeError(f"batch: got {type(batch).__name__}, expected a ConductorBatch")
    if not isinstance(config, ConductorUpdateConfig):
        raise TypeError(f"config: got {type(config).__name__}, expected a ConductorUpdateConfig")
    check_tensors(2, h=batch.h, meta=batch.meta, actions=batch.actions, drawn_probs=batch.drawn_probs, live=batch.live)
    if not batch.h.is_floating_point():
        raise TypeError(f"h: dtype {batch.h.dtype}, expected a floating dtype")
    check_params(batch.h, params)
    rows, K = batch.h.shape[0], params.num_rewards
    if rows == 0:
        raise ValueError(f"h: shape {tuple(batch.h.shape)}, expected at least one row")
    if not config.min_prob < 1 / K:
        raise ValueError(f"min_prob: {config.min_prob}, expected 0 <= min_prob < 1 / K = {1 / K:.4g}")
    if batch.actions is None and batch.drawn_probs is not None:
        raise ValueError("drawn_probs: given without actions, expected the actions that they belong to")
    wanted = {"meta": (rows, K) if batch.actions is None else (rows,)}
    for name in ("meta", "actions", "drawn_probs", "live"):
        x, shape = getattr(batch, name), wanted.get(name, (rows,))
        if x is None:
            continue
        if x.shape != shape:
            beside = "" if name != "meta" else f" with{'out' if batch.actions is None else ''} actions"
            raise ValueError(f"{name}: shape {tuple(x.shape)}, expected {shape}{beside}")
        if x.device != batch.h.device:
            raise ValueError(f"{name}: on {x.device}, expected {batch.h.device} as h")
        _check_dtype(name, x)
    actions = batch.actions
    if actions is not None and readable(actions) and not bool(((actions >= 0) & (actions < K)).all()):
        raise ValueError(f"actions: from {int(actions.min())} to {int(actions.max())}, expected 0 <= action < {K}")


def _check_dtype(name: str, x: Tensor) -> None:
    if name == "actions" and not is_integer(x):
        raise TypeError(f"actions: dtype {x.dtype}, expected a signed integer dtype")
    if name == "live" and x.dtype != torch.bool:
        raise TypeError(f"live: dtype {x.dtype}, expected bool")
    if name in ("meta", "drawn_probs") and not x.is_floating_point():
        raise TypeError(f"{name}: dtype {x.dtype}, expected a floating dtype")


# --- the reference ---


def meta_gradient(
    params: ConductorParams, batch: ConductorBatch, config: ConductorUpdateConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    """J as a scalar tensor, and its gradient by the parameters' names, in their dtype. Neither is differentiable.

    Raises:
        ValueError, TypeError: see ``conductor_update``.
    """
    check_experience(params, batch, config)
    with torch.no_grad(), without_autocast(batch.h):
        live = torch.ones_like(batch.h[:, 0], dtype=torch.bool) if batch.live is None else batch.live
        share = 1.0 / live.sum().clamp(min=1).to(params.weight.dtype)
        h = torch.where(live[:, None], batch.h.to(params.mean.dtype), params.mean)
        x_Nd = (h - params.mean) * params.rstd
        features, slope = x_Nd, None
        if params.hidden_weight is not None:
            u_NH = functional.linear(x_Nd, params.hidden_weight, params.hidden_bias)
            below_NH = 0.5 * (1.0 + torch.erf(u_NH * math.sqrt(0.5)))
            features, slope = u_NH * below_NH, below_NH + u_NH * (-0.5 * u_NH**2).exp() / math.sqrt(2 * math.pi)
        d_logits_NK, gain_N = logit_gradient(functional.linear(features, params.weight, params.bias), batch, config)
        d_logits_NK = torch.where(live[:, None], d_logits_NK, 0.0) * share
        gradients = {"weight": d_logits_NK.T @ features, "bias": d_logits_NK.sum(0)}
        if slope is not None:
            d_u_NH = d_logits_NK @ params.weight * slope
            gradients |= {"hidden_weight": d_u_NH.T @ x_Nd, "hidden_bias": d_u_NH.sum(0)}
        return torch.where(live, gain_N, 0.0).sum() * share, gradients


def logit_gradient(logits_NK: Tensor, batch: ConductorBatch, config: ConductorUpdateConfig) -> tuple[Tensor, Tensor]:
    """dJ/dz [N, K] and J [N] of each row, as if it were the only one. Rows that are not live are computed, too."""
    span = 1.0 - logits_NK.shape[-1] * config.min_prob
    q_NK = (logits_NK / config.tau).softmax(-1)
    p_NK = span * q_NK + config.min_prob
    possible_NK = p_NK != 0  # without a floor p may be 0, where nothing has a finite derivative
    log_NK = torch.where(possible_NK, p_NK, 1.0).log()
    meta = batch.meta.to(p_NK.dtype)
    if batch.actions is None:
        slope_NK, gain_N = meta, (p_NK * meta).sum(-1)
    else:
        actions_N1 = batch.actions.long()[:, None]
        chosen_N = p_NK.gather(1, actions_N1)[:, 0]
        if batch.drawn_probs is not None:
            meta = meta * (chosen_N / batch.drawn_probs.to(p_NK.dtype)).clamp(max=config.max_ratio)
        pull_N = meta / torch.where(chosen_N > 0, chosen_N, 1.0)
        slope_NK = torch.zeros_like(p_NK).scatter(1, actions_N1, pull_N[:, None])
        gain_N = meta * log_NK.gather(1, actions_N1)[:, 0]
    slope_NK = torch.where(possible_NK, slope_NK - config.entropy_coef * (log_NK + 1.0), 0.0)
    centred_NK = slope_NK - (q_NK * slope_NK).sum(-1, keepdim=True)
    return span / config.tau * q_NK * centred_NK, gain_N - config.entropy_coef * (p_NK * log_NK).sum(-1)


def _adamw(
    name: str, state: ConductorState, gradient: Tensor, config: ConductorUpdateConfig, learns: Tensor | None
) -> None:
    """One step on one parameter, by the operations of torch.optim.AdamW. If ``learns`` is False, nothing changes."""
    parameter, first, second = state.params.learned[name], state.first[name], state.second[name]
    decay = 0.0 if name.endswith("bias") else config.weight_decay
    new_first = first.lerp(gradient, 1 - config.beta1)
    new_second = (second * config.beta2).addcmul(gradient, gradient, value=1 - config.beta2)
    step_size = config.learning_rate / (1 - config.beta1**state.step)
    divisor = (new_second.sqrt() / (1 - config.beta2**state.step) ** 0.5) + config.eps
    moved = (parameter * (1 - config.learning_rate * decay)).addcdiv(new_first, divisor, value=-step_size)
    for old, new in ((parameter, moved), (first, new_first), (second, new_second)):
        old.copy_(new if learns is None else torch.where(learns, new, old))


# --- Triton ---

_LEARNED = ("weight", "bias", "hidden_weight", "hidden_bias")


def _flat(h: Tensor, state: ConductorState, batch: ConductorBatch, config: ConductorUpdateConfig) -> tuple[Any, ...]:
    """The arguments of ``_by_triton`` as the operator takes them."""
    moments = (x.get(name) for x in (state.first, state.second) for name in _LEARNED)
    given = batch.meta, batch.actions, batch.drawn_probs, batch.live
    return (h, *state.params.tensors, *moments, *given, state.step, as_text(config))


def _whole(h: Tensor, *given: Any) -> tuple[Any, ...]:
    """The opposite of ``_flat``."""
    tensors, experience, (step, config) = given[:14], given[14:18], given[18:]
    first, second = (
        {name: x for name, x in zip(_LEARNED, moments, strict=True) if x is not None}
        for moments in (tensors[6:10], tensors[10:14])
    )
    state = ConductorState(ConductorParams(*tensors[:6]), first, second, step)
    return h, state, ConductorBatch(h, *experience), from_text(ConductorUpdateConfig, config)


@operator(
    "triton_conductor_update(Tensor h, Tensor mean, Tensor rstd, Tensor(a!) weight, Tensor(b!) bias,"
    " Tensor(c!)? hidden_weight, Tensor(d!)? hidden_bias, Tensor(e!) weight_first, Tensor(f!) bias_first,"
    " Tensor(g!)? hidden_weight_first, Tensor(h!)? hidden_bias_first, Tensor(i!) weight_second, Tensor(j!) bias_second,"
    " Tensor(k!)? hidden_weight_second, Tensor(l!)? hidden_bias_second, Tensor meta, Tensor? actions,"
    " Tensor? drawn_probs, Tensor? live, int step, str config) -> (Tensor, Tensor)",
    lambda h, mean, rstd, weight, *rest: (weight.new_empty(()), weight.new_empty(())),
    flat=_flat,
    whole=_whole,
)
def _by_triton(
    h: Tensor, state: ConductorState, batch: ConductorBatch, config: ConductorUpdateConfig
) -> tuple[Tensor, Tensor]:
    """Objective and norm of the gradient. ``h`` is ``batch.h``, and ``state.step`` counts this update already."""
    from maestro_fast.kernels import conductor_update as kernel

    others = (batch.meta, batch.actions, batch.drawn_probs, batch.live)
    meta, actions, drawn_probs, live = (None if x is None else x.contiguous() for x in others)
    assert meta is not None
    contiguous = ConductorBatch(contiguous_columns(h), meta, actions, drawn_probs, live)
    made = kernel.activations(contiguous.h, state.params)
    update = kernel.conductor_update(state, contiguous, config, made)
    return update.objective, update.grad_norm
