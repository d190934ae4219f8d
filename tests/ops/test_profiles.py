"""Profiles by name, and the combinations that an AdvantageProfile refuses."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from maestro_fast.ops import PROFILES, AdvantageProfile
from maestro_fast.specs import resolve_profile


def test_names_resolve_and_profiles_pass_through() -> None:
    assert all(resolve_profile(name) is profile for name, profile in PROFILES.items())
    own = AdvantageProfile(score_scale="none")
    assert resolve_profile(own) is own


def test_the_default_is_maestro() -> None:
    assert AdvantageProfile() == PROFILES["maestro"]


def test_only_maestro_has_the_kl_in_the_score_and_renormalizes() -> None:
    assert [name for name, profile in PROFILES.items() if profile.kl_in == "score"] == ["maestro"]
    assert [name for name, profile in PROFILES.items() if profile.missing == "renormalize"] == ["maestro"]


def test_only_the_scope_tokens_needs_lengths() -> None:
    assert [name for name, profile in PROFILES.items() if profile.needs_lengths] == ["verl_gdpo"]
    assert (
        AdvantageProfile(score_scale="tokens").needs_lengths and AdvantageProfile(score_center="tokens").needs_lengths
    )


def test_profiles_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        PROFILES["grpo"].ddof = 0  # type: ignore[misc]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("reward_center", "prompt"),
        ("reward_scale", "leave_one_out"),
        ("score_center", None),
        ("score_scale", "leave_one_out"),
        ("reward_eps", -1e-9),
        ("score_eps", float("nan")),
        ("score_eps", 10**400),
        ("ddof", 2),
        ("missing", "drop"),
        ("kl_in", "reward"),
        ("reward_center", "tokens"),
        ("reward_scale", "tokens"),
        ("singleton", "keep"),
        ("score_eps_in", "mean"),
    ],
)
def test_a_wrong_field_is_named(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{field}: "):
        AdvantageProfile(**{field: value})


def test_an_unknown_profile_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^profile: 'GRPO', expected one of maestro, grpo"):
        resolve_profile("GRPO")
    with pytest.raises(TypeError, match=r"^profile: got int"):
        resolve_profile(3)  # type: ignore[arg-type]


def test_an_epsilon_that_is_no_number_is_named() -> None:
    with pytest.raises(TypeError, match="reward_eps: got str '1e-4', expected a number"):
        AdvantageProfile(reward_eps="1e-4")  # type: ignore[arg-type]
