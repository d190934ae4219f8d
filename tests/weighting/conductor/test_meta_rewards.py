"""Estimators of the meta-gradient have the values and gradients that are computed by hand.

Every joint action of a tiny group is enumerated to show what they climb on average; autograd gives the truth.
"""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

from maestro_fast.ops import (
    AdvantageProfile,
    ConductorBatch,
    ConductorUpdateConfig,
    counterfactual_advantages,
    group_advantages,
)
from maestro_fast.ops.conductor_update import logit_gradient
from maestro_fast.weighting import Outcome, WeightContext, Weights
from maestro_fast.weighting.conductor.meta_rewards import experience, pathwise_slopes
from tests.weighting.helpers import normal

TAU, FLOOR, COEF, ALPHA = 0.7, 0.08, 0.2, 0.6
DRAWN = ["reinforce", "baseline", "all_actions"]
PLAIN = AdvantageProfile("group", "group", "group", "none")  # rewards are standardised, scores only centred


def climbed(
    logits_BK: Tensor, actions_B: Tensor | None, meta: Tensor, *, tau: float, min_prob: float, entropy_coef: float
) -> tuple[Tensor, Tensor]:
    """Gives J, the mean over the responses, and its gradient [B, K] by the logits, from the update's closed form."""
    config = ConductorUpdateConfig(tau, min_prob, entropy_coef)
    gradient_BK, gain_B = logit_gradient(logits_BK, ConductorBatch(torch.empty(0), meta, actions_B), config)
    return gain_B.mean(), gradient_BK / len(logits_BK)


def probabilities(logits_BK: Tensor) -> Tensor:
    return (1 - logits_BK.shape[1] * FLOOR) * torch.softmax(logits_BK / TAU, -1) + FLOOR


# --- reinforce, by hand ---


