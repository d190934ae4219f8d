"""What lies outside the process: an engine that dies, and a judge that does not answer in time."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from maestro_fast.generation import GenerationConfig, Served
from maestro_fast.records import Prompts, Rollouts
from maestro_fast.reporting.recorded_run import recorded_train
from tests.faults.reading import metrics, names_step, rollouts, told
from tests.rewards.judge_server import HANG, Body, asked, serving
from tests.training.copy_engine import CopyEngine
from tests.training.test_checkpoint import assert_same_run


class Mortal(CopyEngine):
    """An engine that dies while it samples a batch, counted from 1 over all engines."""

    batches = 0
    dies_at = 0

    def sample(self, prompts: Prompts, *, seed: int) -> Rollouts:
        Mortal.batches += 1
        if Mortal.batches == Mortal.dies_at:
            raise ConnectionResetError(104, "Connection reset by peer")
        return super().sample(prompts, seed=seed)


def test_a_run_whose_engine_dies_goes_on_with_another(raw: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def build_engine(config: GenerationConfig, served: Served) -> CopyEngine:
        return Mortal(AutoModelForCausalLM.from_pretrained(served.path), served.sampling)

    monkeypatch.setattr("maestro_fast.training.run.check_generation", lambda *args: None)
    monkeypatch.setattr("maestro_fast.training.run.build_engine", build_engine)
    raw["generation"] = "vllm"
    raw["trainer"]["max_steps"] = 2
    whole = copy.deepcopy(raw) | {"run_dir": f"{raw['run_dir']}-whole"}
    recorded_train(whole)

    monkeypatch.setattr(Mortal, "batches", 0)
    monkeypatch.setattr(Mortal, "dies_at", 2)
    with pytest.raises(ConnectionResetError) as caught:
        recorded_train(raw)
    recorded_train(raw, resume=True)
    assert_same_run(whole["run_dir"], raw["run_dir"])
    said = told(caught.value)
    assert names_step(said, 2) and "while responses to 'Name colour number" in said and "were sampled" in said
    assert all(row["prompt"] in said for row in rollouts(raw, 2))
    assert "The run as it was after step 1 is in" in said


@pytest.fixture
def judged(raw: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    judge = {"type": "judge", "name": "quality", "model": "m", "cache": f"{tmp_path}/answers.sqlite"}
    raw["rewards"] = [judge | {"request_timeout": 5.0, "retries": 0}, *raw["rewards"]]
    return raw


def test_a_judge_that_never_answers_stops_the_run(judged: dict[str, Any]) -> None:
    silent = False

    def answer(body: Body) -> Any:
        nonlocal silent
        silent |= len(server.bodies) > 16
        return HANG if silent else "Score: 5"

    with serving(answer) as server:
        judged["rewards"][0]["url"] = server.url
        with pytest.raises(ConnectionError) as caught:
            recorded_train(judged)
    said = told(caught.value)
    assert f"reward 'quality': the judge 'm' at {judged['rewards'][0]['url']} answered none of the 16 questions" in said
    assert "no answer within 5 s" in said and "among the responses to 'Name colour" in said and names_step(said, 2)
    assert "The run as it was after step 1 is in" in said

    with serving(lambda body: "Score: 5") as server:
        judged["rewards"][0]["url"] = server.url
        recorded_train(judged, resume=True)
    assert [line["step"] for line in metrics(judged)] == [1, 2, 3]


def test_a_response_that_the_judge_is_late_with_abstains(
    judged: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    late: list[str] = []

    def answer(body: Body) -> Any:
        if not late and len(server.bodies) > 16:  # a question of the second batch
            late.append(asked(body))
        return HANG if late and asked(body) == late[0] else "Score: 5"

    with serving(answer) as server, caplog.at_level(logging.WARNING, "maestro_fast.rewards.judge"):
        judged["rewards"][0]["url"] = server.url
        recorded_train(judged)
    assert [line["rewards/quality/failed"] for line in metrics(judged)] == [0, 1, 0]
    (said,) = [record.getMessage() for record in caplog.records if record.name == "maestro_fast.rewards.judge"]
    (row,) = [row for row in rollouts(judged, 2) if row["rewards"]["quality"] is None]
    assert row["prompt"] in late[0] and row["advantage"] == row["advantage"]
    assert f"reward 'quality': the judge 'm' at {server.url}, in " in said and names_step(said, 2)
    assert f"at a response to {row['prompt']!r}: no answer within 5 s" in said
