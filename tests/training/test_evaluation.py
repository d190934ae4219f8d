"""Rewards on held-out prompts while a run trains."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from maestro_fast.data.dataset import PromptDataset
from maestro_fast.reporting import read_jsonl
from maestro_fast.reporting.recorded_run import recorded_train
from maestro_fast.settings import SettingsError
from maestro_fast.training.batches import Processes
from maestro_fast.training.evaluation import _chunks, evaluation_names, keep_subset
from tests.training.test_trainer import parameters, run

HELD_OUT = [
    {"prompt": f"Name number {i}.", "family": "fact" if i < 3 else "opening", "reference": "red"} for i in range(5)
]


@pytest.fixture
def raw(raw_config: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    path = tmp_path / "held_out.jsonl"
    path.write_text("\n".join(map(json.dumps, HELD_OUT)), encoding="utf-8")
    raw_config["trainer"]["max_steps"] = 3
    return {**raw_config, "evaluation": {"data": {"path": str(path)}, "samples": 2}}


def evaluations(trainer: Any) -> list[dict[str, Any]]:
    return [line for line in trainer.state.log_history if any(key.startswith("eval_") for key in line)]


def test_rewards_are_those_of_the_held_out_prompts(raw: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(
        "def number(prompts, completions, **columns):\n"
        "    return [float(p.split()[-1][:-1]) if 'number' in p else 100.0 for p in prompts]\n"
        "def some(prompts, completions, **columns):\n"
        "    return [None if 'number 1' in p else 1.0 for p in prompts]\n",
        encoding="utf-8",
    )
    raw["rewards"] = ["entropy", f"{tmp_path}/own.py:number", f"{tmp_path}/own.py:some"]
    raw["trainer"] |= {"eval_steps": 2, "eval_strategy": "steps", "eval_on_start": True}
    trainer, _ = run(raw)
    first, second, last = evaluations(trainer)

    assert [line["step"] for line in (first, second, last)] == [0, 2, 3]
    for line in (first, second, last):
        assert line["eval_rewards/number/mean"] == 2.0
        assert line["eval_families/fact/rewards/number"] == 1.0
        assert line["eval_families/opening/rewards/number"] == 3.5
        assert line["eval_rewards/some/mean"] == 1.0
        assert line["eval_rewards/some/abstained"] == pytest.approx(0.2)
        assert 1 <= line["eval_completions/mean_length"] <= 6
    assert first["eval_rewards/entropy/mean"] != second["eval_rewards/entropy/mean"]


def test_utility_stands_beside_the_rewards(raw: dict[str, Any], tmp_path: Path) -> None:
    """All held-out prompts are labelled, though hardly any are in training; one has no utility at all."""
    source = "def u(prompts, **k): return [None if '4' in p else ('1' in p) + 0.5 for p in prompts]\n"
    (tmp_path / "own.py").write_text(source, encoding="utf-8")
    raw["anchor"] = {"function": f"{tmp_path}/own.py:u", "labels": {"share": 0.01}}
    raw["trainer"] |= {"metric_for_best_model": "eval_utility"}
    trainer, _ = run(raw)
    metrics = trainer.evaluate()

    assert metrics["eval_utility"] == pytest.approx((3 * 0.5 + 1.5) / 4)
    assert metrics["eval_utility_count"] == 8.0  # two responses to each of four prompts
    assert metrics["eval_families/fact/utility"] == pytest.approx((0.5 + 1.5 + 0.5) / 3)
    assert metrics["eval_families/opening/utility"] == 0.5
    names = evaluation_names(("format", "brevity", "entropy"), trainer.eval_dataset, anchored=True)
    assert sorted(metrics) == sorted(f"eval_{name}" for name in names)


def test_training_does_not_notice_it(raw: dict[str, Any]) -> None:
    without = {key: value for key, value in copy.deepcopy(raw).items() if key != "evaluation"}
    without["run_dir"] += "-without"
    without["trainer"] |= {"logging_steps": 3}  # an evaluation stands between two log lines
    raw["trainer"] |= {"logging_steps": 3, "eval_steps": 1}
    evaluated, plain = recorded_train(raw), recorded_train(without)
    ours, theirs = ([*read_jsonl(Path(config["run_dir"]) / "metrics.jsonl")] for config in (raw, without))

    assert len(evaluations(evaluated)) == 3
    assert [{k: v for k, v in line.items() if not k.startswith("eval_")} for line in ours[2:]] == theirs
    assert all(key.startswith("eval_") or key in ("step", "epoch") for line in ours[:2] for key in line)
    for name, value in parameters(evaluated).items():
        assert torch.equal(parameters(plain)[name], value), name


def test_the_same_policy_gets_the_same_figures_twice(raw: dict[str, Any]) -> None:
    trainer, _ = run(raw)

    assert trainer.evaluate() == trainer.evaluate()


def test_every_process_gets_as_many_chunks() -> None:
    two = [Processes(type("A", (), {"process_index": rank, "num_processes": 2})) for rank in range(2)]  # type: ignore[arg-type]
    parts = [_chunks(HELD_OUT, processes, 2) for processes in two]  # type: ignore[arg-type]

    assert [[len(chunk) for chunk in part] for part in parts] == [[2, 1], [2, 1]]
    own = [[row for chunk in part for row in chunk] for part in parts]
    dealt = [row for pair in zip(*own, strict=True) for row in pair]
    assert dealt[: len(HELD_OUT)] == HELD_OUT


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"evaluation": None, "trainer": {"eval_strategy": "steps"}}, r"trainer\.eval_strategy: there are no prompts"),
        ({"evaluation": {"data": {"path": "none.jsonl"}}}, "no file none.jsonl"),
        (
            {"evaluation": {"data": {"path": "prompts.jsonl"}, "samples": 0}},
            r"evaluation\.samples: 0, expected at least 1",
        ),
    ],
)
def test_bad_settings_are_named(raw: dict[str, Any], changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises((SettingsError, ValueError, FileNotFoundError), match=complaint):
        run({**raw, **changes})
    assert not (Path(raw["run_dir"]) / "config.yaml").exists()


def test_a_metric_that_no_evaluation_has_is_refused_at_once(raw: dict[str, Any]) -> None:
    raw["trainer"] |= {"metric_for_best_model": "rewards/brevty/mean"}
    with pytest.raises(
        ValueError, match=r"^trainer\.metric_for_best_model: 'rewards/brevty/mean', expected one of .*brevity/mean"
    ):
        run(raw)
    assert not (Path(raw["run_dir"]) / "config.yaml").exists()


def test_names_do_not_depend_on_what_abstained(raw: dict[str, Any], tmp_path: Path) -> None:
    source = "def none(completions, **columns):\n    return [None] * len(completions)\n"
    (tmp_path / "own.py").write_text(source, encoding="utf-8")
    raw |= {"rewards": ["format", f"{tmp_path}/own.py:none"], "weights": "equal"}
    trainer, _ = run(raw)
    metrics = trainer.evaluate()

    assert math.isnan(metrics["eval_rewards/none/mean"]) and metrics["eval_rewards/none/abstained"] == 1.0
    names = evaluation_names(("format", "none"), trainer.eval_dataset)
    assert sorted(metrics) == sorted(f"eval_{name}" for name in names)


@pytest.mark.parametrize("prompts", [3, 4, 7, 10, 29, 40])
def test_a_subset_keeps_the_families_in_proportion(prompts: int) -> None:
    """Twenty, nine and one row; the counts are the proportions, rounded, and at least one."""
    families = ["poem"] * 20 + ["fact"] * 9 + ["rare"]
    rows = [{"prompt": f"Sea {i}", "family": family} for i, family in enumerate(families)]
    data, again, other = (PromptDataset(rows) for _ in range(3))
    keep_subset(data, prompts, 3)
    keep_subset(again, prompts, 3)
    keep_subset(other, prompts, 4)
    counts = [data.families.count(name) for name in ("poem", "fact", "rare")]

    assert counts == {3: [1, 1, 1], 4: [2, 1, 1], 7: [4, 2, 1], 10: [6, 3, 1], 29: [19, 9, 1], 40: [20, 9, 1]}[prompts]
    assert data.rows == again.rows and (data.rows != other.rows or prompts > 20)
    assert data.rows == sorted(data.rows, key=lambda row: int(row["prompt"][4:]))
    assert data.name_of(0) == f"row {data[0]['prompt'][4:]}"


def test_a_subset_without_a_prompt_of_each_family_is_refused() -> None:
    data = PromptDataset([{"prompt": "a", "family": name} for name in "abc"])
    with pytest.raises(ValueError, match=r"^evaluation\.prompts: 2, but the held-out prompts are of 3 families"):
        keep_subset(data, 2, 0)


def test_a_subset_of_several_held_out_sets_is_the_same_at_every_evaluation(raw: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(
        "def number(prompts, completions, **columns):\n"
        "    return [float(p.split()[-1][:-1]) if 'Sea' in p else 0.0 for p in prompts]\n",
        encoding="utf-8",
    )
    rows = [{"prompt": f"Sea {2**i}.", "family": "sea" if i < 8 else "lake"} for i in range(12)]
    for name, own in (("a", rows[:5]), ("b", rows[5:])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, own)), encoding="utf-8")
    raw["evaluation"] = {"data": [{"path": str(tmp_path / f"{name}.jsonl")} for name in "ab"], "prompts": 6}
    raw["rewards"] = ["entropy", f"{tmp_path}/own.py:number"]
    raw["trainer"] |= {"eval_steps": 2, "eval_strategy": "steps", "eval_on_start": True}
    first, second, last = evaluations(run(raw)[0])
    kept = PromptDataset(rows)
    keep_subset(kept, 6, 0)

    assert sorted(kept.families) == ["lake"] * 2 + ["sea"] * 4
    mean = sum(int(row["prompt"][4:-1]) for row in kept.rows) / 6  # Other prompts have another sum of powers of two.
    assert [line["eval_rewards/number/mean"] for line in (first, second, last)] == pytest.approx([mean] * 3)
