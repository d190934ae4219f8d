"""A checkpoint that is damaged in any file is refused before any of it is loaded."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from maestro_fast import manifest
from maestro_fast.manifest import MANIFEST, check_manifest, write_manifest


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    folder = tmp_path / "run" / "checkpoint-20"
    (folder / "shards").mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * 8)
    (folder / "shards" / "0.bin").write_bytes(b"optimizer")
    (folder / "empty").touch()
    write_manifest(folder)
    return folder


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["model.safetensors", "shards/0.bin"])
@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda path: path.unlink(), "is missing"),
        (lambda path: path.write_bytes(b""), "has 0 bytes, expected"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), r"has [\d,]+ bytes, expected"),
        (lambda path: path.write_bytes(path.read_bytes() + b" "), r"has [\d,]+ bytes, expected"),
        (lambda path: flip(path, 0), "is not as it was written"),
        (lambda path: flip(path, -1), "is not as it was written"),
        (lambda path: path.write_bytes(path.read_bytes()[::-1]), "is not as it was written"),
    ],
    ids=["deleted", "empty", "cut", "longer", "first byte", "last byte", "another of its size"],
)
def test_a_damaged_file_is_named(saved: Path, name: str, damage: Callable[[Path], Any], words: str) -> None:
    assert check_manifest(saved)
    damage(saved / name)
    with pytest.raises(ValueError, match=rf"^resume_from_checkpoint: .*checkpoint-20 is damaged: {name} {words}"):
        check_manifest(saved)


def test_the_manifest_itself_may_be_damaged(saved: Path) -> None:
    """Wherever one of its bytes is another, the checkpoint is refused."""
    path = saved / MANIFEST
    whole = path.read_bytes()
    for at in range(len(whole)):
        flip(path, at)
        with pytest.raises(ValueError, match=r"^resume_from_checkpoint: .*checkpoint-20 is damaged: "):
            check_manifest(saved)
        path.write_bytes(whole)
    for content in (
        b"",
        whole[:40],
        b"[]",
        b"null",
        b'{"format": 1}',
        b'{"format": 1, "files": {"empty": {}}}',
        b"\xff",
        b'{"format": 1, "files": {"empty": {"bytes": "x", "sha256": []}}}',
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"is damaged: {MANIFEST} cannot be read"):
            check_manifest(saved)
    path.write_text(json.dumps({"format": 2, "files": {}}))
    with pytest.raises(ValueError, match=f"is damaged: {MANIFEST} has format 2, expected 1"):
        check_manifest(saved)


def test_large_files_have_a_sum_for_each_piece(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sums are those of any other tool, whether the last piece is whole or not."""
    monkeypatch.setattr(manifest, "_PIECE", 1000)
    monkeypatch.setattr(manifest, "_CHUNK", 300)
    data = (saved / "model.safetensors").read_bytes()
    (saved / "whole.bin").write_bytes(data[:2000])
    write_manifest(saved)
    named = json.loads((saved / MANIFEST).read_text())["files"]
    for name, content in {"model.safetensors": data, "whole.bin": data[:2000], "empty": b""}.items():
        pieces = [content[i : i + 1000] for i in range(0, len(content), 1000)] or [b""]
        assert named[name] == {"bytes": len(content), "sha256": [hashlib.sha256(x).hexdigest() for x in pieces]}
    assert check_manifest(saved)
    flip(saved / "model.safetensors", 1500)
    with pytest.raises(ValueError, match=r"model\.safetensors is not as it was written"):
        check_manifest(saved)


def test_the_checkpoint_before_is_named(saved: Path) -> None:
    for name in ("checkpoint-3", "checkpoint-12", "checkpoint-30", "checkpoint-x"):
        (saved.parent / name).mkdir()
    (saved / "empty").unlink()
    with pytest.raises(ValueError, match=r"empty is missing; move it away to go on from checkpoint-12$"):
        check_manifest(saved)
    for name in ("checkpoint-3", "checkpoint-12"):
        (saved.parent / name).rmdir()
    with pytest.raises(ValueError, match=r"empty is missing; the run has no checkpoint before it$"):
        check_manifest(saved)


def test_other_files_are_told_and_left_alone(saved: Path, caplog: pytest.LogCaptureFixture) -> None:
    (saved / "notes.txt").write_text("the good one")
    assert check_manifest(saved)
    assert "holds files that are not of the checkpoint: notes.txt" in caplog.text
    (saved / MANIFEST).unlink()
    assert not check_manifest(saved)
