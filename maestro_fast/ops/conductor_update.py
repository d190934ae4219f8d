"""One update of the Conductor: the meta-gradient in closed form, and a step of AdamW (arXiv 1711.05101).

    p = (1 - K m) q + m,   q = softmax(z / tau),   z = head((h - mean) * rstd)
    J = mean_i [ r_i mu_i log p_i(a_i) + entropy_coef H(p_i) ]         actions drawn; r = min(p(a) / drawn, max_ratio)
    J = mean_i [ sum_a p_i(a) mu_i(a)  + entropy_coef H(p_i) ]         all actions

    dJ/dp_k = 1[k = a] r mu / p_k - entropy_coef (log p_k + 1)         r counts as a constant
    dJ/dp_k = mu_k                - entropy_coef (log p_k + 1)
    dJ/dz   = (1 - K m) / tau * q * (dJ/dp - sum_k q_k dJ/dp_k)

    linear  dW = dz^T x,   db = sum dz                                              x = (h - mean) * rstd
    MLP     dW2 = dz^T GELU(u),   du = dz W2 GELU'(u),   dW1 = du^T x,   db1 = sum du          u = W1 x + b1

mu is REINFORCE's with the advantage of the drawn action (MAESTRO, arXiv 2601.07208), the baseline estimator's with that
minus its expectation, and the sum over all actions with one value for each. Anything else whose derivative by p is
known, such as ``pathwise`` of ``weighting.conductor``, goes in as that derivative for all actions.
"""

from __future__ import annotations

import math
from dataclasses import astuple, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from maestro_fast.ops.backend import Backend, resolve
from maestro_fast.ops.conductor_state import check_experience, check_update
from maestro_fast.ops.conductor_weights import kernel_rows
from maestro_fast.ops.gpu import operator
from maestro_fast.ops.tensors import without_autocast
from maestro_fast.specs import ConductorBatch, ConductorParams, ConductorState, ConductorUpdateConfig


def conductor_update(
    state: ConductorState,
    batch: ConductorBatch,
    config: ConductorUpdateConfig | None = None,
    *,
    backend: Backend | None = None,
) -> tuple[ConductorState, dict[str, Tensor]]:
    """One step of AdamW that maximises J, without a graph of autograd.

    Args:
        state: the head and its moments, whose tensors **change in place**, as an optimiser's do.
        batch: N responses.
        config: options; the defaults if None.
        backend: "triton", "torch", or None: Triton on a CUDA device unless there is float64.

    Returns:
        The state after it, with one more step, holding the same tensors. Metrics, 0-dim tensors of the parameters'
        dtype: ``objective``, J before the step, and ``grad_norm``, the 2-norm of its gradient over all parameters.

    Without a live row no tensor changes and both metrics are 0. ``step`` and the options are numbers of the host: a
    CUDA graph holds those that it was captured with.

    Raises:
        ValueError: shapes, devices, strides, no rows, moments of other parameters, actions out of range (where the
            host can look at them), or a number out of its range.
        TypeError: dtypes.
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


def meta_gradient(
    params: ConductorParams, batch: ConductorBatch, config: ConductorUpdateConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    """J, 0-dim, and its gradient by the names of the parameters, in the parameters' dtype; not differentiable.

    Raises:
        ValueError, TypeError: as ``conductor_update``.
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
    """dJ/dz [N, K] and J [N] of each row by itself, as if it were the only one; whether it is live does not matter."""
    span = 1.0 - logits_NK.shape[-1] * config.min_prob
    q_NK = (logits_NK / config.tau).softmax(-1)
    p_NK = span * q_NK + config.min_prob
    possible_NK = p_NK > 0  # without a floor p may be 0, where nothing has a finite derivative
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
    """As torch.optim.AdamW does it, operation by operation; nothing where ``learns`` is False."""
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
    moments = (x.get(name) for x in (state.first, state.second) for name in _LEARNED)
    given = batch.meta, batch.actions, batch.drawn_probs, batch.live
    return (h, *state.params.tensors, *moments, *given, state.step, [float(x) for x in astuple(config)])


def _whole(*given: Any) -> tuple[Any, ...]:
    h, tensors, experience, step, config = given[0], given[1:15], given[15:19], given[19], given[20]
    first, second = (
        {name: x for name, x in zip(_LEARNED, tensors[at : at + 4], strict=True) if x is not None} for at in (6, 10)
    )
    state = ConductorState(ConductorParams(*tensors[:6]), first, second, step)
    return h, state, ConductorBatch(h, *experience), ConductorUpdateConfig(*config)


@operator(
    "triton_conductor_update(Tensor h, Tensor mean, Tensor rstd, Tensor(a!) weight, Tensor(b!) bias,"
    " Tensor(c!)? hidden_weight, Tensor(d!)? hidden_bias, Tensor(e!) weight_first, Tensor(f!) bias_first,"
    " Tensor(g!)? hidden_weight_first, Tensor(h!)? hidden_bias_first, Tensor(i!) weight_second, Tensor(j!) bias_second,"
    " Tensor(k!)? hidden_weight_second, Tensor(l!)? hidden_bias_second, Tensor meta, Tensor? actions,"
    " Tensor? drawn_probs, Tensor? live, int step, float[] config) -> (Tensor, Tensor)",
    lambda *given: (given[3].new_empty(()), given[3].new_empty(())),
    flat=_flat,
    whole=_whole,
)
def _by_triton(
    h: Tensor, state: ConductorState, batch: ConductorBatch, config: ConductorUpdateConfig
) -> tuple[Tensor, Tensor]:
    """Objective and norm of the gradient; ``state.step`` counts this update. ``h`` is the batch's."""
    from maestro_fast.kernels import conductor_update as kernel

    h, params = kernel_rows(h), state.params
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
