"""The Conductor as a policy: which weights it gives, when it updates, and from what."""

from __future__ import annotations

import logging
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from maestro_fast.weighting import Conductor, ConductorConfig, Outcome
from maestro_fast.weighting.diagnostics import self_flattery
from maestro_fast.weighting.policy import Weights
from tests.weighting.helpers import NAMES, K, context, first_gradient, given_advantages, normal, play

B, D = 8, 5


def conductor(k: int = K, *, random_head: bool = False, **options: Any) -> Conductor:
    policy = ConductorConfig(**options).build(NAMES if k == K else tuple(f"r{i}" for i in range(k)), D)
    if random_head:
        policy.weight.data.copy_(normal(k, D, seed=7))
        policy.bias.data.copy_(normal(k, seed=8))
    return policy


def states(batch: int = B, seed: int = 0) -> Tensor:
    return normal(batch, D, seed=seed) * 3 + 1


def probabilities(policy: Conductor, h: Tensor) -> Tensor:
    """Computes p by its formula, in float64, for a Conductor that has not seen a context yet."""
    config, k = policy.config, len(policy.reward_names)
    logits = h.double() @ policy.weight.detach().double().T + policy.bias.detach().double()
    return (1 - k * config.min_prob) * torch.softmax(logits / config.tau, -1) + config.min_prob


@pytest.mark.parametrize("k", [2, 3, 5, 8])
def test_starts_at_exactly_equal_expected_weights(k: int) -> None:
    expected_BK = conductor(k).weights(context(B, states(), k=k)).expected_BK
    assert (expected_BK == expected_BK[0, 0]).all()
    assert expected_BK[0, 0].item() == pytest.approx(1 / k, abs=1e-7)


def test_weights_lean_towards_the_drawn_action() -> None:
    weights = conductor(random_head=True, alpha=0.4).weights(context(64, states(64)))
    assert weights.actions_B is not None
    assert set(weights.actions_B.tolist()) == {0, 1, 2}
    for row, action in zip(weights.weights_BK.tolist(), weights.actions_B.tolist(), strict=True):
        assert row == pytest.approx([0.6 / K + 0.4 * (k == action) for k in range(K)], abs=1e-7)


def test_expected_weights_are_the_mean_of_the_drawn_ones() -> None:
    policy = conductor(random_head=True, alpha=0.4, tau=2.0, min_prob=0.1)
    h, draws = states(1), 20_000
    weights = policy.weights(context(draws, h.expand(draws, D)))
    p_K = probabilities(policy, h)[0]
    torch.testing.assert_close(weights.expected_BK[0], (0.6 / K + 0.4 * p_K).float())
    torch.testing.assert_close(weights.weights_BK.mean(0), weights.expected_BK[0], rtol=0, atol=0.4 * 4 * 0.5 / 141)


def test_draws_belong_to_seed_step_and_response() -> None:
    policy = conductor(random_head=True, seed=5)
    whole = policy.weights(context(64, states(64), step=3))
    policy.weights(context(7, states(7), step=2))  # what was drawn before does not matter
    again = policy.weights(context(64, states(64), step=3))
    half = conductor(random_head=True, seed=5).weights(context(32, states(64)[:32], step=3))
    assert whole.actions_B is not None and again.actions_B is not None and half.actions_B is not None
    assert torch.equal(again.actions_B, whole.actions_B)
    assert torch.equal(half.actions_B, whole.actions_B[:32])
    for other in (
        conductor(random_head=True, seed=6).weights(context(64, states(64), step=3)),
        policy.weights(context(64, states(64), step=4)),
    ):
        assert other.actions_B is not None and not torch.equal(other.actions_B, whole.actions_B)
        assert torch.equal(other.expected_BK, whole.expected_BK)


def test_soft_mode_uses_the_probabilities() -> None:
    policy = conductor(random_head=True, mode="soft", learning_rate=0)
    weights = policy.weights(context(B, states()))
    torch.testing.assert_close(weights.weights_BK, probabilities(policy, states()).float())
    assert torch.equal(weights.expected_BK, weights.weights_BK)


