"""A Conductor that is saved into a folder comes back as it was, and files that do not fit are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from maestro_fast.weighting import Anchored, Conductor, build_weight_policy, from_pretrained, save_pretrained
from maestro_fast.weighting.saved import TENSORS_FILE, WEIGHTS_FILE, load_weight_policy, save_weight_policy
from tests.weighting.helpers import NAMES, context, normal, play

B, D = 8, 5
ENTRIES: list[dict[str, Any]] = [
    {"type": "conductor", "hidden": 4, "period": 2, "alpha": 0.4},
    {"type": "anchored", "hybrid": True, "steps": 2},
    {"type": "anchored", "steps": 2, "guard": {}},
    {"type": "anchored", "steps": 2, "residual": True, "context": "none"},
]


def trained(entry: dict[str, Any]) -> Any:
    policy = build_weight_policy(entry, NAMES, D)
    for step in range(3):
        play(policy, context(B, normal(B, D, seed=step), step=step), normal(B, seed=50 + step))
    return policy


@pytest.mark.parametrize("entry", ENTRIES)
def test_a_round_trip_keeps_weights_options_and_future(entry: dict[str, Any], tmp_path: Path) -> None:
    policy = trained(entry)
    save_pretrained(policy, tmp_path / "new" / "folder")
    loaded = from_pretrained(tmp_path / "new" / "folder")
    inner = getattr(policy, "policy", policy)
    assert isinstance(loaded, Conductor | Anchored) and loaded.config == inner.config
    assert loaded.reward_names == NAMES and loaded.name == entry["type"]
    for step in range(3, 6):
        at, advantages_B = context(B, normal(B, D, seed=step), step=step), normal(B, seed=50 + step)
        assert torch.equal(play(loaded, at, advantages_B).weights_BK, play(inner, at, advantages_B).weights_BK)


def test_a_file_that_is_older_than_the_residual_has_none(tmp_path: Path) -> None:
    policy = trained({"type": "anchored", "residual": False})
    save_pretrained(policy, tmp_path)
    about = json.loads((tmp_path / "conductor.json").read_text())
    del about["config"]["residual"], about["config"]["residual_factor"]
    (tmp_path / "conductor.json").write_text(json.dumps(about))
    loaded = from_pretrained(tmp_path)
    assert isinstance(loaded, Anchored) and loaded.residual is None and loaded.labelled == policy.labelled > 0


def test_the_json_says_what_it_is(tmp_path: Path) -> None:
    save_pretrained(trained(ENTRIES[0]), tmp_path)
    about = json.loads((tmp_path / "conductor.json").read_text())
    assert about["policy"] == "conductor" and about["rewards"] == list(NAMES) and about["context_size"] == D
    assert about["config"]["alpha"] == 0.4


def test_what_cannot_be_saved_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^policy: 'equal', expected one of conductor, anchored"):
        save_pretrained(build_weight_policy("equal", NAMES, D), tmp_path)
    hooked = {"type": "conductor", "objective": "custom", "meta_reward": lambda outcome: torch.zeros(B)}
    with pytest.raises(ValueError, match=r"^policy: its meta_reward is a function"):
        save_pretrained(build_weight_policy(hooked, NAMES, D), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": 2}, r"conductor\.json: .*'format': 2.*, expected format 1"),
        ({"policy": "equal"}, r"conductor\.json: .*expected format 1 of conductor or anchored"),
        ({"config": {"alfa": 1}}, r"conductor\.json: config\.alfa: unknown setting"),
        ({"rewards": None}, r"conductor\.json: "),
        ({"context_size": D + 1}, r"state\.hidden_weight: shape"),
    ],
)
def test_files_that_do_not_fit_are_named(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    save_pretrained(trained(ENTRIES[0]), tmp_path)
    file = tmp_path / "conductor.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match=words):
        from_pretrained(tmp_path)


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"^folder: .* holds no conductor\.json"):
        from_pretrained(tmp_path)
    save_pretrained(trained(ENTRIES[0]), tmp_path)
    (tmp_path / "conductor.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no conductor\.safetensors"):
        from_pretrained(tmp_path)
    (tmp_path / "conductor.json").write_text("{")
    (tmp_path / "conductor.safetensors").touch()
    with pytest.raises(ValueError, match=r"conductor\.json: is not JSON"):
        from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "content", [b"", b"\x10\0\0\0\0\0\0\0{}", b"no tensors at all" * 9], ids=["empty", "cut", "text"]
)
def test_a_damaged_file_is_named(tmp_path: Path, content: bytes) -> None:
    policy = trained(ENTRIES[0])
    save_pretrained(policy, tmp_path)
    save_weight_policy(tmp_path, policy, NAMES)
    for name in (TENSORS_FILE, WEIGHTS_FILE):
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{TENSORS_FILE}: is damaged, or no file of safetensors \("):
        from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"{WEIGHTS_FILE}: is damaged, or no file of safetensors \("):
        load_weight_policy(tmp_path, policy, NAMES)


def test_a_file_without_a_tensor_is_named(tmp_path: Path) -> None:
    policy = trained(ENTRIES[0])
    save_weight_policy(tmp_path, policy, NAMES)
    save_pretrained(policy, tmp_path)
    for name in (WEIGHTS_FILE, TENSORS_FILE):
        file = tmp_path / name
        file.write_bytes(file.read_bytes().replace(b'"statistics.count"', b'"statistics.coun_"'))
    with pytest.raises(ValueError, match=rf"^resume_from_checkpoint: .*{WEIGHTS_FILE}: .*statistics.count: missing"):
        load_weight_policy(tmp_path, policy, NAMES)
    with pytest.raises(ValueError, match=rf"^.*{TENSORS_FILE}: .*statistics.count: missing"):
        from_pretrained(tmp_path)
