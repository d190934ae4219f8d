"""What several ops ask of a tensor."""

from __future__ import annotations

import torch
from torch import Tensor


def wide(x: Tensor) -> Tensor:
    """The precision that ops compute in: float64 stays, everything else becomes float32."""
    return x if x.dtype == torch.float64 else x.float()


def readable(x: Tensor) -> bool:
    """Whether the host may look at the values: a CPU tensor, neither traced nor fake (which is a subclass)."""
    return x.device.type == "cpu" and type(x) is Tensor and not torch.compiler.is_compiling()


def without_autocast(x: Tensor) -> torch.autocast:
    """A context in which matrix products keep their dtype, for ops that promise float32 results."""
    return torch.autocast(x.device.type, enabled=False)


def is_integer(x: Tensor) -> bool:
    return x.dtype != torch.bool and not x.is_floating_point() and not x.is_complex()
