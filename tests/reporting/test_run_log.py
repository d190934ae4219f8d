from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.trainer_callback import TrainerControl, TrainerState

from maestro_fast.records import StepRecord
from maestro_fast.reporting.recorded_run import ended_by_alarm
from maestro_fast.reporting.run_log import AlarmsLog, MetricsCallback, RolloutsLog, TimingsLog, read_jsonl
from maestro_fast.watching import Alarm


def log(callback: MetricsCallback, step: int, main: bool = True, **values: Any) -> None:
    state = TrainerState(global_step=step, is_world_process_zero=main)
    callback.on_log(None, state, TrainerControl(), logs=values)


def begin(callback: MetricsCallback, step: int = 0, main: bool = True) -> MetricsCallback:
    state = TrainerState(global_step=step, is_world_process_zero=main)
    callback.on_train_begin(None, state, TrainerControl())
    return callback


def steps_of(path: Path) -> list[int]:
    return [row["step"] for row in read_jsonl(path)]


def test_metrics_have_the_step_and_what_was_logged(tmp_path: Path) -> None:
    callback = begin(MetricsCallback(tmp_path))
    log(callback, 1, loss=0.5, kl=float("nan"))
    log(callback, 2, loss=0.25)
    first, second = read_jsonl(tmp_path / "metrics.jsonl")
    assert list(first) == ["step", "loss", "kl"]
    assert (first["step"], first["loss"], first["kl"], second["loss"]) == (1, 0.5, None, 0.25)


def test_what_is_logged_later_at_a_step_joins_its_line(tmp_path: Path) -> None:
    callback = begin(MetricsCallback(tmp_path))
    log(callback, 1, loss=0.5)
    log(callback, 2, loss=0.25)
    log(callback, 2, eval_loss=0.3)
    rows = read_jsonl(tmp_path / "metrics.jsonl")
    assert rows == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.25, "eval_loss": 0.3}]


def test_metrics_hold_nothing_that_differs_between_two_runs_of_one_seed(tmp_path: Path) -> None:
    callback = begin(MetricsCallback(tmp_path))
    log(callback, 1, loss=0.5)
    log(callback, 1, eval_loss=0.3, eval_runtime=2.0, eval_samples_per_second=7.0)
    log(callback, 1, train_runtime=9.0, train_steps_per_second=1.0, total_flos=0.0, train_loss=0.4)
    assert read_jsonl(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 0.5, "eval_loss": 0.3}]


def test_other_processes_write_nothing(tmp_path: Path) -> None:
    callback = begin(MetricsCallback(tmp_path), main=False)
    log(callback, 1, main=False, loss=0.5)
    assert not list(tmp_path.iterdir())


def test_an_evaluation_before_training_is_logged(tmp_path: Path) -> None:
    log(MetricsCallback(tmp_path), 0, eval_loss=0.3)
    assert read_jsonl(tmp_path / "metrics.jsonl")[0]["eval_loss"] == 0.3


