"""Checks of what the Conductor's ops are given."""

from __future__ import annotations

import torch
from torch import Tensor

from maestro_fast.ops.tensors import is_integer, readable
from maestro_fast.specs import ConductorBatch, ConductorParams, ConductorState, ConductorUpdateConfig


def check_params(h: Tensor, params: ConductorParams) -> None:
    """Raises ValueError or TypeError that names the parameter; it stands before every launch, so it has to be quick."""
    if h.ndim != 2 or h.shape[1:] != params.mean.shape:
        raise ValueError(f"h: shape {tuple(h.shape)}, expected [B, d] with d = {params.mean.numel()}")
    mean, rstd, weight, bias, hidden_weight, hidden_bias = params.tensors
    assert rstd is not None and weight is not None and bias is not None
    if (hidden_weight is None) != (hidden_bias is None):
        raise ValueError("params: hidden_weight or hidden_bias alone, expected both or neither")
    size, actions = h.shape[1], weight.shape[0]
    inner = size if hidden_weight is None else hidden_weight.shape[0]
    device, dtype = h.device, weight.dtype
    for name, tensor, shape in (
        ("mean", mean, (size,)),
        ("rstd", rstd, (size,)),
        ("weight", weight, (actions, inner)),
        ("bias", bias, (actions,)),
        ("hidden_weight", hidden_weight, (inner, size)),
        ("hidden_bias", hidden_bias, (inner,)),
    ):
        if tensor is None:
            continue
        if tensor.shape != shape:
            raise ValueError(f"params.{name}: shape {tuple(tensor.shape)}, expected {shape}")
        if tensor.dtype is not dtype or not dtype.is_floating_point:
            raise TypeError(f"params.{name}: dtype {tensor.dtype}, expected one floating dtype for all")
        if tensor.device != device:
            raise ValueError(f"params.{name}: on {tensor.device}, expected {device} as h")


def check_update(state: ConductorState, batch: ConductorBatch, config: ConductorUpdateConfig) -> None:
    """Raises ValueError or TypeError that names the argument."""
    check_experience(state.params, batch, config)
    learned = state.params.learned
    if state.step < 0:
        raise ValueError(f"state.step: {state.step}, expected the number of updates so far")
    for kind in ("first", "second"):
        moments = getattr(state, kind)
        if moments.keys() != learned.keys():
            raise ValueError(f"state.{kind}: of {', '.join(moments) or 'nothing'}, expected {', '.join(learned)}")
        for name, x in learned.items():
            moment = moments[name]
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
        raise TypeError(f"actions: dtype {x.dtype}, expected an integer dtype")
    if name == "live" and x.dtype != torch.bool:
        raise TypeError(f"live: dtype {x.dtype}, expected bool")
    if name in ("meta", "drawn_probs") and not x.is_floating_point():
        raise TypeError(f"{name}: dtype {x.dtype}, expected a floating dtype")
