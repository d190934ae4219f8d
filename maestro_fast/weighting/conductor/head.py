"""The trainable part of a Conductor: a linear head, or an MLP with one hidden layer. It starts at equal weights."""

from __future__ import annotations

import torch
from torch import Tensor

from maestro_fast.specs import ConductorParams


class Head:
    """float32 parameters, by name.

    The last layer starts at zero. The hidden layer's weights are N(0, 1 / d), so that standardised contexts give
    hidden units of variance 1.

    Attributes:
        weight: [K, d], or [K, H] with a hidden layer; bias: [K].
        hidden_weight, hidden_bias: [H, d] and [H], or None.
    """

    def __init__(self, size: int, actions: int, hidden: int, seed: int, device: torch.device) -> None:
        self.weight = torch.zeros(actions, hidden or size, device=device)
        self.bias = torch.zeros(actions, device=device)
        self.hidden_weight: Tensor | None = None
        self.hidden_bias: Tensor | None = None
        if hidden:
            generator = torch.Generator().manual_seed(seed % 2**63)
            self.hidden_weight = (torch.randn(hidden, size, generator=generator) / size**0.5).to(device)
            self.hidden_bias = torch.zeros(hidden, device=device)

    def params(self, mean: Tensor, rstd: Tensor) -> ConductorParams:
        """With the standardisation of the contexts, as ``conductor_weights`` takes them."""
        return ConductorParams(mean, rstd, self.weight, self.bias, self.hidden_weight, self.hidden_bias)
