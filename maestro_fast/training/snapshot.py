"""What a generation batch changes beside the policy, as it was before: for the checkpoint of a run that fails in it."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from maestro_fast.training.metrics import MetricMeans
from maestro_fast.weighting import WeightPolicy


@dataclass(frozen=True)
class Snapshot:
    """State of the weight policy, of the figures not logged yet, and of the random generators of this process."""

    weights: dict[str, Tensor]
    means: dict[str, tuple[float, int]]
    python: Any
    numpy: Any
    host: Tensor
    device: Tensor | None

    @staticmethod
    def take(weights: WeightPolicy, means: MetricMeans, device: torch.device) -> Snapshot:
        """``device``: where the policy draws."""
        return Snapshot(
            weights.state_dict(),
            means.state(),
            random.getstate(),
            np.random.get_state(),
            torch.get_rng_state(),
            torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        )

    def restore(self, weights: WeightPolicy, device: torch.device) -> MetricMeans:
        """Puts all of it back, and returns the figures."""
        weights.load_state_dict(self.weights)
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.host)
        if self.device is not None:
            torch.cuda.set_rng_state(self.device, device)
        return MetricMeans.of(self.means)
