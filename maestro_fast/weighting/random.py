"""Random weights, drawn anew for every response, uniformly from the simplex: the paper's baseline without learning.

w = e / sum(e),  e_k = -log(1 - u_k)       exponentials, normalised, are Dirichlet(1, ..., 1)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from maestro_fast.ops.philox import uniform
from maestro_fast.weighting.policy import Stateless, WeightContext, Weights


@dataclass(frozen=True)
class RandomConfig:
    """Options of ``random``.

    Attributes:
        seed: key of the draws; the weights follow from it, the step and the place in the batch.
    """

    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed: {self.seed}, expected 0 <= seed < 2**64")

    def build(self, reward_names: tuple[str, ...], context_size: int) -> Random:
        del reward_names, context_size
        return Random(self.seed)


class Random(Stateless):
    """Dirichlet(1) weights per response, independent of everything."""

    name = "random"

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def weights(self, context: WeightContext) -> Weights:
        rewards_BK = context.rewards_BK
        u = uniform(self.seed, context.step, 0, rewards_BK.numel(), rewards_BK.device).view(rewards_BK.shape)
        exponential_BK = -torch.log1p(-u) + 2.0**-30  # u = 0 for all k has no direction: any positive floor gives one
        weights_BK = exponential_BK / exponential_BK.sum(-1, keepdim=True)
        return Weights(weights_BK, torch.full_like(weights_BK, 1.0 / weights_BK.shape[1]))
