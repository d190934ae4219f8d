"""Jobs run once each: a suite goes on after a kill, and a job that fails does not end the others."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest

from maestro_fast.evals.jobs import RESULTS_FILE, Job, read_results, run_jobs
from maestro_fast.reporting.json_lines import read_jsonl

# Functions of jobs, in a file of their own: the workers load neither pytest nor torch.
FUNCTIONS = '''
import os, time
from pathlib import Path
from maestro_fast.evals.results import Result

class Awkward(Exception):
    """It cannot be pickled for the parent, and could not be rebuilt there."""
    def __init__(self, path, line):
        super().__init__(f"{path}, line {line}")
        self.held = lambda: None

def work(payload):
    folder = Path(payload["folder"])
    with (folder / f"pid-{os.getpid()}").open("a") as log:
        log.write(payload["name"] + "\\n")
    while payload.get("slow") and not (folder / "go").exists():
        time.sleep(0.02)
    if payload.get("fails"):
        raise Awkward("there", 3)
    if payload.get("dies"):
        os._exit(9)
    if payload.get("lies"):
        return [{"utility": 1.0}]
    if payload.get("meets"):  # It waits for another worker, so that two have begun.
        while len(list(folder.glob("pid-*"))) < 2:
            time.sleep(0.02)
        payload["value"] = float(os.environ.get("CUDA_VISIBLE_DEVICES", "nan"))
    threads = float(os.environ.get("OMP_NUM_THREADS", "nan"))
    return [Result(payload["name"], 1, {}, float("nan") if payload.get("nan") else payload["value"], {}, threads)]
'''


@pytest.fixture
def function(tmp_path: Path) -> str:
    path = tmp_path / "functions.py"
    path.write_text(FUNCTIONS)
    return f"{path}:work"


def job(folder: Path, name: str, value: float = 0.0, **more: Any) -> Job:
    return Job(name, {"name": name, "value": value, **more}, places={"folder": str(folder)})


def begun(folder: Path) -> list[str]:
    """The names of all jobs that were begun, in any process."""
    return sorted(name for path in folder.glob("pid-*") for name in path.read_text().split())


def until(true: Callable[[], bool], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def test_after_a_kill_the_workers_end_and_finished_jobs_are_not_done_again(
    tmp_path: Path, function: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The parent gets SIGKILL while one job has ended and two run. They and no others begin again."""
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    jobs = [job(tmp_path, "a", 1.0), *(job(tmp_path, name, 2.0, slow=True) for name in "bc"), job(tmp_path, "d", 3.0)]
    parent = get_context("fork").Process(target=run_jobs, args=(jobs, function, tmp_path))
    parent.start()
    try:
        until(lambda: begun(tmp_path) == ["a", "b", "c"] and len(read_results(tmp_path)) == 1)
        workers = [int(path.name.removeprefix("pid-")) for path in tmp_path.glob("pid-*")]
        assert all(map(alive, workers))
    finally:
        os.kill(parent.pid or 0, signal.SIGKILL)
        parent.join()
    until(lambda: not any(map(alive, workers)), 10)

    with (tmp_path / RESULTS_FILE).open("a") as file:
        file.write('{"job": "b", "fingerp')  # A kill may come in the middle of a line.
    (tmp_path / "go").touch()
    found = run_jobs(jobs, function, tmp_path, workers=0)

    assert {name: results[0].utility for name, results in found.items()} == {"a": 1.0, "b": 2.0, "c": 2.0, "d": 3.0}
    assert list(found) == ["a", "b", "c", "d"]
    assert begun(tmp_path) == ["a", "b", "b", "c", "c", "d"]
    assert [row["job"] for row in read_jsonl(tmp_path / RESULTS_FILE)] == ["a", "b", "c", "d"]
    assert found["a"][0].length == 1.0, "a worker has one thread"
    run_jobs(jobs, function, tmp_path, workers=0)
    assert len(begun(tmp_path)) == 6