@pytest.mark.parametrize("period", [1, 3])
def test_an_update_uses_all_batches_since_the_last(period: int) -> None:
    """The gradient is that of the whole buffer, by hand; AdamW's first step is learning_rate * sign(gradient)."""
    policy = conductor(period=period, learning_rate=0.01, entropy_coef=0.2)
    batches = []
    for step in range(period):
        assert torch.equal(policy.weight, torch.zeros(K, D)) and "conductor/objective" not in policy.metrics()
        size, h = 4 * (step + 1), states(4 * (step + 1), seed=step)
        weights = play(policy, context(size, h, step=step), advantages := normal(size, seed=20 + step))
        assert weights.actions_B is not None
        batches.append((h, weights.actions_B, advantages))
    h, actions, advantages = (torch.cat(parts) for parts in zip(*batches, strict=True))
    h = h.double()
    x = (h - h.mean(0)) / (h.var(0, correction=0) + 1e-5).sqrt()
    # at equal weights the entropy is flat and d log p_a / dz = (1 - K m)(1[a] - 1/K)
    pull = 0.85 * (torch.nn.functional.one_hot(actions, K) - 1 / K) * advantages[:, None].double()
    gradient = pull.T @ x / len(h)
    torch.testing.assert_close(first_gradient(policy, "weight").double(), gradient, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(first_gradient(policy, "bias").double(), pull.mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(policy.weight.detach().double(), 0.01 * gradient.sign(), rtol=1e-3, atol=0)
    norm = (gradient.square().sum() + pull.mean(0).square().sum()).sqrt().item()
    assert policy.metrics()["conductor/grad_norm"] == pytest.approx(norm, rel=1e-5)
    value = (advantages * math.log(1 / K)).mean() + 0.2 * math.log(K)
    assert policy.metrics()["conductor/objective"] == pytest.approx(value.item(), rel=1e-5)


def test_updates_come_every_period_batches() -> None:
    policy = conductor(period=3)
    changed = []
    for step in range(10):
        before = policy.weight.detach().clone()
        play(policy, context(B, states(seed=step), step=step), normal(B, seed=20 + step))
        changed.append(not torch.equal(policy.weight, before))
        assert ("conductor/objective" in policy.metrics()) == changed[-1]
    assert changed == [False, False, True] * 3 + [False]


def test_statistics_are_frozen_between_updates() -> None:
    policy = conductor(period=2)
    mean = policy.params.mean.clone()
    play(policy, context(B, states(), step=0), normal(B, seed=1))
    assert torch.equal(policy.params.mean, mean)
    play(policy, context(B, states(seed=1), step=1), normal(B, seed=2))
    torch.testing.assert_close(policy.params.mean, torch.cat([states(), states(seed=1)]).mean(0))


def test_degenerate_rows_are_left_out() -> None:
    """The statistics, gradients and parameters are those of batches that never held these rows."""
    policy, clean = conductor(period=2), conductor(period=2)
    for step in range(4):
        h, advantages = states(12, seed=step), normal(12, seed=20 + step)
        degenerate = torch.arange(12) >= B
        play(policy, context(12, torch.where(degenerate[:, None], 1e6, h), step=step), advantages, degenerate)
        play(clean, context(B, h[:B], step=step), advantages[:B])
    for name, value in clean.state_dict().items():
        assert torch.equal(policy.state_dict()[name], value), name


def test_nothing_but_degenerate_rows_is_no_update(caplog: pytest.LogCaptureFixture) -> None:
    policy = conductor(period=2)
    before = policy.state_dict()
    for step in range(2):
        play(policy, context(B, states(), step=step), torch.zeros(B), torch.ones(B, dtype=torch.bool))
    assert policy.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in policy.state_dict().items())
    assert not caplog.records


@pytest.mark.parametrize(("entropy_coef", "closer"), [(0.5, True), (0.0, False)])
def test_the_entropy_term_pushes_towards_uniform(entropy_coef: float, closer: bool) -> None:
    policy = conductor(random_head=True, period=1, learning_rate=0.05, weight_decay=0.0, entropy_coef=entropy_coef)
    policy.weight.data.mul_(0.3)
    policy.statistics.update(states(256))
    before = policy.weights(context(B, states())).expected_BK
    for step in range(40):
        play(policy, context(B, states(seed=step), step=step), torch.zeros(B))
    after = policy.weights(context(B, states())).expected_BK
    distances = [(x - 1 / K).abs().mean().item() for x in (before, after)]
    if closer:
        assert distances[1] < 0.3 * distances[0]
    else:
        assert distances[1] == pytest.approx(distances[0], rel=0.2)  # standardisation moves a little


def test_a_learning_rate_of_zero_freezes_it(caplog: pytest.LogCaptureFixture) -> None:
    policy = conductor(random_head=True, learning_rate=0, period=1)
    before = policy.state_dict()
    for step in range(3):
        play(policy, context(B, states(seed=step), step=step), normal(B, seed=step))
    assert policy.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in policy.state_dict().items())
    assert not caplog.records


