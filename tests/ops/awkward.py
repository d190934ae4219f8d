"""Checks of every backend on inputs on which backends could disagree."""

from __future__ import annotations

from dataclasses import replace

import torch

from maestro_fast.ops import PROFILES, counterfactual_advantages, group_advantages
from maestro_fast.ops.backend import Backend

G = 4
ACTIONS_AK = torch.tensor([[1.0, 0.0], [0.5, 0.5]])


def check_no_epsilon_and_no_spread(name: str, backend: Backend, device: str = "cpu") -> None:
    """0 / 0 is 0, so rewards without spread give 0 without an epsilon, as they do with one."""
    profile = replace(PROFILES[name], reward_eps=0.0, score_eps=0.0)
    rewards_BK = torch.tensor([[1.0, 1], [1, 1], [1, 2], [1, 3], [2, 2], [2, 2], [2, 2], [2, 2]], device=device)
    lengths = torch.ones(8, device=device) if profile.needs_lengths else None
    for rows in (rewards_BK, rewards_BK[4:].repeat(2, 1)):  # the latter without any spread in the batch
        out = group_advantages(rows, None, G, lengths=lengths, profile=profile, backend=backend)
        assert all(x.isfinite().all() for x in out), out
        assert (out.advantages[4:] == 0).all() or "group" not in (profile.score_center, profile.reward_center)
        assert profile.reward_scale != "group" or (out.normalized_rewards[4:] == 0).all()
    if not {profile.score_center, profile.score_scale} & {"batch", "tokens"}:
        half_K, actions_AK = torch.full((2,), 0.5, device=device), ACTIONS_AK.to(device)
        other = counterfactual_advantages(rewards_BK, half_K, actions_AK, G, profile=profile, backend=backend)
        assert other.isfinite().all()
        assert (other[4:] == 0).all()


def check_a_weight_that_is_not_a_number(name: str, backend: Backend, device: str = "cpu") -> None:
    """It makes its own group NaN and no other. A 0 would pass for a group without spread."""
    rewards_BK = torch.tensor([[1.0, 2], [1, 2], [1, 2], [1, 2], [1, 5], [3, 4], [5, 1], [7, 8]], device=device)
    weights_BK = torch.ones(8, 2, device=device)
    weights_BK[1, 1] = torch.nan
    out = group_advantages(rewards_BK, weights_BK, G, profile=name, backend=backend)
    assert out.scores.isnan().tolist() == [False, True] + [False] * 6
    assert out.advantages.isnan().tolist() == [True] * 4 + [False] * 4
    assert not out.degenerate.any()
    other = counterfactual_advantages(rewards_BK, weights_BK, ACTIONS_AK.to(device), G, profile=name, backend=backend)
    assert other.isnan().any(1).tolist() == [True, False, True, True] + [False] * 4  # response 1 under a known weight
