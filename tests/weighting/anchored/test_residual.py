"""The regression of the utility on context and rewards, beside learnt weights and in their place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from maestro_fast.ops import group_advantages
from maestro_fast.settings import SettingsError
from maestro_fast.weighting import (
    Comparison,
    Outcome,
    WeightContext,
    WeightPolicy,
    Weights,
    build_weight_policy,
    weigh_and_compare,
)
from maestro_fast.weighting.anchored.replay import normalised_rewards
from maestro_fast.weighting.anchored.residual import RegressionParams, error_and_gradient, shares
from maestro_fast.weighting.diagnostics import diagnose
from tests.weighting.anchored.test_anchored import world
from tests.weighting.helpers import NAMES, K, normal

N, G, D, H = 8, 6, 5, 4
B = N * G
RESIDUAL: dict[str, Any] = {"type": "anchored", "residual": True}
MODEL: dict[str, Any] = {"type": "reward_model"}
LEARNING = [RESIDUAL, {**RESIDUAL, "hybrid": True}, {**RESIDUAL, "context": "none"}, MODEL, {**MODEL, "hybrid": True}]


def policy_of(entry: dict[str, Any]) -> Any:
    return build_weight_policy(entry, NAMES, D)


def run(policy: WeightPolicy, context: WeightContext, profile: str = "maestro") -> tuple[Weights, Tensor]:
    weights, found = weigh_and_compare(policy, context, Comparison(profile))
    policy.observe(Outcome(context, weights, found, profile))
    return weights, found.advantages


def params() -> RegressionParams:
    return RegressionParams(*(t.detach().double() for t in RegressionParams.start(D, K, H, 3).named().values()))


def groups() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Three groups on two contexts. One reward abstains from a response, and all do from another."""
    rewards_NGK = normal(3, G, K, seed=2).double()
    rewards_NGK[0, 1, 0] = rewards_NGK[1, 2] = float("nan")
    return normal(2, D, seed=1).double(), torch.tensor([0, 1, 0]), rewards_NGK, normal(3, G, seed=3).double()


def test_the_loss_by_hand() -> None:
    net, (x_Pd, index_N, rewards_NGK, utilities_NG) = params(), groups()
    total = 0.0
    for n in range(3):
        errors = []
        for g in range(G):
            r = [0.0 if v != v else v for v in rewards_NGK[n, g].tolist()]
            if rewards_NGK[n, g].isnan().all():
                continue
            f = net.bias.item()
            for h in range(H):
                inside = net.hidden_bias[h] + net.context_weight[h] @ x_Pd[index_N[n]]
                inside = inside + sum(net.reward_weight[h, k] * r[k] for k in range(K))
                f += (net.weight[h] * torch.tanh(inside)).item()
            errors.append((f - utilities_NG[n, g].item()) ** 2)
        total += sum(errors) / len(errors) / 3
    found, _ = error_and_gradient(
        net, x_Pd, index_N, rewards_NGK.nan_to_num(0.0), utilities_NG, shares(rewards_NGK), 0.01
    )
    assert found.item() == pytest.approx(total, rel=1e-12)


def test_gradient_by_autograd() -> None:
    """Autograd goes through the formula of the module, one response after another."""
    x_Pd, index_N, rewards_NGK, utilities_NG = groups()
    named = {name: t.requires_grad_() for name, t in params().named().items()}
    W_x, W_r, c, v, b = named.values()
    loss = 0.01 * torch.stack([t.square().sum() for t in named.values()]).sum()
    for n in range(3):
        rows = rewards_NGK[n][~rewards_NGK[n].isnan().all(1)].nan_to_num(0.0)
        f = torch.stack([v @ torch.tanh(W_x @ x_Pd[index_N[n]] + W_r @ r + c) + b for r in rows])
        loss = loss + (f - utilities_NG[n][~rewards_NGK[n].isnan().all(1)]).square().mean() / 3
    expected = torch.autograd.grad(loss, list(named.values()))
    net = params()
    _, gradient = error_and_gradient(
        net, x_Pd, index_N, rewards_NGK.nan_to_num(0.0), utilities_NG, shares(rewards_NGK), 0.01
    )
    assert gradient.keys() == net.named().keys()
    for found, by_autograd in zip(gradient.values(), expected, strict=True):
        assert by_autograd.abs().max() > 1e-3
        torch.testing.assert_close(found, by_autograd, rtol=1e-10, atol=1e-12)


def interaction(step: int, share: float = 1.0) -> WeightContext:
    """Utility is the product of two rewards: every weighting is worth nothing, and a regression learns it."""
    rewards_BK = normal(B, K, seed=3000 + step)
    utilities_B = rewards_BK[:, 0] * rewards_BK[:, 1]
    utilities_B[int(share * N) * G :] = float("nan")
    x_Bd = (normal(N, D, seed=step) * 0.1).repeat_interleave(G, 0)
    return WeightContext(NAMES, G, step, rewards_BK, x_Bd, utilities_B)


