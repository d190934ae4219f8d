"""What worked in 0.1 works: its public names import, its configs load."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from maestro_fast.training import parse_config

FOLDER = Path(__file__).resolve().parent / "release_0_1"
NAMES: dict[str, list[str]] = json.loads((FOLDER / "names.json").read_text(encoding="utf-8"))
GENERATION: list[Any] = [
    "vllm",
    {"engine": "vllm", "gpu_memory_share": 0.4, "sleep": 2},
    {"engine": "vllm", "mode": "server", "url": "http://gpu2:8000", "address": "gpu1"},
    {"engine": "vllm", "mode": "server", "url": "http://gpu2:8000", "weights": "folder", "folder": "/shared/weights"},
]


@pytest.mark.parametrize("module", NAMES)
def test_public_names_import(module: str) -> None:
    if module.startswith("maestro_fast.integrations.trl"):
        pytest.importorskip("trl")
    if module.endswith("vllm_worker"):
        pytest.importorskip("vllm")
    loaded = importlib.import_module(module)

    assert [name for name in NAMES[module] if not hasattr(loaded, name)] == []


def config(name: str) -> dict[str, Any]:
    raw: dict[str, Any] = yaml.safe_load((FOLDER / name).read_text(encoding="utf-8"))
    return raw


@pytest.mark.parametrize("name", sorted(path.name for path in FOLDER.glob("*.yaml")))
def test_configs_load(name: str) -> None:
    raw = config(name)
    parsed = parse_config(raw)

    assert parsed.run_dir == raw["run_dir"]
    assert parsed.model.path == raw["model"]["path"]


@pytest.mark.parametrize("generation", GENERATION, ids=str)
def test_engines_load(generation: Any) -> None:
    parsed = parse_config(config("readme_run.yaml") | {"generation": generation})

    assert type(parsed.generation).__name__ in ("ColocateConfig", "ServerConfig")
