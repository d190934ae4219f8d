"""Checks every output against float64 on the same device before it is timed, so that no wrong answer passes unnoticed.

It also makes the inputs of the benchmarks, which are the same numbers on every machine.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.gpu_race import DEVICE, faults
from maestro_fast.ops import ConductorParams
from maestro_fast.ops.philox import uniform
from tests.kernels.helpers import assert_close


def normal(*shape: int, seed: int) -> Tensor:
    """Standard normal numbers, drawn on the CPU so that they are the same on every machine."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def head(rewards: int, size: int, units: int | None) -> ConductorParams:
    """A Conductor's network with random weights: linear, or with ``units`` hidden units."""
    inner = size if units is None else units
    hidden = (None, None) if units is None else (normal(units, size, seed=5) / size**0.5, normal(units, seed=6) / 10)
    return ConductorParams(
        normal(size, seed=1) / 4,
        normal(size, seed=2).abs() + 0.5,
        normal(rewards, inner, seed=3) / inner**0.5,
        normal(rewards, seed=4) / 10,
        *hidden,
    )


def wide(value: Any) -> Any:
    """A floating tensor, or a Conductor's network, in float64. Everything else stays as it is."""
    if isinstance(value, ConductorParams):
        return ConductorParams(*(wide(x) for x in value.tensors))
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def gate(ours: Any, plain: Any, truth: Any, *, epsilon: float, what: str) -> None:
    """Checks a tensor, or each field of a named tuple, against float64.

    Our error may not exceed that of the plain PyTorch op by more than ``epsilon``. A result that breaks the rule is
    added to the faults of the case, whose figures are then printed as wrong.
    """
    if isinstance(truth, Tensor):
        try:
            assert_close(ours, truth.detach().cpu(), plain.detach().cpu(), epsilon=epsilon, what=what)
        except AssertionError as error:
            faults.append(str(error).replace("\n", " ")[:300])
        return
    for name, one, simple, true in zip(truth._fields, ours, plain, truth, strict=True):
        gate(one, simple, true, epsilon=epsilon, what=f"{what} {name}")


def clear_seed(probs: Callable[[], Tensor]) -> int:
    """A seed for which no draw lies so near the edge between two actions that rounding of ``probs`` [B, K] decides."""
    cdf_BK = probs().double().cumsum(-1)[:, :-1]
    for seed in range(1000):
        u_B = uniform(seed, 0, 0, cdf_BK.shape[0], cdf_BK.device).double()
        if (u_B[:, None] - cdf_BK).abs().min() > 1e-5:
            return seed
    raise AssertionError("no seed below 1000 keeps off the edges")
