"""DVAO: in each group a reward counts in proportion to its standard deviation there.

    w_k = priority_k * std_k / sum_l priority_l std_l          over the responses of the group

A reward that all responses earn alike says nothing about which one is better. With rewards normalised in the group the
score is sum_k priority_k (r_k - mean_k) / sum_l priority_l std_l: rewards in their own units, scaled as a whole.

Jiang et al., DVAO: Dynamic Variance-adaptive Advantage Optimization for Multi-reward RL, arXiv 2605.25604: its weights,
for any advantage profile. Theirs takes the weighted sum of normalised rewards as the advantage itself, as a profile
with ``score_center`` and ``score_scale`` "none" does. Ours: sample deviations, and weights in proportion to the
priorities for a group without any spread.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from maestro_fast.weighting.policy import Stateless, WeightContext, Weights
from maestro_fast.weighting.values import positive_in_order


@dataclass(frozen=True)
class DvaoConfig:
    """Options of ``dvao``.

    Attributes:
        priorities: A constant factor for each reward, by name. It is 1 for a reward that is left out.
    """

    priorities: dict[str, float] = field(default_factory=dict)

    def build(self, reward_names: tuple[str, ...], context_size: int) -> Dvao:
        del context_size
        return Dvao(positive_in_order(self.priorities, reward_names, "priorities"))


class Dvao(Stateless):
    """Weights per group, adding up to 1."""

    name = "dvao"

    def __init__(self, priorities: tuple[float, ...]) -> None:
        self.priorities = priorities

    def weights(self, context: WeightContext) -> Weights:
        rewards_NGK = context.rewards_BK.view(-1, context.group_size, context.rewards_BK.shape[1])
        live_NGK = ~rewards_NGK.isnan()
        count_NK = live_NGK.sum(1)
        mean_NK = rewards_NGK.nan_to_num(0.0).sum(1) / count_NK.clamp(min=1)
        squares_NK = torch.where(live_NGK, (rewards_NGK - mean_NK[:, None]).square(), 0.0).sum(1)
        top_NK = torch.where(live_NGK, rewards_NGK, float("-inf")).amax(1)
        low_NK = torch.where(live_NGK, rewards_NGK, float("inf")).amin(1)
        std_NK = torch.where(top_NK > low_NK, (squares_NK / (count_NK - 1).clamp(min=1)).sqrt(), 0.0)
        base_K = std_NK.new_tensor(self.priorities)
        parts_NK = base_K * torch.where((std_NK > 0).any(1, keepdim=True), std_NK, 1.0)
        weights_NK = parts_NK / parts_NK.sum(1, keepdim=True)
        weights_BK = weights_NK.repeat_interleave(context.group_size, 0)
        return Weights(weights_BK, weights_BK)
