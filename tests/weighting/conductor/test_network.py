"""A Conductor that is saved and loaded in the middle of a period goes on as if nothing had happened."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from maestro_fast.weighting import Conductor, ConductorConfig, Weights
from tests.weighting.helpers import NAMES, context, normal, play

B, D, BATCHES = 8, 5, 8


def conductor(**options: Any) -> Conductor:
    return ConductorConfig(**{"period": 3, "learning_rate": 0.1, **options}).build(NAMES, D)


def batch(policy: Conductor, step: int) -> Weights:
    """Plays one batch. Batch 4 is degenerate throughout, every other batch in part."""
    h, advantages_B = normal(B, D, seed=step) * 3 + 1, normal(B, seed=100 + step)
    degenerate_B = torch.arange(B) < (B if step == 4 else 4)
    return play(policy, context(B, h, step=step), advantages_B, degenerate_B)


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("cut", range(BATCHES))
def test_a_resumed_conductor_has_the_same_future(cut: int, shuffle: bool, tmp_path: Path) -> None:
    whole = conductor(shuffle=shuffle)
    for step in range(cut):
        batch(whole, step)
    save_file(whole.state_dict(), tmp_path / "state.safetensors")
    resumed = conductor(shuffle=shuffle)
    resumed.load_state_dict(load_file(tmp_path / "state.safetensors"))
    for step in range(cut, BATCHES):
        ours, theirs = batch(resumed, step), batch(whole, step)
        assert torch.equal(ours.weights_BK, theirs.weights_BK)
        assert torch.equal(ours.expected_BK, theirs.expected_BK)
        assert torch.equal(resumed.weight, whole.weight) and torch.equal(resumed.bias, whole.bias)
        assert resumed.metrics() == whole.metrics()
    assert whole.weight.abs().max() > 0
    assert resumed.state_dict().keys() == whole.state_dict().keys()
    assert all(torch.equal(value, whole.state_dict()[key]) for key, value in resumed.state_dict().items())


def test_a_state_is_loaded_over_another() -> None:
    """No parameter, moment or batch of the old state stays."""
    policy, other = conductor(), conductor()
    batch(policy, 0)
    for step in range(5):
        batch(other, step)
    other.load_state_dict(policy.state_dict())
    assert other.state_dict().keys() == policy.state_dict().keys()
    for step in range(1, 6):
        assert torch.equal(batch(other, step).weights_BK, batch(policy, step).weights_BK)
        assert torch.equal(other.weight, policy.weight)


def test_a_state_is_a_snapshot() -> None:
    policy, resumed = conductor(), conductor()
    for step in range(4):
        batch(policy, step)
    state = policy.state_dict()
    copies = {key: value.clone() for key, value in state.items()}
    resumed.load_state_dict(state)
    for step in range(4, 8):
        batch(policy, step)
        batch(resumed, step)
    assert all(torch.equal(value, copies[key]) for key, value in state.items())


def test_a_shorter_period_than_the_saved_buffer() -> None:
    policy, resumed = conductor(period=5), conductor(period=2)
    for step in range(3):
        batch(policy, step)
    resumed.load_state_dict(policy.state_dict())
    batch(resumed, 3)
    assert "conductor/objective" in resumed.metrics()
    assert not any(key.startswith("buffer.") for key in resumed.state_dict())


def without(name: str) -> Any:
    return lambda state: {key: value for key, value in state.items() if key != name}


def with_shape(name: str, *shape: int) -> Any:
    return lambda state: {**state, name: torch.zeros(shape)}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without("weight"), rf"state.weight: missing, expected shape \(3, {D}\)"),
        (with_shape("weight", 3, D + 1), rf"state.weight: shape \(3, {D + 1}\), expected shape \(3, {D}\)"),
        (with_shape("bias", 1), r"state.bias: shape \(1,\), expected shape \(3,\)"),
        (without("statistics.count"), r"state.statistics.count: missing, expected shape \(\)"),
        (with_shape("statistics.mean", D + 1), rf"state.statistics.mean: shape \({D + 1},\), expected shape \({D},\)"),
        (with_shape("statistics.m2"), rf"state.statistics.m2: shape \(\), expected shape \({D},\)"),
        (
            with_shape("optimizer.weight.exp_avg", 3),
            rf"state.optimizer.weight.exp_avg: .* expected .*\(3, {D}\)",
        ),
        (
            with_shape("optimizer.bias.exp_avg_sq", 2),
            r"state.optimizer.bias.exp_avg_sq: .* expected shape \(3,\)",
        ),
        (with_shape("buffer.0.h", 4, D - 1), rf"state.buffer.0.h: shape \(4, {D - 1}\), expected shape \(4, {D}\)"),
        (with_shape("buffer.0.actions", 4, 1), r"state.buffer.0.actions: shape \(4, 1\), expected shape \(4,\)"),
    ],
)
def test_a_wrong_state_is_named_and_changes_nothing(change: Any, words: str) -> None:
    policy, other = conductor(), conductor()
    for step in range(4):
        batch(policy, step)
    batch(other, 7)
    before = other.state_dict()
    with pytest.raises(ValueError, match=f"^{words}"):
        other.load_state_dict(change(policy.state_dict()))
    assert other.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in other.state_dict().items())


def test_all_state_is_tensors() -> None:
    policy = conductor()
    for step in range(4):
        batch(policy, step)
    state = policy.state_dict()
    assert all(isinstance(value, Tensor) and not value.requires_grad for value in state.values())
    assert len({value.data_ptr() for value in state.values()}) == len(state)  # safetensors refuses shared memory
