"""Training with vLLM in the process: after every sync it computes what the policy does, or the run ends."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from maestro_fast.generation import ProbeConfig, VllmEngine
from maestro_fast.reporting.recorded_run import recorded_train
from maestro_fast.training.metrics import StageClock
from maestro_fast.training.weight_sync import StaleWeightsError, SyncedGenerator, build_probe
from tests.generation.helpers import prompts, recomputed
from tests.generation.vllm_engine import COLOCATE, HEAD_DIM, engine, served_model
from tests.tiny import tiny_checkpoint
from tests.training.test_checkpoint import KillAt, Killed, assert_same_run
from tests.training.test_weight_sync import nudge, policy_logprobs

pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def served(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[VllmEngine, Any]]:
    """An engine, and a model of the same sizes."""
    model = served_model(tied=request.param)
    with engine(tmp_path_factory.mktemp("vllm"), model) as made:
        yield made, model


def synced(made: VllmEngine, **probe: Any) -> SyncedGenerator:
    prompt_ids = prompts("Name a colour.", "the quick brown fox").token_ids
    return SyncedGenerator(
        made, build_probe(ProbeConfig(**probe), made, prompt_ids, policy_logprobs), StageClock(torch.device("cpu"))
    )


def assert_samples_the_policy(generator: SyncedGenerator, model: nn.Module) -> None:
    rollouts = generator.generate(model, prompts("the", "Tell a story about the sea.", times=3), seed=1)
    assert rollouts.metrics["sync/probe_max"] < 1e-3
    assert rollouts.sampling_logprobs_C is not None
    torch.testing.assert_close(rollouts.sampling_logprobs_C, recomputed(model, rollouts), rtol=0, atol=1e-3)


def test_the_engine_follows_the_policy(served: tuple[VllmEngine, Any]) -> None:
    made, model = served[0], copy.deepcopy(served[1])
    generator = synced(made)
    for _ in range(3):
        nudge(model)
        assert_samples_the_policy(generator, model)


def test_the_engine_follows_the_adapters(served: tuple[VllmEngine, Any]) -> None:
    made, model = served[0], copy.deepcopy(served[1])
    tuned = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")).eval()
    generator = synced(made)
    for _ in range(2):
        nudge(tuned)
        before = {name: tensor.clone() for name, tensor in tuned.state_dict().items()}
        assert_samples_the_policy(generator, tuned)
        assert all(torch.equal(tensor, tuned.state_dict()[name]) for name, tensor in before.items())


@pytest.mark.parametrize("fault", ["load_weights", "reset_prefix_cache"])
def test_a_fault_of_the_sync_is_caught(
    served: tuple[VllmEngine, Any], monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """A skipped sync, and a kept prefix cache."""
    made, model = served[0], copy.deepcopy(served[1])
    generator = synced(made)
    assert_samples_the_policy(generator, model)
    monkeypatch.setattr(made, fault, lambda *args: None)
    nudge(model)
    with pytest.raises(StaleWeightsError, match="in the engine and"):
        assert_samples_the_policy(generator, model)
    monkeypatch.undo()
    assert_samples_the_policy(synced(made), model)  # the next test finds it in order


def test_a_tied_head_that_keeps_old_weights_is_caught(
    served: tuple[VllmEngine, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM's on the CPU does; an untied one is renewed like any layer."""
    made, model = served[0], copy.deepcopy(served[1])
    generator = synced(made)
    assert_samples_the_policy(generator, model)
    monkeypatch.setattr("maestro_fast.generation.vllm.repack_tied_head", _nothing)
    nudge(model)
    if model.config.tie_word_embeddings:
        with pytest.raises(StaleWeightsError, match="in the engine and"):
            assert_samples_the_policy(generator, model)
    else:
        assert_samples_the_policy(generator, model)
    monkeypatch.undo()
    assert_samples_the_policy(synced(made), model)


def _nothing(model: Any) -> None:
    """In place of ``repack_tied_head``."""


def test_an_evicted_probe_still_finds_a_kept_cache(
    served: tuple[VllmEngine, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is scored once more before the sync, so a batch that drove it out of the cache hides nothing."""
    made, model = served[0], copy.deepcopy(served[1])
    generator = synced(made)
    assert_samples_the_policy(generator, model)
    made.reset_prefix_cache()
    monkeypatch.setattr(made, "reset_prefix_cache", lambda: None)
    nudge(model)
    with pytest.raises(StaleWeightsError):
        assert_samples_the_policy(generator, model)
    monkeypatch.undo()
    assert_samples_the_policy(synced(made), model)


@pytest.fixture
def make_raw(raw_config: dict[str, Any], tmp_path: Path) -> Callable[..., dict[str, Any]]:
    tiny_checkpoint(tmp_path / "tied", tied=True, head_dim=HEAD_DIM)

    def make(name: str, **sections: dict[str, Any]) -> dict[str, Any]:
        raw = copy.deepcopy(raw_config) | {"run_dir": f"{raw_config['run_dir']}-{name}"}
        raw["model"] = {"path": str(tmp_path / "tied")}
        raw["generation"] = {"engine": "vllm", **COLOCATE}
        raw["trainer"] |= {"learning_rate": 1e-2, "save_steps": 1}
        for section, values in sections.items():
            raw[section] = {**raw.get(section, {}), **values}
        return raw

    return make


def logged(raw: dict[str, Any]) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (Path(raw["run_dir"]) / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


def test_ten_steps_with_corrected_sampling(make_raw: Callable[..., dict[str, Any]]) -> None:
    """Engine and trainer agree after every sync, and the ratio between them is the loss's."""
    raw = make_raw("ten", trainer={"max_steps": 10}, loss={"sampler_correction": "token_truncate"})
    recorded_train(raw)
    lines = logged(raw)
    assert len(lines) == 10
    for line in lines:
        assert 0 <= line["sync/probe_max"] < 1e-3 and line["sampling/logprob_gap_max"] < 1e-3
        assert 0 <= line["sampling/k3"] < 1e-6
        assert line["sampling/importance_sampling_ratio/mean"] == pytest.approx(1, abs=1e-4)
    timings = [json.loads(line) for line in (Path(raw["run_dir"]) / "timings.jsonl").read_text().splitlines()]
    assert all(line["sync"] > 0 and line["generate"] > 0 for line in timings)


def test_a_killed_run_goes_on(make_raw: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine starts with the weights of the checkpoint that the run began with: it has to be synced first."""
    whole, killed = make_raw("whole", trainer={"max_steps": 4}), make_raw("killed", trainer={"max_steps": 4})
    recorded_train(whole)
    with monkeypatch.context() as patch:
        from maestro_fast.training import train

        patch.setattr(
            "maestro_fast.reporting.recorded_run.train",
            lambda *a, callbacks, **k: train(*a, callbacks=[*callbacks, KillAt(3)], **k),
        )
        with pytest.raises(Killed):
            recorded_train(killed)
    recorded_train(killed, resume=True)
    assert_same_run(whole["run_dir"], killed["run_dir"])


def test_updates_within_a_batch_and_adapters(make_raw: Callable[..., dict[str, Any]]) -> None:
    raw = make_raw("lora", model={"lora": {"r": 2}}, batch={"updates_per_batch": 2}, trainer={"max_steps": 4})
    recorded_train(raw)
    assert all(line["sync/probe_max"] < 1e-3 for line in logged(raw) if "sync/probe_max" in line)
    assert sum("sync/probe_max" in line for line in logged(raw)) == 2
