"""The state of a Conductor as named tensors: moments of its optimiser, and what is refused when a state is loaded."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from torch.optim import Optimizer


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


def check_state(state: Mapping[str, Tensor], parameters: Mapping[str, Tensor], size: int) -> None:
    """
    Raises:
        ValueError: a tensor that is missing or has another shape than a Conductor of these parameters gives it.
    """
    actions = parameters["bias"].numel()
    expected: dict[str, tuple[int, ...]] = {name: tuple(tensor.shape) for name, tensor in parameters.items()}
    expected |= {"statistics.count": (), "statistics.mean": (size,), "statistics.m2": (size,), "buffer_fresh": ()}
    for name in state:
        if name.startswith("optimizer."):
            parameter = name.split(".")[1]
            expected[name] = () if name.endswith(".step") else expected.get(parameter, ())
    for name, tensor in state.items():
        if name.startswith("buffer."):
            batch, last = tensor.shape[:1], name.split(".")[2]
            width = {"h": (size,), "rewards": (actions,)}.get(last, tuple(tensor.shape[1:]) if last == "meta" else ())
            expected[name] = () if last in ("step", "used", "group_size") else (*batch, *width)
    for name, shape in expected.items():
        if name not in state or state[name].shape != shape:
            came = f"shape {tuple(state[name].shape)}" if name in state else "missing"
            raise ValueError(f"state.{name}: {came}, expected shape {shape}")
