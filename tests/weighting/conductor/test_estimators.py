"""REINFORCE: its value and gradient by hand, and what it is the gradient of on average."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

from maestro_fast.ops import group_advantages
from tests.weighting.conductor.closed_form import climbed
from tests.weighting.helpers import normal

TAU, FLOOR = 0.7, 0.08


def problem(batch: int = 6, k: int = 3, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    logits_BK = normal(batch, k, seed=seed).double()
    actions_B = torch.randint(k, (batch,), generator=torch.Generator().manual_seed(seed))
    return logits_BK, actions_B, normal(batch, seed=seed + 1).double()


def reinforce(
    logits_BK: Tensor, actions_B: Tensor, meta_B: Tensor, tau: float, floor: float, coef: float
) -> tuple[Tensor, Tensor]:
    """J, and its gradient by the logits."""
    return climbed(logits_BK, actions_B, meta_B, tau=tau, min_prob=floor, entropy_coef=coef)


def probabilities(logits_BK: Tensor) -> Tensor:
    return (1 - logits_BK.shape[1] * FLOOR) * torch.softmax(logits_BK / TAU, -1) + FLOOR


@pytest.mark.parametrize("entropy_coef", [0.0, 0.3])
def test_value(entropy_coef: float) -> None:
    logits_BK, actions_B, advantages_B = problem()
    policy = torch.distributions.Categorical(probs=probabilities(logits_BK))
    expected = (advantages_B * policy.log_prob(actions_B) + entropy_coef * policy.entropy()).mean()
    value, _ = reinforce(logits_BK, actions_B, advantages_B, TAU, FLOOR, entropy_coef)
    torch.testing.assert_close(value, expected)


@pytest.mark.parametrize("k", [2, 3, 5])
@pytest.mark.parametrize("entropy_coef", [0.0, 0.3])
def test_gradient_by_hand(k: int, entropy_coef: float) -> None:
    """dp_i/dz_j = (1 - K m) q_i (1[i = j] - q_j) / tau;  d log p_a = dp_a / p_a,  dH = -sum_i (1 + log p_i) dp_i."""
    logits_BK, actions_B, advantages_B = problem(k=k)
    expected_BK = torch.zeros_like(logits_BK)
    for b in range(len(logits_BK)):
        q = [x.item() for x in (logits_BK[b] / TAU).softmax(-1)]
        p = [(1 - k * FLOOR) * x + FLOOR for x in q]
        for j in range(k):
            dp = [(1 - k * FLOOR) * q[i] * ((i == j) - q[j]) / TAU for i in range(k)]
            a = int(actions_B[b])
            entropy = -sum((1 + torch.tensor(p[i]).double().log()) * dp[i] for i in range(k))
            expected_BK[b, j] = (advantages_B[b] * dp[a] / p[a] + entropy_coef * entropy) / len(logits_BK)
    _, gradient_BK = reinforce(logits_BK, actions_B, advantages_B, TAU, FLOOR, entropy_coef)
    torch.testing.assert_close(gradient_BK, expected_BK, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("k", [2, 3])
def test_on_average_it_climbs_the_expected_advantage(k: int) -> None:
    """Sum over all joint actions of p(a) grad REINFORCE(a) = grad of sum_a p(a_b) A_b(a), others' actions given.

    The advantages are real ones: those of one group whose weights follow from the joint action.
    """
    batch, coef = 3, 0.2
    logits_BK = normal(batch, k, seed=3).double().requires_grad_()
    rewards_BK = normal(batch, k, seed=4).double()
    p_BK = probabilities(logits_BK)
    average_BK, expected_advantage = torch.zeros_like(logits_BK), torch.zeros((), dtype=torch.float64)
    for joint in product(range(k), repeat=batch):
        actions_B = torch.tensor(joint)
        weights_BK = 0.7 / k + 0.3 * torch.nn.functional.one_hot(actions_B, k)
        advantages_B = group_advantages(rewards_BK, weights_BK, batch).advantages
        chosen_B = p_BK.gather(1, actions_B[:, None])[:, 0]
        _, gradient_BK = reinforce(logits_BK.detach(), actions_B, advantages_B, TAU, FLOOR, coef)
        average_BK += chosen_B.detach().prod() * gradient_BK
        for b in range(batch):
            others = torch.cat([chosen_B[:b], chosen_B[b + 1 :]]).detach().prod()
            expected_advantage = expected_advantage + chosen_B[b] * others * advantages_B[b] / batch
    entropy = -(p_BK * p_BK.log()).sum(-1).mean()
    (expected_BK,) = torch.autograd.grad(expected_advantage + coef * entropy, logits_BK)
    assert expected_BK.abs().max() > 0.01
    torch.testing.assert_close(average_BK, expected_BK, rtol=1e-9, atol=1e-12)


def test_its_known_weakness() -> None:
    """The group's advantages add up to 0 whatever the actions are, yet the head is pushed: towards what flatters."""
    k, batch = 2, 2
    rewards_BK = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    logits_BK = torch.zeros(batch, k, dtype=torch.float64)
    average_BK = torch.zeros_like(logits_BK)
    for joint in product(range(k), repeat=batch):
        weights_BK = 0.7 / k + 0.3 * torch.nn.functional.one_hot(torch.tensor(joint), k)
        advantages_B = group_advantages(rewards_BK, weights_BK, batch).advantages
        assert advantages_B.sum().abs() < 1e-12
        average_BK += reinforce(logits_BK, torch.tensor(joint), advantages_B, 1.0, 0.0, 0.0)[1] / 4
    assert average_BK[0, 0] > 0.05 and average_BK[1, 1] > 0.05
    torch.testing.assert_close(average_BK.sum(-1), torch.zeros(2, dtype=torch.float64))