def agreement(policy: WeightPolicy, profile: str = "maestro") -> float:
    """The mean product of advantages with the utility on unseen groups without labels; at most 1 (G - 1) / G."""
    context = interaction(99)
    assert context.utilities_B is not None
    z_B = group_advantages(context.utilities_B, None, G).advantages
    unlabelled = WeightContext(NAMES, G, 99, context.rewards_BK, context.context_Bd, torch.full((B,), float("nan")))
    _, found = weigh_and_compare(policy, unlabelled, Comparison(profile))
    return (found.advantages * z_B).mean().item()


@pytest.mark.parametrize("profile", ["maestro", "grpo"])
def test_a_residual_learns_what_no_weighting_can_say(profile: str) -> None:
    found = {}
    for name, entry in {"weights": {**RESIDUAL, "residual": False}, "residual": RESIDUAL, "model": MODEL}.items():
        policy = policy_of(entry)
        for step in range(8):
            run(policy, interaction(step), profile)
        assert name == "weights" or policy.metrics()["conductor/residual_loss"] < 0.6
        found[name] = agreement(policy, profile)
    print(found)
    assert found["residual"] > found["weights"] + 0.2 and found["model"] > found["residual"] > 0.2


@pytest.mark.parametrize("entry", LEARNING, ids=str)
def test_nothing_is_learnt_or_scored_before_the_first_label(entry: dict[str, Any]) -> None:
    policy = policy_of(entry)
    for step in range(2):
        weights, advantages_B = run(policy, world(step, share=0.0))
        assert torch.equal(weights.weights_BK, torch.full((B, K), 1 / K)) and weights.residual_B is None
        assert "conductor/residual_loss" not in policy.metrics()
        equal_B = group_advantages(world(step).rewards_BK, weights.weights_BK, G).advantages
        assert torch.equal(advantages_B, equal_B)
    run(policy, world(2, share=1.0))
    context = world(3)
    weights, found = weigh_and_compare(policy, context, Comparison())
    assert weights.residual_B is not None and weights.residual_B.isfinite().all()
    share = diagnose(Outcome(context, weights, found))["conductor/residual_share"]
    if entry["type"] == "reward_model":
        assert not weights.weights_BK.any() and share == pytest.approx(1.0)
    else:
        assert 0.0 < share < 1.0


