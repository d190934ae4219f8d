"""The verl profiles against what verl 0.9.1 itself returned, and where they differ from it on purpose."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor

from maestro_fast.ops import PROFILES, GroupAdvantages, group_advantages
from tests.ops.verl_oracle import FILE, VerlCase, verl_cases

VERL_PROFILES = [name for name in PROFILES if name.startswith("verl_")]
CASES = list(verl_cases())


def ours(case: VerlCase, profile: str, dtype: torch.dtype) -> GroupAdvantages:
    lengths: dict[str, Any] = {"lengths": case.lengths_B} if PROFILES[profile].needs_lengths else {}
    return group_advantages(
        case.rewards_BK.to(dtype), case.weights_K.to(dtype), case.groups, profile=profile, **lengths
    )


def alone(case: VerlCase) -> Tensor:
    return torch.tensor([case.groups.count(group) == 1 for group in case.groups])


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("profile", VERL_PROFILES)
def test_equals_verl(case: str, profile: str) -> None:
    given = verl_cases()[case]
    result = ours(given, profile, torch.float64)
    flat = result.degenerate & ~alone(given)
    compared = ~flat & (given.lengths_B > 0)
    theirs = given.advantages_B[profile]
    torch.testing.assert_close(result.advantages[compared], theirs[compared], rtol=1e-5, atol=1e-6)
    assert (result.advantages[flat] == 0).all() and compared.sum() >= 3
    assert theirs[compared].abs().max() > (1e-4 if case == "small weights" else 0.3)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("profile", VERL_PROFILES)
def test_float32_equals_verl(case: str, profile: str) -> None:
    given = verl_cases()[case]
    result = ours(given, profile, torch.float32)
    compared = ~(result.degenerate & ~alone(given)) & (given.lengths_B > 0)
    theirs = given.advantages_B[profile].float()
    torch.testing.assert_close(result.advantages[compared], theirs[compared], rtol=1e-5, atol=2e-6)


def test_the_goldens_are_those_of_verl() -> None:
    recorded = json.loads(FILE.read_text())
    assert recorded["versions"]["verl"] == "0.9.1" and FILE.stat().st_size < 200_000
    assert all(set(case["advantages"]) == set(VERL_PROFILES) for case in recorded["cases"].values())


def test_groups_of_identical_rewards_are_zero_where_verl_is_not() -> None:
    """verl returns amplified rounding noise there, and with gdpo the batch's mean too."""
    given = verl_cases()["constant groups"]
    for profile in VERL_PROFILES:
        result = ours(given, profile, torch.float32)
        assert result.degenerate.tolist() == [True] * 6 + [False] * 3
        assert (result.advantages[:6] == 0).all()
    assert given.advantages_B["verl_gdpo"][:6].abs().max() > 1e-3
