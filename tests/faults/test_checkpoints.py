"""A checkpoint that is damaged in any of its files, or that is of another number of rewards, is refused by name."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from maestro_fast.manifest import MANIFEST
from maestro_fast.records import StepRecord
from maestro_fast.reporting.recorded_run import recorded_train
from maestro_fast.settings import SettingsError
from tests.faults.reading import metrics
from tests.training.test_trainer import run


def flip(path: Path) -> None:
    """Changes one bit of the byte in the middle."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "cut to half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "emptied": lambda path: path.write_bytes(b""),
    "a byte flipped": flip,
    "deleted": lambda path: path.unlink(),
}


@pytest.mark.parametrize("lora", [None, {"r": 2}], ids=["full", "lora"])
def test_every_file_is_checked_before_a_step_is_made(raw: dict[str, Any], lora: dict[str, int] | None) -> None:
    raw["weights"] = "conductor"
    raw["model"]["lora"] = lora
    raw["batch"] |= {"updates_per_batch": 2, "micro_batch": 4}  # The checkpoint holds responses.
    trainer, records = run(raw)
    made = len(records)
    folder = Path(raw["run_dir"]) / "checkpoint-3"
    files = sorted(path.name for path in folder.iterdir())
    assert {"optimizer.pt", "step_state_0_of_1.safetensors", "weight_policy.safetensors", MANIFEST} < {*files}
    assert ("adapter_model.safetensors" if lora else "model.safetensors") in files

    for name in files:
        content = (folder / name).read_bytes()
        for damage, harm in DAMAGES.items():
            if (name, damage) == (
                MANIFEST,
                "deleted",
            ):  # as in checkpoints of version 0.1, see test_checkpoint_refusals
                continue
            harm(folder / name)
            # A changed byte in a checksum shows in the file that it belongs to.
            named = "" if name == MANIFEST else rf"{re.escape(name)} (is|has) "
            with pytest.raises(ValueError, match=rf"^resume_from_checkpoint: .*checkpoint-3 is damaged: {named}"):
                trainer.train(resume_from_checkpoint=str(folder))
            (folder / name).write_bytes(content)
    assert len(records) == made


def test_a_damaged_checkpoint_costs_nothing_but_its_own_step(raw: dict[str, Any]) -> None:
    recorded_train(raw)
    last = Path(raw["run_dir"]) / "checkpoint-3"
    before = (Path(raw["run_dir"]) / "rollouts.jsonl").read_bytes()
    flip(last / "model.safetensors")
    raw["trainer"]["max_steps"] = 4
    with pytest.raises(ValueError, match=r"model\.safetensors is not as it was written; move it away .*checkpoint-2$"):
        recorded_train(raw, resume=True)
    shutil.move(last, f"{raw['run_dir']}-damaged")
    recorded_train(raw, resume=True)
    after = (Path(raw["run_dir"]) / "rollouts.jsonl").read_bytes()
    assert after.startswith(before) and [line["step"] for line in metrics(raw)] == [1, 2, 3, 4]


@pytest.mark.parametrize("weights", ["equal", "conductor", {"type": "static", "values": {"brevity": 2.0}}])
def test_a_checkpoint_of_another_number_of_rewards_is_refused(raw: dict[str, Any], weights: Any) -> None:
    raw["weights"] = weights
    run(raw)
    own = raw | {"rewards": [*raw["rewards"], "format"]}
    if isinstance(weights, dict):
        own["weights"] = {"type": "static", "values": {"brevity": 2.0, "format": 1.0}}
    own["trainer"] |= {"max_steps": 4}
    seen: list[StepRecord] = []
    words = r"checkpoint-3/weight_policy\.safetensors is of rewards .*brevity.*, this run has .*brevity.*format"
    with pytest.raises((ValueError, SettingsError), match=words):
        recorded_train(own, resume=True, observers=[seen.append])
    assert not seen
    fewer = raw | {"rewards": [{"type": "length", "name": "other", "target": 2}]}
    if isinstance(weights, dict):
        fewer["weights"] = {"type": "static", "values": {"other": 2.0}}
    with pytest.raises(ValueError, match=json.dumps(["other"]).replace("[", r"\[").replace("]", r"\]")):
        recorded_train(fewer, resume=True)
