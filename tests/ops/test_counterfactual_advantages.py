"""Counterfactual advantages against group_advantages itself, called once per response and action."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from maestro_fast.ops import PROFILES, AdvantageProfile, Groups, counterfactual_advantages, group_advantages
from tests.ops.helpers import assert_same_compiled, assert_same_fake

NAN = float("nan")
SERVED = ["maestro", "grpo", "dr_grpo", "rloo", "verl_grpo", "verl_dr_grpo"]
RAGGED = [2, 0, 0, 1, 2, 2, 0, 2, 3, 3, 0]  # group 1 is a singleton


def draw(*shape: int, missing: float = 0.0, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, dtype=torch.float64, generator=generator)
    return torch.where(torch.rand(*shape, generator=generator) < missing, NAN, x)


def brute_force(
    rewards_BK: Tensor, weights_BK: Tensor, action_weights_AK: Tensor, groups: Any, **options: Any
) -> Tensor:
    """The definition: row j of the weights is replaced and everything computed again."""
    table_BA = torch.empty(len(rewards_BK), len(action_weights_AK), dtype=rewards_BK.dtype)
    for j in range(len(rewards_BK)):
        for a, weights_K in enumerate(action_weights_AK):
            replaced_BK = weights_BK.clone()
            replaced_BK[j] = weights_K
            table_BA[j, a] = group_advantages(rewards_BK, replaced_BK, groups, **options).advantages[j]
    return table_BA


@pytest.mark.parametrize("profile", SERVED)
@pytest.mark.parametrize("missing", [0.0, 0.3])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_equals_the_definition(profile: str, missing: float, dtype: torch.dtype, tolerance: float) -> None:
    rewards_BK = draw(11, 3, missing=missing, seed=1).to(dtype)
    weights_BK, action_weights_AK = draw(11, 3, seed=2).abs().to(dtype), draw(4, 3, seed=3).abs().to(dtype)
    ours = counterfactual_advantages(rewards_BK, weights_BK, action_weights_AK, RAGGED, profile=profile)
    assert ours.dtype == dtype and ours.shape == (11, 4) and ours.abs().max() > 0.3
    expected = brute_force(rewards_BK, weights_BK, action_weights_AK, RAGGED, profile=profile)
    torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance)


any_served_profile = st.builds(
    AdvantageProfile,
    st.sampled_from(["none", "group", "batch", "leave_one_out"]),
    st.sampled_from(["none", "group", "batch"]),
    st.sampled_from(["none", "group", "leave_one_out"]),
    st.sampled_from(["none", "group"]),
    ddof=st.sampled_from([0, 1]),
    singleton=st.sampled_from(["zero", "raw"]),
    missing=st.sampled_from(["zero", "renormalize"]),
    score_eps_in=st.sampled_from(["std", "variance"]),
)


@settings(max_examples=100, deadline=None)
@given(st.data(), any_served_profile)
def test_equals_the_definition_for_every_profile(data: st.DataObject, profile: AdvantageProfile) -> None:
    """Rewards are few quarters, so ties, flat groups, rows without a live weight and singletons are common."""
    batch, K, A = data.draw(st.integers(1, 7)), data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    ids = data.draw(st.lists(st.integers(0, 2), min_size=batch, max_size=batch))
    quarters = st.integers(-4, 4).map(lambda i: i / 4)

    def table(rows: int, value: st.SearchStrategy[float]) -> Tensor:
        drawn = data.draw(st.lists(st.lists(value, min_size=K, max_size=K), min_size=rows, max_size=rows))
        return torch.tensor(drawn, dtype=torch.float64)

    rewards_BK = table(batch, st.just(NAN) | quarters)
    weights_BK, action_weights_AK = (
        table(batch, st.sampled_from([0.0, 0.5, 1.0])),
        table(A, st.sampled_from([0.0, 1.0])),
    )
    options: dict[str, Any] = {"kl": draw(batch, seed=4), "beta": 0.3, "profile": profile}
    ours = counterfactual_advantages(rewards_BK, weights_BK, action_weights_AK, ids, **options)
    expected = brute_force(rewards_BK, weights_BK, action_weights_AK, ids, **options)
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("profile", SERVED)
def test_the_action_that_was_taken_has_the_advantage_as_it_is(profile: str) -> None:
    actions_AK = draw(3, 4, seed=5).abs()
    actions_B = torch.arange(11) % 3
    rewards_BK = draw(11, 4, missing=0.2, seed=6)
    table_BA = counterfactual_advantages(rewards_BK, actions_AK[actions_B], actions_AK, RAGGED, profile=profile)
    advantages_B = group_advantages(rewards_BK, actions_AK[actions_B], RAGGED, profile=profile).advantages
    taken_B = table_BA.gather(1, actions_B[:, None])[:, 0]
    torch.testing.assert_close(taken_B, advantages_B, rtol=1e-12, atol=1e-12)
    assert torch.equal(taken_B == 0, advantages_B == 0)


def test_the_kl_enters_and_degenerate_is_judged_before_it() -> None:
    rewards_BK, weights_BK, actions_AK = draw(8, 2, seed=7), draw(8, 2, seed=8).abs(), draw(3, 2, seed=9).abs()
    rewards_BK[4:] = 0.1  # this group is flat, whatever the weights
    options: dict[str, Any] = {"kl": draw(8, seed=10), "beta": 0.7}
    ours = counterfactual_advantages(rewards_BK, weights_BK, actions_AK, 4, **options)
    torch.testing.assert_close(ours, brute_force(rewards_BK, weights_BK, actions_AK, 4, **options))
    without = counterfactual_advantages(rewards_BK, weights_BK, actions_AK, 4)
    assert (ours[4:] == 0).all() and (ours[:4] - without[:4]).abs().max() > 0.1


def test_an_action_may_wake_a_degenerate_group_and_silence_a_live_one() -> None:
    rewards_BK = torch.tensor([[0.1, 0.0], [0.1, 1.0], [0.1, 2.0], [0.1, 0.0], [0.1, 1.0], [0.1, 0.0]])
    only_first, only_second = [1.0, 0.0], [0.0, 1.0]
    weights_BK = torch.tensor([only_first] * 3 + [only_first, only_second, only_first])
    profile = replace(PROFILES["grpo"], score_scale="none")
    advantages = group_advantages(rewards_BK, weights_BK, 3, profile=profile)
    assert advantages.degenerate.tolist() == [True] * 3 + [False] * 3
    table_BA = counterfactual_advantages(
        rewards_BK, weights_BK, torch.tensor([only_first, only_second]), 3, profile=profile
    )
    assert (table_BA[:3, 0] == 0).all() and (table_BA[:3, 1].abs() > 0.05).all()
    assert (
        table_BA[4, 0] == 0.0 and table_BA[4, 1] == advantages.advantages[4]
    )  # this response alone gives its group a spread


def test_a_response_without_a_live_weight_has_no_advantage_under_that_action() -> None:
    rewards_BK = torch.tensor([[1.0, NAN], [3.0, 0.5], [2.0, 4.0]])
    table_BA = counterfactual_advantages(rewards_BK, None, torch.tensor([[0.0, 1.0], [1.0, 0.0]]), 3)
    assert table_BA[0, 0] == 0.0 and (table_BA.flatten()[1:] != 0).all()


@pytest.mark.parametrize("profile", SERVED)
@pytest.mark.parametrize("size", [1, 2, 5])
def test_identical_rewards_give_exactly_zero_under_every_action(profile: str, size: int) -> None:
    values = torch.tensor([0.1, 1 / 3, 1e4 + 0.1, -7.7e-3]).repeat_interleave(size)
    rewards_BK = values[:, None] * torch.tensor([0.3, 0.9, 1.0])
    actions_AK = torch.tensor([[0.1, 0.2, 0.7], [0.6, 0.3, 0.1]])
    table_BA = counterfactual_advantages(rewards_BK, actions_AK[0], actions_AK[:1], size, profile=profile)
    if size == 1 and PROFILES[profile].singleton == "raw":
        assert (table_BA != 0).all()
    else:
        assert (table_BA == 0).all()
    if PROFILES[profile].reward_center == "group":  # then no weights bring spread into the group
        assert (counterfactual_advantages(rewards_BK, actions_AK[0], actions_AK, size, profile=profile) == 0).all()


@pytest.mark.parametrize("profile", SERVED)
def test_the_order_of_responses_and_actions_does_not_matter(profile: str) -> None:
    rewards_BK, weights_BK, actions_AK = draw(11, 3, missing=0.2), draw(11, 3, seed=1).abs(), draw(5, 3, seed=2).abs()
    ids = torch.tensor(RAGGED)
    generator = torch.Generator().manual_seed(0)
    order, actions = torch.randperm(11, generator=generator), torch.randperm(5, generator=generator)
    straight = counterfactual_advantages(rewards_BK, weights_BK, actions_AK, ids, profile=profile)
    moved = counterfactual_advantages(
        rewards_BK[order], weights_BK[order], actions_AK[actions], 7 - ids[order], profile=profile
    )
    torch.testing.assert_close(moved, straight[order][:, actions], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    rewards_BK, weights_BK, actions_AK = (draw(n, 2, seed=n).abs().to(dtype) for n in (8, 9, 3))
    half = counterfactual_advantages(rewards_BK, weights_BK[:8], actions_AK, 4)
    full = counterfactual_advantages(rewards_BK.float(), weights_BK[:8].float(), actions_AK.float(), 4)
    assert half.dtype == torch.float32 and torch.equal(half, full)


def test_huge_rewards_leave_no_nan() -> None:
    rewards_BK, actions_AK = draw(8, 2, seed=1).float() * 1e30, torch.rand(3, 2)
    for profile in SERVED:
        table_BA = counterfactual_advantages(rewards_BK, torch.rand(8, 2), actions_AK, 4, profile=profile)
        assert table_BA.isfinite().all()


def test_forms_of_inputs_agree_and_nothing_is_needed_of_an_empty_batch() -> None:
    rewards_BK, actions_AK = draw(6, 1), draw(3, 1, seed=1).abs()
    expected = counterfactual_advantages(rewards_BK, torch.ones(6, 1), actions_AK, 3)
    for groups in ([0, 0, 0, 1, 1, 1], torch.tensor([5, 5, 5, 9, 9, 9]), Groups.of(3, 6)):
        assert torch.equal(counterfactual_advantages(rewards_BK[:, 0], None, actions_AK, groups), expected)
    assert counterfactual_advantages(rewards_BK[:0], None, actions_AK, 3).shape == (0, 3)
    assert (counterfactual_advantages(torch.full((4, 1), NAN), None, actions_AK, 2) == 0).all()


# --- gradients, graphs, errors ---


@pytest.mark.parametrize("profile", SERVED)
def test_gradients_of_both_weights(profile: str) -> None:
    rewards_BK = draw(11, 3, missing=0.2, seed=5)
    weights_BK, actions_AK = (draw(n, 3, seed=n).abs().add(0.1).requires_grad_() for n in (11, 2))

    def table(weights: Tensor, actions: Tensor) -> Tensor:
        return counterfactual_advantages(rewards_BK, weights, actions, RAGGED, profile=profile)

    assert all(
        x.abs().max() > 1e-3 for x in torch.autograd.grad(table(weights_BK, actions_AK).sum(), (weights_BK, actions_AK))
    )
    assert torch.autograd.gradcheck(table, (weights_BK, actions_AK))


def test_compiles_to_one_graph() -> None:
    groups = Groups.of(RAGGED, 11)

    def table(rewards: Tensor, weights: Tensor, actions: Tensor) -> Tensor:
        return counterfactual_advantages(rewards, weights, actions, groups)

    assert_same_compiled(table, draw(11, 2, missing=0.2).float(), torch.rand(11, 2), torch.rand(3, 2).requires_grad_())


def test_runs_on_fake_tensors() -> None:
    def table(rewards: Tensor, weights: Tensor, actions: Tensor) -> Tensor:
        return counterfactual_advantages(rewards, weights, actions, 4)

    assert_same_fake(table, torch.rand(8, 2), torch.rand(8, 2), torch.rand(3, 2))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"action_weights": torch.ones(3, 2).long()}, TypeError, "action_weights: dtype torch.int64"),
        ({"action_weights": torch.ones(2)}, ValueError, r"action_weights: shape \(2,\), expected \[A, 2\]"),
        ({"action_weights": torch.ones(3, 4)}, ValueError, r"action_weights: shape \(3, 4\)"),
        ({"action_weights": torch.ones(0, 2)}, ValueError, r"action_weights: shape \(0, 2\)"),
        ({"action_weights": torch.ones(3, 2, device="meta")}, ValueError, "action_weights: on meta"),
        ({"weights": torch.ones(3)}, ValueError, r"weights: shape \(3,\)"),
        ({"profile": "gdpo"}, ValueError, "profile: its score_center is 'batch'"),
        ({"profile": "grpo_batch"}, ValueError, "profile: its score_scale is 'batch'"),
        ({"profile": "verl_gdpo"}, ValueError, "profile: its score_center is 'tokens'"),
        ({"kl": torch.ones(4), "profile": "grpo"}, ValueError, "kl: given"),
        ({"groups": 3}, ValueError, "groups: 4 responses"),
        ({"backend": "triton"}, ValueError, "backend: 'triton' cannot serve counterfactual_advantages here"),
    ],
)
def test_errors_name_the_argument(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {"rewards": torch.ones(4, 2), "weights": None, "groups": 2}
    with pytest.raises(error, match=message):
        counterfactual_advantages(**{**arguments, "action_weights": torch.ones(3, 2), **changes})


def test_only_profiles_beyond_the_group_are_refused() -> None:
    refused = {"gdpo", "grpo_batch", "verl_gdpo"}
    assert set(SERVED) == set(PROFILES) - refused
