"""Equal weights: every reward counts 1 / K. The default, and the baseline that adaptivity has to beat."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from maestro_fast.weighting.policy import Stateless, WeightContext, Weights


@dataclass(frozen=True)
class EqualConfig:
    """No options."""

    def build(self, reward_names: tuple[str, ...], context_size: int) -> Equal:
        del reward_names, context_size
        return Equal()


class Equal(Stateless):
    """w_k = 1 / K."""

    name = "equal"

    def weights(self, context: WeightContext) -> Weights:
        weights_BK = torch.full_like(context.rewards_BK, 1.0 / len(context.reward_names))
        return Weights(weights_BK, weights_BK)
