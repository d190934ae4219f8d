"""How tensors reach the Triton kernels: on a CUDA device (or in Triton's interpreter), without a graph of autograd.

Triton is imported with the first kernel that is called, not by ``import maestro_fast.ops``. Every launch of an op is
decorated with ``operator``.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from maestro_fast.ops.tensors import PLAIN, P, R, as_operator

__all__ = ["obstacle", "on_its_device", "operator"]

_INSTALLED = importlib.util.find_spec("triton") is not None


def obstacle(tensors: tuple[Tensor | None, ...], *, chosen: bool, differentiable: bool = False) -> str | None:
    """The reason why the Triton kernels cannot serve these tensors, or None if they can.

    Args:
        tensors: all tensors that the op reads; None stands for an optional tensor that is missing.
        chosen: whether the caller asked for Triton by name. Then Triton's interpreter (TRITON_INTERPRET=1) may serve
            tensors on the CPU, for tests.
        differentiable: whether the op has a backward pass of its own.
    """
    if not _INSTALLED:
        return "triton is not installed"
    for x in tensors:
        if x is None:
            continue
        if type(x) not in PLAIN and not torch.compiler.is_compiling():
            return f"got a {type(x).__name__}, expected plain tensors"
        if not x.is_cuda and not (chosen and x.is_cpu and os.environ.get("TRITON_INTERPRET") == "1"):
            return f"got a tensor on {x.device}, expected a CUDA device"
        if x.dtype is torch.float64:
            return "got float64, expected float32, float16 or bfloat16"
        if x.requires_grad and torch.is_grad_enabled() and not differentiable:
            return "a gradient is wanted, which it does not compute"
    if forward_ad._current_level >= 0:
        return "forward-mode derivatives are wanted, which it does not compute"
    return None


def operator(
    signature: str,
    shapes: Callable[..., Any],
    *,
    flat: Callable[..., Any] | None = None,
    whole: Callable[..., Any] | None = None,
    result: Callable[..., Any] | None = None,
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A decorator that makes a launch an op of its own, for eager calls and for ``torch.compile``.

    An eager call runs the launch itself, on the device of the first tensor. Under ``torch.compile`` the arguments pass
    through a registered operator, which takes and returns only tensors, numbers and strings. So ``flat`` takes records
    of arguments apart before the operator, ``whole`` puts them together again for the launch, and ``result`` makes the
    launch's result from the operator's outputs. These outputs are all tensors in the launch's result, in their order.
    The launch is called with positional arguments. Its outputs must not share a storage.

    Args:
        signature: the operator's signature as ``torch.library`` takes it, without the namespace.
        shapes: makes empty outputs from the operator's arguments, for fake tensors.
        flat: makes the operator's arguments from those of the launch; None where they are the same.
        whole: is the opposite of ``flat``.
        result: makes the launch's result; None where the launch returns a tensor or a plain tuple of tensors.
    """

    def decorate(launch: Callable[P, R]) -> Callable[P, R]:
        guarded = on_its_device(launch)
        devices = {"CUDA": guarded, "CPU": launch}
        return as_operator(guarded, signature, shapes, flat=flat, whole=whole, result=result, devices=devices)

    return decorate


def on_its_device(launch: Callable[P, R]) -> Callable[P, R]:
    """Makes the device of the launch's first tensor current, because Triton launches on the current device.

    The first argument of the launch is this tensor, or a list that begins with it.
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
