"""Advantages of the kernel against the reference in float64, in and out of one tile."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from maestro_fast.kernels import group_advantages as kernel
from maestro_fast.ops import PROFILES, AdvantageProfile, GroupAdvantages, Groups
from maestro_fast.ops.group_advantages import group_advantages as reference
from tests.kernels.helpers import DEVICE, assert_close, counted_launches, on_device, runs

EPSILON = 2e-6  # times the largest truth; two normalisations and a sum over at most 8 rewards, in float32
RAGGED = [3, 1, 1, 0, 3, 3, 3, 7, 1, 1, 1, 3, 3, 5, 5, 0, 2, 2, 2, 2]
CUSTOM = {
    "rewards over the batch": AdvantageProfile("batch", "batch", "group", "none", ddof=0),
    "leave one out": AdvantageProfile("leave_one_out", "group", "leave_one_out", "group", singleton="raw"),
    "centre alone": AdvantageProfile("batch", "none", "none", "batch", missing="zero"),
    "nothing": AdvantageProfile("none", "none", "none", "none"),
    "crossed": AdvantageProfile("group", "batch", "batch", "tokens", score_eps_in="variance"),
}


@pytest.fixture(params=["one tile", "several tiles"])
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Small tiles take a batch of 20 through the launches of a batch of thousands."""
    if request.param == "several tiles":
        for name, value in (("_WHOLE", 1), ("_SCAN", 16)):
            monkeypatch.setattr(kernel, name, value)
    return str(request.param)


