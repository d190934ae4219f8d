from __future__ import annotations

from typing import Any

import pytest
import torch

from maestro_fast.training import parse_config, timing, train
from maestro_fast.training.timing import StageClock


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> tuple[StageClock, list[float]]:
    """A clock, and the list whose sum is the time."""
    passed = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: sum(passed))
    return StageClock(torch.device("cpu")), passed


def test_a_stage_within_another_counts_once(clock: tuple[StageClock, list[float]]) -> None:
    watch, passed = clock
    shown: list[str] = []
    watch.on_stage = shown.append
    passed.append(1.0)
    with watch.stage("train"):
        passed.append(2.0)
        with watch.stage("rewards"):
            passed.append(4.0)
        passed.append(8.0)
    passed.append(16.0)

    assert watch.lap() == {"train": 10.0, "rewards": 4.0, "total": 31.0}
    assert shown == ["train", "rewards", "train"]


def test_a_stage_that_fails_has_taken_its_time(clock: tuple[StageClock, list[float]]) -> None:
    watch, passed = clock
    with pytest.raises(RuntimeError), watch.stage("rewards"):
        passed.append(3.0)
        raise RuntimeError
    with watch.stage("train"):
        passed.append(1.0)

    assert watch.lap() == {"rewards": 3.0, "train": 1.0, "total": 4.0}
    passed.append(5.0)
    assert watch.lap() == {"total": 5.0}


def test_saving_and_evaluation_count_to_the_batch_before_them(raw_config: dict[str, Any]) -> None:
    raw_config["evaluation"] = {"data": raw_config["data"]}
    raw_config["batch"] = {"prompts_per_batch": 4, "micro_batch": 4, "updates_per_batch": 2}
    raw_config["trainer"] |= {"max_steps": 3, "save_steps": 2, "eval_steps": 2}
    lines: list[dict[str, float]] = []
    train(parse_config(raw_config), raw_config, timing_observers=[lines.append])

    assert [line["step"] for line in lines] == [2, 3]
    for line in lines:  # transformers evaluates and saves after the last step too
        assert {"generate", "train", "evaluate", "save"} < line.keys()
        assert sum(line.values()) - line["step"] - line["total"] <= line["total"]
