"""Makes contexts and outcomes for all tests of weight policies."""

from __future__ import annotations

import torch
from torch import Tensor

from maestro_fast.ops import GroupAdvantages
from maestro_fast.weighting import Conductor, Outcome, WeightContext, WeightPolicy, Weights

NAMES = ("format", "length", "entropy")
K = len(NAMES)


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def context(
    rewards_BK: Tensor | int, h: Tensor | None = None, *, step: int = 0, group_size: int = 4, k: int = K
) -> WeightContext:
    """The context of these rewards, or with an int that of as many responses with random rewards."""
    if isinstance(rewards_BK, int):
        rewards_BK = normal(rewards_BK, k, seed=1000 + step)
    names = tuple(f"r{i}" for i in range(rewards_BK.shape[1])) if rewards_BK.shape[1] != K else NAMES
    utilities_B = normal(len(rewards_BK), seed=2000 + step)
    columns = {"kind": ["x"] * len(rewards_BK)}
    return WeightContext(names, group_size, step, rewards_BK, h, utilities_B, columns)


def given_advantages(advantages_B: Tensor, degenerate_B: Tensor | None = None) -> GroupAdvantages:
    """These advantages. Scores and all else are NaN, since a policy must not look at what advantages were made of."""
    poison_B = torch.full_like(advantages_B, float("nan"))
    if degenerate_B is None:
        degenerate_B = torch.zeros_like(advantages_B, dtype=torch.bool)
    return GroupAdvantages(advantages_B, poison_B, poison_B[:, None].expand(-1, K), poison_B, poison_B, degenerate_B)


def play(policy: WeightPolicy, at: WeightContext, advantages_B: Tensor, degenerate_B: Tensor | None = None) -> Weights:
    """Asks the policy for the weights of one batch and shows it their outcome."""
    weights = policy.weights(at)
    policy.observe(Outcome(at, weights, given_advantages(advantages_B, degenerate_B)))
    return weights


def first_gradient(policy: Conductor, name: str) -> Tensor:
    """The gradient that the first update climbed: AdamW descends, and its first moment is a tenth of its gradient."""
    return policy.state_dict()[f"optimizer.{name}.exp_avg"] / -0.1
