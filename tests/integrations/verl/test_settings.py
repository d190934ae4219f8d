"""What a run of verl may ask for, and what is refused before it starts. These tests need no verl."""

from __future__ import annotations

from typing import Any

import pytest

from maestro_fast.integrations.verl.settings import refusals, run_settings
from maestro_fast.settings import SettingsError, override


def config(estimator: str = "maestro", **dotted: Any) -> dict[str, Any]:
    """verl's config, as far as it matters here; ``algorithm__gamma=1`` sets algorithm.gamma."""
    values: dict[str, Any] = {
        "algorithm": {"adv_estimator": estimator, "use_kl_in_reward": False, "gdpo_reward_keys": ["correct", "brief"]},
        "actor_rollout_ref": {
            "actor": {"strategy": "fsdp2", "use_kl_loss": False, "ulysses_sequence_parallel_size": 1},
            "ref": {"ulysses_sequence_parallel_size": 1},
            "model": {"override_config": {}},
            "rollout": {"n": 4},
        },
        "trainer": {"use_v1": True},
    }
    for name, value in dotted.items():
        override(values, name.replace("__", "."), value)
    return values


def test_two_lines_are_enough() -> None:
    """adv_estimator and the names of the rewards: the Conductor under the profile maestro."""
    settings = run_settings(config())
    assert settings is not None and settings.reward_names == ("correct", "brief") and settings.maestro is not None
    assert settings.maestro.profile == "maestro" and settings.policy(8).name == "conductor"


@pytest.mark.parametrize("estimator", ["grpo", "gae", "grpo_vectorized"])
def test_other_estimators_are_none_of_our_business(estimator: str) -> None:
    assert run_settings(config(estimator, algorithm__gdpo_reward_keys=None)) is None


@pytest.mark.parametrize("estimator", ["fast_grpo", "fast_dr_grpo", "fast_rloo"])
def test_estimators_of_verls_scores_need_nothing(estimator: str) -> None:
    settings = run_settings(config(estimator, algorithm__gdpo_reward_keys=None, actor_rollout_ref__rollout__n=1))
    assert settings is not None and settings.reward_names == () and settings.maestro is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"algorithm__gdpo_reward_keys": None}, r"algorithm\.gdpo_reward_keys: missing.*\+algorithm\.gdpo_reward_keys"),
        ({"algorithm__gdpo_reward_keys": "correct"}, r"algorithm\.gdpo_reward_keys: 'correct'"),
        ({"algorithm__gdpo_reward_keys": ["a", "a"]}, "each name once"),
        ({"algorithm__maestro": {"weight": "equal"}}, r"algorithm\.maestro\.weight: unknown setting.*weights"),
        (
            {"algorithm__maestro": {"weights": "condutor"}},
            r"algorithm\.maestro\.weights\.type: 'condutor'.*'conductor",
        ),
        ({"algorithm__maestro": {"profile": "maesto"}}, r"algorithm\.maestro\.profile: 'maesto'.*'maestro'"),
        (
            {"algorithm__maestro": {"weights": {"type": "static", "values": {"correct": 1.0}}}},
            r"algorithm\.maestro\.weights\.values\.brief: missing",
        ),
        ({"algorithm__maestro": {"weights": "anchored"}}, r"algorithm\.maestro\.utility: missing, weights: anchored"),
        (
            {"algorithm__maestro": {"weights": {"type": "equal", "guard": {}}}},
            r"algorithm\.maestro\.utility: missing, weights\.guard",
        ),
        (
            {"algorithm__maestro": {"weights": "equal", "utility": {"key": "brief"}}},
            r"algorithm\.maestro\.utility\.key: 'brief' is in algorithm\.gdpo_reward_keys",
        ),
        (
            {"algorithm__maestro": {"weights": {"type": "conductor", "estimator": "all_actions"}, "profile": "gdpo"}},
            r"algorithm\.maestro\.profile: compares scores over batch",
        ),
    ],
)
def test_wrong_settings_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        run_settings(config(**changes))


def test_a_section_without_its_estimator_is_named() -> None:
    with pytest.raises(SettingsError, match=r"algorithm\.maestro: is set, but adv_estimator is fast_grpo"):
        run_settings(config("fast_grpo", algorithm__maestro={"weights": "equal"}))


