"""A run that was killed goes on bit by bit, from a checkpoint that is whole."""

from __future__ import annotations

import copy
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback
from transformers.trainer_utils import rotate_checkpoints

from maestro_fast.model.rows import Sequences
from maestro_fast.reporting.recorded_run import recorded_train
from maestro_fast.training import run_directory, train
from maestro_fast.training.batches import MicroBatch, TokenLogprobs
from maestro_fast.training.checkpoint import StepState, load_step_state, save_step_state
from maestro_fast.training.metrics import MetricMeans
from maestro_fast.training.run_directory import staged
from tests.training.test_trainer import run


class Killed(BaseException):
    """No ``Exception``, so that nothing tidies up after it."""


class KillAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise Killed


@pytest.fixture
def make_raw(raw_config: dict[str, Any]) -> Callable[..., dict[str, Any]]:
    """A run of five steps with all kinds of state, in a directory of its own."""

    def make(name: str, **sections: dict[str, Any]) -> dict[str, Any]:
        raw = copy.deepcopy(raw_config) | {"run_dir": f"{raw_config['run_dir']}-{name}"}
        raw["weights"] |= {"period": 2}
        raw["trainer"] |= {"max_steps": 5, "save_steps": 1}
        for section, values in sections.items():
            raw[section] = {**raw.get(section, {}), **values}
        return raw

    return make


def killed_and_resumed(raw: dict[str, Any], step: int) -> None:
    """The run dies in ``step``, before the checkpoint of that step is written, and is resumed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "maestro_fast.reporting.recorded_run.train",
            lambda *a, callbacks, **k: train(*a, callbacks=[*callbacks, KillAt(step)], **k),
        )
        with pytest.raises(Killed):
            recorded_train(raw)
    recorded_train(raw, resume=True)


def assert_same_run(one: str, other: str) -> None:
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        assert (Path(one) / name).read_bytes() == (Path(other) / name).read_bytes(), name
    files = sorted(path.name for path in (Path(one) / "final").glob("*.safetensors"))
    assert "weight_policy.safetensors" in files and len(files) == 2
    for name in files:
        ours, theirs = (load_file(Path(run_dir) / "final" / name) for run_dir in (one, other))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(value, theirs[key]) for key, value in ours.items()), name


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"batch": {"updates_per_batch": 2}},
        {"batch": {"micro_batch": 16}, "loss": {"kl_coef": 0.1}},
        {"trainer": {"logging_steps": 4, "save_steps": 3}},
        {"trainer": {"lr_scheduler_type": "linear"}, "model": {"lora": {"r": 2, "dropout": 0.2}}},
    ],
    ids=["plain", "unused responses", "judged in the training forward", "between log lines", "dropout"],
)
def test_a_killed_run_repeats_the_uninterrupted_one(
    make_raw: Callable[..., dict[str, Any]], sections: dict[str, dict[str, Any]]
) -> None:
    whole, killed = make_raw("whole", **sections), make_raw("killed", **sections)
    recorded_train(whole)
    killed_and_resumed(killed, step=4)

    assert_same_run(whole["run_dir"], killed["run_dir"])


def test_a_run_killed_in_its_second_epoch_goes_on(make_raw: Callable[..., dict[str, Any]]) -> None:
    epochs = {"max_steps": -1, "num_train_epochs": 2}
    whole = make_raw("whole", trainer=epochs)
    recorded_train(whole)
    for step in (5, 6):  # the last checkpoint is at the end of the first epoch, or inside the second
        killed = make_raw(f"killed-{step}", trainer=epochs)
        killed_and_resumed(killed, step=step)
        assert_same_run(whole["run_dir"], killed["run_dir"])


KILLED_WHILE_SAVING = """
import os, signal, sys
from maestro_fast.cli import main
from maestro_fast.training import run_directory
publish, calls = run_directory._publish, 0
def dying(folder, run_dir):
    global calls
    calls += 1
    if calls == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    publish(folder, run_dir)
