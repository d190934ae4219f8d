"""A disk that is full, a quota, and folders that are read-only: a clear error, and nothing is lost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from maestro_fast.reporting.json_lines import JsonLines, read_jsonl
from maestro_fast.reporting.recorded_run import recorded_train
from tests.faults import scenarios
from tests.faults.disks import SmallDisk, run_scenario
from tests.faults.scenarios import POINTS
from tests.tiny import tiny_checkpoint

OWN = """
def mine(completion_ids, **columns):
    return [float(sum(ids) % 7) for ids in completion_ids]

mine.metrics = lambda: {f"figure {i}": 0.0 for i in range(300)}  # A line of the log is longer than a page.
"""
LONG = ("tokenizer", "random state", "step in progress", "weight policy", "manifest", "metrics", "rollouts")


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("run")
    (folder / "data").mkdir()
    rows = [json.dumps({"prompt": f"Name colour number {i}."}) for i in range(16)]
    (folder / "data" / "prompts.jsonl").write_text("\n".join(rows), encoding="utf-8")
    (folder / "own.py").write_text(OWN, encoding="utf-8")
    return {
        "run_dir": str(folder / "whole"),
        "model": {"path": str(tiny_checkpoint(folder / "model"))},
        "data": {"path": str(folder / "data" / "prompts.jsonl")},
        "rewards": [f"{folder}/own.py:mine", {"type": "length", "name": "brevity", "target": 2}],
        "weights": {"type": "conductor", "period": 2},
        "sampling": {"group_size": 4, "max_new_tokens": 6},
        "batch": {"prompts_per_batch": 4, "micro_batch": 8},
        "trainer": {"learning_rate": 1e-3, "max_steps": 3, "save_steps": 1, "disable_tqdm": True, "use_cpu": True},
    }


@pytest.fixture(scope="module")
def whole(raw: dict[str, Any]) -> str:
    """The directory of a run that nothing disturbed."""
    recorded_train(raw)
    return str(raw["run_dir"])


@pytest.mark.parametrize("point", [pytest.param(p, marks=pytest.mark.long if p in LONG else ()) for p in POINTS])
def test_a_disk_that_fills_up(raw: dict[str, Any], whole: str, tmp_path: Path, point: str) -> None:
    """A part of what is written there finds room, as on a real disk."""
    spare = 0 if point.endswith("s") or point == "manifest" else 8192
    run_scenario(scenarios.full_at, raw, whole, tmp_path, point, spare, log=tmp_path / "log")


def test_a_run_that_cannot_be_saved_either(raw: dict[str, Any], tmp_path: Path) -> None:
    run_scenario(scenarios.cannot_be_saved, raw, tmp_path, log=tmp_path / "log")


@pytest.mark.long
def test_disks_that_are_too_small(raw: dict[str, Any], whole: str, tmp_path: Path) -> None:
    sizes = [200_000, 330_000, 600_000, 760_000, 1_100_000, 1_300_000, 1_650_000, 1_750_000]
    run_scenario(scenarios.too_small, raw, whole, tmp_path, sizes, log=tmp_path / "log")


def test_a_disk_that_is_full_before_the_start(raw: dict[str, Any], tmp_path: Path) -> None:
    run_scenario(scenarios.full_before_the_start, raw, tmp_path, log=tmp_path / "log")


def test_a_quota(raw: dict[str, Any], whole: str, tmp_path: Path) -> None:
    run_scenario(scenarios.quota, raw, whole, str(tmp_path / "run"), log=tmp_path / "log", namespace=False)


def test_read_only_folders(raw: dict[str, Any], whole: str, tmp_path: Path) -> None:
    run_scenario(scenarios.read_only, raw, tmp_path, whole, log=tmp_path / "log")


def write_on_a_full_disk(folder: Path) -> None:
    """A line that finds no room, or half of it, leaves the file as it was."""
    disk = SmallDisk(folder / "disk", 1 << 20)
    log = JsonLines(disk.folder / "log.jsonl")
    log.append({"step": 1, "text": "a"}, {"step": 2, "text": "b" * 3000})
    before = log.path.read_bytes()
    for spare in (0, 4096):
        disk.fill(spare)
        for write in (log.append, log.replace_last):
            with pytest.raises(OSError, match=rf"No space left on device: '{log.path}'"):
                write({"step": 3, "text": "c" * 20_000})
            assert log.path.read_bytes() == before
        disk.clear()
    log.replace_last({"step": 2})
    log.append({"step": 3, "text": "c" * 20_000})
    assert [row["step"] for row in read_jsonl(log.path)] == [1, 2, 3]


def test_a_line_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    run_scenario(write_on_a_full_disk, tmp_path, log=tmp_path / "log")
