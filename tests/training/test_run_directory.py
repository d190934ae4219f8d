"""The run directory is checked first, and one run at a time uses it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from transformers import TrainingArguments

from maestro_fast.settings import SettingsError
from maestro_fast.training import run_directory
from maestro_fast.training.run_directory import locked, open_run_directory

ARGS = TrainingArguments(use_cpu=True, report_to="none")
HOLDER = """
import sys, time
from pathlib import Path
from maestro_fast.training.run_directory import locked
with locked(Path(sys.argv[1]), "run_dir"):
    print("locked", flush=True)
    sys.stdin.read()
"""


def test_an_unwritable_run_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    with (
        pytest.raises(SettingsError, match=r"^run_dir: cannot write to .*file/run: Not a directory"),
        open_run_directory(tmp_path / "file" / "run", ARGS, resume=False),
    ):
        pass


def test_a_used_run_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("")
    (tmp_path / "metrics.jsonl").write_text("")

    for resume, complaint in ((False, "holds a run already"), (True, "holds no checkpoint to resume from")):
        with (
            pytest.raises(SettingsError, match=rf"^run_dir: .* {complaint}"),
            open_run_directory(tmp_path, ARGS, resume=resume),
        ):
            pass


def test_resuming_where_there_is_no_directory_looks_nowhere_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "checkpoint-1").mkdir()
    monkeypatch.chdir(tmp_path)

    with (
        pytest.raises(SettingsError, match=r"^run_dir: .*absent holds no checkpoint to resume from"),
        open_run_directory(tmp_path / "absent", ARGS, resume=True),
    ):
        pass
    assert not (tmp_path / "absent").exists()


def test_a_checkpoint_that_was_moved_away_can_be_resumed_from(tmp_path: Path) -> None:
    (tmp_path / ".old-checkpoint-2").mkdir()
    with open_run_directory(tmp_path, ARGS, resume=True):
        assert (tmp_path / "checkpoint-2").is_dir()


def test_only_the_main_process_asks_whose_directory_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process may come when config.yaml is written already, while the main process holds the lock."""
    (tmp_path / "config.yaml").write_text("")
    args = TrainingArguments(use_cpu=True, report_to="none")
    monkeypatch.setattr(TrainingArguments, "process_index", 1)
    with locked(tmp_path, "run_dir"), open_run_directory(tmp_path, args, resume=False) as path:
        assert path == tmp_path


def test_a_verdict_of_any_process_reaches_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TrainingArguments, "world_size", 2)
    monkeypatch.setattr(run_directory, "gather_object", lambda own: [*own, "run_dir: cannot write to it: Disk full"])
    with pytest.raises(SettingsError, match="Disk full"), open_run_directory(tmp_path, ARGS, resume=False):
        pass


def test_two_processes_do_not_share_a_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_directory, "_PATIENCE", 0.0)
    other = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert other.stdout is not None and other.stdout.readline() == "locked\n"
        with (
            pytest.raises(
                SettingsError, match=r"^run_dir: another process works in .*, expected a directory of its own"
            ),
            open_run_directory(tmp_path, ARGS, resume=False),
        ):
            pass
    finally:
        other.kill()
        other.communicate()
    with open_run_directory(tmp_path, ARGS, resume=False):  # a killed process leaves no lock behind
        pass
