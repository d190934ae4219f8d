"""Weight policies by name, and what every one of them must do."""

from __future__ import annotations

import inspect
import re
from typing import Any

import pytest
import torch

from maestro_fast.settings import SettingsError, sentences, settings_of
from maestro_fast.settings import build as settings_build
from maestro_fast.weighting import (
    POLICIES,
    Conductor,
    ConductorConfig,
    Equal,
    FunctionPolicy,
    GuardConfig,
    Guarded,
    Random,
    Static,
    WeightPolicy,
    WeightsConfig,
    build_weight_policy,
)
from maestro_fast.weighting.policy import Stateless
from tests.weighting.helpers import NAMES, context, normal, play

D = 5
# Policies that need options, or learn nothing in three batches without them. The others are built by their mere name.
ENTRIES: dict[str, Any] = {
    "static": {"type": "static", "values": dict.fromkeys(NAMES, 0.5)},
    "schedule": {"type": "schedule", "points": [{"step": 0, "values": dict.fromkeys(NAMES, 0.5)}]},
    "function": {"type": "function", "function": lambda context: torch.ones(3)},
    "router": {"type": "router", "column": "kind", "routes": {"x": dict.fromkeys(NAMES, 0.5)}},
    "conductor": {"type": "conductor", "period": 2},
    "anchored": {"type": "anchored", "steps": 2},
    "reward_model": {"type": "reward_model", "steps": 2},
}


def build(name: str) -> WeightPolicy:
    return build_weight_policy(ENTRIES.get(name, name), NAMES, D)


def test_by_name_and_with_options() -> None:
    assert isinstance(build_weight_policy("equal", NAMES, D), Equal)
    assert isinstance(build_weight_policy({}, NAMES, D), Equal)
    static = build_weight_policy(ENTRIES["static"], NAMES, D)
    assert isinstance(static, Static) and static.values == (0.5, 0.5, 0.5)
    drawn = build_weight_policy({"type": "random", "seed": 9}, NAMES, D)
    assert isinstance(drawn, Random) and drawn.seed == 9
    conductor = build_weight_policy({"type": "conductor", "alpha": 1, "learning_rate": "1e-5"}, NAMES, D)
    assert isinstance(conductor, Conductor)
    assert conductor.config == ConductorConfig(alpha=1.0, learning_rate=1e-5)
    assert conductor.weight.shape == (3, D) and conductor.reward_names == NAMES


def test_the_entry_is_not_changed() -> None:
    entry = {"type": "random", "seed": 9}
    build_weight_policy(entry, NAMES, D)
    assert entry == {"type": "random", "seed": 9}


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ("best", "weights.type: 'best', expected one of equal, static, random, "),
        ({"type": "best", "alpha": 1}, "weights.type: 'best', expected one of equal, "),
        ({"type": ["equal"]}, "weights.type: ['equal'], expected one of equal, "),
        ({"type": None}, "weights.type: missing, expected one of equal, "),
        (None, "weights: got nothing, expected the type of a weight policy or a mapping with it under 'type'"),
        (["equal"], "weights: got list ['equal'], expected the type of a weight policy or a mapping"),
        ({"type": "equal", "alpha": 1}, "weights.alpha: unknown setting, there are none here"),
        ({"alpha": 1}, "weights.alpha: unknown setting"),
        ("static", "weights.values: missing, it has no default"),
        ({"type": "random", "seeds": 1}, "weights.seeds: unknown setting, expected one of seed"),
        ({"type": "random", "seed": -1}, "weights.seed: -1, expected 0 <= seed < 2**64"),
        ({"type": "random", "seed": 2**64}, "weights.seed: 18446744073709551616, expected"),
        ({"type": "conductor", "lr": 1}, "weights.lr: unknown setting, expected one of alpha, capacity, "),
        ({"type": "conductor", "alpha": 0}, "weights.alpha: 0.0, expected 0 < alpha <= 1"),
        ({"type": "conductor", "alpha": 1.1}, "weights.alpha: 1.1, expected 0 < alpha <= 1"),
        ({"type": "conductor", "tau": 0}, "weights.tau: 0.0, expected a positive number"),
        ({"type": "conductor", "tau": float("nan")}, "weights.tau: nan, expected a positive number"),
        ({"type": "conductor", "min_prob": -0.1}, "weights.min_prob: -0.1, expected 0 <= min_prob < 1 / K"),
        ({"type": "conductor", "min_prob": 0.34}, "weights.min_prob: 0.34, expected below 1 / K = 0.33"),
        ({"type": "conductor", "period": 0}, "weights.period: 0, expected at least 1"),
        ({"type": "conductor", "period": 2.5}, "weights.period: got float 2.5, expected int"),
        ({"type": "conductor", "seed": -1}, "weights.seed: -1, expected 0 <= seed < 2**64"),
        ({"type": "conductor", "mode": "hard"}, "weights.mode: got str 'hard', expected one of sample, soft"),
        (
            {"type": "conductor", "context": "h"},
            "weights.context: got str 'h', expected one of response, response_mean",
        ),
        ({"type": "conductor", "learning_rate": -1}, "weights.learning_rate: -1.0, expected a number >= 0"),
        ({"type": "conductor", "weight_decay": -1}, "weights.weight_decay: -1.0, expected a number >= 0"),
        ({"type": "conductor", "entropy_coef": float("nan")}, "weights.entropy_coef: nan, expected a number >= 0"),
        ({"type": "conductor", "mode": "soft"}, "weights.learning_rate: 0.001 with mode 'soft', expected 0"),
    ],
)
def test_errors_name_the_setting(entry: Any, words: str) -> None:
    with pytest.raises(SettingsError, match="^" + re.escape(words)):
        build_weight_policy(entry, NAMES, D)


