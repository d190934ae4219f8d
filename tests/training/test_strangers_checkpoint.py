"""A checkpoint from a stranger cannot run code: nothing in it is unpickled but tensors and numbers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from maestro_fast.manifest import MANIFEST, write_manifest
from tests.training.test_trainer import run

WRITTEN = ["optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"]


class Payload:
    """An object that leaves a trace where it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.trace,)


def poison(path: Path, trace: Path, form: str) -> None:
    """Writes an object that runs code where it is unpickled, in one of the two formats of torch.save."""
    torch.save({"state": Payload(trace)}, path, _use_new_zipfile_serialization=form == "zip")


@pytest.fixture
def raw(raw_config: dict[str, Any]) -> dict[str, Any]:
    raw_config["trainer"] |= {"max_steps": 1, "save_steps": 1}
    return raw_config


@pytest.mark.parametrize("form", ["zip", "legacy"])
def test_the_payload_is_one(tmp_path: Path, form: str) -> None:
    poison(tmp_path / "file", tmp_path / "trace", form)
    torch.load(tmp_path / "file", weights_only=False)
    assert (tmp_path / "trace").exists()


@pytest.mark.parametrize("form", ["zip", "legacy"])
@pytest.mark.parametrize("name", WRITTEN)
def test_no_file_of_a_checkpoint_runs_code(raw: dict[str, Any], tmp_path: Path, name: str, form: str) -> None:
    run(raw)
    folder, trace = Path(raw["run_dir"]) / "checkpoint-1", tmp_path / "trace"
    poison(folder / name, trace, form)
    write_manifest(folder)  # as a stranger would

    if name == "training_args.bin":  # It is written, and never read.
        assert run(raw, resume=True, trainer__max_steps=2)[0].state.global_step == 2
    else:
        with pytest.raises(ValueError, match=rf"^resume_from_checkpoint: .*{re.escape(name)} holds more than tensors"):
            run(raw, resume=True, trainer__max_steps=2)
        (folder / MANIFEST).unlink()
        (folder / name).write_bytes(b"cut")
        with pytest.raises(ValueError, match=rf"^resume_from_checkpoint: .*{re.escape(name)}.* is damaged"):
            run(raw, resume=True, trainer__max_steps=2)
    assert not trace.exists()


@pytest.mark.parametrize("lora", [None, {"r": 2}], ids=["full", "lora"])
def test_weights_in_a_pickle_run_no_code(raw: dict[str, Any], tmp_path: Path, lora: dict[str, int] | None) -> None:
    """Where there is no file of safetensors, transformers and peft look for one that is a pickle."""
    raw["model"]["lora"] = lora
    run(raw)
    folder, trace = Path(raw["run_dir"]) / "checkpoint-1", tmp_path / "trace"
    name = "adapter_model" if lora else "model"
    (folder / f"{name}.safetensors").unlink()
    poison(folder / ("adapter_model.bin" if lora else "pytorch_model.bin"), trace, "zip")
    write_manifest(folder)

    with pytest.raises(ValueError, match=r"^resume_from_checkpoint: .* holds more than tensors"):
        run(raw, resume=True, trainer__max_steps=2)
    assert not trace.exists()
