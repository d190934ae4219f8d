"""A second run on what a LoRA run left in ``final/``: the adapter goes on, or is merged, and the KL starts at 0."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.training.copy_engine import CopyEngine
from tests.training.test_checkpoint import killed_and_resumed
from tests.training.test_trainer import run

pytest.importorskip("peft")


@pytest.fixture
def first(raw_config: dict[str, Any]) -> Path:
    """The ``final/`` of a LoRA run that has moved far from its base."""
    raw_config["weights"] = "equal"
    raw_config["trainer"]["learning_rate"] = 0.05
    run({**raw_config, "run_dir": f"{raw_config['run_dir']}-first", "model": raw_config["model"] | {"lora": {"r": 2}}})
    return Path(f"{raw_config['run_dir']}-first") / "final"


def adapter(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def config(raw: dict[str, Any], first: Path, **model: Any) -> dict[str, Any]:
    raw = copy.deepcopy(raw) | {"model": {"path": str(first), **model}}
    raw |= {"loss": {"kl_coef": 0.1}, "advantages": {"profile": "grpo"}}
    raw["trainer"] |= {"learning_rate": 1e-3, "save_steps": 1}
    return raw


def test_a_trained_adapter_goes_on_from_where_it_was(raw_config: dict[str, Any], first: Path) -> None:
    raw = config(raw_config, first)
    trainer, _ = run(raw)
    lines = [line for line in trainer.state.log_history if "kl" in line]
    before, after = adapter(first), adapter(Path(raw["run_dir"]) / "final")
    moved = max((after[name] - before[name]).abs().max().item() for name in before)

    assert before.keys() == after.keys()
    assert 0 < moved < 0.01, "two steps of Adam at 1e-3; the first run moved it by 0.1"
    assert max(value.abs().max().item() for name, value in before.items() if "lora_B" in name) > 0.03
    assert lines[0]["kl"] == pytest.approx(0, abs=1e-7), "the reference is the adapter that the run started from"
    assert lines[1]["kl"] > 1e-9


def test_a_killed_run_on_an_adapter_goes_on_bit_by_bit(raw_config: dict[str, Any], first: Path) -> None:
    whole, killed = config(raw_config, first), config(raw_config, first)
    whole["run_dir"] += "-whole"
    run(whole)
    killed_and_resumed(killed, 2)
    a, b = (adapter(Path(raw["run_dir"]) / "final") for raw in (whole, killed))

    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_merged_adapter_trains_as_a_whole_model(raw_config: dict[str, Any], first: Path) -> None:
    raw = config(raw_config, first, adapter="merge")
    trainer, _ = run(raw)
    lines = [line for line in trainer.state.log_history if "kl" in line]
    final = AutoModelForCausalLM.from_pretrained(Path(raw["run_dir"]) / "final")

    assert lines[0]["kl"] == pytest.approx(0, abs=1e-7)
    assert not (Path(raw["run_dir"]) / "final" / "adapter_config.json").exists()
    base = AutoModelForCausalLM.from_pretrained(raw_config["model"]["path"])
    gap = (final.model.layers[0].mlp.up_proj.weight - base.model.layers[0].mlp.up_proj.weight).abs().max()
    assert gap > 0.01, "base + adapter, not the base, was trained"


def test_a_new_adapter_on_a_merged_one_goes_on_after_a_kill(raw_config: dict[str, Any], first: Path) -> None:
    raw = config(raw_config, first, adapter="merge", lora={"r": 2})
    killed_and_resumed(raw, 2)
    run_dir = Path(raw["run_dir"])
    saved = json.loads((run_dir / "final" / "adapter_config.json").read_text())

    assert saved["base_model_name_or_path"] == str(run_dir / "merged")
    merged = AutoModelForCausalLM.from_pretrained(run_dir / "merged")
    base = AutoModelForCausalLM.from_pretrained(raw_config["model"]["path"])
    assert (merged.model.layers[0].mlp.up_proj.weight - base.model.layers[0].mlp.up_proj.weight).abs().max() > 0.01


def test_an_engine_gets_the_base_and_then_the_policy(
    raw_config: dict[str, Any], first: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every sync is probed, so a run that ends has had the same policy in engine and trainer."""
    paths, engines = [], []

    def build_engine(_config: Any, served: Any) -> CopyEngine:
        paths.append(served.path)
        engines.append(CopyEngine(AutoModelForCausalLM.from_pretrained(served.path), served.sampling))
        return engines[0]

    monkeypatch.setattr("maestro_fast.training.run.check_generation", lambda *args: None)
    monkeypatch.setattr("maestro_fast.training.run.build_engine", build_engine)
    run(config(raw_config, first) | {"generation": "vllm"})

    assert paths == [raw_config["model"]["path"]], "an engine cannot load an adapter"
    assert engines[0].calls.count("load_weights") == 2
