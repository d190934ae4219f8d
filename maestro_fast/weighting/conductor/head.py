"""The trainable part of a Conductor: a linear head, or an MLP with one hidden layer. It starts at equal weights."""

from __future__ import annotations

import torch
from torch import Tensor

from maestro_fast.ops.conductor_params import ConductorParams


class Head:
    """float32 parameters on the CPU, by name.

    The last layer starts at zero. The hidden layer's weights are N(0, 1 / d), so that standardised contexts give
    hidden units of variance 1.

    Attributes:
        weight: [K, d], or [K, H] with a hidden layer; bias: [K].
        hidden_weight, hidden_bias: [H, d] and [H], or None.
    """

    def __init__(self, size: int, actions: int, hidden: int, seed: int) -> None:
        self.weight = torch.zeros(actions, hidden or size, requires_grad=True)
        self.bias = torch.zeros(actions, requires_grad=True)
        self.hidden_weight: Tensor | None = None
        self.hidden_bias: Tensor | None = None
        if hidden:
            generator = torch.Generator().manual_seed(seed % 2**63)
            drawn = torch.randn(hidden, size, generator=generator) / size**0.5
            self.hidden_weight = drawn.requires_grad_()
            self.hidden_bias = torch.zeros(hidden, requires_grad=True)

    def named(self) -> dict[str, Tensor]:
        """The parameters that there are."""
        names = ("weight", "bias", "hidden_weight", "hidden_bias")
        found = {name: getattr(self, name) for name in names}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def params(self, mean: Tensor, rstd: Tensor) -> ConductorParams:
        """With the standardisation of the contexts, as ``conductor_weights`` takes them."""
        return ConductorParams(mean, rstd, self.weight, self.bias, self.hidden_weight, self.hidden_bias)

    def groups(self, weight_decay: float) -> list[dict[str, object]]:
        """For an optimiser: biases do not decay."""
        return [
            {"params": [tensor], "weight_decay": 0.0 if name.endswith("bias") else weight_decay}
            for name, tensor in self.named().items()
        ]