def inputs(batch: int, rewards: int, *, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """rewards, weights, kl, lengths; a sixth of the rewards missing, two responses without any."""
    generator = torch.Generator().manual_seed(seed)
    rewards_BK = torch.randn(batch, rewards, generator=generator) * 3 + 1
    rewards_BK[torch.rand(batch, rewards, generator=generator) < 1 / 6] = float("nan")
    rewards_BK[batch // 2 :: 7] = float("nan")
    weights_BK = torch.rand(batch, rewards, generator=generator)
    return (
        rewards_BK,
        weights_BK,
        torch.rand(batch, generator=generator),
        torch.randint(0, 50, (batch,), generator=generator),
    )


def launched(
    rewards_BK: Tensor, weights_BK: Tensor, groups: Any, profile: AdvantageProfile, kl: Tensor | None, lengths: Tensor
) -> GroupAdvantages:
    index_NG = Groups.of(groups, rewards_BK.shape[0]).index_NG
    rewards_BK, weights_BK, index_NG, kl, counts = on_device(
        rewards_BK, weights_BK, index_NG, kl, lengths if profile.needs_lengths else None
    )
    return kernel.group_advantages(
        rewards_BK, weights_BK, index_NG, profile=profile, kl=kl, beta=0.0 if kl is None else 0.1, lengths=counts
    )


def check(
    rewards_BK: Tensor, weights_BK: Tensor, groups: Any, profile: AdvantageProfile, kl: Tensor, lengths: Tensor
) -> None:
    used_kl = kl if profile.kl_in == "score" else None
    ours, *others = runs(
        lambda: launched(rewards_BK, weights_BK, groups, profile, used_kl, lengths),
        *(rewards_BK, weights_BK, used_kl, lengths),
    )
    options: dict[str, Any] = {"profile": profile, "lengths": lengths if profile.needs_lengths else None}
    if used_kl is not None:
        options |= {"kl": used_kl.double(), "beta": 0.1}
    truth = reference(rewards_BK.double(), weights_BK.double(), groups, **options)
    plain = reference(rewards_BK, weights_BK, groups, **options)
    for name, x, expected, simple in zip(truth._fields, ours, truth, plain, strict=True):
        assert_close(x, expected, simple, epsilon=EPSILON, what=name)
        assert all(torch.equal(x, getattr(again, name)) for again in others), f"{name} differs between two runs"


@pytest.mark.parametrize("name", [*PROFILES, *CUSTOM])
@pytest.mark.parametrize("groups", [4, RAGGED], ids=["equal", "ragged"])
def test_every_profile(name: str, groups: Any, tiles: str) -> None:
    profile = PROFILES[name] if name in PROFILES else CUSTOM[name]
    check(*inputs(20, 3)[:2], groups, profile, *inputs(20, 3)[2:])


@pytest.mark.parametrize("rewards", [1, 8])
@pytest.mark.parametrize("size", [1, 2, 5, 16, 33])
@pytest.mark.parametrize("name", ["maestro", "gdpo"])
def test_sizes_of_groups_and_numbers_of_rewards(name: str, size: int, rewards: int) -> None:
    batch = max(2 * size, 6 * (size == 1))
    rewards_BK, weights_BK, kl, lengths = inputs(batch, rewards, seed=size)
    check(rewards_BK, weights_BK, size, PROFILES[name], kl, lengths)


@pytest.mark.parametrize("name", ["maestro", "gdpo", "rloo", "grpo_batch", "verl_grpo"])
def test_identical_rewards_give_exactly_zero(name: str, tiles: str) -> None:
    profile = replace(PROFILES[name], kl_in="loss")
    rewards_BK = torch.tensor([0.1, 1 / 3, 1e4 + 0.1]).expand(21, 3)
    weights_BK = torch.tensor([0.7, 1.9, 0.31]).expand(21, 3)
    out = launched(rewards_BK, weights_BK, 7, profile, None, torch.ones(21))
    assert torch.equal(out.advantages.cpu(), torch.zeros(21))
    assert out.degenerate.all()


@pytest.mark.parametrize("name", ["maestro", "gdpo", "grpo_batch", "verl_gdpo"])
def test_a_flat_group_among_others(name: str, tiles: str) -> None:
    """Its advantages are 0 even where a KL spreads its scores, or where the batch's mean is not its own."""
    rewards_BK, weights_BK, kl, lengths = inputs(20, 3)
    rewards_BK[8:12], weights_BK[8:12] = torch.tensor([0.1, 2.0, -0.3]), torch.tensor([0.7, 0.2, 0.4])
    check(rewards_BK, weights_BK, 4, PROFILES[name], kl, lengths)
    out = launched(rewards_BK, weights_BK, 4, replace(PROFILES[name], kl_in="score"), kl, lengths)
    assert torch.equal(out.advantages.cpu()[8:12], torch.zeros(4))
    assert out.degenerate.cpu()[8:12].all() and out.scores.cpu()[8:12].unique().numel() == 4


def test_all_weight_on_rewards_that_abstained() -> None:
    rewards_BK, _, kl, lengths = inputs(20, 3)
    check(rewards_BK, torch.eye(3).repeat(7, 1)[:20], 5, PROFILES["maestro"], kl, lengths)


def test_strides_and_one_set_of_weights_for_all() -> None:
    rewards_BK, _, kl, lengths = inputs(20, 3)
    check(rewards_BK.T.contiguous().T, torch.rand(3).expand(20, 3), 5, PROFILES["maestro"], kl, lengths)


def test_an_empty_batch() -> None:
    out = kernel.group_advantages(
        torch.zeros(0, 2, device=DEVICE),
        torch.zeros(0, 2, device=DEVICE),
        Groups.of(4, 0).to(torch.device(DEVICE)).index_NG,
        profile=PROFILES["maestro"],
    )
    assert [tuple(x.shape) for x in out] == [(0,), (0,), (0, 2), (0,), (0,), (0,)]


def test_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """One launch for scopes of groups, and for a batch that fits a tile."""
    launches = counted_launches(monkeypatch)
    rewards_BK, weights_BK, _, lengths = inputs(80, 2)
    for name, expected in (("maestro", 1), ("gdpo", 1), ("verl_gdpo", 1)):
        launched(rewards_BK, weights_BK, 4, PROFILES[name], None, lengths)
        assert len(launches) == expected, (name, launches)
        launches.clear()
    monkeypatch.setattr(kernel, "_WHOLE", 1)
    monkeypatch.setattr(kernel, "_SCAN", 64)
    for profile, expected in ((PROFILES["grpo"], 1), (PROFILES["gdpo"], 2), (CUSTOM["crossed"], 3)):
        launched(rewards_BK, weights_BK, 4, profile, None, lengths)
        assert len(launches) == expected, (profile, launches)
        launches.clear()


@pytest.mark.parametrize("size", [8, 40, 300])
def test_rewards_are_added_in_their_order_however_many_a_tile_holds(size: int) -> None:
    """So the bits of a score do not depend on the tile, nor that on the batch."""
    held = {kernel.rewards_at_once(32, tiles.groups * tiles.width, tiles.warps) for tiles in tiles_of(size)}
    assert max(held) < 32, "a tile that holds all of them shows nothing"
    rewards_BK, weights_BK, _, lengths = inputs(2 * size, 32)
    scores = launched(rewards_BK, weights_BK, size, PROFILES["grpo"], None, lengths).scores.cpu()
    expected = torch.zeros(2 * size)
    for k in range(32):
        expected = expected + torch.where(rewards_BK[:, k].isnan(), 0.0, weights_BK[:, k] * rewards_BK[:, k])
    assert torch.equal(scores, expected)


@pytest.mark.parametrize("size", [1, 8, 16, 32, 300])
def test_a_tile_of_groups_has_one_shape_whatever_the_batch(size: int) -> None:
    """Two batches of other sizes, and the fused adaptive step, then add up a group in one order."""
    assert len({(tiles.groups, tiles.width, tiles.warps) for tiles in tiles_of(size)}) == 1


def tiles_of(size: int) -> list[kernel.Tiles]:
    return [kernel.Tiles.of(number, size, wide=False) for number in (1, 2, 7, 100, 4096)]
