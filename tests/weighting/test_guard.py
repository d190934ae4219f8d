"""The guard steps in when it should, hides the labels that it watches, and then does what it was told to."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import pytest
import torch

from maestro_fast.ops import group_advantages
from maestro_fast.settings import SettingsError
from maestro_fast.weighting import (
    GuardConfig,
    Guarded,
    Outcome,
    WeightContext,
    WeightPolicy,
    Weights,
    build_weight_policy,
    scored,
)
from maestro_fast.weighting.guard import verdict
from tests.weighting.helpers import NAMES, K, normal

N, G, D = 10, 4, 3
B = N * G


def policy(entry: Any = "anchored", **guard: Any) -> Guarded:
    entry = {"policy": entry} if isinstance(entry, str) else entry
    options = {"window": 3, "warmup": 6, "held_back": 0.5, **guard}
    found = build_weight_policy({**entry, "guard": options}, NAMES, D)
    assert isinstance(found, Guarded)
    return found


def batch(step: int, level: float, scores: float) -> WeightContext:
    utilities_B = normal(B, seed=step) * 0.1 + level
    rewards_BK = normal(B, K, seed=1000 + step) + scores
    return WeightContext(NAMES, G, step, rewards_BK, normal(N, D, seed=5).repeat_interleave(G, 0), utilities_B)


def run(guarded: WeightPolicy, context: WeightContext) -> Weights:
    weights = guarded.weights(context)
    advantages = group_advantages(*scored(context, weights), G)
    guarded.observe(Outcome(context, weights, advantages))
    return weights


def history(*parts: tuple[int, float, float]) -> list[tuple[float, float]]:
    """For each part, ``count`` batches at a score, whose utility alternates by +-0.1 around the one given."""
    rows, i = [], 0
    for count, utility, score in parts:
        for _ in range(count):
            rows.append((utility + 0.1 * (-1) ** i, score))
            i += 1
    return rows


@pytest.mark.parametrize(
    ("parts", "steps_in"),
    [
        ([(8, 0.5, 0.0), (4, 0.0, 1.0)], True),
        ([(8, 0.5, 0.0), (4, 0.0, -1.0)], False),  # scores fall too: the weights did not mislead
        ([(8, 0.5, 0.0), (4, 0.9, 1.0)], False),
        ([(8, 0.5, 0.0), (4, 0.4, 1.0)], False),  # within the noise
        ([(4, 0.5, 0.0), (3, 0.0, 1.0)], False),  # too short
    ],
)
def test_when_it_steps_in(parts: Any, steps_in: bool) -> None:
    assert bool(verdict(history(*parts), GuardConfig(window=4, warmup=4))) is steps_in


def test_the_error_of_the_fall_by_hand() -> None:
    """In a window of 4, values +-0.1 have variance 0.04 / 3; the standard error is sqrt(2 * 0.04 / 3 / 4) = 0.0816."""
    rows = history((4, 0.5, 0.0), (4, 0.0, 1.0))
    assert "6.1 standard errors" in verdict(rows, GuardConfig(window=4, warmup=4, margin=6.1))
    assert not verdict(rows, GuardConfig(window=4, warmup=4, margin=6.2))


def tripped(action: str, caplog: pytest.LogCaptureFixture, **guard: Any) -> Guarded:
    guarded = policy(action=action, **guard)
    for step in range(6):
        run(guarded, batch(step, 1.0, 0.0))
    assert not guarded.tripped and not caplog.records
    for step in range(6, 9):
        run(guarded, batch(step, 0.0, 2.0))
    assert guarded.tripped and guarded.metrics()["guard/tripped"] == 1.0
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and f"action: {action}" in record.message and "fell from" in record.message
    return guarded


def test_freeze(caplog: pytest.LogCaptureFixture) -> None:
    guarded = tripped("freeze", caplog)
    before = guarded.policy.state_dict()
    weights_BK = run(guarded, batch(9, 1.0, 0.0)).weights_BK
    assert torch.equal(run(guarded, replace(batch(10, 1.0, 0.0), step=10)).weights_BK, weights_BK)
    assert all(torch.equal(value, before[key]) for key, value in guarded.policy.state_dict().items())
    assert (weights_BK - 1 / K).abs().max() > 1e-3 and not guarded.should_stop


@pytest.mark.parametrize("values", [{}, {"format": 0.5, "length": 0.25, "entropy": 0.25}])
def test_static(caplog: pytest.LogCaptureFixture, values: dict[str, float]) -> None:
    guarded = tripped("static", caplog, values=values)
    row = [values.get(name, 1 / K) for name in NAMES]
    assert torch.equal(run(guarded, batch(9, 1.0, 0.0)).weights_BK, torch.tensor([row] * B))


def test_stop(caplog: pytest.LogCaptureFixture) -> None:
    assert tripped("stop", caplog).should_stop


def test_held_back_labels_reach_nobody_else() -> None:
    guarded = policy({"policy": "anchored", "hybrid": True})
    context = batch(0, 1.0, 0.0)
    held_back_N = guarded._held_back(context)
    assert 0 < held_back_N.sum() < N
    weights = run(guarded, context)
    assert weights.direct_B is not None
    assert torch.equal(weights.direct_B[::G], ~held_back_N)
    assert guarded.policy.labelled == int((~held_back_N).sum())  # type: ignore[attr-defined]
    assert context.utilities_B is not None
    held_back = context.utilities_B.view(N, G)[held_back_N].mean().item()
    assert guarded.metrics()["guard/utility"] == pytest.approx(held_back)


@pytest.mark.parametrize("entry", ["anchored", "equal"])
def test_a_resumed_guard_has_the_same_future(entry: str) -> None:
    whole, resumed = policy(entry), policy(entry)
    for step in range(7):
        run(whole, batch(step, 1.0 - 0.2 * (step > 4), step))
    resumed.load_state_dict(whole.state_dict())
    for step in range(7, 12):
        context = batch(step, 0.0, 9.0)
        assert torch.equal(run(resumed, context).weights_BK, run(whole, context).weights_BK)
        assert resumed.metrics() == whole.metrics() and resumed.tripped == whole.tripped
    assert whole.tripped and all(torch.equal(v, whole.state_dict()[k]) for k, v in resumed.state_dict().items())


@pytest.mark.parametrize(
    ("guard", "words"),
    [
        ({"action": "panic"}, "weights.guard.action: got str 'panic', expected one of freeze, static, stop"),
        ({"held_back": 0}, "weights.guard.held_back: 0.0, expected 0 < held_back <= 1"),
        ({"window": 1}, "weights.guard.window: 1, expected at least 2"),
        ({"action": "static", "values": {"taste": 1}}, "weights.guard.values.taste: there is no such reward"),
        ({"action": "static", "values": {"format": 1}}, "weights.guard.values.length: missing"),
        ({"values": {"format": 1}}, "weights.guard.values: given with action 'freeze'"),
        ("freeze", "weights.guard: got str 'freeze', expected a mapping"),
    ],
)
def test_errors_name_the_setting(guard: Any, words: str) -> None:
    with pytest.raises(SettingsError) as caught:
        build_weight_policy({"policy": "equal", "guard": guard}, NAMES, D)
    assert str(caught.value).startswith(words)
