"""How tensors reach the Triton kernels: on a CUDA device (or in Triton's interpreter), without a graph of autograd.

Triton is imported when the first kernel is wanted: ``import maestro_fast.ops`` does without. ``operator`` is the one
way from an op to its launch: eager calls run the launch itself, ``torch.compile`` takes the operator that is registered
beside it, which it does not look into.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

library = torch.library.Library("maestro_fast", "FRAGMENT")
_INSTALLED = importlib.util.find_spec("triton") is not None
_PLAIN = (Tensor, torch.nn.Parameter)
_P = ParamSpec("_P")
_R = TypeVar("_R")


def obstacle(tensors: tuple[Tensor | None, ...], *, chosen: bool, differentiable: bool = False) -> str | None:
    """Why the Triton kernels cannot serve these tensors, or None.

    Args:
        chosen: by name: then Triton's interpreter may serve tensors on the CPU (TRITON_INTERPRET=1), for tests.
        differentiable: the op has a backward pass of its own.
    """
    if not _INSTALLED:
        return "triton is not installed"
    for x in tensors:
        if x is None:
            continue
        if type(x) not in _PLAIN and not torch.compiler.is_compiling():
            return f"got a {type(x).__name__}, expected plain tensors"
        if not x.is_cuda and not (chosen and os.environ.get("TRITON_INTERPRET") == "1"):
            return f"got a tensor on {x.device}, expected a CUDA device"
        if x.dtype is torch.float64:
            return "got float64, expected float32, float16 or bfloat16"
        if x.requires_grad and torch.is_grad_enabled() and not differentiable:
            return "a gradient is wanted, which it does not compute"
    if forward_ad._current_level >= 0:
        return "forward-mode derivatives are wanted, which it does not compute"
    return None


def floats(x: Tensor) -> Tensor:
    """Contiguous float32."""
    return (x if x.dtype is torch.float32 else x.float()).contiguous()


def operator(
    signature: str,
    shapes: Callable[..., Any],
    *,
    flat: Callable[..., Sequence[Any]] | None = None,
    whole: Callable[..., Sequence[Any]] | None = None,
) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """Makes a launch an op of its own, for eager calls and for ``torch.compile``.

    The launch gets its arguments as they are in an eager call. Under ``torch.compile`` they pass through a registered
    operator, which takes tensors, numbers and strings alone: ``flat`` takes records apart, ``whole`` puts them
    together.
    The outputs of a launch must not share a storage.

    Args:
        signature: of the registered operator, as ``torch.library`` takes it, without the namespace.
        shapes: the operator's arguments to empty outputs, for fake tensors.
        flat, whole: between the launch's positional arguments and the operator's; None where they are the same.
    """

    def decorate(launch: Callable[_P, _R]) -> Callable[_P, _R]:
        guarded = on_its_device(launch)

        def run(*given: Any) -> Any:
            outputs = launch(*(given if whole is None else whole(*given)))  # type: ignore[call-arg]
            return tuple(outputs) if isinstance(outputs, tuple) else outputs  # of no class of ours

        define(signature, run, shapes)
        registered = getattr(torch.ops.maestro_fast, signature.partition("(")[0])

        @functools.wraps(launch)
        def call(*arguments: Any) -> Any:
            if torch.compiler.is_compiling():
                return registered(*(arguments if flat is None else flat(*arguments)))
            return guarded(*arguments)  # type: ignore[call-arg]

        return call  # type: ignore[return-value]

    return decorate


def on_its_device(launch: Callable[_P, _R]) -> Callable[_P, _R]:
    """The launch with the device of its first tensor made current: Triton launches on the current device.

    The first argument is that tensor, or a list that begins with it.
    """

    @functools.wraps(launch)
    def run(*arguments: Any) -> Any:
        first = arguments[0]
        device = (first[0] if isinstance(first, list) else first).device
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                return launch(*arguments)  # type: ignore[call-arg]
        return launch(*arguments)  # type: ignore[call-arg]

    return run  # type: ignore[return-value]


def define(signature: str, launch: Callable[..., Any], shapes: Callable[..., Any]) -> None:
    """Registers an operator of ours that compilation does not look into.

    Args:
        signature: as ``torch.library`` takes it, without the namespace.
        launch: its work, on the device of its first argument, a tensor, or in Triton's interpreter.
        shapes: the same arguments to empty outputs.
    """
    name = signature.partition("(")[0]
    library.define(signature)
    library.impl(name, on_its_device(launch), "CUDA")
    library.impl(name, launch, "CPU")
    torch.library.register_fake(f"maestro_fast::{name}", shapes, lib=library)
