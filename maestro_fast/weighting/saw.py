"""SAW, stage-aware dynamic weighting: a reward counts by how much it still varies over the batch, relative to its mean.

    r~_k = r_k - min_k + delta        CV_k = std_k / (mean_k + delta)        of r~_k over the batch
    w_k  = priority_k * CV_k / sum_l CV_l                                     times K with mode "advantage"

Once a reward is learnt, all responses earn it alike, and the noise that is left should not fill its share of the
advantage. If the CV of all rewards add up to less than delta, then w_k = priority_k / K (times K with mode
"advantage"). Deviations are sample deviations.

He et al., SAW: Stage-Aware Dynamic Weighting for Multi-Objective RL in LLMs, arXiv 2606.07705. Mode "reward" is for raw
rewards (their GRPO), "advantage" for rewards that are normalised in the group (their GDPO). The paper takes min_k from
the definition of the reward. Where it is not configured, we take the least value seen so far in the run.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from maestro_fast.weighting.policy import (
    Outcome,
    WeightContext,
    Weights,
    WithoutContext,
    in_reward_order,
    live_mean_and_std,
    live_range,
    positive_in_reward_order,
    same_weights,
)


@dataclass(frozen=True)
class SawConfig:
    """A reward counts by how much it still varies over the batch, relative to its mean (SAW, arXiv 2606.07705).

    Attributes:
        minima: The least value that a reward can take, by name. For a reward that is left out, it is the least value
            seen so far.
        priorities: A constant factor for each reward, by name. It is 1 for a reward that is left out.
        delta: The small offset that keeps the quotients finite.
        mode: The scale of the weights: they add up to 1 with "reward" and to K with "advantage".
    """

    minima: dict[str, float] = field(default_factory=dict)
    priorities: dict[str, float] = field(default_factory=dict)
    delta: float = 1e-4
    mode: Literal["reward", "advantage"] = "reward"

    def __post_init__(self) -> None:
        if not self.delta > 0:
            raise ValueError(f"delta: {self.delta}, expected a number above 0")

    def build(self, reward_names: tuple[str, ...], context_size: int) -> Saw:
        """The policy for these rewards. A ValueError names an unknown reward, or a number that is out of range."""
        del context_size
        in_reward_order(self.minima, reward_names, "minima", 0.0)
        return Saw(self, reward_names, positive_in_reward_order(self.priorities, reward_names, "priorities"))


class Saw(WithoutContext):
    """Gives all responses of a batch the same weights. Its state is the least value of each reward."""

    name = "saw"

    def __init__(self, config: SawConfig, reward_names: tuple[str, ...], priorities: tuple[float, ...]) -> None:
        self.config, self.reward_names = config, reward_names
        self.priorities = torch.tensor(priorities)
        known = [config.minima.get(name, float("inf")) for name in reward_names]
        self.known_K = torch.tensor([name in config.minima for name in reward_names])
        self.minima_K = torch.tensor(known)
        self._metrics: dict[str, float] = {}

    def weights(self, context: WeightContext) -> Weights:
        """The weights of this batch, which follow from its own rewards.

        Raises:
            ValueError: A reward is below its configured minimum.
        """
        rewards_BK = context.rewards_BK.float().cpu()
        minima_K = torch.minimum(self.minima_K, live_range(rewards_BK, 0)[0])
        for k in (self.known_K & (minima_K < self.minima_K)).nonzero()[:, 0].tolist():
            name = self.reward_names[k]
            raise ValueError(f"weights.minima.{name}: {self.config.minima[name]}, but the reward gave {minima_K[k]:g}")
        shifted_BK = rewards_BK - torch.where(minima_K.isfinite(), minima_K, 0.0) + self.config.delta
        mean_K, std_K = live_mean_and_std(shifted_BK, 0, correction=1)
        cv_K = (std_K / (mean_K + self.config.delta)).nan_to_num(0.0)  # a reward that always abstained has CV 0
        self._metrics = {f"saw/cv/{name}": cv_K[k].item() for k, name in enumerate(self.reward_names)}
        total = cv_K.sum()
        share_K = torch.full_like(cv_K, 1 / len(cv_K)) if total < self.config.delta else cv_K / total
        scale = len(cv_K) if self.config.mode == "advantage" else 1
        return same_weights(scale * self.priorities * share_K, context)

    def observe(self, outcome: Outcome) -> None:
        """Remembers the least value of each reward."""
        low_K, _ = live_range(outcome.context.rewards_BK.float().cpu(), 0)
        self.minima_K = torch.minimum(self.minima_K, low_K)

    def metrics(self) -> dict[str, float]:
        """The CV of each reward in the last batch."""
        return dict(self._metrics)

    def state_dict(self) -> dict[str, Tensor]:
        """``minima`` [K], infinite for a reward that has always abstained."""
        return {"minima": self.minima_K.clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Takes over a ``state_dict``; anything else raises a ValueError."""
        if set(state) != {"minima"} or state["minima"].shape != self.minima_K.shape:
            raise ValueError(f"state: holds {sorted(state)}, expected minima of shape {tuple(self.minima_K.shape)}")
        self.minima_K = state["minima"].clone()
