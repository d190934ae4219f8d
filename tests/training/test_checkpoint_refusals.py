"""A resumed run must not train too far, go on from half a checkpoint, or tear a batch."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from maestro_fast import manifest
from maestro_fast.manifest import MANIFEST, check_manifest
from maestro_fast.reporting import read_jsonl
from maestro_fast.training import run_directory
from maestro_fast.training.run_directory import staged
from tests.training.test_trainer import run


@pytest.fixture
def raw(raw_config: dict[str, Any]) -> dict[str, Any]:
    """A run of three steps with a checkpoint after each."""
    raw_config["trainer"] |= {"max_steps": 3, "save_steps": 1}
    return raw_config


def test_a_finished_run_makes_no_further_step(raw: dict[str, Any]) -> None:
    run(raw)
    shutil.rmtree(Path(raw["run_dir"]) / "final")
    trainer, records = run(raw, resume=True)

    assert (trainer.state.global_step, records) == (3, [])
    assert (Path(raw["run_dir"]) / "final").is_dir()
    assert not (Path(raw["run_dir"]) / "checkpoint-4").exists()


@pytest.mark.parametrize("pattern", ["optimizer*", "scheduler.pt"])
def test_half_a_checkpoint_of_an_older_version_is_refused(raw: dict[str, Any], pattern: str) -> None:
    run(raw)
    (Path(raw["run_dir"]) / "checkpoint-3" / MANIFEST).unlink()
    for path in (Path(raw["run_dir"]) / "checkpoint-3").glob(pattern):
        path.unlink()

    with pytest.raises(ValueError, match=r"resume_from_checkpoint: .*checkpoint-3 holds no .*, it is incomplete"):
        run(raw, resume=True, trainer__max_steps=4)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"micro_batch": 2}, r"^batch\.micro_batch: 2, but .* made with 4, expected the same"),
        ({"updates_per_batch": 1}, r"^batch\.updates_per_batch: 1, but .* made with 2, expected the same"),
        ({"prompts_per_batch": 8}, r"^batch\.prompts_per_batch: 8, but .* made with 4, expected the same"),
    ],
)
def test_responses_are_trained_on_as_they_were_divided(
    raw: dict[str, Any], changes: dict[str, int], complaint: str
) -> None:
    raw["batch"] = {"prompts_per_batch": 4, "micro_batch": 4, "updates_per_batch": 2}
    run(raw)  # ends after the first of the two updates of its second batch

    with pytest.raises(ValueError, match=complaint):
        run({**raw, "batch": raw["batch"] | changes}, resume=True, trainer__max_steps=6)


def test_a_batch_is_not_begun_in_its_middle(raw: dict[str, Any]) -> None:
    run(raw)
    with pytest.raises(ValueError, match=r"^batch\.updates_per_batch: 2, but .*checkpoint-3 .*after step 3"):
        run(raw, resume=True, trainer__max_steps=6, batch__updates_per_batch=2)


def test_memory_may_be_saved_between_batches(raw: dict[str, Any]) -> None:
    run(raw)
    trainer, records = run(raw, resume=True, trainer__max_steps=5, batch__micro_batch=4)

    assert ([record.step for record in records], trainer.state.global_step) == ([4, 5], 5)


def test_a_second_training_starts_anew(raw: dict[str, Any]) -> None:
    raw["batch"] = {"prompts_per_batch": 4, "micro_batch": 4, "updates_per_batch": 2}
    trainer, records = run(raw | {"trainer": raw["trainer"] | {"save_strategy": "no", "logging_steps": 2}})
    left = len(trainer._micro_batches)
    trainer.train()

    assert left == 2
    assert [record.step for record in records] == [1, 3, 1, 3]


@pytest.mark.parametrize("dies_at", ["the new one", "nothing"])
def test_a_replaced_folder_is_there_until_its_successor_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dies_at: str
) -> None:
    def write(value: str) -> None:
        with staged(tmp_path, Accelerator(cpu=True)) as folder:
            (folder / "final").mkdir()
            (folder / "final" / "value").write_text(value)

    write("1")
    rename: Callable[..., Path] = Path.rename

    def dying(self: Path, target: Path) -> Path:
        if dies_at == "the new one" and self.parent.name == ".saving":
            raise KeyboardInterrupt
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", dying)
        if dies_at == "nothing":
            write("2")
        else:
            with pytest.raises(KeyboardInterrupt):
                write("2")
    run_directory.recover(tmp_path)

    assert (tmp_path / "final" / "value").read_text() == ("2" if dies_at == "nothing" else "1")
    assert not list(tmp_path.glob(".old-*"))


def test_metrics_hold_each_step_once(raw: dict[str, Any]) -> None:
    """This holds also where a finished run was resumed."""
    from maestro_fast.reporting.recorded_run import recorded_train

    recorded_train(raw)
    before = (Path(raw["run_dir"]) / "metrics.jsonl").read_bytes()
    recorded_train(raw, resume=True)

    assert (Path(raw["run_dir"]) / "metrics.jsonl").read_bytes() == before
    assert [line["step"] for line in read_jsonl(Path(raw["run_dir"]) / "metrics.jsonl")] == [1, 2, 3]


def unreadable(path: Path, start: int) -> str:
    raise PermissionError(13, "Permission denied", str(path))


def test_a_run_refuses_what_it_would_load_in_silence(raw: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The manifest names every file of a run's checkpoints. Without it, other parameters would be trained on."""
    trainer, _ = run(raw)
    folder = Path(raw["run_dir"])
    assert all(check_manifest(path) for path in folder.glob("checkpoint-*"))
    last, named = folder / "checkpoint-3", json.loads((folder / "checkpoint-3" / MANIFEST).read_text())["files"]
    assert {"model.safetensors", "optimizer.pt", "rng_state.pth", "weight_policy.safetensors"} < named.keys()

    shutil.copytree(last, folder / "kept")
    content = bytearray((last / "model.safetensors").read_bytes())
    content[-3] ^= 1  # A byte of the last tensor: the file can be read.
    (last / "model.safetensors").write_bytes(content)
    ours, theirs = (load_file(path / "model.safetensors") for path in (last, folder / "kept"))
    assert any(not torch.equal(value, theirs[name]) for name, value in ours.items())
    with pytest.raises(ValueError, match=r"checkpoint-3 is damaged: model\.safetensors is not as it was written; move"):
        run(raw, resume=True, trainer__max_steps=4)
    with pytest.raises(ValueError, match=r"^resume_from_checkpoint: .*run, expected the folder of a checkpoint$"):
        trainer.train(resume_from_checkpoint=str(folder / "config.yaml" / "run"))
    with monkeypatch.context() as patch:  # Root, who may run the tests, can read every file.
        patch.setattr(manifest, "_sha256", unreadable)
        with pytest.raises(ValueError, match=r"^resume_from_checkpoint: .*checkpoint-3/.* cannot be read: Permission"):
            trainer.train(resume_from_checkpoint=str(last))
    shutil.rmtree(last)
    (folder / "kept").rename(last)
    assert run(raw, resume=True, trainer__max_steps=4)[0].state.global_step == 4


def test_a_checkpoint_of_an_older_version_goes_on(raw: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    run(raw)
    (Path(raw["run_dir"]) / "checkpoint-3" / MANIFEST).unlink()
    with caplog.at_level(logging.WARNING):
        trainer, _ = run(raw, resume=True, trainer__max_steps=4)
    assert trainer.state.global_step == 4
    assert f"checkpoint-3 has no {MANIFEST}, so its files are not checked" in caplog.text
