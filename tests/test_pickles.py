"""Sharded states of a stranger run no code. The other files are tried in training/test_strangers_checkpoint.py."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import load, save

from maestro_fast.pickles import check_pickles
from tests.training.test_strangers_checkpoint import Payload

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """A folder as FSDP writes it, from one process."""
    folder = tmp_path / "checkpoint" / "optimizer_0"
    state = {"state": {"w": torch.arange(6.0), "half": torch.ones(2, dtype=torch.bfloat16)}, "groups": {"lr": 0.1}}
    save({"optimizer": state}, checkpoint_id=folder)
    return folder


def test_what_a_run_writes_passes(shards: Path) -> None:
    check_pickles(shards.parent)


def test_an_index_runs_no_code(shards: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    (shards / ".metadata").write_bytes(pickle.dumps(Payload(trace)))
    with pytest.raises(ValueError, match=r"^resume_from_checkpoint: .*optimizer_0/\.metadata holds more than tensors"):
        check_pickles(shards.parent)
    assert not trace.exists()


def test_a_shard_runs_no_code(tmp_path: Path) -> None:
    """torch.distributed itself unpickles what stands beside the tensors, whatever it is."""
    trace, folder = tmp_path / "trace", tmp_path / "checkpoint" / "optimizer_0"
    state: dict[str, Any] = {"w": torch.ones(2), "lr": Payload(trace)}
    save(state, checkpoint_id=folder)
    with pytest.raises(ValueError, match=r"^resume_from_checkpoint: .*optimizer_0/\.metadata holds more than tensors"):
        check_pickles(folder.parent)
    assert not trace.exists()
    load({"w": torch.zeros(2), "lr": None}, checkpoint_id=folder)
    assert trace.exists()


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp"])
def test_damaged_shards_are_named(shards: Path, name: str) -> None:
    (shards / name).write_bytes((shards / name).read_bytes()[:40])
    with pytest.raises(ValueError, match=r"^resume_from_checkpoint: .*optimizer_0/\.metadata (is damaged|holds more)"):
        check_pickles(shards.parent)


CLASS_CHANGED = (
    b"ctorch.distributed.checkpoint.metadata\nStorageMeta\n"  # a class that an index may name,
    b"N}X\x05\x00\x00\x00itemsctorch\nSize\ns\x86b"  # an attribute of it set to another,
    b"0"  # and both dropped
)


def test_an_index_that_changes_a_class_is_refused(shards: Path) -> None:
    """torch's own unpickler would set the attribute, and its code would then call what the file names."""
    file = shards / ".metadata"
    written = file.read_bytes()
    assert written[:1] == b"\x80", "no protocol at the beginning: this shows nothing"
    file.write_bytes(written[:2] + CLASS_CHANGED + written[2:])
    with pytest.raises(ValueError, match=r"^resume_from_checkpoint: .*/\.metadata is damaged: .*__setstate__"):
        check_pickles(shards.parent)


def test_an_index_of_one_process_is_refused(shards: Path, tmp_path: Path) -> None:
    """torch.distributed reads it where there is no other."""
    (shards / "__0.metadata").write_bytes(pickle.dumps(Payload(tmp_path / "trace")))
    with pytest.raises(ValueError, match=r"^resume_from_checkpoint: .*/__0\.metadata holds more than tensors"):
        check_pickles(shards.parent)
    (shards / "__0.metadata").unlink()
    (shards / ".metadata").unlink()
    with pytest.raises(ValueError, match=r"^resume_from_checkpoint: .*optimizer_0 holds no \.metadata"):
        check_pickles(shards.parent)


def test_a_link_is_refused(shards: Path, tmp_path: Path) -> None:
    """What it leads to would be loaded, wherever that is."""
    shards.rename(tmp_path / "elsewhere")
    shards.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"^resume_from_checkpoint: .*optimizer_0 is a link"):
        check_pickles(shards.parent)


def test_whatever_a_damaged_file_raises_it_is_named(shards: Path) -> None:
    (shards.parent / "scheduler.pt").write_bytes(b"J\x01")
    with pytest.raises(ValueError, match=r"^resume_from_checkpoint: .*scheduler\.pt is damaged"):
        check_pickles(shards.parent)
