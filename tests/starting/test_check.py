"""``maestro-fast check``: what it shows of a run, what it finds wrong, and that it leaves nothing behind."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from maestro_fast.settings import SettingsError
from maestro_fast.starting import check as checking
from maestro_fast.starting.check import CheckOptions, check
from maestro_fast.starting.memory import Room
from tests.tiny import tiny_checkpoint

FEW = CheckOptions(prompts=2, tokens=6)
OWN = """
def parity(completion_ids, **columns):
    return [float(sum(ids) % 3) for ids in completion_ids]

def broken(completions, answer, **columns):
    return [len(text) / (int(a) - 1) for text, a in zip(completions, answer)]
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("model"), "llama")


@pytest.fixture
def raw(tmp_path: Path, model: Path) -> dict[str, Any]:
    rows = [
        {"prompt": [{"role": "user", "content": f"Name {i}. " * (1 + i)}], "answer": "1", "family": "ab"[i % 2]}
        for i in range(4)
    ]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (tmp_path / "own.py").write_text(OWN, encoding="utf-8")
    return {
        "run_dir": str(tmp_path / "runs" / "one"),
        "model": {"path": str(model)},
        "data": {"path": str(tmp_path / "prompts.jsonl")},
        "rewards": [f"{tmp_path}/own.py:parity", {"type": "length", "target": 2, "where": {"family": "a"}}],
        "weights": "conductor",
        "sampling": {"group_size": 4, "max_new_tokens": 96},
        "batch": {"prompts_per_batch": 2, "micro_batch": 4},
        "loss": {"kl_coef": 0.1},
        "advantages": {"profile": "grpo"},
        "trainer": {"use_cpu": True, "max_steps": 6},
    }


def files(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


def test_a_run_that_is_ready_is_shown_and_nothing_is_written(
    raw: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files(tmp_path)

    assert check(raw, FEW)
    printed = capsys.readouterr().out
    assert printed.rstrip().endswith("ready")
    assert files(tmp_path) - before <= {tmp_path / "__pycache__"}
    for words in (
        "a 2, b 2",  # the families
        "<|user|>Name 0. <|end|><|assistant|>",  # the prompt with its special tokens
        "Rewards of 8 responses (2 prompts x 4)",
        "reference",  # a frozen copy, for the KL
        "training pass",
        "groups have a signal",
        "scoring",  # the Conductor's forward
        "The run has 6 such batches",
    ):
        assert words in printed, words
    (length,) = [line for line in printed.splitlines() if line.startswith("length  ")]
    assert "50 %" in length, "it abstains from one of the two families"
    assert max(map(len, printed.splitlines())) <= 120


def test_a_reward_that_fails_is_named_with_its_line_beside_those_that_work(
    raw: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw["rewards"].append(f"{tmp_path}/own.py:broken")

    assert not check(raw, FEW)
    printed = capsys.readouterr().out
    verdict = printed[printed.index("What has to change") :]
    assert "rewards: 'broken' failed" in verdict and "ZeroDivisionError" in verdict and "own.py" in verdict
    assert "line 6, in broken" in verdict or "line 6, in <listcomp>" in verdict
    assert "parity  " in printed and "failed" in printed, "the others are shown"


def test_memory_that_is_too_small_names_the_micro_batch_that_fits(
    raw: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    raw |= {"loss": {}, "batch": {"prompts_per_batch": 4, "micro_batch": 16}}
    judge = checking._judge_memory

    def with_less_room(memory: Any, *rest: Any) -> None:
        room = Room("a test", int(memory.with_micro_batch(2).peak / 0.85) + 1, 0)
        judge(replace(memory, room=room), *rest)

    monkeypatch.setattr(checking, "_judge_memory", with_less_room)
    assert not check(raw, FEW)
    assert "batch.micro_batch: 2 fits" in capsys.readouterr().out


def test_a_run_directory_in_use_has_to_change(raw: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    used = Path(raw["run_dir"])
    used.mkdir(parents=True)
    (used / "metrics.jsonl").write_text("{}\n", encoding="utf-8")
    before = files(used)

    assert not check(raw, FEW)
    assert f"run_dir: {used} holds a run already" in capsys.readouterr().out
    assert files(used) == before


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"sampling": {"group_size": 1}}, "sampling.group_size: 1"),
        ({"data": {"path": "prompts.jsonl", "max_prompt_tokens": 12}}, "max_prompt_tokens: the prompt of row"),
        ({"batch": {"prompts_per_batch": 2, "micro_batch": 3}}, "batch.micro_batch: 3"),
    ],
)
def test_what_train_refuses_is_refused_by_the_same_sentence(
    raw: dict[str, Any], tmp_path: Path, change: dict[str, Any], complaint: str
) -> None:
    for section, value in change.items():
        raw[section] = {**raw[section], **value}
    raw["data"]["path"] = str(tmp_path / "prompts.jsonl")

    with pytest.raises(ValueError, match=complaint):
        check(raw, FEW)


def test_it_runs_in_one_process(raw: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    prepare = checking.prepare

    def of_two(config: Any) -> Any:
        prepared = prepare(config)
        monkeypatch.setattr(type(prepared.args), "world_size", 2)
        return prepared

    monkeypatch.setattr(checking, "prepare", of_two)
    with pytest.raises(SettingsError, match="check: started as 2 processes"):
        check(raw, FEW)


def test_the_random_state_of_the_caller_is_no_concern_of_the_policy(
    raw: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """Two checks of one config sample the same responses."""

    def responses() -> list[str]:
        torch.manual_seed(len(seen))
        check(raw, FEW)
        printed = capsys.readouterr().out
        seen.append([line for line in printed.splitlines() if line.startswith("  | ")])
        return seen[-1]

    seen: list[list[str]] = []
    assert responses() == responses()
