"""Weight policies by name, and what every one of them must do."""

from __future__ import annotations

import inspect
import re
from typing import Any

import pytest
import torch

from maestro_fast.settings import SettingsError
from maestro_fast.weighting import (
    POLICIES,
    Conductor,
    ConductorConfig,
    Equal,
    Random,
    Static,
    WeightPolicy,
    build_weight_policy,
)
from tests.weighting.helpers import NAMES, context, normal, play

D = 5
ENTRIES: dict[str, Any] = {
    "equal": "equal",
    "static": {"policy": "static", "values": dict.fromkeys(NAMES, 0.5)},
    "random": "random",
    "schedule": {"policy": "schedule", "points": [{"step": 0, "values": dict.fromkeys(NAMES, 0.5)}]},
    "callable": {"policy": "callable", "function": lambda context: torch.ones(3)},
    "router": {"policy": "router", "column": "kind", "routes": {"x": dict.fromkeys(NAMES, 0.5)}},
    "saw": "saw",
    "dvao": "dvao",
    "weakest_first": "weakest_first",
    "exp3": "exp3",
    "conductor": {"policy": "conductor", "period": 2},
    "anchored": {"policy": "anchored", "steps": 2},
}


def build(name: str) -> WeightPolicy:
    return build_weight_policy(ENTRIES[name], NAMES, D)


def test_by_name_and_with_options() -> None:
    assert isinstance(build_weight_policy("equal", NAMES, D), Equal)
    assert isinstance(build_weight_policy({}, NAMES, D), Equal)
    static = build_weight_policy(ENTRIES["static"], NAMES, D)
    assert isinstance(static, Static) and static.values == (0.5, 0.5, 0.5)
    drawn = build_weight_policy({"policy": "random", "seed": 9}, NAMES, D)
    assert isinstance(drawn, Random) and drawn.seed == 9
    conductor = build_weight_policy({"policy": "conductor", "alpha": 1, "learning_rate": "1e-5"}, NAMES, D)
    assert isinstance(conductor, Conductor)
    assert conductor.config == ConductorConfig(alpha=1.0, learning_rate=1e-5)
    assert conductor.weight.shape == (3, D) and conductor.reward_names == NAMES


def test_the_entry_is_not_changed() -> None:
    entry = {"policy": "random", "seed": 9}
    build_weight_policy(entry, NAMES, D)
    assert entry == {"policy": "random", "seed": 9}


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ("best", "weights.policy: 'best', expected one of equal, static, random, "),
        ({"policy": "best", "alpha": 1}, "weights.policy: 'best', expected one of equal, "),
        ({"policy": ["equal"]}, "weights.policy: ['equal'], expected one of equal, "),
        ({"policy": None}, "weights.policy: None, expected one of equal, "),
        (None, "weights: got None, expected the name of a policy or a mapping"),
        (["equal"], "weights: got ['equal'], expected the name of a policy or a mapping"),
        ({"policy": "equal", "alpha": 1}, "weights.alpha: unknown setting, there are none here"),
        ({"alpha": 1}, "weights.alpha: unknown setting"),
        ("static", "weights.values: missing, it has no default"),
        ({"policy": "random", "seeds": 1}, "weights.seeds: unknown setting, expected one of seed"),
        ({"policy": "random", "seed": -1}, "weights.seed: -1, expected 0 <= seed < 2**64"),
        ({"policy": "random", "seed": 2**64}, "weights.seed: 18446744073709551616, expected"),
        ({"policy": "conductor", "lr": 1}, "weights.lr: unknown setting, expected one of alpha, capacity, "),
        ({"policy": "conductor", "alpha": 0}, "weights.alpha: 0.0, expected 0 < alpha <= 1"),
        ({"policy": "conductor", "alpha": 1.1}, "weights.alpha: 1.1, expected 0 < alpha <= 1"),
        ({"policy": "conductor", "tau": 0}, "weights.tau: 0.0, expected a positive number"),
        ({"policy": "conductor", "tau": float("nan")}, "weights.tau: nan, expected a positive number"),
        ({"policy": "conductor", "min_prob": -0.1}, "weights.min_prob: -0.1, expected 0 <= min_prob < 1 / K"),
        ({"policy": "conductor", "min_prob": 0.34}, "weights.min_prob: 0.34, expected below 1 / K = 0.33"),
        ({"policy": "conductor", "period": 0}, "weights.period: 0, expected at least 1"),
        ({"policy": "conductor", "period": 2.5}, "weights.period: got float 2.5, expected int"),
        ({"policy": "conductor", "seed": -1}, "weights.seed: -1, expected 0 <= seed < 2**64"),
        ({"policy": "conductor", "mode": "hard"}, "weights.mode: got str 'hard', expected one of sample, soft"),
        (
            {"policy": "conductor", "context": "h"},
            "weights.context: got str 'h', expected one of response, prompt_last",
        ),
        ({"policy": "conductor", "learning_rate": -1}, "weights.learning_rate: -1.0, expected a number >= 0"),
        ({"policy": "conductor", "weight_decay": -1}, "weights.weight_decay: -1.0, expected a number >= 0"),
        ({"policy": "conductor", "entropy_coef": float("nan")}, "weights.entropy_coef: nan, expected a number >= 0"),
        ({"policy": "conductor", "mode": "soft"}, "weights.learning_rate: 0.001 with mode 'soft', expected 0"),
    ],
)
def test_errors_name_the_setting(entry: Any, words: str) -> None:
    with pytest.raises(SettingsError, match="^" + re.escape(words)):
        build_weight_policy(entry, NAMES, D)


def test_errors_carry_the_given_path() -> None:
    with pytest.raises(SettingsError, match=r"^arms\[1\]\.policy: 'best'"):
        build_weight_policy("best", NAMES, D, path="arms[1]")


def test_every_policy_is_tested_here() -> None:
    assert set(ENTRIES) == set(POLICIES)


@pytest.mark.parametrize("name", POLICIES)
def test_satisfies_the_protocol(name: str) -> None:
    policy = build(name)
    assert policy.name == name
    assert policy.needs_context is (name in ("conductor", "anchored"))
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


@pytest.mark.parametrize("name", ["equal", "static", "random", "schedule", "callable", "router", "dvao"])
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
