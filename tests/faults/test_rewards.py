"""A reward that raises, hangs, or returns NaN, inf or the wrong number of values: what a run does, and what it says.

The fault comes in the second step, at the first response to the second of four prompts. Whatever the fault, the user
reads the name of the reward, the step, and the prompt where it can be known.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from maestro_fast.error_report import explain
from maestro_fast.reporting.recorded_run import recorded_train
from maestro_fast.rewards import RewardTimeoutError
from tests.faults.reading import metrics, names_step, rollouts, told

OWN = """
import pathlib, time

calls = 0

def faulty(prompts, completions, **columns):
    global calls
    calls += 1
    fails = calls == {at} and not pathlib.Path(__file__).with_name("mended").exists()
    values = []
    for row, completion in enumerate(completions):
        if fails and row == 4:
            {fault}
        values.append(float(len(completion)))
    return values
"""
FAULTS = {
    "raises": ('raise KeyError("topic")', KeyError, "'topic'"),
    "hangs": ("time.sleep(60)", RewardTimeoutError, "reward 'faulty': was not back within 2 s for 16 responses"),
    "nan": ('values.append(float("nan")); continue', ValueError, "reward 'faulty': row 4 is nan, expected a finite"),
    "inf": ('values.append(float("inf")); continue', ValueError, "reward 'faulty': row 4 is inf, expected a finite"),
    "length": ("continue", ValueError, "reward 'faulty': returned 15 values for 16 completions"),
}


def faulty(raw: dict[str, Any], folder: Path, kind: str, on_error: str = "stop", at: int = 2) -> dict[str, Any]:
    (folder / "own.py").write_text(OWN.format(fault=FAULTS[kind][0], at=at), encoding="utf-8")
    own = {"function": f"{folder}/own.py:faulty", "on_error": on_error}
    return raw | {"rewards": [own | ({"timeout": 2.0} if kind == "hangs" else {}), *raw["rewards"]]}


@pytest.mark.parametrize("kind", FAULTS)
def test_it_stops_the_run_which_goes_on_once_it_is_mended(raw: dict[str, Any], tmp_path: Path, kind: str) -> None:
    _, expected, words = FAULTS[kind]
    raw = faulty(raw, tmp_path, kind)
    with pytest.raises(expected) as caught:
        recorded_train(raw)
    assert [line["step"] for line in metrics(raw)] == [1]

    (tmp_path / "mended").touch()
    recorded_train(raw, resume=True)
    assert [line["step"] for line in metrics(raw)] == [1, 2, 3]

    batch, said = rollouts(raw, 2), told(caught.value)
    assert words in said and "'faulty'" in said and "after step 1 is in" in said
    assert batch[4]["prompt"] in said and names_step(said, 2)
    assert (batch[0]["prompt"] in said) == (kind == "length")  # Only a wrong length may be due to any of them.
    line = (tmp_path / "own.py").read_text().splitlines().index(f"            {FAULTS[kind][0]}") + 1
    if kind == "raises":  # The line of the user's own code.
        assert f'own.py", line {line}, in faulty' in str(explain(caught.value))
    if kind == "hangs":
        assert f"it is in faulty, line {line} of {tmp_path}/own.py" in said


@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=pytest.mark.long if k in ("inf", "length") else ()) for k in FAULTS]
)
def test_it_abstains_and_the_run_goes_on(
    raw: dict[str, Any], tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    raw = faulty(raw, tmp_path, kind, "abstain")
    with caplog.at_level(logging.WARNING, "maestro_fast.rewards.guarded"):
        trainer = recorded_train(raw)

    assert trainer.state.global_step == 3
    figure = "rewards/faulty/timeouts" if kind == "hangs" else "rewards/faulty/errors"
    assert [(line[figure], line["rewards/faulty/abstained"]) for line in metrics(raw)] == [(0, 0), (1, 1), (0, 0)]
    (said,) = [record.getMessage() for record in caplog.records if record.name == "maestro_fast.rewards.guarded"]
    assert said.startswith("reward 'faulty' abstains from all 16 responses of a batch, in ") and names_step(said, 2)
    assert FAULTS[kind][2] in said and rollouts(raw, 2)[4]["prompt"] in said
    assert all(row["rewards"]["faulty"] is None is not row["rewards"]["brevity"] for row in rollouts(raw, 2))


def test_an_asynchronous_one_that_hangs_says_where(raw: dict[str, Any], tmp_path: Path) -> None:
    source = (
        "import asyncio\n"
        "async def asks(prompts, completions, **columns):\n"
        "    for prompt in prompts[4:]:\n"
        "        await asyncio.sleep(60)\n"
    )
    (tmp_path / "own.py").write_text(source, encoding="utf-8")
    raw["rewards"] = [{"function": f"{tmp_path}/own.py:asks", "timeout": 0.5, "on_error": "abstain"}, *raw["rewards"]]
    raw["trainer"]["max_steps"] = 1
    recorded_train(raw)
    raw["rewards"][0]["on_error"] = "stop"
    with pytest.raises(RewardTimeoutError) as caught:
        recorded_train(raw | {"run_dir": f"{raw['run_dir']}-stops"})
    said = told(caught.value)
    assert f"it is in asks, line 4 of {tmp_path}/own.py" in said and names_step(said, 1)
    assert f"at a response to {rollouts(raw, 1)[4]['prompt']!r}" in said


def test_in_an_evaluation_it_says_so(raw: dict[str, Any], tmp_path: Path) -> None:
    raw = faulty(raw, tmp_path, "raises", at=3)  # An evaluation of two prompts comes behind every second step.
    raw["evaluation"] = {"data": {"path": raw["data"]["path"], "limit": 2}, "samples": 4}
    raw["trainer"] |= {"eval_strategy": "steps", "eval_steps": 2}
    with pytest.raises(KeyError) as caught:
        recorded_train(raw)
    assert "in an evaluation, at a response to 'Name colour number 1.'" in told(caught.value)
    assert "after step 2 is in" in told(caught.value)
