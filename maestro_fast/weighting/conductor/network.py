"""The Conductor's network, linear or an MLP with one hidden layer, with AdamW's moments and its saved state."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from maestro_fast.specs import ConductorParams, ConductorState


class Network:
    """The float32 parameters that a Conductor learns, and AdamW's moments of them.

    The last layer starts at zero, so training starts at equal weights. The hidden layer's weights start as
    N(0, 1 / d): standardised contexts then give hidden units of variance 1. An update changes all tensors in place.

    Attributes:
        weight: the last layer's weights, [K, d] if the network is linear and [K, H] in an MLP.
        bias: the last layer's biases, [K].
        hidden_weight, hidden_bias: the hidden layer of an MLP, [H, d] and [H]; None if the network is linear.
        first, second: AdamW's moments, by the names of the parameters.
        updates: how many updates have been made.
    """

    def __init__(self, size: int, num_rewards: int, hidden: int, seed: int, device: torch.device) -> None:
        """
        Args:
            size: d, the width of a context.
            num_rewards: K.
            hidden: H, or 0 for a linear network.
            seed: decides the hidden layer's first weights.
            device: where the network lives.
        """
        self.weight = torch.zeros(num_rewards, hidden or size, device=device)
        self.bias = torch.zeros(num_rewards, device=device)
        self.hidden_weight: Tensor | None = None
        self.hidden_bias: Tensor | None = None
        if hidden:
            generator = torch.Generator().manual_seed(seed % 2**63)
            self.hidden_weight = (torch.randn(hidden, size, generator=generator) / size**0.5).to(device)
            self.hidden_bias = torch.zeros(hidden, device=device)
        self.first = {name: torch.zeros_like(x) for name, x in self.learned.items()}
        self.second = {name: torch.zeros_like(x) for name, x in self.learned.items()}
        self.updates = 0

    @property
    def learned(self) -> dict[str, Tensor]:
        """The parameters that an update changes, by name."""
        found = {name: getattr(self, name) for name in ("weight", "bias", "hidden_weight", "hidden_bias")}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def params(self, mean: Tensor, rstd: Tensor) -> ConductorParams:
        """The parameters as ``conductor_weights`` takes them, beside the mean and 1 / std of the contexts."""
        return ConductorParams(mean, rstd, self.weight, self.bias, self.hidden_weight, self.hidden_bias)

    def state(self, mean: Tensor, rstd: Tensor) -> ConductorState:
        """The parameters and moments as ``conductor_update`` takes them."""
        return ConductorState(self.params(mean, rstd), self.first, self.second, self.updates)

    def state_dict(self) -> dict[str, Tensor]:
        """The parameters by name and, after the first update, the moments as ``optimizer.<parameter>.<key>``."""
        state = dict(self.learned)
        if self.updates:
            for name in self.learned:
                state[f"optimizer.{name}.exp_avg"] = self.first[name]
                state[f"optimizer.{name}.exp_avg_sq"] = self.second[name]
                state[f"optimizer.{name}.step"] = torch.tensor(float(self.updates))
        return state

    def saved_shapes(self, state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
        """The shapes that ``load_state_dict`` expects, by name. The moments are there all together, or not at all."""
        shapes: dict[str, tuple[int, ...]] = {name: tuple(x.shape) for name, x in self.learned.items()}
        if any(name.startswith("optimizer.") for name in state):
            for name, x in self.learned.items():
                shapes[f"optimizer.{name}.step"] = ()
                shapes |= {f"optimizer.{name}.{kind}": tuple(x.shape) for kind in ("exp_avg", "exp_avg_sq")}
        return shapes

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Takes over what ``state_dict`` gave. If that holds no moments, the next update counts as the first."""
        has_moments = "optimizer.bias.step" in state
        for name, parameter in self.learned.items():
            parameter.copy_(state[name])
            for kind, moment in (("exp_avg", self.first[name]), ("exp_avg_sq", self.second[name])):
                if has_moments:
                    moment.copy_(state[f"optimizer.{name}.{kind}"])
                else:
                    moment.zero_()
        self.updates = int(state["optimizer.bias.step"]) if has_moments else 0