def test_a_resumed_run_repeats_no_step(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    callback = begin(MetricsCallback(tmp_path))
    for step in range(1, 8):
        log(callback, step, loss=step)
    path.write_bytes(path.read_bytes() + b'{"step": 8, "lo')  # The run is killed here; its checkpoint is of step 5.
    resumed = begin(MetricsCallback(tmp_path), step=5)
    log(resumed, 5, eval_loss=0.1)
    for step in (6, 7, 8):
        log(resumed, step, loss=-step)
    rows = read_jsonl(path)
    assert [row["step"] for row in rows] == list(range(1, 9))
    assert [row["loss"] for row in rows] == [1, 2, 3, 4, 5, -6, -7, -8]
    assert rows[4]["eval_loss"] == 0.1


def test_a_new_run_in_an_old_directory_starts_anew(tmp_path: Path) -> None:
    log(begin(MetricsCallback(tmp_path)), 3, loss=1.0)
    log(begin(MetricsCallback(tmp_path)), 1, loss=2.0)
    assert steps_of(tmp_path / "metrics.jsonl") == [1]


def test_alarms_of_repeated_steps_are_written_once(tmp_path: Path) -> None:
    log = AlarmsLog(tmp_path)
    assert not (tmp_path / "alarms.jsonl").exists()
    for step in (2, 5, 7):
        log(Alarm(step, "kl", 0.7, 0.5, "warn", "kl above 0.5"))
    resumed = AlarmsLog(tmp_path)
    resumed.on_train_begin(None, TrainerState(global_step=5, is_world_process_zero=False), TrainerControl())  # type: ignore[arg-type]
    assert steps_of(tmp_path / "alarms.jsonl") == [2, 5, 7], "only the main process writes"
    resumed.on_train_begin(None, TrainerState(global_step=5, is_world_process_zero=True), TrainerControl())  # type: ignore[arg-type]
    assert steps_of(tmp_path / "alarms.jsonl") == [2, 5]
    resumed(Alarm(7, "kl", 0.8, 0.5, "stop", "kl above 0.5"))
    assert read_jsonl(tmp_path / "alarms.jsonl")[-1] == {
        "step": 7,
        "metric": "kl",
        "value": 0.8,
        "bound": 0.5,
        "action": "stop",
        "condition": "kl above 0.5",
    }
    assert ended_by_alarm(tmp_path, 6) == ended_by_alarm(tmp_path, 5) == ended_by_alarm(tmp_path / "none", 7) == []
    assert ended_by_alarm(tmp_path, 7) == ["The alarm on kl ended the run after step 7: it was 0.8 (kl above 0.5)."]


def test_rollouts_have_one_line_per_response(tmp_path: Path, make_record: Callable[[int], StepRecord]) -> None:
    record = make_record(4)
    RolloutsLog(tmp_path)(record)
    rows = read_jsonl(tmp_path / "rollouts.jsonl")
    assert len(rows) == len(record.completions) == 16
    assert rows[3] == {
        "step": 4,
        "family": "reasoning",
        "prompt": "A reasoning task, number 1",
        "completion": "an answer (step 4, response 3)",
        "rewards": dict(zip(record.reward_names, record.rewards_BK[3].tolist(), strict=True)),
        "weights": dict(zip(record.reward_names, record.weights_BK[3].tolist(), strict=True)),
        "advantage": record.advantages_B[3].item(),
        "score": record.scores_B[3].item(),
        "length": 13,
        "truncated": True,
        "degenerate": False,
    }
    assert torch.isnan(record.rewards_BK[0, 0])
    assert rows[0]["rewards"]["perplexity"] is None

    known_B = torch.where(torch.arange(16) < 4, 0.25, float("nan"))
    RolloutsLog(tmp_path)(replace(record, utilities_B=known_B, residuals_B=torch.arange(16.0)))
    first, fifth = (read_jsonl(tmp_path / "rollouts.jsonl")[row] for row in (0, 4))
    assert first == rows[0] | {"utility": 0.25, "residual": 0.0}
    assert fifth == rows[4] | {"utility": None, "residual": 4.0}


def test_resumed_rollouts_repeat_no_step(tmp_path: Path, make_record: Callable[[int], StepRecord]) -> None:
    rollouts = RolloutsLog(tmp_path)
    for step in (1, 2, 2, 3):  # Step 2 has two generation batches.
        rollouts(make_record(step))
    resumed = RolloutsLog(tmp_path)
    resumed(make_record(2))
    resumed(make_record(2))
    assert steps_of(tmp_path / "rollouts.jsonl") == [1] * 16 + [2] * 32


def test_a_run_of_version_0_1_goes_on_in_the_steps_of_today(
    tmp_path: Path, make_record: Callable[[int], StepRecord]
) -> None:
    """Its responses had the number of optimiser steps done before them, so they count from 0."""
    rollouts = RolloutsLog(tmp_path)
    for step in (0, 1, 2):
        rollouts(make_record(step))
    before = read_jsonl(tmp_path / "rollouts.jsonl")
    RolloutsLog(tmp_path)(make_record(3))  # The checkpoint was made after two steps.

    after = read_jsonl(tmp_path / "rollouts.jsonl")
    assert [row["step"] for row in after] == [1] * 16 + [2] * 16 + [3] * 16
    assert after[:32] == [row | {"step": row["step"] + 1} for row in before[:32]]


def test_timings_resume_and_need_a_step(tmp_path: Path) -> None:
    timings = TimingsLog(tmp_path)
    assert not list(tmp_path.iterdir())
    for step in range(3):
        timings({"generate": 1.5, "total": 2.0, "step": step})
    TimingsLog(tmp_path)({"step": 2, "generate": 9.0})
    rows = read_jsonl(tmp_path / "timings.jsonl")
    assert rows[1:] == [{"step": 1, "generate": 1.5, "total": 2.0}, {"step": 2, "generate": 9.0}]
    with pytest.raises(ValueError, match="expected step"):
        timings({"generate": 1.0})
