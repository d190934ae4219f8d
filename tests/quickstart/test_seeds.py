"""Other seeds of the quickstart: every draw follows from the seed, finished arms are kept, and the table is right."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from maestro_fast.evals.results import Result
from maestro_fast.quickstart import seeds
from maestro_fast.quickstart.held_out import Utilities

ALL = ["equal", "labelled", "anchored"]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What is made and trained, in order. Models and policies are replaced by empty folders."""
    calls: list[tuple[Any, ...]] = []

    def make(name: str) -> Any:
        return lambda example, folder, *, seed: calls.append((name, folder.parent.name, seed))

    def train(raw: dict[str, Any]) -> None:
        run_dir = Path(raw["run_dir"])
        run_dir.mkdir()
        rows = [{"length": 3}, {"length": 4}]
        (run_dir / "rollouts.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
        anchor = raw["anchor"]["labels"]
        calls.append((run_dir.name, run_dir.parent.name, raw["seed"], anchor["seed"], anchor["share"], raw["weights"]))

    monkeypatch.setattr(seeds, "make_checkpoint", make("model"))
    monkeypatch.setattr(seeds, "make_reward_model", make("reward_model"))
    monkeypatch.setattr(seeds, "recorded_train", train)
    monkeypatch.setattr(seeds, "utilities", lambda raw, model, data: Utilities(["fact"], torch.tensor([0.5])))
    return calls


def test_every_draw_follows_from_the_seed(calls: list[tuple[Any, ...]], tmp_path: Path) -> None:
    found = seeds.run([3, 4], tmp_path, 0)
    assert calls[:4] == [(name, f"seed{s}", s) for s in (3, 4) for name in ("model", "reward_model")]
    assert [call[:5] for call in calls[4:]] == [(arm, f"seed{s}", s, s, 0.25) for s in (3, 4) for arm in ALL]
    assert [call[5] if isinstance(call[5], str) else call[5]["type"] for call in calls[4:7]] == [
        "equal",
        "utility",
        "anchored",
    ]
    assert [(own.arm, own.seed) for own in found] == [("warm_start", 3), ("warm_start", 4)] + [
        (arm, s) for s in (3, 4) for arm in ALL
    ]
    assert {own.tokens for own in found} == {0, 7} and {own.utility for own in found} == {0.5}


def test_finished_arms_are_not_run_again(calls: list[tuple[Any, ...]], tmp_path: Path) -> None:
    seeds.run([3], tmp_path, 0)
    lines = (tmp_path / "results.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "results.jsonl").write_text("".join(lines[:-1]))  # as if the last arm had been killed
    del calls[:]
    seeds.run([3], tmp_path, 0)
    assert [call[0] for call in calls] == ["anchored"]


def test_the_table_pairs_by_seed() -> None:
    means = {"warm_start": (0.3, 0.4), "equal": (0.4, 0.3), "labelled": (0.4, 0.5), "anchored": (0.5, 0.7)}
    results = [
        Result(arm, seed, {}, value, {"fact": value, "opening": 2 * value})
        for arm, values in means.items()
        for seed, value in zip((5, 6), values, strict=True)
    ]
    _, _, start, equal, labelled, anchored = (
        [cell.strip() for cell in line.strip("|").split("|")] for line in seeds.table(results).splitlines()
    )
    # With two seeds, the interval is 12.706 times half the difference of the two.
    assert start == ["warm start", "0.350 ± 0.635", "", "", "+0.250 ± 0.635", "0.35", "0.70"]
    assert equal[2:5] == ["+0.000 ± 1.271", "1 of 2", "+0.250 ± 1.906"]
    assert labelled[2:5] == ["+0.100 ± 0.000", "2 of 2", "+0.150 ± 0.635"]
    assert anchored[2:5] == ["+0.250 ± 0.635", "2 of 2", ""] and anchored[5:] == ["0.60", "1.20"]
