"""The trainer with an engine that holds a copy of the policy: what it logs, and how it ends."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from maestro_fast.generation import GenerationConfig, SamplingConfig, Served, TransformersGenerator
from maestro_fast.records import Prompts, Rollouts, StepRecord
from maestro_fast.reporting.recorded_run import recorded_train
from maestro_fast.rewards import FunctionReward, RewardSet
from maestro_fast.settings import SettingsError
from maestro_fast.training import parse_config, train
from maestro_fast.training.weight_sync import StaleWeightsError, SyncedGenerator, check_engine, check_room
from tests.generation.helpers import same
from tests.tiny import tiny_model, tiny_tokenizer
from tests.training.copy_engine import CopyEngine

LONGEST = 12  # tokens of the longest prompt of ``conftest.ROWS``


@pytest.fixture
def engines(raw_config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> list[CopyEngine]:
    """The engines of the runs of a test, in which ``CopyEngine`` stands for vLLM."""
    made: list[CopyEngine] = []

    def build_engine(config: GenerationConfig, served: Served) -> CopyEngine:
        assert served.dtype == torch.float32 and served.stop_ids == {0} and served.processes == 1
        assert served.longest_prompt == LONGEST and served.positions == 256
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
    raw_config |= {"weights": weights, "rewards": ["format", {"type": "length", "name": "brevity", "target": 2}]}
    recorded_train(raw_config)
    assert engines[0].calls.count("load_weights") >= 2 and engines[0].calls[-1] == "close"
    for line in logged(raw_config):
        assert 0 <= line["sync/probe_mean"] <= line["sync/probe_max"] < 1e-5
        assert 0 < line["sampling/logprob_gap_mean"] <= line["sampling/logprob_gap_max"] < 1e-5
        assert abs(line["sampling/k3"]) < 1e-9
    timings = (Path(raw_config["run_dir"]) / "timings.jsonl").read_text().splitlines()
    assert all(json.loads(line)["sync"] > 0 for line in timings)


def test_a_truncated_sampler_is_not_compared_with_the_policy(
    raw_config: dict[str, Any], engines: list[CopyEngine], caplog: pytest.LogCaptureFixture
) -> None:
    """Its log-probs are of another distribution. The probe still is: it compares whole distributions."""
    raw_config["sampling"] |= {"top_k": 5, "top_p": 0.9}
    raw_config["trainer"]["max_steps"] = 1
    with caplog.at_level("INFO", "maestro_fast.training.parts"):
        recorded_train(raw_config)
    (line,) = logged(raw_config)
    assert line["sync/probe_max"] < 1e-5 and not any(name.startswith("sampling/") for name in line)
    assert "with sampling.top_p: 0.9 and sampling.top_k: 5 the sampler's log-probs are those after" in caplog.text


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
    assert "mend the cause and go on with --resume" in caught.value.__notes__[-1]
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


def test_a_sequence_that_the_engine_has_no_room_for_is_refused(
    raw_config: dict[str, Any], engines: list[CopyEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CopyEngine, "max_tokens", 9)
    words = r"^sampling\.max_new_tokens: 6 after the longest prompt of \d+ tokens, expected at most 9 together"
    with pytest.raises(SettingsError, match=words):
        recorded_train(raw_config | {"sampling": {"group_size": 4, "max_new_tokens": 6}})
    assert engines[0].calls == ["close"]
    check_room(CopyEngine(tiny_model()), 3, SamplingConfig(max_new_tokens=6))


def test_of_two_parts_at_once_one_syncs_and_both_are_sampled_with_the_new_weights(
    raw_config: dict[str, Any], engines: list[CopyEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each part is compared with what the policy itself samples for it."""
    both, lock = threading.Barrier(2, timeout=60.0), threading.Lock()
    engine_sample, generate = CopyEngine.sample, SyncedGenerator.generate
    parts: list[tuple[int, list[Any]]] = []  # the seed and the prompts of each part

    def sample(self: CopyEngine, prompts: Prompts, *, seed: int) -> Rollouts:
        both.wait()  # both parts are being sampled before either goes on
        with lock:
            return engine_sample(self, prompts, seed=seed)

    def checked(self: SyncedGenerator, model: nn.Module, prompts: Prompts, *, seed: int) -> Rollouts:
        rollouts = generate(self, model, prompts, seed=seed)
        with lock:
            own = engines[0]._generator.generate(model, prompts, seed=seed)
            assert same(rollouts, own)
            parts.append((seed, prompts.texts))
        return rollouts

    monkeypatch.setattr(CopyEngine, "concurrent_parts", 2)
    monkeypatch.setattr(CopyEngine, "sample", sample)
    monkeypatch.setattr(SyncedGenerator, "generate", checked)
    codes = FunctionReward(lambda completions, **_: [float(sum(map(ord, text)) % 97) for text in completions], "codes")
    monkeypatch.setattr("maestro_fast.training.run.build_rewards", lambda _: RewardSet([codes]))
    raw_config["weights"] = "equal"
    records: list[StepRecord] = []
    train(parse_config(raw_config), raw_config, observers=[records.append])
    scored, renewed = ["prompt_logprobs"], ["load_weights", "reset_prefix_cache", "prompt_logprobs"]
    sampled = ["sample", "sample", "sleep"]
    assert engines[0].calls[:-1] == [*renewed, *sampled, *2 * (scored + renewed + sampled)]
    assert len({seed for seed, _ in parts}) == 6  # no two parts draw the same numbers
    for i, record in enumerate(records):
        assert sorted(record.prompts) == sorted(text for _, texts in parts[2 * i : 2 * i + 2] for text in texts)
