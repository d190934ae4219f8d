"""SAW, stage-aware dynamic weighting: a reward counts as much as it still varies over the batch, relative to its mean.

    r~_k = r_k - min_k + delta        CV_k = std_k / (mean_k + delta)        of r~_k over the batch
    w_k  = priority_k * CV_k / sum_l CV_l                                     times K with mode "advantage"

A reward that is learnt becomes the same for all responses, and its residual noise should not fill its share of the
advantage. If all CV together are below delta: w_k = priority_k / K (times K). Deviations are sample ones.

He et al., SAW: Stage-Aware Dynamic Weighting for Multi-Objective RL in LLMs, arXiv 2606.07705: mode "reward" weighs raw
rewards (their GRPO), "advantage" rewards normalised in the group (their GDPO). They take min_k from the reward's
definition. Ours where it is not given: the least value seen so far in the run.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from maestro_fast.weighting.policy import Outcome, WeightContext, Weights, WithoutContext
from maestro_fast.weighting.values import in_order, positive_in_order


@dataclass(frozen=True)
class SawConfig:
    """Options of ``saw``.

    Attributes:
        minima: the least value that a reward can take, by name.
        priorities: constant factors, by name; 1 where none is given.
        delta: the offset of the module.
        mode: the scale of the weights: their sum is 1 ("reward") or K ("advantage").
    """

    minima: dict[str, float] = field(default_factory=dict)
    priorities: dict[str, float] = field(default_factory=dict)
    delta: float = 1e-4
    mode: Literal["reward", "advantage"] = "reward"

    def __post_init__(self) -> None:
        if not self.delta > 0:
            raise ValueError(f"delta: {self.delta}, expected a number above 0")

    def build(self, reward_names: tuple[str, ...], context_size: int) -> Saw:
        del context_size
        in_order(self.minima, reward_names, "minima", 0.0)
        return Saw(self, reward_names, positive_in_order(self.priorities, reward_names, "priorities"))


class Saw(WithoutContext):
    """
    Raises:
        ValueError: when called, a reward below its configured minimum.
    """

    name = "saw"

    def __init__(self, config: SawConfig, reward_names: tuple[str, ...], priorities: tuple[float, ...]) -> None:
        self.config, self.reward_names = config, reward_names
        self.priorities = torch.tensor(priorities)
        known = [config.minima.get(name, float("inf")) for name in reward_names]
        self.known_K = torch.tensor([name in config.minima for name in reward_names])
        self.minima_K = torch.tensor(known)
        self._metrics: dict[str, float] = {}

    def weights(self, context: WeightContext) -> Weights:
        rewards_BK = context.rewards_BK.float().cpu()
        minima_K = torch.minimum(self.minima_K, least(rewards_BK))
        for k in (self.known_K & (minima_K < self.minima_K)).nonzero()[:, 0].tolist():
            name = self.reward_names[k]
            raise ValueError(f"weights.minima.{name}: {self.config.minima[name]}, but the reward gave {minima_K[k]:g}")
        cv_K = self._variation(rewards_BK - torch.where(minima_K.isfinite(), minima_K, 0.0) + self.config.delta)
        self._metrics = {f"saw/cv/{name}": cv_K[k].item() for k, name in enumerate(self.reward_names)}
        total = cv_K.sum()
        share_K = torch.full_like(cv_K, 1 / len(cv_K)) if total < self.config.delta else cv_K / total
        scale = len(cv_K) if self.config.mode == "advantage" else 1
        weights_BK = (scale * self.priorities * share_K).to(context.rewards_BK).expand_as(context.rewards_BK)
        return Weights(weights_BK, weights_BK)

    def _variation(self, shifted_BK: Tensor) -> Tensor:
        """CV [K] over the live values; 0 for fewer than two."""
        live_BK = ~shifted_BK.isnan()
        count_K = live_BK.sum(0)
        mean_K = shifted_BK.nan_to_num(0.0).sum(0) / count_K.clamp(min=1)
        squares_K = torch.where(live_BK, (shifted_BK - mean_K).square(), 0.0).sum(0)
        return (squares_K / (count_K - 1).clamp(min=1)).sqrt() / (mean_K + self.config.delta)

    def observe(self, outcome: Outcome) -> None:
        self.minima_K = torch.minimum(self.minima_K, least(outcome.context.rewards_BK.float().cpu()))

    def metrics(self) -> dict[str, float]:
        return dict(self._metrics)

    def state_dict(self) -> dict[str, Tensor]:
        return {"minima": self.minima_K.clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        if set(state) != {"minima"} or state["minima"].shape != self.minima_K.shape:
            raise ValueError(f"state: holds {sorted(state)}, expected minima of shape {tuple(self.minima_K.shape)}")
        self.minima_K = state["minima"].clone()


def least(rewards_BK: Tensor) -> Tensor:
    """[K], infinite where a reward abstained throughout."""
    return torch.where(rewards_BK.isnan(), float("inf"), rewards_BK).amin(0)
