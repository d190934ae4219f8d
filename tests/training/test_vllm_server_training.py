"""Training with a vLLM server: it samples with the policy of every step, and a run outlives it."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from maestro_fast.generation.http import ServerGone
from maestro_fast.records import Prompts, Rollouts, StepRecord
from maestro_fast.reporting.recorded_run import recorded_train
from maestro_fast.reporting.run_log import MetricsCallback, RolloutsLog
from maestro_fast.training import parse_config, train
from maestro_fast.training.weight_sync import SyncedGenerator
from tests.generation.helpers import recomputed
from tests.training.test_checkpoint import killed_and_resumed
from tests.training.test_distributed import launch
from tests.vllm_serving import Serving

pytestmark = [pytest.mark.vllm]


@pytest.fixture
def raw(raw_config: dict[str, Any], vllm_serving: Serving, tmp_path: Path) -> dict[str, Any]:
    raw_config["model"] = {"path": str(vllm_serving.model)}
    raw_config["trainer"] |= {"max_steps": 5, "save_steps": 2, "logging_steps": 1, "learning_rate": 1e-2}
    raw_config["generation"] = {
        "type": "vllm_server",
        "url": vllm_serving.url,
        "weights": "folder",
        "folder": str(tmp_path / "shared"),
        "timeout": 60,
        "retries": 1,
        "start_timeout": 0,
    }
    return raw_config


def logged(raw: dict[str, Any], name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    lines = (Path(raw["run_dir"]) / name).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_every_step_is_sampled_with_its_own_policy(
    raw: dict[str, Any], vllm_serving: Serving, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate, sampled = SyncedGenerator.generate, []

    def checked(self: SyncedGenerator, model: Any, prompts: Prompts, *, seed: int) -> Rollouts:
        rollouts = generate(self, model, prompts, seed=seed)
        assert rollouts.sampling_logprobs_C is not None
        torch.testing.assert_close(rollouts.sampling_logprobs_C, recomputed(model, rollouts), rtol=0, atol=1e-3)
        sampled.append(len(rollouts))
        return rollouts

    monkeypatch.setattr(SyncedGenerator, "generate", checked)
    trainer = train(parse_config(raw), raw)
    assert sampled == [16] * 5 and trainer.state.global_step == 5
    before = load_file(vllm_serving.model / "model.safetensors")
    after = load_file(Path(raw["run_dir"]) / "final" / "model.safetensors")
    assert before.keys() == after.keys()
    assert max((after[name] - before[name]).abs().max() for name in before) > 0.01
    assert not list((tmp_path / "shared").iterdir())


def test_a_run_whose_server_is_killed_goes_on_with_a_new_one(raw: dict[str, Any], vllm_serving: Serving) -> None:
    def kill(record: StepRecord) -> None:
        if record.step == 3:
            vllm_serving.kill()

    config, url = parse_config(raw), vllm_serving.url
    try:
        with pytest.raises(ServerGone) as caught:
            train(
                config,
                raw,
                observers=[RolloutsLog(config.run_dir), kill],
                callbacks=[MetricsCallback(config.run_dir)],
            )
    finally:
        vllm_serving.start()
    assert str(caught.value).startswith(f"vLLM server {url}: tried ")
    assert "2 times in 1 s, the last time: ConnectionRefusedError" in str(caught.value)
    assert "The run as it was after step 3 is in " in caught.value.__notes__[-1]
    assert [line["step"] for line in logged(raw) if "loss" in line] == [1, 2, 3]

    raw["generation"]["url"] = vllm_serving.url
    recorded_train(raw, resume=True)
    lines = [line for line in logged(raw) if "loss" in line]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    assert all(line["sync/probe_max"] < 1e-3 for line in lines)
    assert sorted({line["step"] for line in logged(raw, "rollouts.jsonl")}) == [1, 2, 3, 4, 5]
    assert (Path(raw["run_dir"]) / "final" / "model.safetensors").is_file()


def test_the_next_batch_is_sampled_ahead_and_a_killed_run_trains_on_what_it_had(raw: dict[str, Any]) -> None:
    """The sampler's log-probs are those of the policy one step before, and a resumed run has the same responses."""
    raw["generation"]["ahead"] = 1
    raw["loss"] = {"sampler_correction": "token_truncate"}
    raw["trainer"]["save_steps"] = 1
    whole = raw | {"run_dir": raw["run_dir"] + "-whole"}
    recorded_train(copy.deepcopy(whole))
    killed_and_resumed(raw, 3)
    for run in (raw, whole):
        lines = [line for line in logged(run) if "loss" in line]
        assert [line["sampling/staleness"] for line in lines] == [0.0, 1.0, 1.0, 1.0, 1.0]
        gaps = [line["sampling/logprob_gap_mean"] for line in lines]
        assert gaps[0] < 1e-4 < min(gaps[1:]) and all(line["sync/probe_max"] < 1e-3 for line in lines)
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        assert (Path(raw["run_dir"]) / name).read_bytes() == (Path(whole["run_dir"]) / name).read_bytes()


def test_two_processes_that_share_a_policy_send_it_whole(raw: dict[str, Any], tmp_path: Path) -> None:
    """FSDP2: each process holds half of the policy, and the server samples with all of it, step by step."""
    raw["weights"] = {"type": "conductor", "period": 1}
    raw["trainer"] |= {"max_steps": 3, "save_steps": 3, "fsdp": True, "fsdp_config": {"version": 2}}
    config = tmp_path / "config.json"
    config.write_text(json.dumps(raw), encoding="utf-8")
    launch(2, config, tmp_path / "out", "configured", script="sharded_processes.py", timeout=400)
    ranks = [torch.load(tmp_path / "out" / f"rank{rank}.pt", weights_only=False) for rank in range(2)]
    lines = [line for line in ranks[0]["logs"] if "sync/probe_max" in line]
    assert [line["step"] for line in lines] == [1, 2, 3] and max(line["sync/probe_max"] for line in lines) < 1e-3
    assert max(line["sampling/logprob_gap_max"] for line in lines) < 1e-2
    final = load_file(Path(raw["run_dir"]) / "final" / "model.safetensors")
    for rank in ranks:
        assert rank["policy"].keys() <= final.keys()  # A tied head is written, too.
        for name, tensor in rank["policy"].items():
            assert torch.equal(final[name], tensor), name