def test_the_weakness_of_the_objective_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    policy = conductor(period=2)
    for step in range(6):
        play(policy, context(B, states(), step=step), normal(B, seed=step))
        assert len(caplog.records) == (step > 0)
    record = caplog.records[0]
    assert record.levelno == logging.WARNING
    assert "conductor/self_flattery" in record.message and "equal" in record.message


def test_entropy_of_the_batch_is_reported() -> None:
    policy = conductor(random_head=True)
    policy.weights(context(B, states()))
    p_BK = probabilities(policy, states())
    assert policy.metrics()["conductor/entropy"] == pytest.approx(-(p_BK * p_BK.log()).sum(-1).mean().item(), rel=1e-5)


def test_self_flattery_by_hand() -> None:
    """There are two groups of two, so normalised rewards are +-1/sqrt(2), but for the eps."""
    rewards_BK = torch.tensor([[1.0, 0.0], [0.0, 4.0], [5.0, 7.0], [5.0, 9.0]])
    at = context(rewards_BK, group_size=2)

    def flattery(rows: list[list[float]]) -> float:
        weights = Weights(torch.tensor(rows), torch.tensor(rows))
        return self_flattery(Outcome(at, weights, given_advantages(torch.zeros(4))))

    one = 0.5**0.5
    assert flattery([[0.5, 0.5]] * 4) == pytest.approx(0, abs=1e-6)
    assert flattery([[0.9, 0.1]] * 4) == pytest.approx(0, abs=1e-6)
    # Each row gets its best column. Column 0 of the second group has no spread.
    assert flattery([[1, 0], [0, 1], [1, 0], [0, 1]]) == pytest.approx((one + one + 0 + one) / 4, rel=1e-3)
    assert flattery([[0, 1], [1, 0], [0, 1], [1, 0]]) == pytest.approx((-one - one - one - 0) / 4, rel=1e-3)


@pytest.mark.parametrize(
    ("h", "words"),
    [
        (None, "context_Bd: missing, the Conductor reads the hidden state"),
        (torch.zeros(B, D + 1), rf"context_Bd: shape \({B}, {D + 1}\), expected \({B}, {D}\)"),
        (torch.zeros(B - 1, D), rf"context_Bd: shape \({B - 1}, {D}\), expected \({B}, {D}\)"),
        (torch.zeros(B * D), rf"context_Bd: shape \({B * D},\), expected \({B}, {D}\)"),
    ],
)
@pytest.mark.parametrize("shuffle", [False, True])
def test_a_wrong_context_is_named(h: Tensor | None, words: str, shuffle: bool) -> None:
    with pytest.raises(ValueError, match=f"^{words}"):
        conductor(shuffle=shuffle).weights(context(B, h))
