"""Running mean and variance of the contexts, merged batch by batch (Chan, Golub and LeVeque 1983)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class RunningStatistics:
    """Mean and population variance of all rows seen, in float64; frozen between calls of ``update``.

    Attributes:
        count: float64 scalar on the CPU. mean, m2: float64 [d], m2 the sum of squared deviations.
    """

    def __init__(self, size: int, device: torch.device | None = None) -> None:
        self.count = torch.zeros((), dtype=torch.float64)
        self.mean = torch.zeros(size, dtype=torch.float64, device=device)
        self.m2 = torch.zeros(size, dtype=torch.float64, device=device)

    def update(self, rows_Bd: Tensor) -> None:
        rows = rows_Bd.detach().to(self.mean)
        if rows.shape[0] == 0:
            return
        mean = rows.mean(0)
        delta = mean - self.mean
        total = self.count + rows.shape[0]
        self.m2 = self.m2 + (rows - mean).square().sum(0) + delta.square() * self.count * rows.shape[0] / total
        self.mean = self.mean + delta * rows.shape[0] / total
        self.count = total

    def standardisation(self, eps: float = 1e-5) -> tuple[Tensor, Tensor]:
        """float32 (mean [d], 1 / standard deviation [d]); (0, 1) before the first update."""
        if self.count == 0:
            return torch.zeros_like(self.mean, dtype=torch.float32), torch.ones_like(self.mean, dtype=torch.float32)
        variance = self.m2 / self.count
        return self.mean.float(), (variance + eps).rsqrt().float()

    def state_dict(self, prefix: str) -> dict[str, Tensor]:
        return {prefix + name: getattr(self, name).clone() for name in ("count", "mean", "m2")}

    def load_state_dict(self, state: Mapping[str, Tensor], prefix: str) -> None:
        for name in ("count", "mean", "m2"):
            setattr(self, name, state[prefix + name].clone().to(getattr(self, name).device))
