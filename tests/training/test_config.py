"""Settings from a file and the command line; each mistake is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import TrainingArguments

from maestro_fast.settings import SettingsError
from maestro_fast.training import parse_config, read_config
from maestro_fast.training.arguments import training_arguments

MINIMAL = "run_dir: out\nmodel: {path: m}\ndata: {path: p.jsonl}\nrewards: [format]\n"


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(MINIMAL, encoding="utf-8")
    return path


def test_defaults_are_a_working_run(config_file: Path) -> None:
    config = parse_config(read_config(config_file))

    assert config.weights == "equal"
    assert config.method.profile == "maestro"
    assert config.method.sampling.group_size == 8


def test_overrides_reach_nested_settings(config_file: Path) -> None:
    words = [
        "--sampling.group_size",
        "4",
        "--trainer.learning_rate=1e-5",
        "--weights",
        "random",
        "--model.lora",
        "{r: 2}",
    ]
    config = parse_config(read_config(config_file, words))

    assert config.sampling.group_size == 4
    assert config.weights == "random"
    assert config.model.lora is not None
    assert config.model.lora.r == 2


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--sampling.group_size", "1"], r"^sampling\.group_size: 1, expected at least 2"),
        (["--sampling.groups", "4"], r"^sampling\.groups: unknown setting, expected one of group_size"),
        (["--sampling.temperature", "hot"], r"^sampling\.temperature: got str 'hot', expected float"),
        (["--loss.normalization", "mean"], r"^loss\.normalization: got str 'mean', expected one of grpo"),
        (["--batch.micro_batch", "0"], r"^batch\.micro_batch: 0, expected at least 1"),
        (["--seed"], r"^seed: missing its value"),
        (["seed", "3"], r"^seed: expected --section\.setting VALUE"),
    ],
)
def test_a_wrong_setting_is_named(config_file: Path, words: list[str], complaint: str) -> None:
    with pytest.raises(SettingsError, match=complaint):
        parse_config(read_config(config_file, words))


def test_a_missing_section_is_named(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("run_dir: out\n", encoding="utf-8")

    with pytest.raises(SettingsError, match=r"^model: missing"):
        parse_config(read_config(path))
    with pytest.raises(SettingsError, match="config: no file"):
        read_config(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"learnin_rate": 1e-5}, r"^trainer\.learnin_rate: transformers\.TrainingArguments has no such field"),
        ({"gradient_accumulation_steps": 4}, r"^trainer\.gradient_accumulation_steps: is set by batch\.micro_batch"),
        ({"output_dir": "x"}, r"^trainer\.output_dir: is set by run_dir"),
        ({"lr_scheduler_type": "none_such"}, r"^trainer: "),
        ({"save_only_model": True}, r"^trainer\.save_only_model: True is not supported: .*optimiser"),
        ({"ignore_data_skip": True}, r"^trainer\.ignore_data_skip: True is not supported"),
        ({"auto_find_batch_size": True}, r"^trainer\.auto_find_batch_size: .*batch\.micro_batch"),
        ({"push_to_hub": True}, r"^trainer\.push_to_hub: True is not supported"),
    ],
)
def test_trainer_settings_are_checked(config_file: Path, values: dict[str, Any], complaint: str) -> None:
    config = parse_config({**read_config(config_file), "trainer": values})

    with pytest.raises(SettingsError, match=complaint):
        training_arguments(config)


def test_one_process_takes_one_gpu(config_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = parse_config(read_config(config_file))
    monkeypatch.setattr(TrainingArguments, "n_gpu", 2)

    with pytest.raises(SettingsError, match=r"sees 2 GPUs, .* torchrun --nproc_per_node=2, .* CUDA_VISIBLE_DEVICES"):
        training_arguments(config)