def problem(batch: int = 6, k: int = 3, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    logits_BK = normal(batch, k, seed=seed).double()
    actions_B = torch.randint(k, (batch,), generator=torch.Generator().manual_seed(seed))
    return logits_BK, actions_B, normal(batch, seed=seed + 1).double()


def reinforce(
    logits_BK: Tensor, actions_B: Tensor, meta_B: Tensor, tau: float, floor: float, coef: float
) -> tuple[Tensor, Tensor]:
    """Gives J and its gradient by the logits."""
    return climbed(logits_BK, actions_B, meta_B, tau=tau, min_prob=floor, entropy_coef=coef)


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
    """The sum over all joint actions of p(a) grad REINFORCE(a) is grad of sum_a p(a_b) A_b(a), the others being fixed.

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
    """The group's advantages add up to 0 whatever the actions are, and yet they push the network to flatter itself."""
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


# --- every estimator, over all joint actions ---


def worth(batch: int) -> Tensor:
    return normal(batch, seed=9).double()


def closed_form(logits_BK: Tensor, actions_B: Tensor | None, meta: Tensor, coef: float = COEF) -> tuple[Tensor, Tensor]:
    return climbed(logits_BK.detach(), actions_B, meta, tau=TAU, min_prob=FLOOR, entropy_coef=coef)


def estimate(kind: str, logits_BK: Tensor, actions_B: Tensor, rewards_BK: Tensor, weigh: Tensor) -> Tensor:
    """Gives the gradient for one joint action. ``weigh``, 1 in the paper and z(U) in first order, scales advantages."""
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
    """Sums p(a) mean_b weigh_b A_b over all joint actions, plus entropy; a response moves its own action alone."""
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
    """Gives the mean of the estimator's gradient over all joint actions, and the trace of its covariance."""
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
    """The ratios of the variances over some problems are printed, since they are a finding."""
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


@pytest.mark.parametrize("factors", [None, (3.0, 3.0, 3.0), (0.5, 2.0, 6.0)])
@pytest.mark.parametrize("kl", [False, True])
def test_pathwise_is_autograd_through_the_soft_weights(kl: bool, factors: tuple[float, ...] | None) -> None:
    """The slopes are those of central differences of the value, which is formed by hand."""
    logits_BK = normal(4, 3, seed=3).double().requires_grad_()
    rewards_BK, worth_B = normal(4, 3, seed=4).double(), worth(4)
    kl_B = normal(4, seed=5).double().abs() if kl else None
    beta = 0.3 if kl else 0.0
    factors_K = torch.tensor(factors or (1.0, 1.0, 1.0)).double()

    def value(z_BK: Tensor) -> Tensor:
        p_BK = probabilities(z_BK)
        x = (rewards_BK - rewards_BK.mean(0)) / (rewards_BK.std(0) + 1e-4)
        s = (factors_K * p_BK * x).sum(-1) - (0.0 if kl_B is None else beta * kl_B)
        return (worth_B * (s - s.mean()) / (s.std() + 1e-4)).mean() - COEF * (p_BK * p_BK.log()).sum(-1).mean()

    p_BK = probabilities(logits_BK.detach())
    values_B, slopes_BK = pathwise_slopes(
        p_BK, worth_B, rewards_BK, 4, kl_B=kl_B, beta=beta, factors_K=None if factors is None else factors_K
    )
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
    """Gives the largest element of the enumerated meta-gradient of 'advantage', where a group reads one context."""
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
    """E sum_b A_b grad log p(a_b) = (1 - 1/G) grad E_p sum_b s_b(a) = 0, since each reward adds up to 0 in its group.

    So rewards have to be centred: by the profile, or, as dr_grpo leaves them as they are, before it.
    """
    assert max(meta_gradient(kind, profile, seed) for seed in range(2)) < 1e-12


def test_rewards_that_are_not_centred_leave_a_meta_gradient() -> None:
    """With dr_grpo on raw rewards, the paper's objective prefers the larger reward, whatever it measures."""
    assert meta_gradient("reinforce", "dr_grpo", 0, centred=False) > 0.01


def test_std_scaling_leaves_a_small_residual() -> None:
    """The division by a random std keeps the sum from vanishing. The residual is printed."""
    residual = max(meta_gradient("reinforce", "maestro", seed) for seed in range(3))
    print(f"largest meta-gradient of a prompt context under std scaling: {residual:.2e}")
    assert 1e-6 < residual < 0.05


# --- rewards that abstain ---


@pytest.mark.parametrize("estimator", DRAWN)
def test_an_action_whose_reward_abstained_gets_no_credit(estimator: str) -> None:
    rewards_BK = normal(4, 3, seed=1)
    rewards_BK[1, 0] = rewards_BK[2, 1] = float("nan")
    actions_B = torch.tensor([0, 0, 0, 1])  # the second response emphasised what abstained from it
    weights_BK = (1 - ALPHA) / 3 + ALPHA * torch.eye(3)[actions_B]
    context = WeightContext(("a", "b", "c"), 4, 0, rewards_BK)
    advantages = group_advantages(rewards_BK, weights_BK, 4)
    probs_BK = torch.tensor([[0.5, 0.3, 0.2]]).expand(4, 3)
    found = experience(
        Outcome(context, Weights(weights_BK, weights_BK, actions_B), advantages),
        torch.arange(4.0)[:, None],
        probs_BK,
        objective="advantage",
        estimator=estimator,  # type: ignore[arg-type]
        alpha=ALPHA,
        meta_reward=None,
        keep_drawn_probs=False,
    )
    if estimator != "all_actions":
        assert found["h"][:, 0].tolist() == [0.0, 2.0, 3.0] and found["actions"].tolist() == [0, 0, 1]
        return
    every_BK = found["meta"]
    slopes_BK = every_BK - (probs_BK * every_BK).sum(1, keepdim=True)  # by the logits, up to the factor p
    assert slopes_BK[[1, 2], [0, 1]].abs().max() < 1e-6 and slopes_BK[0].abs().min() > 1e-3
    whole = counterfactual_advantages(rewards_BK, weights_BK, (1 - ALPHA) / 3 + ALPHA * torch.eye(3), 4)
    live_BK = ~rewards_BK.isnan()
    torch.testing.assert_close(every_BK[live_BK], whole[live_BK])
