"""Small simulations show what the Conductor learns, from which states, and that its objective flatters itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from maestro_fast.ops import group_advantages
from maestro_fast.weighting import Conductor, ConductorConfig, Equal, Outcome
from maestro_fast.weighting.diagnostics import self_flattery
from tests.weighting.helpers import NAMES, K, context, normal, play

B, D = 64, 6


def planted(**options: Any) -> tuple[Conductor, float, float]:
    """Gives advantage 1 to the action that a linear function of h names, and 0 to the others.

    Returns the Conductor, its mean probability of the named action, and how often the most frequent one is named.
    """
    policy = ConductorConfig(learning_rate=0.1, entropy_coef=0.01, period=2, **options).build(NAMES, D)
    truth = normal(D, K, seed=99)

    def batch(step: int) -> tuple[Tensor, Tensor]:
        x = normal(B, D, seed=step)
        return x * torch.tensor([1.0, 10, 0.1, 1, 1, 1]) + 20, (x @ truth).argmax(-1)

    for step in range(60):
        h, best_B = batch(step)
        at = context(B, h, step=step)
        actions_B = policy.weights(at).actions_B
        assert actions_B is not None
        play(policy, at, (actions_B == best_B).float())
    h, best_B = batch(5000)
    expected_BK = policy.weights(context(B, h)).expected_BK
    p_BK = (expected_BK - (1 - policy.config.alpha) / K) / policy.config.alpha
    return policy, p_BK.gather(1, best_B[:, None]).mean().item(), (best_B.bincount().max() / B).item()


def test_learns_a_planted_preference() -> None:
    _, named, most_frequent = planted()
    assert named > 0.7 > most_frequent + 0.2  # the two floors of 0.05 leave at most 0.9


def test_shuffled_states_teach_nothing() -> None:
    policy, named, most_frequent = planted(shuffle=True)
    assert 1 / K - 0.03 < named < most_frequent + 0.03  # this much is possible without the states
    assert policy.weight.abs().sum() > 0  # it has updated


def flattery_after(batches: int, **options: Any) -> tuple[Conductor, float]:
    """Rewards are noise, and h is the response's own normalised rewards. Gives the last batches' mean self-flattery."""
    policy = ConductorConfig(**{"learning_rate": 0.05, "entropy_coef": 0.02, "period": 2, **options}).build(NAMES, K)
    group, seen = 8, []
    for step in range(batches):
        rewards_BK = normal(B, K, seed=step) * torch.tensor([1.0, 5.0, 0.1])
        h = group_advantages(rewards_BK, None, group).normalized_rewards
        at = context(rewards_BK, h, step=step, group_size=group)
        weights = policy.weights(at)
        policy.observe(Outcome(at, weights, group_advantages(rewards_BK, weights.weights_BK, group)))
        seen.append(policy.metrics()["conductor/self_flattery"])
    return policy, sum(seen[-20:]) / 20


def test_the_published_objective_learns_to_flatter_itself() -> None:
    """Nothing here says which reward the task needs, and yet the network moves. The metric shows this weakness."""
    policy, flattery = flattery_after(80)
    assert flattery > 0.12
    assert (policy.weight.diagonal() > 0).all()  # weight goes to the reward on which the response looks good
    assert (policy.weight.detach() - policy.weight.diagonal().detach().diag()).max() < policy.weight.diagonal().min()


def test_no_flattery_without_learning_or_without_the_states() -> None:
    assert abs(flattery_after(20, learning_rate=0.0)[1]) < 0.05
    assert abs(flattery_after(80, shuffle=True)[1]) < 0.05


def test_equal_weights_do_not_flatter() -> None:
    for step in range(5):
        at = context(normal(B, K, seed=step), step=step, group_size=8)
        weights = Equal().weights(at)
        outcome = Outcome(at, weights, group_advantages(at.rewards_BK, weights.weights_BK, 8))
        assert self_flattery(outcome) == pytest.approx(0, abs=1e-6)
