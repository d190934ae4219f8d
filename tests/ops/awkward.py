"""Checks of every backend on inputs on which backends could disagree."""

from __future__ import annotations

import warnings
from dataclasses import replace

import torch

from maestro_fast.ops import PROFILES, GroupAdvantages, counterfactual_advantages, group_advantages
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


POISONS = ("NaN weight", "infinite reward", "NaN KL")


def check_poison_reaches_only_what_is_compared(name: str, poison: str, backend: Backend, device: str = "cpu") -> None:
    """A number that is none makes everything that is compared with it not finite, and touches nothing else."""
    profile = PROFILES[name]
    if poison == "NaN KL" and profile.kl_in == "loss":
        return
    # The first group is poisoned, the second one is sound, and the third one has no spread.
    rewards_BK = torch.tensor([[1.0, 2], [3, 1], [2, 5], [4, 4], [1, 5], [3, 4], [5, 1], [7, 8]] + [[2.0, 2]] * 4)
    weights_BK, kl_B = torch.ones(12, 2), torch.linspace(0, 1, 12)
    options = {"lengths": torch.arange(1.0, 13, device=device)} if profile.needs_lengths else {}

    def advantages() -> GroupAdvantages:
        kl = {"kl": kl_B.to(device), "beta": 0.5} if profile.kl_in == "score" else {}
        given = rewards_BK.to(device), weights_BK.to(device), G
        return group_advantages(*given, **kl, **options, profile=profile, backend=backend)

    sound = advantages()
    if poison == "NaN weight":
        weights_BK[1, 1] = torch.nan
    elif poison == "infinite reward":
        rewards_BK[1, 1] = torch.inf
    else:
        kl_B[[1, 9]] = torch.nan
    with warnings.catch_warnings():  # Triton's interpreter computes with NumPy, which warns of a NaN.
        warnings.simplefilter("ignore", RuntimeWarning)
        out = advantages()
    assert not out.advantages[:4].isfinite().any()
    scopes = {profile.reward_center, profile.reward_scale, profile.score_center, profile.score_scale}
    if scopes.isdisjoint(("batch", "tokens")):
        assert torch.equal(out.advantages[4:], sound.advantages[4:])
    else:
        assert not out.advantages[4:8].isfinite().any()
    assert (out.advantages[8:] == 0).all()
    assert out.degenerate.tolist() == [False] * 8 + [True] * 4
    if scopes.isdisjoint(("batch", "tokens")):
        equal_AK = torch.tensor([[1.0, 1.0], [3.0, 3.0]], device=device)
        given = rewards_BK.to(device), weights_BK.to(device), equal_AK, G
        kl = {"kl": kl_B.to(device), "beta": 0.5} if profile.kl_in == "score" else {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            other = counterfactual_advantages(*given, **kl, profile=profile, backend=backend)
        assert not other[[0, 2, 3]].isfinite().any()
        assert other[4:8].isfinite().all()
        assert (other[8:, 0] == 0).all()


MAGNITUDES = (1e-30, 1e30)  # the squares of these are no float32 numbers


def check_any_magnitude(name: str, size: float, backend: Backend, device: str = "cpu") -> None:
    """Rewards whose squares are too large or too small for float32 give the advantages that float64 gives."""
    profiles = PROFILES[name], replace(PROFILES[name], reward_eps=0.0, score_eps=0.0)
    rewards_BK = torch.tensor([[1.0, 2], [3, 1], [2, 5], [4, 4], [1, 5], [3, 4], [5, 1], [7, 9]], device=device) * size
    rewards_BK[2, 0] = torch.nan
    half_K, actions_AK = torch.full((2,), 0.5, device=device), ACTIONS_AK.to(device)
    for profile in profiles:
        lengths = torch.arange(1.0, 9, device=device) if profile.needs_lengths else None
        out = group_advantages(rewards_BK, half_K, G, lengths=lengths, profile=profile, backend=backend)
        truth = group_advantages(
            rewards_BK.double(), half_K.double(), G, lengths=lengths, profile=profile, backend="torch"
        )
        compared = [(out.advantages, truth.advantages), (out.std, truth.std)]
        if not {profile.score_center, profile.score_scale} & {"batch", "tokens"}:
            other = counterfactual_advantages(rewards_BK, half_K, actions_AK, G, profile=profile, backend=backend)
            expected = counterfactual_advantages(
                rewards_BK.double(), half_K.double(), actions_AK.double(), G, profile=profile, backend="torch"
            )
            compared.append((other, expected))
        for ours, wanted in compared:
            assert ours.isfinite().all(), ours
            error = (ours.double() - wanted).abs().max() / wanted.abs().max()
            assert error < 1e-6, (profile, float(error), ours, wanted)
