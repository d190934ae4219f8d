"""The trainer with an engine that holds a copy of the policy: what it logs, and how it ends."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from maestro_fast.generation import GenerationConfig, Served, TransformersGenerator
from maestro_fast.reporting.recorded_run import recorded_train
from maestro_fast.training.sync_probe import StaleWeightsError
from maestro_fast.training.synced import check_engine
from tests.tiny import tiny_model, tiny_tokenizer
from tests.training.copy_engine import CopyEngine


@pytest.fixture
def engines(raw_config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> list[CopyEngine]:
    """Of the runs of a test, in which ``CopyEngine`` stands for vLLM."""
    made: list[CopyEngine] = []

    def build_engine(config: GenerationConfig, served: Served) -> CopyEngine:
        assert served.dtype == torch.float32 and served.stop_ids == {0} and served.processes == 1
        made.append(CopyEngine(AutoModelForCausalLM.from_pretrained(served.path), served.sampling))
        return made[-1]

    monkeypatch.setattr("maestro_fast.training.run.check_generation", lambda *args: None)
    monkeypatch.setattr("maestro_fast.training.run.build_engine", build_engine)
    raw_config["generation"] = "vllm"
    raw_config["trainer"]["max_steps"] = 3
    return made


def logged(raw: dict[str, Any]) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (Path(raw["run_dir"]) / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


@pytest.mark.parametrize("weights", ["equal", "conductor"], ids=["the training forward", "a scoring forward"])
def test_every_batch_logs_its_sync_and_how_far_sampler_and_policy_lie_apart(
    raw_config: dict[str, Any], engines: list[CopyEngine], weights: str
) -> None:
    raw_config |= {"weights": weights, "rewards": ["format", {"name": "brevity", "kind": "length", "target": 2}]}
    recorded_train(raw_config)
    assert engines[0].calls.count("load_weights") >= 2 and engines[0].calls[-1] == "close"
    for line in logged(raw_config):
        assert 0 <= line["sync/probe_mean"] <= line["sync/probe_max"] < 1e-5
        assert 0 < line["sampling/logprob_gap_mean"] <= line["sampling/logprob_gap_max"] < 1e-5
        assert abs(line["sampling/k3"]) < 1e-9
    timings = (Path(raw_config["run_dir"]) / "timings.jsonl").read_text().splitlines()
    assert all(json.loads(line)["sync"] > 0 for line in timings)


def test_the_gap_is_over_all_micro_batches_of_the_training_forward(
    raw_config: dict[str, Any], engines: list[CopyEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sampler whose log-probs are off by a known amount in a few tokens of one response."""
    raw_config |= {"weights": "equal", "rewards": ["format"]}
    sample, tokens = CopyEngine.sample, []

    def off(self: CopyEngine, prompts: Any, *, seed: int) -> Any:
        rollouts = sample(self, prompts, seed=seed)
        assert rollouts.sampling_logprobs_C is not None
        rollouts.sampling_logprobs_C[-2:] -= 0.5
        tokens.append(len(rollouts.sampling_logprobs_C))
        return rollouts

    monkeypatch.setattr(CopyEngine, "sample", off)
    recorded_train(raw_config)
    for line, count in zip(logged(raw_config), tokens, strict=True):
        assert line["sampling/logprob_gap_max"] == pytest.approx(0.5, abs=1e-4)
        assert line["sampling/logprob_gap_mean"] == pytest.approx(1.0 / count, rel=1e-3)
        assert line["sampling/k3"] == pytest.approx(2 * (torch.tensor(0.5).exp().item() - 1.5) / count, rel=1e-3)


def test_a_stale_engine_ends_the_run_with_a_checkpoint(
    raw_config: dict[str, Any], engines: list[CopyEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    load, loads = CopyEngine.load_weights, []

    def first_only(self: CopyEngine, weights: Any) -> None:
        loads.append(1)
        if len(loads) == 1:
            load(self, weights)

    monkeypatch.setattr(CopyEngine, "load_weights", first_only)
    raw_config["trainer"]["learning_rate"] = 0.05
    with pytest.raises(StaleWeightsError) as caught:
        recorded_train(raw_config)
    assert engines[0].calls[-1] == "close"
    assert "mend the cause and go on with --resume" in caught.value.__notes__[0]
    monkeypatch.undo()
    monkeypatch.setattr("maestro_fast.training.run.check_generation", lambda *args: None)
    monkeypatch.setattr(
        "maestro_fast.training.run.build_engine",
        lambda config, served: CopyEngine(AutoModelForCausalLM.from_pretrained(served.path), served.sampling),
    )
    recorded_train(raw_config, resume=True)
    assert [line["step"] for line in logged(raw_config)] == [1, 2, 3]


def test_one_sampler_only() -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match=r"^engine: CopyEngine beside a generator, expected one of the two"):
        check_engine(CopyEngine(model), TransformersGenerator(tiny_tokenizer(), None), model)  # type: ignore[arg-type]
    check_engine(CopyEngine(model), None, model)
