"""Weight policies that learn as named tensors: moments of an optimiser, and what a Conductor refuses to load."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor
from torch.optim import Optimizer

from maestro_fast.specs import ConductorParams, ConductorState


def moments(optimizer: Optimizer, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The optimiser's state of each parameter, as ``optimizer.<parameter>.<key>``."""
    return {
        f"optimizer.{name}.{key}": value.detach().clone()
        for name, parameter in parameters.items()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def load_moments(optimizer: Optimizer, parameters: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Takes over what ``moments`` gave; nothing of the optimiser's old state stays."""
    for name, parameter in parameters.items():
        prefix = f"optimizer.{name}."
        found = {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}
        optimizer.state.pop(parameter, None)
        if found:
            optimizer.state[parameter] = {key: value.clone() for key, value in found.items()}


def adamw_moments(state: ConductorState) -> dict[str, Tensor]:
    """Of a Conductor, under the names that ``moments`` has for torch.optim.AdamW; none before the first update."""
    if state.step == 0:
        return {}
    step = torch.tensor(float(state.step))
    kinds = (("exp_avg", state.first), ("exp_avg_sq", state.second))
    found = {f"optimizer.{name}.{kind}": x.cpu().clone() for kind, parts in kinds for name, x in parts.items()}
    return found | {f"optimizer.{name}.step": step.clone() for name in state.first}


def with_moments(params: ConductorParams, state: Mapping[str, Tensor]) -> ConductorState:
    """The state of these parameters whose moments ``adamw_moments`` gave."""
    fresh = ConductorState.start(params)
    if "optimizer.bias.step" not in state:
        return fresh
    for kind, parts in (("exp_avg", fresh.first), ("exp_avg_sq", fresh.second)):
        for name, x in parts.items():
            x.copy_(state[f"optimizer.{name}.{kind}"])
    return replace(fresh, step=int(state["optimizer.bias.step"]))


def check_state(state: Mapping[str, Tensor], parameters: Mapping[str, Tensor], size: int) -> None:
    """
    Raises:
        ValueError: a tensor that is missing or has another shape than a Conductor of these parameters gives it.
    """
    actions = parameters["bias"].numel()
    expected: dict[str, tuple[int, ...]] = {name: tuple(tensor.shape) for name, tensor in parameters.items()}
    expected |= {"statistics.count": (), "statistics.mean": (size,), "statistics.m2": (size,), "buffer_fresh": ()}
    if any(name.startswith("optimizer.") for name in state):
        for name, tensor in parameters.items():
            expected[f"optimizer.{name}.step"] = ()
            expected |= {f"optimizer.{name}.{kind}": tuple(tensor.shape) for kind in ("exp_avg", "exp_avg_sq")}
    for name, tensor in state.items():
        if name.startswith("buffer."):
            batch, last = tensor.shape[:1], name.split(".")[2]
            width = {"h": (size,), "rewards": (actions,)}.get(last, tuple(tensor.shape[1:]) if last == "meta" else ())
            expected[name] = () if last in ("step", "used", "group_size") else (*batch, *width)
    for name, shape in expected.items():
        if name not in state or state[name].shape != shape:
            came = f"shape {tuple(state[name].shape)}" if name in state else "missing"
            raise ValueError(f"state.{name}: {came}, expected shape {shape}")