@pytest.mark.parametrize("entry", [RESIDUAL, MODEL], ids=str)
def test_nothing_is_learnt_from_groups_without_rewards(entry: dict[str, Any]) -> None:
    """A regression that knew no other groups would give arbitrary scores to all prompts."""
    policy, context = policy_of(entry), world(0, share=1.0)
    context.rewards_BK.view(N, G, K)[:, 1:] = float("nan")
    context.rewards_BK[: B // 2] = float("nan")
    run(policy, context)
    weights, _ = run(policy, world(1, share=0.0))
    assert weights.residual_B is None and torch.equal(weights.weights_BK, torch.full((B, K), 1 / K))


def test_what_f_reads_of_a_response() -> None:
    """f does not depend on the order of the responses, nor on rewards that abstained, and is none without rewards."""
    policy = policy_of(RESIDUAL)
    for step in range(2):
        run(policy, world(step))
    context = world(5)
    context.rewards_BK[2, 1] = context.rewards_BK[3] = float("nan")
    found_B = policy.weights(context).residual_B
    assert found_B.isnan().nonzero().flatten().tolist() == [3]
    order_B = torch.arange(B).view(N, G).flip(1).flatten()
    moved = WeightContext(NAMES, G, 5, context.rewards_BK[order_B], context.context_Bd, context.utilities_B)
    torch.testing.assert_close(policy.weights(moved).residual_B, found_B[order_B], equal_nan=True)
    x_Nd = policy.memory.standardised(policy.memory.contexts(context))
    r_NGK = normalised_rewards(context)
    assert r_NGK[0, 2, 1].isnan()
    r_NGK[0, 2, 1] = 0.0
    with torch.no_grad():
        net = policy.residual.params
        alone = net.units(x_Nd[:1], torch.tensor([0]), r_NGK[:1].nan_to_num(0.0)) @ net.weight + net.bias
    torch.testing.assert_close(alone[0, [0, 1, 2, 4, 5]], found_B[:G][[0, 1, 2, 4, 5]])


@pytest.mark.parametrize("entry", LEARNING, ids=str)
@pytest.mark.parametrize("cut", [1, 3])
def test_a_resumed_run_has_the_same_future(entry: dict[str, Any], cut: int, tmp_path: Path) -> None:
    whole, resumed = policy_of({**entry, "steps": 3}), policy_of({**entry, "steps": 3})
    for step in range(cut):
        run(whole, world(step))
    save_file(whole.state_dict(), tmp_path / "state.safetensors")
    resumed.load_state_dict(load_file(tmp_path / "state.safetensors"))
    for step in range(cut, cut + 2):
        ours, theirs = run(resumed, world(step)), run(whole, world(step))
        assert torch.equal(ours[1], theirs[1]) and torch.equal(ours[0].residual_B, theirs[0].residual_B)  # type: ignore[arg-type]
        assert resumed.metrics() == whole.metrics()
    assert all(torch.equal(value, whole.state_dict()[key]) for key, value in resumed.state_dict().items())


def test_states_with_and_without_a_residual_are_not_mixed_up() -> None:
    with_it, without = policy_of(RESIDUAL), policy_of({**RESIDUAL, "residual": False})
    with pytest.raises(ValueError, match=r"^state\.residual: was saved with `residual: false`, expected it with"):
        with_it.load_state_dict(without.state_dict())
    with pytest.raises(ValueError, match=r"^state\.residual: was saved with `residual: true`, expected it with"):
        without.load_state_dict(with_it.state_dict())
    misshapen = {name: tensor[:1] if tensor.ndim else tensor for name, tensor in with_it.state_dict().items()}
    with pytest.raises(ValueError, match=r"^state\..*, expected shape"):
        with_it.load_state_dict(misshapen)


def test_the_weights_are_the_same_with_and_without_a_residual() -> None:
    """They stay what a person reads: the residual takes no part in their learning."""
    one, other = policy_of({**RESIDUAL, "residual": False}), policy_of(RESIDUAL)
    for step in range(3):
        assert torch.equal(run(one, world(step))[0].weights_BK, run(other, world(step))[0].weights_BK)


def test_without_a_context_there_is_one_weighting_for_all() -> None:
    policy = policy_of({"type": "anchored", "context": "none"})
    assert not policy.needs_context
    for step in range(6):
        context = world(step)
        run(policy, WeightContext(NAMES, G, step, context.rewards_BK, None, context.utilities_B))
    weights_BK = policy.weights(world(9)).weights_BK
    assert torch.equal(weights_BK, weights_BK[:1].expand(B, K))
    # The utility is reward 0 in one half of the prompts and reward 2 in the other; reward 1 is noise.
    assert weights_BK[0, 1] < 0.15 and weights_BK[0, [0, 2]].min() > 0.3
    moved = {name for name, tensor in policy.params.named().items() if tensor.detach().abs().sum() > 0}
    assert moved == {"bias"}
    torch.testing.assert_close(weights_BK[0], policy.params.bias.detach().softmax(0))


@pytest.mark.parametrize("profile", ["maestro", "grpo", "dr_grpo", "rloo", "gdpo"])
def test_grpo_on_the_labelled_prompts_alone(profile: str) -> None:
    policy, context = policy_of({"type": "utility"}), world(0)
    assert context.utilities_B is not None
    labelled_B = ~context.utilities_B.isnan()
    assert 0 < labelled_B.sum() < B
    context.rewards_BK[~labelled_B.nonzero()[0] % B] = float("nan")
    weights, found = weigh_and_compare(policy, context, Comparison(profile))
    assert not weights.weights_BK.any() and torch.equal(weights.direct_B, labelled_B)  # type: ignore[arg-type]
    assert not found.advantages[~labelled_B].any() and bool(found.degenerate[~labelled_B].all())
    assert not found.degenerate[labelled_B].any() and bool((found.advantages[labelled_B] != 0).all())
    if profile != "gdpo":
        by_utility_B = group_advantages(context.utilities_B.nan_to_num(0), None, G, profile=profile).advantages
        torch.testing.assert_close(found.advantages[labelled_B], by_utility_B[labelled_B], rtol=1e-3, atol=1e-3)


def test_what_makes_no_sense_is_refused() -> None:
    for entry in ({"type": "utility"}, MODEL):
        with pytest.raises(SettingsError, match=f"^weights.guard: given with {entry['type']}, under which no reward"):
            build_weight_policy({**entry, "guard": {}}, NAMES, D)
    with pytest.raises(SettingsError, match=r"^weights\.residual_factor: -1\.0, expected a number >= 0"):
        build_weight_policy({**RESIDUAL, "residual_factor": -1}, NAMES, D)
    with pytest.raises(SettingsError, match=r"^weights\.hidden: 0, expected at least 1"):
        build_weight_policy({**MODEL, "hidden": 0}, NAMES, D)
