"""How tensors reach the Triton kernels: on a CUDA device (or in Triton's interpreter), without a graph of autograd.

Triton is imported when the first kernel is wanted: ``import maestro_fast.ops`` does without. In eager mode an op
launches its kernel itself; ``torch.compile`` takes the operator registered beside it, which it does not look into.
"""

from __future__ import annotations

import importlib.util
import os

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
