"""How tensors reach the Triton kernels: on a CUDA device (or in Triton's interpreter), without a graph of autograd.

Triton is imported when the first kernel is wanted: ``import maestro_fast.ops`` does without. In eager mode an op
launches its kernel itself; ``torch.compile`` takes the operator registered beside it, which it does not look into.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

library = torch.library.Library("maestro_fast", "FRAGMENT")
_INSTALLED = importlib.util.find_spec("triton") is not None
_PLAIN = (Tensor, torch.nn.Parameter)


def obstacle(tensors: tuple[Tensor | None, ...], *, chosen: bool, differentiable: bool = False) -> str | None:
    """Why the Triton kernels cannot serve these tensors, or None.

    Args:
        chosen: by name: then Triton's interpreter may serve tensors on the CPU (TRITON_INTERPRET=1), for tests.
        differentiable: the op has a backward pass of its own.
    """
    given = [x for x in tensors if x is not None]
    if not _INSTALLED:
        return "triton is not installed"
    for x in given:
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


def define(signature: str, launch: Callable[..., Any], shapes: Callable[..., Any]) -> None:
    """Registers an operator of ours that compilation does not look into.

    Args:
        signature: as ``torch.library`` takes it, without the namespace.
        launch: its work, on a CUDA device or in Triton's interpreter.
        shapes: the same arguments to empty outputs.
    """

    def run(*arguments: Any) -> Any:
        return _apart(launch(*arguments))

    name = signature.partition("(")[0]
    library.define(signature)
    library.impl(name, run, "CUDA")
    library.impl(name, run, "CPU")
    torch.library.register_fake(f"maestro_fast::{name}", shapes, lib=library)


def _apart(outputs: Any) -> Any:
    """An operator's results must not share a storage, which those of an eager launch do to save allocations."""
    if outputs is None or isinstance(outputs, Tensor):
        return outputs
    seen: set[int] = set()
    apart = []
    for x in outputs:
        storage = x.untyped_storage().data_ptr()
        apart.append(x.clone() if storage in seen else x)
        seen.add(storage)
    return tuple(apart)
