"""The best policy by labelled utility: which one it is, and that final/ holds it, whatever killed the run."""

from __future__ import annotations

import itertools
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from maestro_fast.records import StepRecord
from maestro_fast.reporting import write_report
from maestro_fast.reporting.recorded_run import recorded_train
from maestro_fast.training import best_policy, parse_config, train
from maestro_fast.training.best_policy import BestPolicy
from tests.training.test_checkpoint import assert_same_run, killed_and_resumed

NAN = float("nan")


def record(done: int, utilities: list[float]) -> StepRecord:
    """The record of a batch that a policy of ``done`` optimiser steps sampled."""
    empty = torch.zeros(len(utilities))
    names, none = ["x"] * len(utilities), empty[:, None]
    return StepRecord(
        done + 1,
        ("r",),
        names,
        names,
        names,
        none,
        none,
        none,
        empty,
        empty,
        empty,
        empty,
        empty,
        torch.tensor(utilities),  # type: ignore[arg-type]
    )


class Policy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.zeros(1))
        self.frozen = nn.Parameter(torch.zeros(1), requires_grad=False)


def test_the_rule_by_hand() -> None:
    """The window has 3 batches with labels and counts from batch 5 on. Each batch has two optimiser steps."""
    policy, keeper = Policy(), BestPolicy(window=3, first=5)
    utilities: list[list[float]] = [
        [9.0, 9.0],
        [-1.0],
        [NAN, NAN],
        [-3.0],
        [-2.0],
        [0.0, NAN, -1.0],
        [NAN],
        [-1.0],
        [-4.0],
    ]
    found = []
    for number, values in enumerate(utilities):
        policy.value.data.fill_(float(number))
        keeper.see(number, record(2 * number, values), policy)
        found.append((keeper.step, keeper.utility))
    # at 5 it is (-3 - 2 - 0.5) / 3, at 6 there are no labels, at 7 it is (-2 - 0.5 - 1) / 3 and better, at 8 worse
    assert found[:5] == [(None, None)] * 5
    assert found[5] == found[6] == (10, pytest.approx(-5.5 / 3))
    assert found[7] == found[8] == (14, pytest.approx(-3.5 / 3))
    assert {name: tensor.item() for name, tensor in keeper.parameters.items()} == {"value": 7.0}


def test_zero_is_a_utility_like_any_other() -> None:
    keeper = BestPolicy(window=1, first=0)
    for number, value in enumerate([0.0, -1.0]):
        keeper.see(number, record(number, [value]), Policy())
    assert (keeper.step, keeper.utility) == (0, 0.0)


def test_a_saved_one_goes_on(tmp_path: Path) -> None:
    whole, resumed = BestPolicy(window=2, first=1), BestPolicy(window=2, first=1)
    policy = Policy()
    for number, value in enumerate([0.1, 0.3]):
        whole.see(number, record(number, [value]), policy)
    whole.save(tmp_path)
    resumed.load(tmp_path)
    for keeper in (whole, resumed):
        keeper.see(2, record(2, [0.2]), policy)
    assert resumed == whole and resumed.step == 2 and math.isclose(resumed.utility or 0, 0.25, rel_tol=1e-6)


