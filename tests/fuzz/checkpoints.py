"""Checkpoints that are damaged: a resume refuses them and names the file, or goes on from the undamaged state.

    python -m tests.fuzz checkpoints --inputs 4000 --json tests/fuzz/checkpoints.json

Every input is a checkpoint of a tiny run in which a file is cut, lacks a byte or has another, is missing, is that of
another step or another run, or in which a JSON file has another value. What a resume checks and what it loads of our
part is then called as a resume calls it. Half of the inputs get a manifest that fits the damage, as if a stranger had
written it: what is no file of its kind any more has to be refused all the same, and content that is valid is trusted.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from maestro_fast.manifest import MANIFEST, write_manifest
from maestro_fast.training.checkpoint import StepState, check_resumed
from maestro_fast.training.trainer import MaestroTrainer
from tests.fuzz.kills import make_config
from tests.fuzz.trial import Input, add_options, as_tally, try_inputs
from tests.training.test_trainer import run as train

__all__ = ["add_options", "main", "run"]

_OURS = ("weight_policy", "step_state")  # what is loaded here; transformers loads the others


class Checkpoint:
    """The checkpoint of a run between two updates from one batch, beside others that may be confused with it.

    Attributes:
        original: the folder, undamaged.
        others: the checkpoint of another step, and those of another run.
    """

    def __init__(self, folder: Path) -> None:
        self.trainer, self.original, self.others = self._make(folder)
        self.damaged = folder / "tried" / self.original.name
        self.damaged.parent.mkdir()
        self.right = self.load(self.original)

    @staticmethod
    def _make(folder: Path) -> tuple[MaestroTrainer, Path, list[Path]]:
        raw = make_config(folder, 1)
        raw["evaluation"] = None
        raw["trainer"] |= {"max_steps": 3, "save_steps": 1, "save_total_limit": None, "eval_steps": None}
        trainer, _ = train(raw)
        other = raw | {"run_dir": str(folder / "other"), "seed": 5}
        train(other)
        paths = [Path(raw["run_dir"]), Path(other["run_dir"])]
        found = [path / f"checkpoint-{step}" for path in paths for step in (1, 2, 3)]
        return trainer, found[2], [path for path in found if path != found[2]]

    def load(self, folder: Path) -> dict[str, Any]:
        """What a resume has of our part, by name, after its checks."""
        check_resumed(str(folder), self.trainer.args, self.trainer.step.processes)
        state = self.trainer.checkpoints.load(folder, 3)
        assert state is not None
        return {**_plain(state), **self.trainer.step.weights.state_dict()}

    def copy(self) -> Path:
        """The folder, undamaged, at the place where it may be damaged. Its files are copied when they are written."""
        shutil.rmtree(self.damaged, ignore_errors=True)
        shutil.copytree(self.original, self.damaged, copy_function=lambda a, b: Path(b).hardlink_to(a))
        return self.damaged


def _plain(state: StepState) -> dict[str, Any]:
    """Everything in a step in progress, by name."""
    found: dict[str, Any] = {
        name: value for name, value in vars(state).items() if name not in ("micro_batches", "means")
    }
    found["means"] = state.means.state()
    for i, batch in enumerate(state.micro_batches):
        found |= {f"{i}.{name}": value for name, value in vars(batch).items()}
        found |= {f"{i}.{name}": value for name, value in vars(batch.logprobs).items()}
    return found


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two states are the same bit by bit."""

    def equal(a: Any, b: Any) -> bool:
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            return (
                a.dtype == b.dtype
                and a.shape == b.shape
                and torch.equal(a.view(-1).view(torch.uint8), b.view(-1).view(torch.uint8))
            )
        if hasattr(a, "old_C"):
            return True  # Its tensors stand there by themselves.
        return bool(a == b)

    return one.keys() == other.keys() and all(equal(value, other[name]) for name, value in one.items())


# --- damage ---


def _write(path: Path, content: bytes) -> None:
    path.unlink(missing_ok=True)  # The original is the same file.
    path.write_bytes(content)


def _byte(rng: random.Random, path: Path) -> str:
    content = bytearray(path.read_bytes())
    at = rng.randrange(len(content) if rng.random() < 0.5 else min(len(content), 3000))  # Headers stand at the start.
    content[at] ^= 1 << rng.randrange(8)
    _write(path, bytes(content))
    return f"byte {at} of {path.name}"