run_directory._publish = dying
main(["train", sys.argv[1]])
"""


def test_kill_9_while_a_checkpoint_is_saved(make_raw: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    """The test of the quickstart kills a run between two steps."""
    whole, killed, config = make_raw("whole"), make_raw("killed"), tmp_path / "killed.yaml"
    config.write_text(yaml.safe_dump(killed), encoding="utf-8")
    program = [sys.executable, "-c", KILLED_WHILE_SAVING, str(config)]
    died = subprocess.run(program, capture_output=True, timeout=240).returncode
    left = {path.name for path in Path(killed["run_dir"]).iterdir()}

    assert died == -signal.SIGKILL
    assert {"checkpoint-2", "metrics.jsonl", ".saving"} <= left and not {"checkpoint-3", "final"} & left
    recorded_train(killed, resume=True)
    recorded_train(whole)
    assert_same_run(whole["run_dir"], killed["run_dir"])
    assert not (Path(killed["run_dir"]) / ".saving").exists()


def test_old_checkpoints_go_only_when_the_new_one_is_there(
    make_raw: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = make_raw("run", trainer={"save_total_limit": 1, "max_steps": 3})
    seen: list[list[str]] = []
    publish = run_directory._publish

    def spy(folder: Path, run_dir: Path) -> None:
        seen.append(sorted(path.name for path in run_dir.glob("checkpoint-*")))
        publish(folder, run_dir)

    monkeypatch.setattr(run_directory, "_publish", spy)
    run(raw)

    assert seen == [[], ["checkpoint-1"], ["checkpoint-2"], ["checkpoint-3"]]  # the last publishes final/
    assert [path.name for path in Path(raw["run_dir"]).glob("checkpoint-*")] == ["checkpoint-3"]


def test_a_kill_leaves_no_part_of_a_checkpoint_that_is_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (1, 2, 3):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "value").touch()

    def dying(path: Path) -> None:
        next(Path(path).iterdir()).unlink()
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(shutil, "rmtree", dying)
        run_directory.rotate(tmp_path, 2, None)
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3"]
    run_directory.recover(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-3"]


def test_a_checkpoint_that_cannot_be_deleted_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (1, 2):
        (tmp_path / f"checkpoint-{step}").mkdir()

    def busy(path: Path) -> None:
        raise OSError(16, "Device or resource busy", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", busy)
        run_directory.rotate(tmp_path, 1, None)
        run_directory.recover(tmp_path)  # as the next checkpoint does
    assert caplog.text.count(".gone-checkpoint-1 could not be deleted: Device or resource busy") == 2
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-2"]


@pytest.mark.parametrize("limit", [None, 0, 1, 2, 3, 9])
@pytest.mark.parametrize("best", [None, 2, 5, 7])
def test_the_checkpoints_that_stay_are_those_of_transformers(
    tmp_path: Path, limit: int | None, best: int | None
) -> None:
    for where in ("ours", "theirs"):
        for step in (2, 5, 10, 9):
            (tmp_path / where / f"checkpoint-{step}").mkdir(parents=True)
    names = {
        where: None if best is None else str(tmp_path / where / f"checkpoint-{best}") for where in ("ours", "theirs")
    }
    run_directory.rotate(tmp_path / "ours", limit, names["ours"])
    rotate_checkpoints(str(tmp_path / "theirs"), limit, names["theirs"])
    left = [sorted(path.name for path in (tmp_path / where).iterdir()) for where in ("ours", "theirs")]
    assert left[0] == left[1]


def test_the_best_checkpoint_is_named_where_it_lies(make_raw: Callable[..., dict[str, Any]]) -> None:
    raw = make_raw("run", trainer={"metric_for_best_model": "eval_rewards/brevity/mean", "save_total_limit": 1})
    raw["evaluation"] = {"data": raw["data"]}
    raw["trainer"] |= {"load_best_model_at_end": True, "greater_is_better": False, "learning_rate": 0.01}
    trainer, _ = run(raw)
    best, final = trainer.state.best_model_checkpoint, Path(raw["run_dir"]) / "final"

    assert trainer.state.best_global_step < trainer.state.global_step, "the last is the best: this shows nothing"
    for name in ("model.safetensors", "weight_policy.safetensors"):
        ours, theirs = load_file(final / name), load_file(Path(str(best)) / name)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(value, theirs[key]) for key, value in ours.items()), name
    assert best is not None and Path(best).parent == Path(raw["run_dir"]) and Path(best).is_dir()
    saved = json.loads((Path(best) / "trainer_state.json").read_text())
    assert saved["best_model_checkpoint"] == best


def test_a_staged_folder_replaces_its_like_and_leaves_none_behind(tmp_path: Path) -> None:
    for value in "12":
        with staged(tmp_path, Accelerator(cpu=True)) as folder:
            (folder / "checkpoint-5").mkdir()
            (folder / "checkpoint-5" / "value").write_text(value)
    with pytest.raises(RuntimeError), staged(tmp_path, Accelerator(cpu=True)) as folder:
        (folder / "checkpoint-5").mkdir()
        raise RuntimeError

    assert (tmp_path / "checkpoint-5" / "value").read_text() == "2"
    assert not (tmp_path / ".saving").exists()  # The room of what failed half-way is free again.


def micro_batch(seed: int) -> MicroBatch:
    random = torch.Generator().manual_seed(seed)
    return MicroBatch(
        Sequences([[1, 2, 3], [4]], [[5], [6, 7]]),
        torch.rand(2, generator=random),
        torch.tensor([0, 1, 3]),
        TokenLogprobs(torch.rand(3, generator=random), None, torch.rand(3, generator=random)),
        0.1 + seed,
        3.0,
    )


def test_the_step_in_progress_comes_back_bit_by_bit(tmp_path: Path) -> None:
    means = MetricMeans()
    means.add({"kl": 0.1})
    means.add({"kl": 0.2, "reward": 1 / 3})
    state = StepState([micro_batch(0), micro_batch(1)], means, 0.30000001192092896, 7)
    save_step_state(tmp_path, state, 0, 1)
    back = load_step_state(tmp_path, 0, 1, torch.device("cpu"))

    assert back is not None
    assert (back.loss, back.logged_step, back.means.pop()) == (state.loss, 7, means.pop())
    for ours, theirs in zip(back.micro_batches, state.micro_batches, strict=True):
        assert ours.sequences == theirs.sequences
        assert (ours.normalizer, ours.entropy_normalizer) == (theirs.normalizer, theirs.entropy_normalizer)
        assert torch.equal(ours.advantages_B, theirs.advantages_B) and torch.equal(ours.cu_seqlens, theirs.cu_seqlens)
        assert ours.logprobs.ref_C is None and ours.logprobs.old_C is not None and theirs.logprobs.old_C is not None
        assert torch.equal(ours.logprobs.old_C, theirs.logprobs.old_C)


@pytest.mark.parametrize("change", ["numbers", "tensor", "lengths"])
def test_a_step_in_progress_that_somebody_has_changed_is_named(tmp_path: Path, change: str) -> None:
    save_step_state(tmp_path, StepState([micro_batch(0)]), 0, 1)
    file = tmp_path / "step_state_0_of_1.safetensors"
    tensors = load_file(file)
    with safe_open(file, framework="pt") as saved:
        numbers = json.loads(saved.metadata()["numbers"])
    if change == "numbers":
        del numbers["means"]
    elif change == "tensor":
        del tensors["0.advantages"]
    else:
        tensors["0.prompt_lengths"] = torch.tensor([3, 9])
    save_file(tensors, file, metadata={"numbers": json.dumps(numbers)})
    with pytest.raises(
        ValueError, match=r"^resume_from_checkpoint: .*step_state_0_of_1\.safetensors does not hold what"
    ):
        load_step_state(tmp_path, 0, 1, torch.device("cpu"))


def test_another_number_of_processes_may_resume_between_batches_only(tmp_path: Path) -> None:
    for rank in range(2):
        save_step_state(tmp_path, StepState(), rank, 2)
    assert load_step_state(tmp_path, 0, 1, torch.device("cpu")) is None
    save_step_state(tmp_path, StepState([micro_batch(0)]), 1, 2)
    with pytest.raises(
        ValueError, match="2 processes had still to train on, expected as many processes, this run has 1"
    ):
        load_step_state(tmp_path, 0, 1, torch.device("cpu"))
    shutil.rmtree(tmp_path)
    with pytest.raises(ValueError, match=r"holds no step_state_0_of_1\.safetensors, it is incomplete"):
        load_step_state(tmp_path, 0, 1, torch.device("cpu"))
