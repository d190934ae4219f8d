"""The quickstart, shortened: every part runs and leaves what it promises."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from maestro_fast.quickstart.model import build_tokenizer, read_pairs
from maestro_fast.quickstart.run import EXAMPLE, quickstart, verdict

FAMILIES = {"fact", "opening", "format", "rewrite"}


def test_bundled_prompts_are_of_four_balanced_families() -> None:
    rows = [json.loads(line) for line in (EXAMPLE / "prompts.jsonl").read_text(encoding="utf-8").splitlines()]
    counts = Counter(row["family"] for row in rows)

    assert len(rows) >= 300
    assert set(counts) == FAMILIES
    assert max(counts.values()) == min(counts.values())
    assert len({row["prompt"] for row in rows}) == len(rows)
    assert all(len(row["drafts"]) == 5 and row["reference"] for row in rows)


def test_tags_are_whole_tokens_that_stay_in_the_text() -> None:
    tokenizer = build_tokenizer([text for pair in read_pairs(EXAMPLE / "prompts.jsonl") for text in pair])
    text = "<think> I know this. </think> <answer> Athens. </answer>"
    ids = tokenizer(text)["input_ids"]

    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert {"<think>", "</think>", "<answer>", "</answer>"} <= set(tokenizer.convert_ids_to_tokens(ids))


def test_quickstart_runs_to_its_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = quickstart(tmp_path / "out", epochs=1, limit=16)
    printed = capsys.readouterr().out
    spreads = json.loads((run / "spread.json").read_text())

    assert run == tmp_path / "out" / "conductor"
    for name in ("config.yaml", "metrics.jsonl", "timings.jsonl", "rollouts.jsonl", "report/report.html", "final"):
        assert (run / name).exists(), name
    assert len((run / "rollouts.jsonl").read_text().splitlines()) == 16 * 8
    assert f"{spreads['conductor']:.4f}" in printed
    assert f"{spreads['shuffled']:.4f}" in printed
    assert "Self-flattery" in printed
    assert "report.html" in printed
    with pytest.raises(FileExistsError, match=r"--out: .* is not empty"):
        quickstart(tmp_path / "out")


def test_the_verdict_says_so_when_the_control_is_not_exceeded() -> None:
    assert "above the 0.0100" in verdict(0.02, 0.01, 0.0)[0]
    assert "NOT above" in verdict(0.01, 0.02, 0.0)[0]
    assert "does not show" in verdict(0.01, 0.02, 0.0)[1]
    assert "outside the healthy" in verdict(0.02, 0.01, 0.06)[2]
    assert "within the healthy" in verdict(0.02, 0.01, -0.04)[2]