def test_entries_of_release_0_1_are_read_with_one_warning_for_each_old_word(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("maestro_fast.settings._said", set())
    for _ in range(2):
        drawn = build_weight_policy({"policy": "random", "seed": 9}, NAMES, D)
        assert isinstance(drawn, Random) and drawn.seed == 9
        own = build_weight_policy({"policy": "callable", "function": lambda context: torch.ones(3)}, NAMES, D)
        assert isinstance(own, FunctionPolicy)
    assert caplog.messages == [
        "weights: the key `policy` is now called `type`: write `type: random` in weights. "
        "The old one is read in this release and refused in the next.",
        "weights.type: `callable` is now called `function`: write `type: function`. "
        "The old name is read in this release and refused in the next.",
    ]
    with pytest.raises(SettingsError, match=r"^weights\.policy: is the old name of type, which is set too"):
        build_weight_policy({"policy": "equal", "type": "equal"}, NAMES, D)


def test_the_config_is_typed() -> None:
    """Reading a config checks everything but what depends on the rewards."""
    found = settings_build(WeightsConfig, {"type": "conductor", "alpha": 1, "guard": {"window": 3}}, "weights")
    assert found == WeightsConfig(ConductorConfig(alpha=1.0), GuardConfig(window=3))
    assert settings_build(WeightsConfig, {}, "weights") == WeightsConfig() == settings_build(WeightsConfig, "equal")
    assert isinstance(build_weight_policy(found, NAMES, D), Guarded)
    with pytest.raises(SettingsError, match=r"^weights\.guard\.window: got str 'x', expected int"):
        settings_build(WeightsConfig, {"type": "equal", "guard": {"window": "x"}}, "weights")


@pytest.mark.parametrize("name", [*POLICIES, "guard"])
def test_every_option_has_a_sentence(name: str) -> None:
    config = GuardConfig if name == "guard" else POLICIES[name]
    assert set(settings_of(config)) <= sentences(config).keys()


def test_errors_carry_the_given_path() -> None:
    with pytest.raises(SettingsError, match=r"^arms\[1\]\.type: 'best'"):
        build_weight_policy("best", NAMES, D, path="arms[1]")


@pytest.mark.parametrize("name", POLICIES)
def test_satisfies_the_protocol(name: str) -> None:
    policy = build(name)
    assert policy.name == {"function": "callable"}.get(name, name)  # checkpoints of release 0.1 hold this name
    assert policy.needs_context is (name in ("conductor", "anchored", "reward_model"))
    methods = [key for key, value in vars(WeightPolicy).items() if inspect.isfunction(value) and key[0] != "_"]
    assert {"weights", "observe", "metrics", "state_dict", "load_state_dict"} == set(methods)
    for method in methods:
        wanted = list(inspect.signature(getattr(WeightPolicy, method)).parameters)[1:]
        assert list(inspect.signature(getattr(policy, method)).parameters) == wanted


@pytest.mark.parametrize("name", POLICIES)
def test_a_batch_and_its_figures(name: str) -> None:
    policy = build(name)
    for step in range(3):
        weights = play(policy, context(8, normal(8, D, seed=step), step=step), normal(8, seed=50 + step))
        for tensor in (weights.weights_BK, weights.expected_BK):
            assert tensor.shape == (8, 3) and tensor.dtype == torch.float32 and not tensor.requires_grad
            assert tensor.isfinite().all()
        metrics = policy.metrics()
        assert all(type(key) is str and type(value) is float for key, value in metrics.items())
    assert all(isinstance(value, torch.Tensor) and not value.requires_grad for value in policy.state_dict().values())


@pytest.mark.parametrize("name", POLICIES)
def test_state_round_trip(name: str) -> None:
    policy, fresh = build(name), build(name)
    for step in range(3):
        play(policy, context(8, normal(8, D, seed=step), step=step), normal(8, seed=50 + step))
    fresh.load_state_dict(policy.state_dict())
    assert fresh.state_dict().keys() == policy.state_dict().keys()
    assert all(torch.equal(value, fresh.state_dict()[key]) for key, value in policy.state_dict().items())
    at = context(8, normal(8, D, seed=9), step=9)
    assert torch.equal(fresh.weights(at).weights_BK, policy.weights(at).weights_BK)


STATELESS = [name for name in POLICIES if isinstance(build(name), Stateless)]


@pytest.mark.parametrize("name", STATELESS)
def test_a_policy_without_state_refuses_one(name: str) -> None:
    with pytest.raises(ValueError, match=r"^state: holds \['bias', "):
        build(name).load_state_dict(build("conductor").state_dict())


@pytest.mark.parametrize("name", POLICIES)
def test_two_runs_with_one_seed_are_bitwise_equal(name: str) -> None:
    one, other = build(name), build(name)
    for step in range(4):
        torch.manual_seed(step)  # what the rest of the program draws does not matter
        at, advantages_B = context(8, normal(8, D, seed=step), step=step), normal(8, seed=50 + step)
        ours, theirs = (play(policy, at, advantages_B) for policy in (one, other))
        assert torch.equal(ours.weights_BK, theirs.weights_BK) and torch.equal(ours.expected_BK, theirs.expected_BK)
    assert one.metrics() == other.metrics()
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in one.state_dict().items())
