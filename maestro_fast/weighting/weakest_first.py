"""Weakest first: the reward that the policy is furthest from earning in full counts most.

    m_k <- decay m_k + (1 - decay) mean of r_k over the batch                  the first batch sets it
    x_k  = (m_k - low_k) / (high_k - low_k)                                     how much of the reward is earned
    w    = softmax(-x / tau)

The idea is that of Chen et al., DRBO: Dynamic Reward Balancing (Findings of EMNLP 2025): measure each metric, raise the
weight of the weak ones, so that none is left behind. We could not establish its update rule; this formula is ours.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from maestro_fast.weighting.policy import Outcome, WeightContext, Weights, WithoutContext
from maestro_fast.weighting.values import in_order


@dataclass(frozen=True)
class WeakestFirstConfig:
    """Options of ``weakest_first``.

    Attributes:
        low, high: the range of a reward, by name; where not given, the range of values seen so far.
        tau: temperature; small: the weakest reward takes all the weight.
        decay: of the moving mean, in [0, 1).
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
        del context_size
        for path, values in (("low", self.low), ("high", self.high)):
            in_order(values, reward_names, path, 0.0)
        return WeakestFirst(self, reward_names)


class WeakestFirst(WithoutContext):
    """Weights of a batch follow from the batches before it; a reward not seen yet counts as half earned."""

    name = "weakest_first"

    def __init__(self, config: WeakestFirstConfig, reward_names: tuple[str, ...]) -> None:
        self.config, self.reward_names = config, reward_names
        nothing_K = torch.full((len(reward_names),), float("nan"))
        self._state = {"mean": nothing_K, "low": nothing_K.clone(), "high": nothing_K.clone()}

    def weights(self, context: WeightContext) -> Weights:
        row_K = (-self.earned() / self.config.tau).softmax(0)
        weights_BK = row_K.to(context.rewards_BK).expand_as(context.rewards_BK)
        return Weights(weights_BK, weights_BK)

    def earned(self) -> Tensor:
        """x [K] in [0, 1]."""
        low_K, high_K = self._range("low", self.config.low), self._range("high", self.config.high)
        span_K = high_K - low_K
        x_K = ((self._state["mean"] - low_K) / torch.where(span_K > 0, span_K, 1.0)).clamp(0, 1)
        return torch.where((span_K > 0) & x_K.isfinite(), x_K, 0.5)

    def _range(self, side: str, given: dict[str, float]) -> Tensor:
        known_K = torch.tensor([given.get(name, float("nan")) for name in self.reward_names])
        return torch.where(known_K.isnan(), self._state[side], known_K)

    def observe(self, outcome: Outcome) -> None:
        rewards_BK = outcome.context.rewards_BK.float().cpu()
        live_BK = ~rewards_BK.isnan()
        found = {
            "mean": rewards_BK.nanmean(0),
            "low": torch.where(live_BK, rewards_BK, float("inf")).amin(0),
            "high": torch.where(live_BK, rewards_BK, float("-inf")).amax(0),
        }
        decay, old = self.config.decay, self._state
        merged = {
            "mean": decay * old["mean"] + (1 - decay) * found["mean"],
            "low": torch.minimum(old["low"], found["low"]),
            "high": torch.maximum(old["high"], found["high"]),
        }
        seen_K = live_BK.any(0)
        self._state = {
            key: torch.where(seen_K, torch.where(old[key].isnan(), found[key], merged[key]), old[key]) for key in old
        }

    def metrics(self) -> dict[str, float]:
        return {f"weakest_first/earned/{n}": x for n, x in zip(self.reward_names, self.earned().tolist(), strict=True)}

    def state_dict(self) -> dict[str, Tensor]:
        return {name: tensor.clone() for name, tensor in self._state.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        shape = (len(self.reward_names),)
        if set(state) != set(self._state) or any(tensor.shape != shape for tensor in state.values()):
            raise ValueError(f"state: holds {sorted(state)}, expected mean, low and high of shape {shape}")
        self._state = {name: tensor.clone() for name, tensor in state.items()}
