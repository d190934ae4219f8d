"""Suites and training runs side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from maestro_fast.evals.compare import compare
from maestro_fast.evals.page import ARMS_FILE, read_arms
from maestro_fast.evals.results import Result
from maestro_fast.reporting.json_lines import JsonLines
from tests.evals.invented import invented

FEW = [r for r in invented(shares=(0.05, 0.1)) if r.arm in ("equal", "labelled", "anchored_residual")]


def suite(folder: Path, results: Sequence[Result]) -> Path:
    JsonLines(folder / ARMS_FILE).append(*(result.as_json() for result in results))
    return folder


def run(folder: Path, seed: int | None, utility: float | None, **rewards: float) -> Path:
    """A run directory with two evaluations, of which the second one counts."""
    log = JsonLines(folder / "metrics.jsonl")
    for step, gap in ((1, -0.5), (2, 0.0), (3, 0.0)):
        row: dict = {"step": step, "loss": 1.0, "rewards/facts/mean": 9.0}
        if step != 3:
            row |= {f"eval_rewards/{name}/mean": value + gap for name, value in rewards.items()}
            row["eval_completions/mean_length"] = 20.0
            row |= {} if utility is None else {"eval_utility": utility + gap, "eval_families/poem/utility": utility}
        log.append(row)
    if seed is not None:
        (folder / "config.yaml").write_text(yaml.safe_dump({"seed": seed}))
    return folder


def test_a_suite_shows_its_tables(tmp_path: Path) -> None:
    text = compare([suite(tmp_path / "one", FEW)])
    assert "Utility minus that of equal by the share of labels: strong, 80 steps" in text
    assert "at 5 % labels anchored_residual beats labelled" in text
    assert max(map(len, text[: text.index("\n- ")].splitlines())) <= 100


def test_arms_of_two_suites_are_told_apart_and_compared_with_the_first(tmp_path: Path) -> None:
    better = [replace(one, utility=one.utility + 0.1) for one in FEW]
    mine = [replace(one, arm="mine") for one in FEW if one.arm == "equal"]
    text = compare([suite(tmp_path / "one", FEW), f"other={suite(tmp_path / 'two', better + mine)}"])
    assert "utility minus that of equal [one]" in text.lower()
    assert "equal [other]" in text and "anchored_residual [one]" in text and "mine [" not in text
    line = next(line for line in text.splitlines() if line.startswith("equal [other]"))
    assert "+0.10000 ± 0.00000" in line or "+0.100 ± 0.000" in line
    assert "mine, -" not in text and "mine" in text


def test_runs_of_several_seeds_are_compared_seed_by_seed(tmp_path: Path) -> None:
    """The gaps are 0.10, 0.12 and 0.14, so they have mean 0.12 and half width 4.303 * 0.02 / sqrt(3) = 0.0497."""
    equal = ",".join(str(run(tmp_path / f"e{s}", s, 0.1 * s, facts=0.5)) for s in (1, 2, 3))
    mine = ",".join(str(run(tmp_path / f"m{s}", s, 0.12 * s + 0.08, facts=0.25)) for s in (3, 1, 2))
    text = compare([f"equal={equal}", f"mine={mine}"], tmp_path / "out")

    assert "+0.120 ± 0.050" in text
    (row, gaps, *_) = [line.split() for line in text.splitlines() if line.startswith("mine ")]
    assert row[:6] == ["mine", "2", "3", "0.250", "±", "0.000"]
    assert gaps[:4] == ["mine", "-0.250", "±", "0.000*"]
    assert "above equal: mine." in text
    assert {one.arm for one in read_arms(tmp_path / "out")} == {"equal", "mine"}
    assert "mine" in (tmp_path / "out" / "report.html").read_text()


def test_single_runs_have_no_interval_and_it_is_said(tmp_path: Path) -> None:
    text = compare([run(tmp_path / "a", 1, 0.4, facts=0.5), run(tmp_path / "b", 1, 0.6, facts=0.7, style=0.2)])
    assert "one seed each, so there is no interval" in " ".join(text.split())
    assert "There is one seed for each arm, so there are no intervals" in text
    assert "above a:" not in text and "±" not in text.partition("\n- ")[0]
    row = next(line.split() for line in text.splitlines() if line.startswith("b "))
    assert row[:5] == ["b", "2", "1", "0.700", "0.200"]


def test_runs_without_a_utility_are_compared_by_their_rewards(tmp_path: Path) -> None:
    pairs = [
        ",".join(str(run(tmp_path / f"{name}{s}", None, None, facts=value + 0.1 * s)) for s in (1, 2))
        for name, value in (("a", 0.1), ("b", 0.3))
    ]
    text = compare([f"a={pairs[0]}", f"b={pairs[1]}"], tmp_path / "out")
    assert "No utility was measured" in text and "Utility on held-out prompts" not in text
    assert "The same minus those of a, seed by seed" in text
    assert all(math.isnan(one.utility) for one in read_arms(tmp_path / "out"))


def test_what_cannot_be_compared_is_named(tmp_path: Path) -> None:
    one, other = suite(tmp_path / "suite", FEW), run(tmp_path / "run", 1, 0.5, facts=0.5)
    again = run(tmp_path / "again", 1, 0.5, facts=0.5)
    half, blind = tmp_path / "half", tmp_path / "blind"
    JsonLines(half / "results.jsonl").append({"job": "a"})
    JsonLines(blind / "metrics.jsonl").append({"step": 1, "loss": 1.0})
    for runs, complaint in [
        ([], "none, expected directories"),
        ([one, other], "suites and training runs, expected one kind"),
        ([other, f"run={again}"], "two are called 'run'"),
        ([f"a={other},{again}"], "two runs of a have the seed 1"),
        ([half], "half is a suite that has not ended"),
        ([blind], "blind was never evaluated on held-out prompts"),
        ([tmp_path / "none"], "has neither arms.jsonl nor metrics.jsonl"),
        ([f"a={one},{other}"], "one suite of several"),
        ([f"={other}"], "expected DIRECTORY or LABEL=DIRECTORY"),
    ]:
        with pytest.raises(ValueError, match=rf"^runs: .*{complaint}"):
            compare(runs)
