"""DVAO: in each group, a reward counts in proportion to its standard deviation in that group.

    w_k = priority_k * std_k / sum_l priority_l std_l          std over the responses of the group

A reward that all responses earn alike does not tell which response is better. If rewards are normalised within the
group, the score is sum_k priority_k (r_k - mean_k) / sum_l priority_l std_l: rewards keep their own units, and only
their sum is rescaled.

The weights are those of Jiang et al., DVAO: Dynamic Variance-adaptive Advantage Optimization for Multi-reward RL, arXiv
2605.25604, for any advantage profile. The paper uses the weighted sum of normalised rewards as the advantage itself; a
profile whose ``score_center`` and ``score_scale`` are "none" does the same. Two choices are ours: deviations are sample
deviations, and in a group where no reward varies the weights are in proportion to the priorities.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from maestro_fast.weighting.policy import (
    Stateless,
    WeightContext,
    Weights,
    live_mean_and_std,
    live_range,
    positive_in_reward_order,
)


@dataclass(frozen=True)
class DvaoConfig:
    """In each group, a reward counts by its standard deviation in that group (DVAO, arXiv 2605.25604).

    Attributes:
        priorities: A constant factor for each reward, by name. It is 1 for a reward that is left out.
    """

    priorities: dict[str, float] = field(default_factory=dict)

    def build(self, reward_names: tuple[str, ...], context_size: int) -> Dvao:
        """The policy for these rewards. A ValueError names an unknown reward, or a priority that is not above 0."""
        del context_size
        return Dvao(positive_in_reward_order(self.priorities, reward_names, "priorities"))


class Dvao(Stateless):
    """Gives every group weights of its own, which add up to 1."""

    name = "dvao"

    def __init__(self, priorities: tuple[float, ...]) -> None:
        self.priorities = priorities

    def weights(self, context: WeightContext) -> Weights:
        """The weights of each group, for all of its responses."""
        rewards_NGK = context.rewards_BK.view(-1, context.group_size, context.rewards_BK.shape[1])
        low_NK, high_NK = live_range(rewards_NGK, 1)
        _, std_NK = live_mean_and_std(rewards_NGK, 1, correction=1)
        std_NK = torch.where(high_NK > low_NK, std_NK, 0.0)  # exactly 0 for equal rewards, whatever the mean's rounding
        base_K = std_NK.new_tensor(self.priorities)
        parts_NK = base_K * torch.where((std_NK > 0).any(1, keepdim=True), std_NK, 1.0)
        weights_NK = parts_NK / parts_NK.sum(1, keepdim=True)
        weights_BK = weights_NK.repeat_interleave(context.group_size, 0)
        return Weights(weights_BK, weights_BK)