def test_a_job_that_fails_does_not_end_the_others_and_runs_again(tmp_path: Path, function: str) -> None:
    """Its exception cannot be pickled, and the next job goes on in the same worker."""
    jobs = [job(tmp_path, "bad", fails=True), job(tmp_path, "good", 2.0)]
    with pytest.raises(RuntimeError, match=r"^1 of 2 jobs failed: bad\. bad: Awkward: there, line 3\.") as caught:
        run_jobs(jobs, function, tmp_path, workers=1)

    assert 'raise Awkward("there", 3)' in caught.value.__notes__[0]
    assert [one.arm for one in read_results(tmp_path)] == ["good"]
    assert len(list(tmp_path.glob("pid-*"))) == 1
    with pytest.raises(RuntimeError, match=r"^1 of 2 jobs failed: bad"):
        run_jobs(jobs, function, tmp_path, workers=0)
    assert begun(tmp_path) == ["bad", "bad", "good"]


def test_a_worker_that_dies_is_reported_with_its_job(tmp_path: Path, function: str) -> None:
    jobs = [job(tmp_path, "first", 1.0), job(tmp_path, "deadly", dies=True)]
    with pytest.raises(RuntimeError, match=r"a worker died.*while these jobs ran: deadly"):
        run_jobs(jobs, function, tmp_path, workers=1)
    assert [one.arm for one in read_results(tmp_path)] == ["first"]


def test_results_of_another_payload_are_refused_and_another_place_is_not(tmp_path: Path, function: str) -> None:
    run_jobs([job(tmp_path, "a", 1.0)], function, tmp_path, workers=0)
    other = tmp_path / "other"
    assert run_jobs([job(other, "a", 1.0)], function, tmp_path, workers=0)["a"][0].utility == 1.0
    with pytest.raises(ValueError, match=r"^jobs: a is in .*results.jsonl with other settings"):
        run_jobs([job(tmp_path, "a", 2.0)], function, tmp_path, workers=0)
    with pytest.raises(ValueError, match=r"^jobs: a is in .*results.jsonl with other settings"):
        run_jobs([job(tmp_path, "a", 1.0)], function.replace(":work", ":play"), tmp_path, workers=0)


def test_two_jobs_of_one_name_are_refused(tmp_path: Path, function: str) -> None:
    with pytest.raises(ValueError, match=r"^jobs: two have the same name"):
        run_jobs([job(tmp_path, "a"), job(tmp_path, "a", 1.0)], function, tmp_path)


def test_what_is_no_list_of_results_is_a_failure_of_the_job(tmp_path: Path, function: str) -> None:
    with pytest.raises(RuntimeError, match="expected a list of Result"):
        run_jobs([job(tmp_path, "a", lies=True)], function, tmp_path, workers=0)
    assert not (tmp_path / RESULTS_FILE).exists()


def test_a_utility_that_is_not_a_number_comes_back_as_it_was(tmp_path: Path, function: str) -> None:
    jobs = [job(tmp_path, "a", nan=True)]
    for _ in range(2):
        assert math.isnan(run_jobs(jobs, function, tmp_path, workers=0)["a"][0].utility)
    assert begun(tmp_path) == ["a"]


@pytest.mark.parametrize(
    ("visible", "count", "dealt"), [("4, 7", 2, [4.0, 7.0]), (None, 2, [0.0, 1.0]), ("5", 1, [5.0] * 2)]
)
def test_each_worker_has_one_gpu(
    tmp_path: Path, function: str, monkeypatch: pytest.MonkeyPatch, visible: str | None, count: int, dealt: list[float]
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr("torch.cuda.device_count", lambda: count)
    found = run_jobs([job(tmp_path, name, meets=True) for name in "ab"], function, tmp_path, workers=2)
    assert sorted(results[0].utility for results in found.values()) == dealt


def test_without_gpus_the_environment_stays(tmp_path: Path, function: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "9")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    found = run_jobs([job(tmp_path, name, meets=True) for name in "ab"], function, tmp_path, workers=2)
    assert {results[0].utility for results in found.values()} == {9.0}
