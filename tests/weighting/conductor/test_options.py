"""Each option of the Conductor does what it says: network, contexts, modes, estimators, decay, buffer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from maestro_fast.ops import counterfactual_advantages, group_advantages
from maestro_fast.settings import SettingsError
from maestro_fast.weighting import (
    Comparison,
    Conductor,
    ConductorConfig,
    Outcome,
    WeightContext,
    Weights,
    build_weight_policy,
    weigh_and_compare,
)
from tests.weighting.helpers import NAMES, K, first_gradient, normal, play
from tests.weighting.one_op import FUSED, counted

B, G, D = 12, 4, 5


def conductor(**options: Any) -> Conductor:
    return ConductorConfig(**{"period": 1, "learning_rate": 0.05, **options}).build(NAMES, D)


def at(step: int = 0, *, utilities: bool = False, h: Tensor | None = None) -> WeightContext:
    h = normal(B, D, seed=step) if h is None else h
    labels_B = normal(B, seed=70 + step) if utilities else None
    if labels_B is not None:
        labels_B[:G] = float("nan")
    return WeightContext(NAMES, G, step, normal(B, K, seed=1000 + step), h, labels_B)


def real(policy: Conductor, context: WeightContext, **how: Any) -> Weights:
    """Plays one batch with the advantages that its weights give."""
    weights = policy.weights(context)
    advantages = group_advantages(context.rewards_BK, weights.weights_BK, G)
    policy.observe(Outcome(context, weights, advantages, **how))
    return weights


def hidden_weight(policy: Conductor) -> Tensor:
    assert policy.network.hidden_weight is not None
    return policy.network.hidden_weight


def test_an_mlp_head_starts_at_equal_weights_and_learns_in_both_layers() -> None:
    policy = conductor(hidden=7, min_prob=0.0)
    hidden = hidden_weight(policy).clone()
    assert hidden.shape == (7, D) and policy.weight.shape == (K, 7)
    expected_BK = real(policy, at(0)).expected_BK
    assert (expected_BK - 1 / K).abs().max() < 1e-7
    real(policy, at(1))
    assert policy.weight.abs().max() > 0
    assert not torch.equal(hidden_weight(policy), hidden)  # the last layer is not 0 any more
    assert torch.equal(hidden, hidden_weight(conductor(hidden=7)))  # the seed alone decides
    assert not torch.equal(hidden, hidden_weight(conductor(hidden=7, seed=1)))


def test_layer_norm_in_place_of_running_statistics() -> None:
    policy = conductor(standardise="layer_norm")
    policy.weight.data.copy_(normal(K, D, seed=7))
    h = normal(B, D, seed=0) * 5 + 2
    x = (h - h.mean(1, keepdim=True)) / (h.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
    p_BK = 0.85 * (x @ policy.weight.detach().T).softmax(-1) + 0.05
    torch.testing.assert_close(policy.weights(at(h=h)).expected_BK, 0.7 / K + 0.3 * p_BK)


@pytest.mark.parametrize("kind", ["response", "response_mean", "response_first_layer"])
def test_contexts_of_the_response_differ_within_a_group(kind: str) -> None:
    policy = conductor(context=kind)
    policy.weight.data.copy_(normal(K, D, seed=7))
    expected_BK = policy.weights(at()).expected_BK
    assert policy.context_kind == kind
    assert len(expected_BK.unique(dim=0)) == B


@pytest.mark.parametrize("kind", ["prompt_last", "prompt_mean", "reference_prompt_mean"])
def test_contexts_of_the_prompt_are_one_per_group(kind: str) -> None:
    policy = conductor(context=kind)
    policy.weight.data.copy_(normal(K, D, seed=7))
    h = normal(3, D, seed=0).repeat_interleave(G, 0) + 1e-6 * normal(B, D, seed=1)  # noise of a batched forward
    expected_BK = policy.weights(at(h=h)).expected_BK
    assert policy.context_kind == kind
    assert torch.equal(expected_BK, expected_BK[::G].repeat_interleave(G, 0))
    assert not torch.equal(expected_BK[0], expected_BK[G])


def test_one_action_per_group() -> None:
    policy = conductor(mode="group")
    policy.weight.data.copy_(normal(K, D, seed=7))
    weights = real(policy, at(3))
    assert weights.actions_B is not None
    assert torch.equal(weights.actions_B, weights.actions_B[::G].repeat_interleave(G))
    assert torch.equal(weights.weights_BK, weights.weights_BK[::G].repeat_interleave(G, 0))
    drawn = {tuple(policy.weights(at(step)).actions_B[::G].tolist()) for step in range(9)}  # type: ignore[index]
    assert len(drawn) > 3


@pytest.mark.parametrize("objective", ["advantage", "first_order"])
def test_all_actions_learns_from_counterfactual_advantages(objective: str) -> None:
    """At equal weights d/dz_k of sum_a p(a) cf[j, a] is (1 - K m)(cf[j, k] - mean_a cf[j, a]) / K."""
    policy = conductor(estimator="all_actions", entropy_coef=0.0, standardise="layer_norm", objective=objective)
    context = at(0, utilities=True)
    weights = real(policy, context)
    every_AK = 0.7 / K + 0.3 * torch.eye(K)
    cf_BK = counterfactual_advantages(context.rewards_BK, weights.weights_BK, every_AK, G)
    pull_BK = 0.85 * (cf_BK - cf_BK.mean(1, keepdim=True)) / K
    if objective == "first_order":
        assert context.utilities_B is not None
        u_NG = context.utilities_B[G:].view(2, G)
        z_NG = (u_NG - u_NG.mean(1, keepdim=True)) / (u_NG.std(1, keepdim=True) + 1e-4)
        pull_BK = pull_BK[G:] * z_NG.view(-1, 1)
    torch.testing.assert_close(first_gradient(policy, "bias"), pull_BK.mean(0), rtol=1e-4, atol=1e-7)


def test_first_order_weighs_advantages_with_known_utilities() -> None:
    policy = conductor(objective="first_order", entropy_coef=0.0)
    context = at(0, utilities=True)
    weights = real(policy, context)
    assert weights.actions_B is not None and context.utilities_B is not None
    u_NG = context.utilities_B[G:].view(2, G)
    z_B = ((u_NG - u_NG.mean(1, keepdim=True)) / (u_NG.std(1, keepdim=True) + 1e-4)).flatten()
    advantages_B = group_advantages(context.rewards_BK, weights.weights_BK, G).advantages[G:]
    drawn_BK = torch.nn.functional.one_hot(weights.actions_B[G:], K) - 1 / K
    gradient_K = (0.85 * drawn_BK * (advantages_B * z_B)[:, None]).mean(0)
    torch.testing.assert_close(first_gradient(policy, "bias"), gradient_K, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("kind", ["reinforce", "baseline", "all_actions", "pathwise"])
def test_a_custom_meta_reward(kind: str) -> None:
    """The reward of index 2 is what the user wants: its weight grows."""

    def hook(outcome: Outcome) -> Tensor:
        if kind == "pathwise":
            return group_advantages(outcome.context.rewards_BK[:, 2], None, G, profile="grpo").advantages
        return torch.tensor([0.0, 0.0, 1.0]).expand(B, K)

    mode = "soft" if kind == "pathwise" else "sample"
    policy = conductor(objective="custom", meta_reward=hook, estimator=kind, mode=mode, entropy_coef=0.0)
    for step in range(20):
        expected_BK = real(policy, at(step)).expected_BK
    assert expected_BK[:, 2].mean() > 1 / K + 0.03


def test_a_wrong_meta_reward_is_named() -> None:
    policy = conductor(objective="custom", meta_reward=lambda outcome: torch.zeros(3), estimator="baseline")
    with pytest.raises(ValueError, match=rf"^meta_reward: returned shape \(3,\), expected .* \({B}, {K}\)"):
        real(policy, at(0))
    with pytest.raises(ValueError, match=r"^utilities_B: missing, this weight policy needs an anchor"):
        real(conductor(objective="first_order"), at(0))


def test_the_learning_rate_halves_and_freezes() -> None:
    policy = conductor(half_life=2, freeze_at=3, weight_decay=0.0, entropy_coef=0.0)
    moved = []
    for step in range(5):
        before = policy.bias.detach().clone()
        play(policy, at(step), normal(B, seed=5))
        moved.append((policy.bias - before).abs().max().item())
    assert moved[0] == pytest.approx(0.05, rel=1e-3)  # the first step of AdamW is learning_rate * sign
    assert moved[3:] == [0.0, 0.0] and 0 < moved[2] <= 0.05 / 2 * 1.1


def test_kept_batches_are_used_again_with_importance_ratios() -> None:
    policy = conductor(period=2, capacity=3, staleness=4, min_prob=0.0)
    held = []
    for step in range(8):
        real(policy, at(step))
        held.append([int(batch["step"]) for batch in policy.buffer.batches])
    assert held == [[0], [0, 1], [0, 1, 2], [1, 2, 3], [1, 2, 3, 4], [3, 4, 5], [3, 4, 5, 6], [5, 6, 7]]
    policy = conductor(period=1, capacity=1, staleness=1)
    real(policy, at(0))
    joined = policy.buffer.batches[0]
    now_B = policy.probs(joined["h"]).detach().gather(1, joined["actions"][:, None])[:, 0]
    assert torch.allclose(joined["drawn_probs"], torch.full((B,), 1 / K))
    assert not torch.allclose(now_B, joined["drawn_probs"])


@pytest.mark.parametrize("options", [{"hidden": 4}, {"capacity": 3, "staleness": 5}, {"estimator": "all_actions"}])
def test_a_resumed_conductor_has_the_same_future(options: dict[str, Any]) -> None:
    whole, resumed = conductor(period=2, **options), conductor(period=2, **options)
    for step in range(3):
        real(whole, at(step))
    resumed.load_state_dict(whole.state_dict())
    for step in range(3, 7):
        assert torch.equal(real(resumed, at(step)).weights_BK, real(whole, at(step)).weights_BK)
        assert resumed.metrics() == whole.metrics()
    assert all(torch.equal(value, whole.state_dict()[key]) for key, value in resumed.state_dict().items())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"estimator": "pathwise"}, "weights.estimator: 'pathwise' with mode 'sample', expected mode 'soft'"),
        ({"estimator": "pathwise", "mode": "soft"}, "weights.estimator: 'pathwise' with objective 'advantage'"),
        ({"estimator": "baseline", "mode": "group"}, "weights.estimator: 'baseline' with mode 'group'"),
        ({"objective": "custom"}, "weights.meta_reward: None with objective 'custom', expected a function"),
        ({"meta_reward": "a:b"}, "weights.meta_reward: 'a:b' with objective 'advantage'"),
        ({"objective": "custom", "meta_reward": "json:nothing"}, "weights.meta_reward: json has no 'nothing'"),
        ({"capacity": 0}, "weights.capacity: 0, expected at least 1"),
        ({"staleness": -1}, "weights.staleness: -1, expected at least 0"),
        ({"half_life": 0}, "weights.half_life: 0.0, expected a positive number"),
        ({"hidden": -1}, "weights.hidden: -1, expected at least 0"),
        ({"device": "cuda:99"}, "weights.device: 'cuda:99', expected one that is here: "),
        ({"device": "nowhere"}, "weights.device: 'nowhere', expected one that is here: "),
    ],
)
def test_errors_name_the_setting(options: dict[str, Any], words: str) -> None:
    with pytest.raises(SettingsError) as caught:
        build_weight_policy({"type": "conductor", **options}, NAMES, D)
    assert str(caught.value).startswith(words)


@pytest.mark.parametrize(
    ("device", "cuda", "world_size", "chosen"),
    [
        ("auto", False, None, "cpu"),
        ("auto", True, None, "cuda:1"),
        ("auto", True, "1", "cuda:1"),
        ("auto", True, "2", "cpu"),
        ("cuda:3", True, "2", "cuda:3"),
        ("cpu", True, None, "cpu"),
    ],
)
def test_a_conductor_alone_lives_on_the_current_gpu(
    device: str, cuda: bool, world_size: str | None, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several processes all hold the same bits, so theirs live on the CPU unless a device is named."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if world_size is not None:
        monkeypatch.setenv("WORLD_SIZE", world_size)
    assert ConductorConfig(device=device).chosen_device == chosen


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"hidden": 8}, {"estimator": "all_actions"}, {"capacity": 3}])
def test_on_a_gpu_it_learns_what_it_learns_on_the_cpu(options: dict[str, Any]) -> None:
    here, there = conductor(period=2, **options), conductor(period=2, device="cuda", **options)
    for step in range(6):
        real(here, at(step))
        real(there, at(step))
        if step == 3:  # a state passes from one to the other
            there.load_state_dict(here.state_dict())
    assert there.weight.is_cuda
    for name, value in here.state_dict().items():
        torch.testing.assert_close(there.state_dict()[name], value, rtol=1e-3, atol=1e-4)
    assert there.metrics() == pytest.approx(here.metrics(), rel=1e-3, abs=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("profile", ["maestro", "grpo", "rloo"])
@pytest.mark.parametrize("options", [{}, {"hidden": 8}, {"mode": "soft", "learning_rate": 0.0}])
def test_on_a_gpu_one_op_gives_the_bits_of_two(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], profile: str
) -> None:
    policy, host = conductor(device="cuda", **options), at()
    policy.weight.copy_(normal(*policy.weight.shape, seed=7))
    assert host.context_Bd is not None
    context = replace(host, rewards_BK=host.rewards_BK.to("cuda"), context_Bd=host.context_Bd.to("cuda"))
    weights = policy.weights(context)
    advantages = group_advantages(context.rewards_BK, weights.weights_BK, G, profile=profile)
    calls = counted(monkeypatch)
    found, compared = weigh_and_compare(policy, context, Comparison(profile))
    assert calls == FUSED
    assert torch.equal(found.weights_BK, weights.weights_BK) and torch.equal(found.expected_BK, weights.expected_BK)
    assert found.actions_B is not None and weights.actions_B is not None
    assert torch.equal(found.actions_B, weights.actions_B)
    for name, expected in advantages._asdict().items():
        assert torch.equal(getattr(compared, name), expected), name
