"""What a run does for its rewards: data of their own, a word about the silent ones, conditions checked before it."""

from __future__ import annotations

import copy
import json
import logging
from pathlib import Path
from typing import Any

import pytest

from maestro_fast.reporting import read_jsonl
from maestro_fast.reporting.recorded_run import recorded_train
from maestro_fast.settings import SettingsError
from maestro_fast.training import run

JUDGE = """
def judge(prompts, completions, completion_ids, notes, **columns):
    found = [float(len(prompt) + len(note)) + len(ids) % 2 for prompt, note, ids in zip(prompts, notes, completion_ids)]
    for prompt, completion, ids, note in zip(prompts, completions, completion_ids, notes):
        prompt.append({"role": "assistant", "content": "judged"})
        completion[0]["content"] = "changed"
        note.append("judged")
        ids.clear()
    return found

def count(prompts, **columns):
    return [float(len(prompt)) for prompt in prompts]
"""


@pytest.fixture
def raw(raw_config: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """Rewards that change what they get; conversations; held-out prompts that are evaluated at every step."""
    rows = [
        {"prompt": [{"role": "user", "content": f"Name {i}."}], "family": "fact", "notes": ["x"]} for i in range(16)
    ]
    for name, part in (("prompts", rows), ("held_out", rows[:2])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, part)), encoding="utf-8")
    (tmp_path / "own.py").write_text(JUDGE, encoding="utf-8")
    raw_config["rewards"] = [f"{tmp_path}/own.py:judge", f"{tmp_path}/own.py:count", "format"]
    raw_config |= {"weights": "equal", "evaluation": {"data": {"path": str(tmp_path / "held_out.jsonl")}}}
    raw_config["trainer"] |= {"max_steps": 3, "eval_strategy": "steps", "eval_steps": 1, "logging_steps": 1}
    return raw_config


def test_rewards_change_neither_data_nor_each_other_and_silent_ones_are_named(
    raw: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="maestro_fast"):
        trainer = recorded_train(raw)

    lines = [*read_jsonl(Path(raw["run_dir"]) / "metrics.jsonl")]
    assert [line["rewards/count/mean"] for line in lines if "rewards/count/mean" in line] == [1.0] * 3
    assert {line["eval_rewards/count/mean"] for line in lines if "eval_rewards/count/mean" in line} == {1.0}
    for data in (trainer.train_dataset, trainer.eval_dataset):
        assert all(len(row["prompt"]) == 1 and row["notes"] == ["x"] for row in data)
    kept = [*read_jsonl(Path(raw["run_dir"]) / "rollouts.jsonl")]
    assert kept and "judged" not in json.dumps(kept) and "changed" not in json.dumps(kept)

    silent = [text for text in caplog.messages if "of the first 3 generation batches" in text]
    assert ["'count' gave 1" in text or "'format' gave 0" in text for text in silent] == [True, True]


def test_a_condition_that_no_prompt_meets_ends_before_the_model_is_loaded(
    raw: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "load_policy", None)
    raw = copy.deepcopy(raw)
    raw["rewards"][2] = {"type": "format", "where": {"family": ["fcat"]}}
    with pytest.raises(SettingsError, match=r"^rewards\[2\]\.where\.family: 'fcat' .*expected one of 'fact'$"):
        recorded_train(raw)
    assert not Path(raw["run_dir"]).exists()
