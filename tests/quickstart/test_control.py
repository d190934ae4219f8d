"""A control run ends with the quickstart that began it, and two quickstarts do not share a directory."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from maestro_fast.quickstart.control import control_run
from maestro_fast.quickstart.run import quickstart
from maestro_fast.settings import SettingsError
from maestro_fast.training import run_directory
from maestro_fast.training.run_directory import locked

CHILD = """
import time
from maestro_fast.quickstart.control import end_with_parent
end_with_parent()
print("watching", flush=True)
time.sleep(600)
"""
# Starts the control run as the quickstart does, but with another program in its place.
PARENT = """
import subprocess, sys, time
from pathlib import Path
from maestro_fast.quickstart import run
from maestro_fast.training.run_directory import locked
popen = subprocess.Popen
def start(command, **options):
    return popen([sys.executable, "-c", sys.argv[2]], **{**options, "stdout": None})
subprocess.Popen = start
out = Path(sys.argv[1])
with locked(out, "--out") as lock, run.control_run({"run_dir": str(out / "equal")}, out, lock) as control:
    print(control.pid, flush=True)
    time.sleep(600)
"""


SAVING = """
import signal, sys, time
def save(*_):
    time.sleep(1)
    print("saved", flush=True)
    sys.exit(130)
signal.signal(signal.SIGINT, save)
print("training", flush=True)
time.sleep(600)
"""


def test_after_ctrl_c_the_control_run_saves_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    popen = subprocess.Popen

    def start(command: list[str], **options: Any) -> subprocess.Popen[bytes]:
        return popen([sys.executable, "-c", SAVING], **options)

    monkeypatch.setattr(subprocess, "Popen", start)
    log = tmp_path / "equal.log"
    with (
        locked(tmp_path, "--out") as lock,
        pytest.raises(KeyboardInterrupt),
        control_run({"run_dir": str(tmp_path / "equal")}, tmp_path, lock) as control,
    ):
        assert control is not None and control.stdin is not None
        while "training" not in log.read_text():
            time.sleep(0.02)
        control.send_signal(signal.SIGINT)  # A terminal sends it to both.
        raise KeyboardInterrupt
    control.stdin.close()
    assert log.read_text().split() == ["training", "saved"] and control.returncode == 130


def test_the_control_run_ends_with_a_killed_quickstart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The child also holds the lock, so the lock is free only when the child has ended."""
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(tmp_path), CHILD], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    control = 0
    try:
        lines = {parent.stdout.readline().strip() for _ in range(2)}
        assert "watching" in lines
        control = int((lines - {"watching"}).pop())
        monkeypatch.setattr(run_directory, "_PATIENCE", 0.0)
        with pytest.raises(SettingsError, match=r"^--out: another process works in"):
            quickstart(tmp_path, resume=True)

        parent.kill()
        parent.wait()
        monkeypatch.setattr(run_directory, "_PATIENCE", 30.0)
        with locked(tmp_path, "--out"):
            control = 0
    finally:
        parent.kill()
        parent.communicate()
        if control:
            os.kill(control, signal.SIGKILL)