def _cut(rng: random.Random, path: Path) -> str:
    content = path.read_bytes()
    _write(path, content[: rng.choice([0, 1, 8, len(content) // 2, len(content) - 1])])
    return f"{path.name} cut to {path.stat().st_size} bytes"


def _longer(rng: random.Random, path: Path) -> str:
    _write(path, path.read_bytes() + rng.choice([b"\0", b"\n", b"garbage"]))
    return f"{path.name} longer"


def _removed(rng: random.Random, path: Path) -> str:
    path.unlink()
    return f"{path.name} removed"


def _garbage(rng: random.Random, path: Path) -> str:
    _write(path, rng.choice([b"{}", b"null", b"\x80\x04N.", bytes(64), rng.randbytes(200), b"PK\x03\x04"]))
    return f"{path.name} of garbage"


def _json(rng: random.Random, path: Path) -> str:
    """Another value in a JSON file, or in the header of a file of safetensors."""
    content = path.read_bytes()
    start, size = (8, int.from_bytes(content[:8], "little")) if path.suffix == ".safetensors" else (0, len(content))
    try:
        found = json.loads(content[start : start + size])
    except ValueError:
        return _byte(rng, path)
    words = _other_value(rng, found)
    text = json.dumps(found).encode()
    _write(path, (len(text).to_bytes(8, "little") if start else b"") + text + content[start + size :])
    return f"{path.name}: {words}"


def _other_value(rng: random.Random, found: Any) -> str:
    """Changes a value somewhere in JSON, also in text that is JSON itself, and says what."""
    places: list[tuple[Any, Any]] = []

    def collect(value: Any) -> None:
        for key, inner in (
            value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        ):
            places.append((value, key))
            collect(inner)

    collect(found)
    if not places:
        return "empty"
    parent, key = rng.choice(places)
    if isinstance(parent[key], str) and parent[key].startswith("{") and rng.random() < 0.9:
        inner = json.loads(parent[key])
        words = _other_value(rng, inner)
        parent[key] = json.dumps(inner)
        return f"{key}.{words}"
    if rng.random() < 0.2 and isinstance(parent, dict):
        del parent[key]
        return f"{key} deleted"
    parent[key] = rng.choice([None, True, 0, -1, 10**30, 1.5, float("nan"), "", "x", [], {}, [[1]], {"a": 1}])
    return f"{key} = {parent[key]!r}"


_DAMAGE: tuple[Callable[[random.Random, Path], str], ...] = (
    _byte,
    _byte,
    _cut,
    _longer,
    _removed,
    _garbage,
    _json,
    _json,
)


def damage(rng: random.Random, checkpoint: Checkpoint) -> tuple[Path, str, bool]:
    """A damaged folder, what was done to it, and whether its manifest fits the damage."""
    folder, forged = checkpoint.copy(), rng.random() < 0.5
    names: list[str] = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    ours = [name for name in names if name.startswith(_OURS)]
    name = rng.choice(ours if rng.random() < 0.5 else names)
    if forged and name == MANIFEST:
        name = rng.choice(ours)
    how = rng.random()
    if how < 0.15:
        other = rng.choice(checkpoint.others) / name
        if not other.is_file():
            other = checkpoint.original / name
        _write(folder / name, other.read_bytes())
        words = f"{name} of {other.parent.parent.name}/{other.parent.name}"
    elif how < 0.2:
        extra = folder / rng.choice(["extra.json", "extra.safetensors", "optimizer.bin.old", "x/y.txt"])
        extra.parent.mkdir(exist_ok=True)
        extra.write_bytes(b"{")
        words = "a file more"
    else:
        words = rng.choice(_DAMAGE)(rng, folder / name)
    if forged:
        (folder / MANIFEST).unlink()
        write_manifest(folder)
    return folder, words + ", with a manifest that fits" * forged, forged


def _outcome(checkpoint: Checkpoint, folder: Path, forged: bool) -> tuple[str, str]:
    try:
        found = checkpoint.load(folder)
    except ValueError as error:
        named = str(folder) in str(error) or str(error).startswith(("batch.", "sampling."))
        return ("refused by name" if named else "refused without a name"), f"{type(error).__name__}: {error}"[:300]
    finally:
        checkpoint.trainer.checkpoints.load(checkpoint.original, 3)  # What a failed load has left ends here.
    if same(found, checkpoint.right):
        return "right", ""
    return ("trusted", "") if forged else ("wrong", "the state is another one")


def run(folder: Path, inputs: int, seed: int, first: int = 0) -> tuple[Counter[str], list[str]]:
    """Tries checkpoints, see ``trial.try_inputs``; the runs are made in ``folder``."""
    checkpoint = Checkpoint(folder)

    def make(rng: random.Random) -> Input:
        damaged, words, forged = damage(rng, checkpoint)
        return Input(words, lambda: _outcome(checkpoint, damaged, forged))

    return try_inputs(make, ("right", "refused by name", "trusted"), inputs=inputs, seed=seed, first=first)


def main(given: argparse.Namespace) -> dict[str, Any]:
    """Runs the command, and returns its tally."""
    with tempfile.TemporaryDirectory() as folder:
        return as_tally(given, *run(Path(folder), given.inputs, given.seed, given.first))
