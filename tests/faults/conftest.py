"""A run of three steps, each on four of sixteen prompts that are all different, with a checkpoint after each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.training.conftest import checkpoint, raw_config

__all__ = ["checkpoint", "raw_config"]


@pytest.fixture
def raw(raw_config: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    rows = [{"prompt": f"Name colour number {i}.", "family": f"family {i % 2}"} for i in range(16)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    raw_config["trainer"] |= {"max_steps": 3, "save_steps": 1, "logging_steps": 1, "optim": "sgd"}
    return raw_config | {
        "rewards": [{"type": "length", "name": "brevity", "target": 2}],
        "weights": "equal",
    }
