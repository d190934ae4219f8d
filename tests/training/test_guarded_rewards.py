"""Rewards that fail or are late in a whole run, and the figures that rewards have of their own in its log."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from maestro_fast.reporting import read_jsonl
from maestro_fast.reporting.recorded_run import recorded_train
from maestro_fast.rewards import RewardTimeoutError
from tests.training.test_checkpoint import assert_same_run

OWN = """
import pathlib, time

class Counting:
    asked = 0

    def __call__(self, completions, **columns):
        self.asked += len(completions)
        return [float(len(text)) for text in completions]

    def metrics(self):
        found, self.asked = {"asked": self.asked}, 0
        return found

counting, useful = Counting(), Counting()

def flaky(prompts, completions, **columns):
    if any("sea" in prompt for prompt in prompts):
        raise KeyError("topic")
    return [float(len(text)) for text in completions]

def late(completions, **columns):
    late.calls += 1
    time.sleep(30 if late.calls == 2 and not pathlib.Path(__file__).with_name("mended").exists() else 0)
    return [float(len(text)) for text in completions]

late.calls = 0
"""


@pytest.fixture
def raw(raw_config: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """A line of the log for each of two steps; held-out prompts, of which none is about the sea."""
    (tmp_path / "own.py").write_text(OWN, encoding="utf-8")
    rows = [{"prompt": f"Name number {i}.", "family": "fact", "reference": "red"} for i in range(3)]
    (tmp_path / "held_out.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    raw_config["trainer"] |= {"logging_steps": 1, "optim": "sgd"}
    return raw_config | {"weights": "equal"}


def test_failures_abstain_and_figures_are_those_of_their_own_batch(raw: dict[str, Any], tmp_path: Path) -> None:
    """Of eight rows about the sea, each of two batches of eight draws some: the whole batch abstains."""
    raw["rewards"] = [
        {"function": f"{tmp_path}/own.py:flaky", "on_error": "abstain", "timeout": 60},
        f"{tmp_path}/own.py:counting",
    ]
    raw["anchor"] = f"{tmp_path}/own.py:useful"
    raw["evaluation"] = {"data": {"path": str(tmp_path / "held_out.jsonl")}, "samples": 2}
    raw["trainer"] |= {"eval_strategy": "steps", "eval_steps": 1}
    raw["batch"] |= {"prompts_per_batch": 8}
    trainer = recorded_train(raw)

    lines = [*read_jsonl(Path(raw["run_dir"]) / "metrics.jsonl")]
    trained = [line for line in lines if "loss" in line]
    evaluated = [line for line in lines if "eval_rewards/flaky/errors" in line]
    assert len(trained) == len(evaluated) == trainer.state.global_step == 2
    for line in trained:
        assert (line["rewards/flaky/errors"], line["rewards/flaky/timeouts"]) == (1.0, 0.0)
        assert line["rewards/flaky/abstained"] == 1.0
        assert line["rewards/counting/asked"] == line["anchor/asked"] == 32.0
    for line in evaluated:
        assert line["eval_rewards/flaky/errors"] == 0.0 == line["eval_rewards/flaky/abstained"]
        assert line["eval_rewards/counting/asked"] == line["eval_anchor/asked"] == 6.0


def test_a_run_that_a_late_reward_stops_goes_on_from_there(raw: dict[str, Any], tmp_path: Path) -> None:
    raw["rewards"] = [{"function": f"{tmp_path}/own.py:late", "timeout": 1.0}]
    whole = copy.deepcopy(raw) | {"run_dir": f"{raw['run_dir']}-whole"}
    with pytest.raises(
        RewardTimeoutError, match=r"^reward 'late': was not back within 1 s for 16 responses\n"
    ) as caught:
        recorded_train(raw)
    assert any("after step 1 is in" in note for note in caught.value.__notes__)

    (tmp_path / "mended").touch()
    recorded_train(raw, resume=True)
    recorded_train(whole)
    assert_same_run(whole["run_dir"], raw["run_dir"])
