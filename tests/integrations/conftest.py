"""Settings, model, data and rewards as a user of TRL has them, small enough for one CPU core."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

from tests.tiny import tiny_checkpoint


def checkpointing_field() -> str:
    """The name of the setting for gradient checkpointing, which newer versions of transformers have renamed."""
    names = {item.name for item in fields(TrainingArguments)}
    return "activation_checkpointing" if "activation_checkpointing" in names else "gradient_checkpointing"


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture
def settings(tmp_path: Path) -> Callable[..., Any]:
    """Makes a ``GRPOConfig`` whose generation batches have two groups of four responses."""
    from trl import GRPOConfig

    def make(**changes: Any) -> GRPOConfig:
        values: dict[str, Any] = {
            "output_dir": str(tmp_path / "run"),
            "per_device_train_batch_size": 8,
            "per_device_eval_batch_size": 8,
            "num_generations": 4,
            "max_completion_length": 8,
            "max_steps": 2,
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "use_cpu": True,
            "bf16": False,
            checkpointing_field(): False,
            "disable_tqdm": True,
            "seed": 3,
        }
        return GRPOConfig(**values | changes)

    return make


@pytest.fixture
def ingredients(checkpoint: Path) -> Callable[[], dict[str, Any]]:
    """Makes the model, the tokenizer, the data and the rewards of a trainer, new ones for each call."""

    def make() -> dict[str, Any]:
        rows = [{"prompt": f"prompt {i}", "family": f"family {i % 2}"} for i in range(16)]
        return {
            "model": AutoModelForCausalLM.from_pretrained(checkpoint),
            "processing_class": AutoTokenizer.from_pretrained(checkpoint),
            "train_dataset": Dataset.from_list(rows),
            "reward_funcs": [parity, brevity],
        }

    return make


def parity(completion_ids: list[list[int]], **columns: object) -> list[float]:
    return [float(sum(ids) % 5) for ids in completion_ids]


def brevity(completion_ids: list[list[int]], **columns: object) -> list[float]:
    """Counts the distinct tokens, so that rewards differ even if all responses are truncated."""
    return [-float(len(set(ids))) - 0.25 * (ids[0] % 3) for ids in completion_ids]


def steady(completion_ids: list[list[int]], prompts: list[str], **columns: object) -> list[float]:
    """Gives all responses to a prompt one reward that float32 cannot hold exactly, so that means are rounded."""
    return [0.1 + 0.1 * int(prompt.split()[-1]) for prompt in prompts]


def abstaining(completion_ids: list[list[int]], **columns: object) -> list[float | None]:
    return [None if ids[0] % 2 else 0.3 * (ids[0] % 7) for ids in completion_ids]
