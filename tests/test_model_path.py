"""A path that leads to no model is answered before anything is loaded, and with its reason."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from huggingface_hub import constants

from maestro_fast.model_path import check_model_path
from maestro_fast.settings import SettingsError
from maestro_fast.training import ModelConfig
from maestro_fast.training.run import load_policy, loading_model
from tests.tiny import tiny_checkpoint


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize(
    ("missing", "complaint"),
    [
        ({"config.json"}, "has no config.json, expected a checkpoint of transformers"),
        ({"model.safetensors"}, "holds no weights, expected model.safetensors beside config.json"),
        ({"tokenizer.json", "tokenizer_config.json"}, r"holds no tokenizer \(tokenizer.json\)"),
    ],
)
def test_a_folder_that_lacks_a_part_is_refused(whole: Path, tmp_path: Path, missing: set[str], complaint: str) -> None:
    check_model_path(str(whole))
    for path in whole.iterdir():
        if path.name not in missing:
            (tmp_path / path.name).symlink_to(path)

    with pytest.raises(SettingsError, match=f"^model.path: {tmp_path} {complaint}"):
        check_model_path(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "text", "complaint"),
    [
        ("config.json", "{nope", "/config.json is not JSON: Expecting property name"),
        ("config.json", "{}", "/config.json names no model_type"),
        ("config.json", "[]", "/config.json holds a list, expected a JSON object"),
        (
            "model.safetensors.index.json",
            json.dumps({"weight_map": {"a": "1-of-2.safetensors", "b": "model.safetensors"}}),
            " lacks 1-of-2.safetensors, one of the 2 files of weights in model.safetensors.index.json",
        ),
    ],
)
def test_a_broken_file_is_named(whole: Path, tmp_path: Path, name: str, text: str, complaint: str) -> None:
    for path in whole.iterdir():
        if path.name != name:
            (tmp_path / path.name).symlink_to(path)
    (tmp_path / name).write_text(text)

    with pytest.raises(SettingsError, match=f"^model.path: {tmp_path}{complaint}"):
        check_model_path(str(tmp_path))


def test_what_is_no_folder_is_told_from_a_name_of_the_hub(whole: Path, tmp_path: Path) -> None:
    (tmp_path / "run" / "final").mkdir(parents=True)
    (tmp_path / "run" / "final" / "config.json").write_text("{}")
    for path, complaint in {
        f"{tmp_path}/nowhere": "there is no folder",
        f"{whole}/config.json": ".* is a file, expected the folder of a checkpoint",
        f"{tmp_path}/run": ".* has no config.json, .*; the folders final in it have one",
    }.items():
        with pytest.raises(SettingsError, match=f"^--model: {complaint}"):
            check_model_path(path, "--model")
    check_model_path("org/model")
    (tmp_path / "run" / "adapter_config.json").write_text("{}")
    check_model_path(str(tmp_path / "run"))  # An adapter names its own base model.


@pytest.mark.parametrize(
    ("path", "complaint"),
    [
        ("org/model", "there is no folder org/model, and the hub cannot be reached for a model of that name"),
        ("FOLDER", ".* cannot be loaded: .*zork"),
        ("WEIGHTS", ".* cannot be loaded: Error while deserializing header"),
    ],
)
def test_what_transformers_cannot_load_is_one_sentence(
    path: str, complaint: str, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    changed = "config.json" if path == "FOLDER" else "model.safetensors"
    for file in whole.iterdir():
        (tmp_path / file.name).symlink_to(file) if file.name != changed else None
    (tmp_path / changed).write_text('{"model_type": "zork"}')
    folder = path if path == "org/model" else str(tmp_path)

    with pytest.raises(SettingsError, match=f"^model.path: {complaint}") as caught, loading_model(folder):
        load_policy(ModelConfig(folder))
    assert "\n" not in str(caught.value)
