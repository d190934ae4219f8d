from __future__ import annotations

from pathlib import Path
from typing import Any

from maestro_fast.reporting.json_lines import JsonLines
from maestro_fast.reporting.samples import sample_pairs


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
        ("x1", 1, ("x4", 99)),
    ]


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
