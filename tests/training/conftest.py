"""Checkpoints, prompts and configs that the training tests share."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import tiny_checkpoint

ROWS = [
    {"prompt": text, "family": family, "reference": "red"}
    for text, family in [("Name a colour.", "fact"), ("Tell a story about the sea.", "opening")] * 8
]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A local checkpoint by family and tying; made once."""
    made: dict[tuple[str, bool], Path] = {}

    def get(family: str = "qwen3", tied: bool = False) -> Path:
        key = (family, tied)
        if key not in made:
            made[key] = tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"), family, tied=tied)
        return made[key]

    return get


@pytest.fixture
def raw_config(tmp_path: Path, checkpoint: Callable[..., Path]) -> dict[str, Any]:
    """A run of two steps on sixteen prompts, without progress bars."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join(json.dumps(row) for row in ROWS), encoding="utf-8")
    return {
        "run_dir": str(tmp_path / "run"),
        "model": {"path": str(checkpoint())},
        "data": {"path": str(prompts)},
        "rewards": ["format", {"name": "brevity", "kind": "length", "target": 2}, "entropy"],
        "weights": {"policy": "conductor", "period": 1, "learning_rate": 0.05},
        "sampling": {"group_size": 4, "max_new_tokens": 6},
        "batch": {"prompts_per_batch": 4, "micro_batch": 8},
        "trainer": {"learning_rate": 1e-3, "max_steps": 2, "disable_tqdm": True, "use_cpu": True},
    }
