from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from maestro_fast.reporting import samples
from maestro_fast.reporting.json_lines import JsonLines
from maestro_fast.reporting.samples import sample_pairs, say_pairs


def row(step: int, family: str, prompt: str, completion: str = "") -> dict[str, Any]:
    return {"step": step, "family": family, "prompt": prompt, "completion": completion}


def pairs_of(path: Path, *rows: dict[str, Any]) -> list[tuple[Any, ...]]:
    file = path / "rollouts.jsonl"
    JsonLines(file).append(*rows)
    return [
        (p.early["prompt"], p.early["step"], p.late and (p.late["prompt"], p.late["step"])) for p in sample_pairs(file)
    ]


def test_the_same_prompt_is_preferred_then_the_same_family(tmp_path: Path) -> None:
    rows = [row(1, "x", "x1"), row(1, "x", "x2"), row(1, "y", "y1"), row(1, "z", "z1")]
    rows += [row(50, "x", "x2"), row(99, "x", "x3"), row(99, "x", "x2"), row(99, "x", "x4"), row(99, "y", "y2")]
    assert pairs_of(tmp_path, *rows) == [
        ("x2", 1, ("x2", 99)),
        ("y1", 1, ("y2", 99)),
        ("z1", 1, None),
    ]


def test_without_a_prompt_that_comes_again_pairs_share_the_family(tmp_path: Path) -> None:
    rows = [row(1, "x", "x1"), row(1, "x", "x2"), row(99, "x", "x3"), row(99, "x", "x4")]
    assert pairs_of(tmp_path, *rows) == [("x1", 1, ("x4", 99)), ("x2", 1, ("x3", 99))]
    assert say_pairs(sample_pairs(tmp_path / "rollouts.jsonl")).startswith("No prompt that the log shows")


def test_prompts_of_the_first_and_last_fifth_go_before_those_of_the_halves(tmp_path: Path) -> None:
    rows = [row(1, "x", "a"), row(30, "x", "b"), row(2, "x", "c"), row(60, "x", "a"), row(70, "x", "b")]
    rows += [row(90, "x", "b"), row(100, "x", "c")]
    rows.sort(key=lambda one: int(one["step"]))
    assert pairs_of(tmp_path, *rows) == [("c", 2, ("c", 100)), ("a", 1, ("a", 60)), ("b", 30, ("b", 90))]
    assert say_pairs(sample_pairs(tmp_path / "rollouts.jsonl")) == "Both responses of a pair answer the same prompt."


def test_of_a_large_file_only_the_ends_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [row(step, "x", f"{step}, {n % 40}", "y" * 500) for step in range(200) for n in range(4)]
    rows += [row(200, "x", "0, 1", "the last"), row(200, "x", "0, 1", "not the first of its group")]
    monkeypatch.setattr(samples, "_BYTES", 20_000)
    assert pairs_of(tmp_path, *rows) == [("0, 1", 1, ("0, 1", 201))]
    (pair,) = sample_pairs(tmp_path / "rollouts.jsonl")
    assert pair.late is not None and pair.late["completion"] == "the last"


def test_a_file_of_version_0_1_counts_from_0_and_is_shown_from_1(tmp_path: Path) -> None:
    assert pairs_of(tmp_path, row(0, "x", "p"), row(7, "x", "p")) == [("p", 1, ("p", 8))]


def test_the_first_response_of_a_group_counts(tmp_path: Path) -> None:
    JsonLines(tmp_path / "r").append(*(row(s, "x", "p", f"{s}, {n}") for s in (0, 9) for n in range(4)))
    (pair,) = sample_pairs(tmp_path / "r")
    assert pair.late is not None
    assert (pair.early["completion"], pair.late["completion"], pair.same_prompt) == ("0, 0", "9, 0", True)


def test_families_take_turns_and_eight_are_enough(tmp_path: Path) -> None:
    rows = [row(0, "x", f"x{n}") for n in range(20)] + [row(0, "y", f"y{n}") for n in range(3)]
    prompts = [prompt for prompt, *_ in pairs_of(tmp_path, *rows)]
    assert prompts == ["x0", "y0", "x1", "y1", "x2", "y2", "x3", "x4"]


def test_a_single_step_has_no_late_responses(tmp_path: Path) -> None:
    assert pairs_of(tmp_path, row(7, "x", "p")) == [("p", 7, None)]


def test_an_empty_file_has_no_pairs(tmp_path: Path) -> None:
    assert pairs_of(tmp_path) == []
