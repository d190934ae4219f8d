"""A run that fails late: no finished step is lost, and what is saved is the run as it was before the failure."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from maestro_fast.records import StepRecord
from maestro_fast.reporting.recorded_run import recorded_train
from maestro_fast.reporting.run_log import MetricsCallback, RolloutsLog
from maestro_fast.training import parse_config, train
from tests.training.test_checkpoint import assert_same_run
from tests.training.test_trainer import run


def drawing_reward(path: Path) -> str:
    """A reward that reads Python's random numbers."""
    path.write_text(
        "import random\ndef mine(completions, **columns):\n    return [random.random() for _ in completions]\n",
        encoding="utf-8",
    )
    return f"{path}:mine"


def failing(at: int) -> Callable[[StepRecord], None]:
    def observe(record: StepRecord) -> None:
        if record.step == at:
            raise OSError("disk full")

    return observe


@pytest.mark.parametrize("micro_batch", [8, 16], ids=["scored before", "judged in the training forward"])
def test_the_checkpoint_of_a_failure_knows_nothing_of_the_batch_that_failed(
    raw_config: dict[str, Any], tmp_path: Path, micro_batch: int
) -> None:
    """An observer fails, after the weight policy has learnt, figures were counted and random numbers were drawn."""
    raw_config["trainer"] |= {"max_steps": 4, "logging_steps": 2}
    raw_config["batch"]["micro_batch"] = micro_batch
    raw_config["weights"] |= {"period": 2}
    raw_config["rewards"] = ["entropy", "format", drawing_reward(tmp_path / "own.py")]
    whole = copy.deepcopy(raw_config) | {"run_dir": f"{raw_config['run_dir']}-whole"}
    random.seed(0)
    recorded_train(whole)

    config = parse_config(raw_config)
    with pytest.raises(OSError, match="disk full") as caught:
        train(
            config,
            raw_config,
            observers=[failing(at=4), RolloutsLog(config.run_dir)],
            callbacks=[MetricsCallback(config.run_dir)],
        )
    recorded_train(raw_config, resume=True)

    assert "after step 3 is in" in caught.value.__notes__[-1]
    assert_same_run(whole["run_dir"], raw_config["run_dir"])


def test_an_evaluation_that_fails_costs_no_finished_step(raw_config: dict[str, Any], tmp_path: Path) -> None:
    source = (
        "calls = 0\n"
        "def mine(completions, **columns):\n"
        "    global calls\n"
        "    calls += 1\n"
        "    if calls == 3:\n"
        "        raise RuntimeError('the judge is down')\n"
        "    return [float(len(c)) for c in completions]\n"
    )
    (tmp_path / "own.py").write_text(source, encoding="utf-8")
    raw_config |= {"rewards": [f"{tmp_path}/own.py:mine"], "weights": "equal"}
    raw_config["evaluation"] = {"data": raw_config["data"]}
    raw_config["trainer"] |= {"max_steps": 4, "save_steps": 2}

    with pytest.raises(RuntimeError, match="the judge is down") as caught:
        run(raw_config)
    assert "checkpoint-2; mend the cause and go on with --resume" in caught.value.__notes__[-1]

    (tmp_path / "own.py").write_text(source.replace("calls == 3", "False"), encoding="utf-8")
    _, records = run(raw_config, resume=True)
    assert [record.step for record in records] == [3, 4]