ANCHORED = {"weights": "anchored", "utility": {"key": "judge"}}
# For each refusal: the estimator, what is set, and the least change that makes it run.
REFUSED: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "trainer.use_v1=False": ("fast_gdpo", {"trainer__use_v1": False}, {"trainer__use_v1": True}),
    "algorithm.gdpo_reward_weights": (
        "maestro",
        {"algorithm__gdpo_reward_weights": [1.0, 0.5]},
        {"algorithm__gdpo_reward_weights": None},
    ),
    "actor_rollout_ref.rollout.n below 2": (
        "maestro",
        {"actor_rollout_ref__rollout__n": 1},
        {"actor_rollout_ref__rollout__n": 2},
    ),
    "algorithm.use_kl_in_reward under a profile whose KL is in the loss": (
        "maestro",
        {"algorithm__use_kl_in_reward": True, "algorithm__maestro": {"profile": "verl_grpo"}},
        {"algorithm__maestro": {"profile": "maestro"}},
    ),
    "algorithm.use_kl_in_reward": (
        "fast_gdpo",
        {"algorithm__use_kl_in_reward": True},
        {"algorithm__use_kl_in_reward": False},
    ),
    "algorithm.rollout_correction.bypass_mode": (
        "maestro",
        {"algorithm__rollout_correction": {"bypass_mode": True}},
        {"algorithm__maestro": {"weights": "saw"}},
    ),
    "an actor_rollout_ref.actor.strategy other than fsdp, fsdp2, megatron": (
        "maestro",
        {"actor_rollout_ref__actor__strategy": "veomni"},
        {"algorithm__maestro": {"weights": "exp3"}},
    ),
    "use_fused_kernels, mtp or dynamic_context_parallel with the strategy megatron": (
        "maestro",
        {"actor_rollout_ref__actor__strategy": "megatron", "actor_rollout_ref__model__mtp": {"enable": True}},
        {"actor_rollout_ref__model__mtp": {"enable": False}},
    ),
    "context: response_first_layer": (
        "maestro",
        {"algorithm__maestro": {"weights": {"type": "conductor", "context": "response_first_layer"}}},
        {"algorithm__maestro": {"weights": {"type": "conductor", "context": "response_mean"}}},
    ),
    "no reference policy, where the context is reference_prompt_mean": (
        "maestro",
        {"algorithm__maestro": ANCHORED},
        {"actor_rollout_ref__actor__use_kl_loss": True},
    ),
    "ulysses_sequence_parallel_size above 1 with an attention other than flash attention": (
        "maestro",
        {
            "actor_rollout_ref__ref__fsdp_config": {"ulysses_sequence_parallel_size": 2},
            "actor_rollout_ref__model__override_config": {"attn_implementation": "sdpa"},
        },
        {"actor_rollout_ref__model__override_config": {}},
    ),
}


def test_a_context_of_the_reference_needs_no_forward_of_the_policy() -> None:
    changes = {"algorithm__rollout_correction": {"bypass_mode": True}, "actor_rollout_ref__actor__use_kl_loss": True}
    assert run_settings(config(algorithm__maestro=ANCHORED, **changes)) is not None


def test_the_conductor_stays_off_the_workers_gpus() -> None:
    settings = run_settings(config())
    assert settings is not None and settings.policy(4).weights.__self__.config.device == "cpu"  # type: ignore[attr-defined]


def test_every_refusal_has_its_case() -> None:
    assert [refusal.setting for refusal in refusals()] == [*REFUSED]


@pytest.mark.parametrize("setting", REFUSED)
def test_refusals(setting: str) -> None:
    """The setting is refused by its name, and the remedy that is given runs."""
    estimator, changes, remedy = REFUSED[setting]
    refusal = next(refusal for refusal in refusals() if refusal.setting == setting)
    with pytest.raises(SettingsError) as caught:
        run_settings(config(estimator, **changes))
    assert str(caught.value).startswith(setting) and refusal.where in str(caught.value)
    assert run_settings(config(estimator, **{**changes, **remedy})) is not None
