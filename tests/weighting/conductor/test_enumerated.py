"""Estimators against truth: every joint action of a tiny group is enumerated, and autograd gives the truth."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

from maestro_fast.ops import AdvantageProfile, counterfactual_advantages, group_advantages
from maestro_fast.weighting.conductor.estimators import pathwise_slopes
from tests.weighting.conductor.closed_form import climbed
from tests.weighting.helpers import normal

TAU, FLOOR, COEF, ALPHA = 0.7, 0.08, 0.2, 0.6
DRAWN = ["reinforce", "baseline", "all_actions"]
PLAIN = AdvantageProfile("group", "group", "group", "none")  # rewards standardised, scores only centred


def probabilities(logits_BK: Tensor) -> Tensor:
    return (1 - logits_BK.shape[1] * FLOOR) * torch.softmax(logits_BK / TAU, -1) + FLOOR


def worth(batch: int) -> Tensor:
    return normal(batch, seed=9).double()


def closed_form(logits_BK: Tensor, actions_B: Tensor | None, meta: Tensor, coef: float = COEF) -> tuple[Tensor, Tensor]:
    return climbed(logits_BK.detach(), actions_B, meta, tau=TAU, min_prob=FLOOR, entropy_coef=coef)


def estimate(kind: str, logits_BK: Tensor, actions_B: Tensor, rewards_BK: Tensor, weigh: Tensor) -> Tensor:
    """The gradient for one joint action; ``weigh`` multiplies the advantages (1: the paper's, z(U): first order)."""
    batch, k = logits_BK.shape
    every_AK = (1 - ALPHA) / k + ALPHA * torch.eye(k).double()
    weights_BK = every_AK[actions_B]
    chosen_B = group_advantages(rewards_BK, weights_BK, batch).advantages * weigh
    every_BK = counterfactual_advantages(rewards_BK, weights_BK, every_AK, batch) * weigh[:, None]
    if kind == "all_actions":
        return closed_form(logits_BK, None, every_BK)[1]
    if kind == "baseline":
        chosen_B = chosen_B - (probabilities(logits_BK.detach()) * every_BK).sum(-1)
    return closed_form(logits_BK, actions_B, chosen_B)[1]


def enumerated(logits_BK: Tensor, rewards_BK: Tensor, weigh: Tensor) -> Tensor:
    """E over all joint actions of mean_b weigh_b A_b, each response differentiated in its own action, plus entropy."""
    batch, k = logits_BK.shape
    p_BK, total = probabilities(logits_BK), torch.zeros((), dtype=torch.float64)
    for joint in product(range(k), repeat=batch):
        weights_BK = (1 - ALPHA) / k + ALPHA * torch.nn.functional.one_hot(torch.tensor(joint), k).double()
        advantages_B = group_advantages(rewards_BK, weights_BK, batch).advantages * weigh
        chosen_B = p_BK[torch.arange(batch), torch.tensor(joint)]
        for b in range(batch):
            others = torch.cat([chosen_B[:b], chosen_B[b + 1 :]]).detach().prod()
            total = total + chosen_B[b] * others * advantages_B[b] / batch
    return total + COEF * -(p_BK * p_BK.log()).sum(-1).mean()


def moments(kind: str, logits_BK: Tensor, rewards_BK: Tensor, weigh: Tensor) -> tuple[Tensor, float]:
    """Mean of the estimator's gradient over all joint actions, and the trace of its covariance."""
    batch, k = logits_BK.shape
    p_BK = probabilities(logits_BK.detach())
    mean_BK, square = torch.zeros_like(p_BK), 0.0
    for joint in product(range(k), repeat=batch):
        actions_B = torch.tensor(joint)
        chance = p_BK[torch.arange(batch), actions_B].prod()
        gradient_BK = estimate(kind, logits_BK, actions_B, rewards_BK, weigh)
        mean_BK += chance * gradient_BK
        square += float(chance * gradient_BK.square().sum())
    return mean_BK, square - float(mean_BK.square().sum())


@pytest.mark.parametrize("weighed", [False, True], ids=["advantage", "first_order"])
@pytest.mark.parametrize("k", [2, 3])
@pytest.mark.parametrize("kind", DRAWN)
def test_gradient_is_that_of_the_enumerated_expectation(kind: str, k: int, weighed: bool) -> None:
    batch = 3
    logits_BK = normal(batch, k, seed=3).double().requires_grad_()
    rewards_BK = normal(batch, k, seed=4).double()
    weigh = worth(batch) if weighed else torch.ones(batch).double()
    truth_BK = torch.autograd.grad(enumerated(logits_BK, rewards_BK, weigh), logits_BK)[0]
    mean_BK, _ = moments(kind, logits_BK, rewards_BK, weigh)
    assert truth_BK.abs().max() > 0.01
    torch.testing.assert_close(mean_BK, truth_BK, rtol=1e-9, atol=1e-12)


def test_variance_falls_from_reinforce_to_all_actions() -> None:
    """Mean over some problems of the variance, given that of all_actions; printed, as it is a finding."""
    spread = dict.fromkeys(DRAWN, 0.0)
    for seed in range(4):
        logits_BK = (0.5 * normal(3, 3, seed=seed)).double().requires_grad_()
        rewards_BK = normal(3, 3, seed=100 + seed).double()
        for kind in DRAWN:
            spread[kind] += moments(kind, logits_BK, rewards_BK, torch.ones(3).double())[1]
    ratios = {kind: spread[kind] / spread["all_actions"] for kind in DRAWN}
    print("variance over that of all_actions:", {kind: round(value, 1) for kind, value in ratios.items()})
    assert ratios["reinforce"] > 3
    assert ratios["reinforce"] > ratios["baseline"] > 1


@pytest.mark.parametrize("kl", [False, True])
def test_pathwise_is_autograd_through_the_soft_weights(kl: bool) -> None:
    """By central differences of the value, which is formed by hand."""
    logits_BK = normal(4, 3, seed=3).double().requires_grad_()
    rewards_BK, worth_B = normal(4, 3, seed=4).double(), worth(4)
    kl_B = normal(4, seed=5).double().abs() if kl else None
    beta = 0.3 if kl else 0.0

    def value(z_BK: Tensor) -> Tensor:
        p_BK = probabilities(z_BK)
        x = (rewards_BK - rewards_BK.mean(0)) / (rewards_BK.std(0) + 1e-4)
        s = (p_BK * x).sum(-1) - (0.0 if kl_B is None else beta * kl_B)
        return (worth_B * (s - s.mean()) / (s.std() + 1e-4)).mean() - COEF * (p_BK * p_BK.log()).sum(-1).mean()

    p_BK = probabilities(logits_BK.detach())
    values_B, slopes_BK = pathwise_slopes(p_BK, worth_B, rewards_BK, 4, kl_B=kl_B, beta=beta)
    found, gradient_BK = closed_form(logits_BK, None, slopes_BK)
    found = found + (values_B - (p_BK * slopes_BK).sum(-1)).mean()
    torch.testing.assert_close(found, value(logits_BK.detach()), rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        for b, k in product(range(4), range(3)):
            step = torch.zeros_like(logits_BK)
            step[b, k] = 1e-6
            slope = (value(logits_BK + step) - value(logits_BK - step)) / 2e-6
            assert gradient_BK[b, k].item() == pytest.approx(slope.item(), rel=1e-5, abs=1e-8)


def meta_gradient(kind: str, profile: str | AdvantageProfile, seed: int, *, centred: bool = True) -> float:
    """Largest element of the enumerated meta-gradient of 'advantage', all of a group reading one context."""
    shared_K = normal(1, 3, seed=seed).double()
    rewards_BK = normal(3, 3, seed=100 + seed).double()
    if centred:
        rewards_BK = rewards_BK - rewards_BK.mean(0)
    every_AK = (1 - ALPHA) / 3 + ALPHA * torch.eye(3).double()
    p_K = probabilities(shared_K)[0]
    total_K = torch.zeros_like(shared_K)
    for joint in product(range(3), repeat=3):
        actions_B = torch.tensor(joint)
        logits_BK = shared_K.expand(3, 3)
        weights_BK = every_AK[actions_B]
        if kind == "all_actions":
            every_BK = counterfactual_advantages(rewards_BK, weights_BK, every_AK, 3, profile=profile)
            gradient_BK = closed_form(logits_BK, None, every_BK, 0.0)[1]
        else:
            meta_B = group_advantages(rewards_BK, weights_BK, 3, profile=profile).advantages
            gradient_BK = closed_form(logits_BK, actions_B, meta_B, 0.0)[1]
        total_K += p_K[actions_B].prod() * gradient_BK.sum(0, keepdim=True)
    return total_K.abs().max().item()


@pytest.mark.parametrize("kind", ["reinforce", "all_actions"])
@pytest.mark.parametrize("profile", ["dr_grpo", PLAIN], ids=["dr_grpo", "standardised rewards"])
def test_a_prompt_context_has_no_meta_gradient_with_mean_only_scaling(
    kind: str, profile: str | AdvantageProfile
) -> None:
    """E sum_b A_b grad log p(a_b) = (1 - 1/G) grad E_p sum_b s_b(a): 0, as each reward adds up to 0 over its group.

    So rewards have to be centred: by the profile, or, as dr_grpo leaves them as they are, before it.
    """
    assert max(meta_gradient(kind, profile, seed) for seed in range(2)) < 1e-12


def test_rewards_that_are_not_centred_leave_a_meta_gradient() -> None:
    """dr_grpo on raw rewards: the paper's objective then prefers the reward that is large, whatever it measures."""
    assert meta_gradient("reinforce", "dr_grpo", 0, centred=False) > 0.01


def test_std_scaling_leaves_a_small_residual() -> None:
    """Reported, not wished for: the division by a random std keeps the sum from vanishing."""
    residual = max(meta_gradient("reinforce", "maestro", seed) for seed in range(3))
    print(f"largest meta-gradient of a prompt context under std scaling: {residual:.2e}")
    assert 1e-6 < residual < 0.05
