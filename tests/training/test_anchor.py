"""Utilities from the config to the weight policy: labels, hybrid scores, the guard that stops a run, resuming."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from maestro_fast.ops import group_advantages
from maestro_fast.records import StepRecord
from maestro_fast.training import MaestroTrainer, parse_config, train
from maestro_fast.weighting import Anchored

MINE = """
def first(completion_ids, **k): return [float(ids[0] % 7) for ids in completion_ids]
def last(completion_ids, **k): return [float(ids[-1] % 5) for ids in completion_ids]
def utility(completion_ids, **k): return [float(ids[0] % 7) for ids in completion_ids]
"""


@pytest.fixture
def raw(raw_config: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "mine.py").write_text(MINE)
    at = f"{tmp_path}/mine.py"
    return raw_config | {
        "rewards": [f"{at}:first", f"{at}:last"],
        "anchor": {"function": f"{at}:utility", "labels": {"share": 0.5, "early": 1}},
        "weights": {"type": "anchored", "hybrid": True, "steps": 3},
    }


def run(raw: dict[str, Any], *, resume: bool = False) -> tuple[MaestroTrainer, list[StepRecord]]:
    records: list[StepRecord] = []
    return train(parse_config(raw), raw, resume=resume, observers=[records.append]), records


def test_labels_reach_the_policy_and_the_log(raw: dict[str, Any]) -> None:
    trainer, records = run(raw)
    policy = trainer.step.weights
    assert isinstance(policy, Anchored)
    first, second = (record.utilities_B for record in records)
    assert first is not None and second is not None
    assert first.isfinite().all() and second.isnan().any()
    known = [x.view(4, 4) for x in (first, second)]
    spread = sum(int((x.amax(1) > x.amin(1)).sum()) for x in known)
    assert policy.labelled == spread
    expected_B = group_advantages(
        first, None, 4, profile="maestro"
    ).advantages  # every response is labelled, so hybrid scores are the utilities
    torch.testing.assert_close(records[0].advantages_B, expected_B, rtol=1e-3, atol=1e-3)
    logged = trainer.state.log_history[0]
    assert logged["anchor/labelled"] == 1.0 and logged["anchor/utility"] == pytest.approx(first.mean().item())


def test_a_killed_run_repeats_the_uninterrupted_one(raw: dict[str, Any], tmp_path: Path) -> None:
    raw["trainer"] |= {"max_steps": 3, "save_steps": 1}
    raw["weights"]["residual"] = True
    whole, records = run(raw | {"run_dir": str(tmp_path / "whole")})
    half = raw | {"run_dir": str(tmp_path / "half")}
    run(half | {"trainer": half["trainer"] | {"max_steps": 2}})
    resumed, rest = run(half, resume=True)
    for ours, theirs in zip(rest, records[2:], strict=True):
        assert torch.equal(ours.weights_BK, theirs.weights_BK) and torch.equal(ours.advantages_B, theirs.advantages_B)
    state = whole.step.weights.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in resumed.step.weights.state_dict().items())


@pytest.mark.parametrize("kind", ["utility", "reward_model"])
def test_policies_without_weights_train(raw: dict[str, Any], kind: str) -> None:
    """Groups without labels have no part in the update under ``utility``; ``final: auto`` keeps the best policy."""
    raw["weights"] = kind
    raw["batch"] = raw.get("batch", {}) | {"no_signal": "drop"}
    trainer, records = run(raw)
    assert trainer.best is not None
    utilities_B, last = records[1].utilities_B, records[1]
    assert utilities_B is not None
    unlabelled_B = utilities_B.isnan()
    assert unlabelled_B.any() and not last.weights_BK.any()
    logged = trainer.state.log_history[1]
    assert bool((last.advantages_B[unlabelled_B] != 0).any()) is (kind == "reward_model")
    if kind == "utility":
        assert logged["batch/left_out"] >= unlabelled_B.float().mean().item()
    else:
        assert logged["conductor/residual_loss"] > 0


def test_a_guard_can_stop_the_run(raw: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("maestro_fast.weighting.guard.verdict", lambda history, config: "it is enough")
    raw["weights"]["guard"] = {"action": "stop", "held_back": 1.0}
    raw["trainer"]["max_steps"] = 4
    trainer, records = run(raw)
    assert trainer.state.global_step == 1 and len(records) == 1
