"""Counterfactual advantages of the kernel against the reference in float64, and against the advantages themselves."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from maestro_fast.kernels import counterfactual_advantages as kernel
from maestro_fast.kernels.group_advantages import group_advantages
from maestro_fast.ops import PROFILES, AdvantageProfile, Groups
from maestro_fast.ops.counterfactual_advantages import counterfactual_advantages as reference
from tests.kernels.helpers import assert_close, on_device, runs
from tests.kernels.test_group_advantages import CUSTOM, RAGGED, inputs

EPSILON = 3e-6  # like that of the advantages; the moments are of the others instead of the group
WITHIN_GROUPS = ["maestro", "grpo", "dr_grpo", "rloo", "verl_grpo", "verl_dr_grpo"]
OWN = {**{name: PROFILES[name] for name in WITHIN_GROUPS}, **CUSTOM, "plain": AdvantageProfile(ddof=0)}
PROFILES_HERE = {name: p for name, p in OWN.items() if {p.score_center, p.score_scale}.isdisjoint({"batch", "tokens"})}


def launched(
    rewards_BK: Tensor, weights_BK: Tensor, action_weights: Tensor, groups: Any, profile: Any, kl: Tensor | None
) -> Tensor:
    index_NG = Groups.of(groups, rewards_BK.shape[0]).index_NG
    rewards_BK, weights_BK, action_weights, index_NG, kl = on_device(
        rewards_BK, weights_BK, action_weights, index_NG, kl
    )
    return kernel.counterfactual_advantages(
        rewards_BK, weights_BK, action_weights, index_NG, profile=profile, kl=kl, beta=0.0 if kl is None else 0.1
    )


def check(
    rewards_BK: Tensor, weights_BK: Tensor, action_weights: Tensor, groups: Any, profile: AdvantageProfile, kl: Tensor
) -> None:
    used = kl if profile.kl_in == "score" else None
    ours, *others = runs(
        lambda: launched(rewards_BK, weights_BK, action_weights, groups, profile, used),
        *(rewards_BK, weights_BK, action_weights, used),
    )
    truth, plain = (
        reference(
            rewards_BK.to(dtype),
            weights_BK.to(dtype),
            action_weights.to(dtype),
            groups,
            profile=profile,
            kl=None if used is None else used.to(dtype),
            beta=0.0 if used is None else 0.1,
        )
        for dtype in (torch.float64, torch.float32)
    )
    assert_close(ours, truth, plain, epsilon=EPSILON)
    assert all(torch.equal(ours, again) for again in others)


@pytest.mark.parametrize("name", PROFILES_HERE)
@pytest.mark.parametrize("groups", [4, RAGGED], ids=["equal", "ragged"])
def test_every_profile_within_groups(name: str, groups: Any) -> None:
    rewards_BK, weights_BK, kl, _ = inputs(20, 3)
    actions_AK = torch.rand(5, 3, generator=torch.Generator().manual_seed(1))
    check(rewards_BK, weights_BK, actions_AK, groups, PROFILES_HERE[name], kl)


@pytest.mark.parametrize("rewards", [1, 8])
@pytest.mark.parametrize("size", [1, 2, 16, 33])
def test_sizes_of_groups_and_one_hot_actions(size: int, rewards: int) -> None:
    """One-hot actions leave a response without a live weight where that reward abstained."""
    rewards_BK, weights_BK, kl, _ = inputs(2 * size + (size == 1) * 4, rewards, seed=size)
    check(rewards_BK, weights_BK, torch.eye(rewards), size, PROFILES["maestro"], kl)


def test_the_action_taken_gives_the_advantage() -> None:
    rewards_BK, _, kl, _ = inputs(20, 3)
    actions_AK = torch.rand(4, 3, generator=torch.Generator().manual_seed(3))
    action_B = torch.arange(20) % 4
    weights_BK, profile = actions_AK[action_B], PROFILES["maestro"]
    out = launched(rewards_BK, weights_BK, actions_AK, RAGGED, profile, kl).cpu()
    arguments = on_device(rewards_BK, weights_BK, Groups.of(RAGGED, 20).index_NG, kl)
    factual = group_advantages(*arguments[:3], profile=profile, kl=arguments[3], beta=0.1).advantages.cpu()
    torch.testing.assert_close(out.gather(1, action_B[:, None])[:, 0], factual, rtol=1e-5, atol=1e-5)
    assert factual.abs().max() > 0.5


@pytest.mark.parametrize("name", ["maestro", "rloo"])
def test_identical_rewards_give_exactly_zero(name: str) -> None:
    rewards_BK = torch.tensor([0.1, 1 / 3, 1e4 + 0.1]).expand(14, 3)
    weights_K = torch.tensor([0.7, 1.9, 0.31])
    profile = replace(PROFILES[name], kl_in="loss")
    out = launched(rewards_BK, weights_K.expand(14, 3), weights_K[None], 7, profile, None)
    assert torch.equal(out.cpu(), torch.zeros(14, 1))


def test_a_kl_does_not_hide_that_a_group_is_flat() -> None:
    rewards_BK, weights_K = torch.tensor([0.1, 1.0]).expand(10, 2), torch.tensor([0.7, 0.3])
    kl = torch.rand(10, generator=torch.Generator().manual_seed(0)) - 0.5
    arguments = (rewards_BK, weights_K.expand(10, 2), weights_K[None], 5, PROFILES["dr_grpo"])
    assert torch.equal(launched(*arguments, kl).cpu(), torch.zeros(10, 1))


def test_a_group_that_does_not_fit() -> None:
    rewards_BK, weights_BK, _, _ = inputs(1025, 1)
    with pytest.raises(ValueError, match="groups: one of 1025 responses, expected at most 1024"):
        launched(rewards_BK, weights_BK, torch.eye(1), 1025, PROFILES["rloo"], None)