@pytest.fixture
def raw(raw_config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr(best_policy, "WINDOW", 2)
    monkeypatch.setattr(best_policy, "FIRST", 1)
    (tmp_path / "mine.py").write_text(
        "def first(completion_ids, **k): return [float(ids[0] % 7) for ids in completion_ids]\n"
        "def last(completion_ids, **k): return [float(ids[-1] % 5) for ids in completion_ids]\n"
    )
    raw = raw_config | {
        "rewards": [f"{tmp_path}/mine.py:first", "entropy"],
        "anchor": {"function": f"{tmp_path}/mine.py:last", "labels": {"share": 0.5, "early": 1}},
        "weights": {"type": "anchored", "steps": 2},
    }
    raw["trainer"] |= {"max_steps": 6, "save_steps": 1, "save_total_limit": 10, "learning_rate": 0.02}
    return raw


def test_final_holds_the_policy_of_the_best_step(raw: dict[str, Any]) -> None:
    seen: list[StepRecord] = []
    trainer = train(parse_config(raw), raw, observers=[seen.append])
    labelled = []  # (the number of steps behind the policy, mean)
    for item in seen:
        assert item.utilities_B is not None
        values = [u for u in item.utilities_B.tolist() if not math.isnan(u)]
        labelled += [(item.step - 1, sum(values) / len(values))] if values else []
    windows = [(step, (a + b) / 2) for (_, a), (step, b) in itertools.pairwise(labelled)]
    step, utility = max(windows, key=lambda window: window[1])
    assert 0 < step < 5, "the first or the last is the best: this shows nothing"

    run_dir = Path(raw["run_dir"])
    about = json.loads((run_dir / "final" / "best.json").read_text())
    assert about["step"] == step and about["utility"] == pytest.approx(utility)
    final, there, last = (
        load_file(run_dir / name / "model.safetensors") for name in ("final", f"checkpoint-{step}", "checkpoint-6")
    )
    assert all(torch.equal(final[key], there[key]) for key in there)
    assert not all(torch.equal(final[key], last[key]) for key in last)
    assert trainer.state.log_history[-2]["best/utility"] == pytest.approx(utility)


def test_a_killed_run_keeps_the_same_one(raw: dict[str, Any]) -> None:
    whole, killed = ({**raw, "run_dir": f"{raw['run_dir']}-{name}"} for name in ("whole", "killed"))
    recorded_train(whole)
    step = json.loads((Path(whole["run_dir"]) / "final" / "best.json").read_text())["step"]
    killed_and_resumed(killed, step=step + 2)  # by then the best policy is known, and training has gone past it

    assert_same_run(whole["run_dir"], killed["run_dir"])
    ours, theirs = (Path(run["run_dir"]) / "final" / "best.json" for run in (whole, killed))
    assert ours.read_bytes() == theirs.read_bytes()
    assert f"after step {step}: the utility" in write_report(whole["run_dir"]).read_text()


@pytest.mark.parametrize(
    ("final", "weights", "kept"), [("last", "anchored", False), ("auto", "equal", False), ("best", "equal", True)]
)
def test_one_key_decides(raw: dict[str, Any], final: str, weights: str, kept: bool) -> None:
    raw |= {"final": final, "weights": weights}
    raw["trainer"]["max_steps"] = 3
    trainer = train(parse_config(raw), raw)
    run_dir = Path(raw["run_dir"])
    assert (trainer.best is not None) == kept == (run_dir / "final" / "best.json").exists()
    last, final_ = (load_file(run_dir / name / "model.safetensors") for name in ("checkpoint-3", "final"))
    assert all(torch.equal(last[key], final_[key]) for key in last) == (not kept)


def test_a_run_too_short_for_it_says_so(
    raw: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(best_policy, "FIRST", 20)
    raw["trainer"]["max_steps"] = 2
    train(parse_config(raw), raw)
    assert "final/ holds the last policy: the best one by utility is known from batch 20 on" in caplog.text
    assert json.loads((Path(raw["run_dir"]) / "final" / "best.json").read_text())["step"] is None


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"final": "best", "anchor": None, "weights": "equal"}, "final: best, but no utility is known"),
        ({"final": "best", "trainer": {"load_best_model_at_end": True}}, "final: best, but trainer.load_best_model"),
        ({"final": "first"}, "final: got str 'first', expected one of auto, best, last"),
    ],
)
def test_settings_that_cannot_be_are_named(raw: dict[str, Any], changes: dict[str, Any], complaint: str) -> None:
    raw |= changes
    if "trainer" in changes:
        raw |= {"evaluation": {"data": raw["data"]}}
        raw["trainer"] |= {"max_steps": 1, "use_cpu": True, "save_steps": 1, "metric_for_best_model": "eval_utility"}
    with pytest.raises(ValueError, match=re.escape(complaint)):
        train(parse_config(raw), raw)
    assert not (Path(raw["run_dir"]) / "config.yaml").exists()


def test_a_checkpoint_without_it_is_refused(raw: dict[str, Any]) -> None:
    raw["trainer"]["max_steps"] = 1
    train(parse_config(raw | {"final": "last"}), raw)
    raw["trainer"]["max_steps"] = 2
    with pytest.raises(ValueError, match=r"^resume_from_checkpoint: .* holds no best_policy\.safetensors"):
        train(parse_config(raw), raw, resume=True)
