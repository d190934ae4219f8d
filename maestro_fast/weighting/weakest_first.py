"""Weakest first: the reward that the policy is furthest from earning in full counts most.

    m_k <- decay m_k + (1 - decay) mean of r_k over the batch                  the first batch sets it
    x_k  = (m_k - low_k) / (high_k - low_k)                                     how much of the reward is earned
    w    = softmax(-x / tau)

The idea is that of Chen et al., DRBO: Dynamic Reward Balancing (Findings of EMNLP 2025): measure each metric and raise
the weights of the weak ones, so that none is left behind. We could not establish the paper's update rule; this formula
is ours.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from maestro_fast.weighting.policy import (
    Outcome,
    WeightContext,
    Weights,
    WithoutContext,
    in_reward_order,
    live_range,
    same_weights,
)


@dataclass(frozen=True)
class WeakestFirstConfig:
    """The reward that the policy is furthest from earning in full counts most.

    Attributes:
        low: The least value of each reward, by name. For a reward that is left out, it is the least value seen so far.
        high: The greatest value of each reward, by name. For a reward that is left out, it is the greatest value seen
            so far.
        tau: The temperature of the softmax. When it is small, the weakest reward takes all the weight.
        decay: The decay of the moving mean, in [0, 1).
    """

    low: dict[str, float] = field(default_factory=dict)
    high: dict[str, float] = field(default_factory=dict)
    tau: float = 0.5
    decay: float = 0.9

    def __post_init__(self) -> None:
        if not self.tau > 0:
            raise ValueError(f"tau: {self.tau}, expected a positive number")
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay: {self.decay}, expected 0 <= decay < 1")
        for name in self.low.keys() & self.high.keys():
            if not self.low[name] < self.high[name]:
                raise ValueError(f"high.{name}: {self.high[name]}, expected more than low, {self.low[name]}")

    def build(self, reward_names: tuple[str, ...], context_size: int) -> WeakestFirst:
        """The policy for these rewards. A ValueError names an unknown reward, or a bound that is not finite."""
        del context_size
        for path, values in (("low", self.low), ("high", self.high)):
            in_reward_order(values, reward_names, path, 0.0)
        return WeakestFirst(self, reward_names)


class WeakestFirst(WithoutContext):
    """Gives a batch the weights that follow from the batches before it.

    A reward that has not been seen yet, or has had one value only, counts as half earned.
    """

    name = "weakest_first"

    def __init__(self, config: WeakestFirstConfig, reward_names: tuple[str, ...]) -> None:
        self.config, self.reward_names = config, reward_names
        nothing_K = torch.full((len(reward_names),), float("nan"))
        self._state = {"mean": nothing_K, "low": nothing_K.clone(), "high": nothing_K.clone()}

    def weights(self, context: WeightContext) -> Weights:
        """softmax(-x / tau), for every response."""
        return same_weights((-self.earned() / self.config.tau).softmax(0), context)

    def earned(self) -> Tensor:
        """x [K] in [0, 1], how much of each reward is earned."""
        low_K, high_K = self._bound("low", self.config.low), self._bound("high", self.config.high)
        span_K = high_K - low_K
        x_K = ((self._state["mean"] - low_K) / torch.where(span_K > 0, span_K, 1.0)).clamp(0, 1)
        return torch.where((span_K > 0) & x_K.isfinite(), x_K, 0.5)

    def _bound(self, side: str, configured: dict[str, float]) -> Tensor:
        """[K]: the configured bound of each reward, or else the one seen so far."""
        known_K = torch.tensor([configured.get(name, float("nan")) for name in self.reward_names])
        return torch.where(known_K.isnan(), self._state[side], known_K)

    def observe(self, outcome: Outcome) -> None:
        """Updates the moving mean and the range of each reward that did not always abstain in this batch."""
        rewards_BK = outcome.context.rewards_BK.float().cpu()
        low_K, high_K = live_range(rewards_BK, 0)
        found = {"mean": rewards_BK.nanmean(0), "low": low_K, "high": high_K}
        decay, old = self.config.decay, self._state
        merged = {
            "mean": decay * old["mean"] + (1 - decay) * found["mean"],
            "low": torch.minimum(old["low"], low_K),
            "high": torch.maximum(old["high"], high_K),
        }
        seen_K = ~rewards_BK.isnan().all(0)
        self._state = {
            key: torch.where(seen_K, torch.where(old[key].isnan(), found[key], merged[key]), old[key]) for key in old
        }

    def metrics(self) -> dict[str, float]:
        """How much of each reward is earned."""
        return {f"weakest_first/earned/{n}": x for n, x in zip(self.reward_names, self.earned().tolist(), strict=True)}

    def state_dict(self) -> dict[str, Tensor]:
        """``mean``, ``low`` and ``high``, each [K] and NaN for a reward that has always abstained."""
        return {name: tensor.clone() for name, tensor in self._state.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Takes over a ``state_dict``; anything else raises a ValueError."""
        shape = (len(self.reward_names),)
        if set(state) != set(self._state) or any(tensor.shape != shape for tensor in state.values()):
            raise ValueError(f"state: holds {sorted(state)}, expected mean, low and high of shape {shape}")
        self._state = {name: tensor.clone() for name, tensor in state.items()}
