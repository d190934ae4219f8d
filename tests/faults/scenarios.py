"""What happens on the disks of ``disks.py``, each in a program of its own."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from maestro_fast.manifest import check_manifest
from maestro_fast.reporting import read_jsonl
from maestro_fast.reporting.recorded_run import recorded_train, try_report
from maestro_fast.settings import SettingsError
from tests.faults.disks import SmallDisk, limit_files, make_read_only
from tests.faults.reading import told
from tests.training.test_checkpoint import assert_same_run

FULL = "No space left on device"
ROOM = 64 << 20  # bytes, more than a run takes

# The function before which the disk fills up, at which of its calls, and what the error names.
POINTS = {
    "model": ("transformers.modeling_utils:PreTrainedModel.save_pretrained", 3, "checkpoint-3"),
    "tokenizer": ("transformers:PreTrainedTokenizerBase.save_pretrained", 3, "checkpoint-3"),
    "optimizer": ("transformers:Trainer._save_optimizer_and_scheduler", 3, "checkpoint-3"),
    "random state": ("transformers:Trainer._save_rng_state", 3, "checkpoint-3"),
    "step in progress": ("maestro_fast.training.checkpoint:save_step_state", 3, "checkpoint-3"),
    "weight policy": ("maestro_fast.training.checkpoint:save_weight_policy", 3, "checkpoint-3"),
    "manifest": ("maestro_fast.training.run_directory:write_manifest", 3, "checkpoint-3"),
    "metrics": ("maestro_fast.reporting.run_log:MetricsCallback.on_log", 5, "metrics.jsonl"),
    "rollouts": ("maestro_fast.reporting.run_log:RolloutsLog.__call__", 3, "rollouts.jsonl"),
    "final": ("maestro_fast.training.run:_save_final", 1, "final"),
}


def error_of(raw: dict[str, Any], *, resume: bool = False) -> Exception | None:
    """The error in which a run ends."""
    try:
        recorded_train(raw, resume=resume)
    except Exception as error:
        return error
    return None


def before(place: str, call: int, action: Callable[[], None]) -> None:
    """Has ``action`` called before the function at ``place`` is, the ``call``-th time."""
    module, _, path = place.partition(":")
    owner: Any = import_module(module)
    *outer, name = path.split(".")
    for part in outer:
        owner = getattr(owner, part)
    function, calls = getattr(owner, name), 0

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            action()
        return function(*args, **kwargs)

    setattr(owner, name, wrapped)


def full_at(raw: dict[str, Any], whole: str, folder: Path, point: str, spare: int) -> None:
    """The disk fills up at ``point`` of the third step. Two steps are kept, and the run goes on as ``whole`` did."""
    disk = SmallDisk(folder / "disk", ROOM)
    run_dir = disk.folder / "run"
    raw = raw | {"run_dir": str(run_dir)}
    place, call, named = POINTS[point]
    before(place, call, functools.partial(disk.fill, spare))
    error = error_of(raw)
    assert isinstance(error, OSError), error
    said = told(error)
    assert FULL in said and str(run_dir) in said and named in said, said
    last = 3 if point == "final" else 2
    checkpoints = sorted(run_dir.glob("checkpoint-*"))
    assert checkpoints[-1].name == f"checkpoint-{last}" and all(map(check_manifest, checkpoints))
    assert point == "final" or f"{run_dir}/checkpoint-2; mend the cause and go on with --resume" in said, said
    assert not (run_dir / ".saving").exists(), "half a checkpoint takes room"
    for name in ("metrics.jsonl", "rollouts.jsonl"):  # No line is cut, and none of a step with a checkpoint is missing.
        content = (run_dir / name).read_bytes()
        assert content.endswith(b"\n") and {row["step"] for row in read_jsonl(run_dir / name)} >= {*range(1, last + 1)}

    disk.clear()
    recorded_train(raw, resume=True)
    assert_same_run(whole, str(run_dir))


def cannot_be_saved(raw: dict[str, Any], folder: Path) -> None:
    """The disk is full where a run ends and would be saved. Both are told, and how to go on; a report can wait."""
    disk = SmallDisk(folder / "disk", ROOM)
    run_dir = disk.folder / "run"
    raw = raw | {"run_dir": str(run_dir), "trainer": raw["trainer"] | {"max_steps": 4, "save_steps": 2}}
    before(POINTS["rollouts"][0], 4, disk.fill)
    error = error_of(raw)
    assert isinstance(error, OSError), error
    said = told(error)
    assert said.startswith(f"[Errno 28] {FULL}: '{run_dir}/rollouts.jsonl'"), said
    assert f"could not be saved either: run_dir: checkpoint-3 could not be written to {run_dir}: {FULL}" in said, said
    assert f"after step 3. The last checkpoint is {run_dir}/checkpoint-2; mend the cause and go on with" in said, said
    disk.clear()
    assert recorded_train(raw, resume=True).state.global_step == 4
    disk.fill()
    assert try_report(run_dir).startswith(f"No report was written: [Errno 28] {FULL}")


def too_small(raw: dict[str, Any], whole: str, folder: Path, sizes: list[int]) -> None:
    """A run on disks of several sizes, wherever they are full, and then on a large one."""
    disk = SmallDisk(folder / "disk", ROOM)
    run_dir = disk.folder / "run"
    raw = raw | {"run_dir": str(run_dir)}
    for size in sizes:
        disk.resize(size)
        error = error_of(raw)
        assert isinstance(error, OSError | SettingsError), (size, error)
        said = told(error)
        assert str(run_dir) in said and (FULL in said or "expected room for one" in said), (size, said)
        checkpoints = [*run_dir.glob("checkpoint-*")]
        assert all(map(check_manifest, checkpoints))
        print(size, len(checkpoints), said, flush=True)
        disk.resize(ROOM)
        if not checkpoints:
            shutil.rmtree(run_dir)
        recorded_train(raw, resume=bool(checkpoints))
        assert_same_run(whole, str(run_dir))
        shutil.rmtree(run_dir)


def full_before_the_start(raw: dict[str, Any], folder: Path) -> None:
    """The model is not loaded, and where no checkpoint fits, nothing is trained."""
    disk = SmallDisk(folder / "disk", ROOM)
    raw = raw | {"run_dir": str(disk.folder / "run")}
    before("maestro_fast.training.trainer:MaestroTrainer.training_step", 1, _never)
    disk.fill(spare=100_000)
    said = str(error_of(raw))
    assert "run_dir: a checkpoint takes at least 0.5 MB, and " in said and "expected room for one" in said, said
    before("maestro_fast.training.run:load", 1, _never)
    disk.fill()
    said = str(error_of(raw))
    assert said.startswith(f"run_dir: cannot write to {raw['run_dir']}: {FULL} (0.0 MB"), said


def quota(raw: dict[str, Any], whole: str, run_dir: str) -> None:
    """No file may be larger than the weights, so the first checkpoint cannot be written."""
    raw = raw | {"run_dir": run_dir}
    limit_files(100_000)
    error = error_of(raw)
    assert isinstance(error, OSError), error
    said = told(error)
    assert f"run_dir: checkpoint-1 could not be written to {run_dir}: File too large" in said, said
    assert not [*Path(run_dir).glob("checkpoint-*")]


def read_only(raw: dict[str, Any], folder: Path, finished: str) -> None:
    """Folders that cannot be written to are refused before the model is loaded; data and model need only be read."""
    for name in ("data", "model"):
        make_read_only(Path(raw[name]["path"]).parent if name == "data" else Path(raw[name]["path"]))
    parent, run_dir = folder / "parent", folder / "finished"
    parent.mkdir()
    make_read_only(parent)
    shutil.copytree(finished, run_dir)
    longer = raw | {"trainer": raw["trainer"] | {"max_steps": 4}, "run_dir": str(run_dir)}
    assert error_of(longer, resume=True) is None

    before("maestro_fast.training.run:load", 1, _never)
    make_read_only(run_dir / "metrics.jsonl")
    locked = folder / "locked"
    shutil.copytree(finished, locked)
    make_read_only(locked / ".lock")
    refusals = [
        (raw | {"run_dir": str(locked)}, locked / ".lock", True),
        (raw | {"run_dir": str(parent / "run")}, parent / "run", False),
        (longer, run_dir / "metrics.jsonl", True),
        (raw | {"run_dir": finished}, Path(finished), True),
        (raw | {"run_dir": finished}, Path(finished), False),
    ]
    for given, path, resume in refusals:
        if path == Path(finished):
            make_read_only(path)
        error = error_of(given, resume=resume)
        assert isinstance(error, SettingsError), error
        assert str(error) == f"run_dir: cannot write to {path}: Read-only file system", error
    judge = {"type": "judge", "url": "http://127.0.0.1:9/v1", "model": "m", "cache": str(parent / "answers.sqlite")}
    said = str(error_of(raw | {"rewards": [judge], "run_dir": str(folder / "other")}))
    assert said.startswith(f"rewards[0].cache: {parent}/answers.sqlite: unable to open database file"), said


def _never() -> None:
    raise AssertionError("The run went on.")
