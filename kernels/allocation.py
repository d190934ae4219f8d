"""Outputs of a launch in one allocation: on the host an allocation takes as long as a tenth of a launch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_ALIGNED = 4  # floats: Triton compiles another variant for a pointer that 16 bytes do not divide


def empty_floats(device: torch.device, *shapes: tuple[int, ...]) -> list[Tensor]:
    """Uninitialised contiguous float32 tensors that share a storage, each aligned to 16 bytes."""
    sizes = [math.prod(shape) for shape in shapes]
    room = [-(-size // _ALIGNED) * _ALIGNED for size in sizes]
    parts = torch.empty(sum(room), device=device, dtype=torch.float32).split(room)
    return [part[:size].view(shape) for part, size, shape in zip(parts, sizes, shapes, strict=True)]
