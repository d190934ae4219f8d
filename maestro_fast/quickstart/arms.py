"""The runs of the quickstart: one config, and what each of its runs changes in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from maestro_fast.settings import override

EXAMPLE = Path(__file__).parent.parent / "examples" / "quickstart"


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Attributes:
        label: what it is called in tables and sentences.
        changes: the settings that differ from those of the bundled config, by dotted name.
    """

    label: str
    changes: Mapping[str, Any]


ANCHORED = "anchored"
"""The run that the others are compared with. It is the bundled config as it stands."""

ARMS = {
    "equal": Arm("equal weights", {"weights": "equal"}),
    # Groups without a label have no signal here. They are dropped, or the mean over the batch would count them.
    "labelled": Arm("labelled prompts alone", {"weights": {"type": "utility"}, "batch.no_signal": "drop"}),
    ANCHORED: Arm("anchored", {}),
}


def run_config(out: Path, arm: str, settings: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The config of a run in ``out``/``arm``.

    Args:
        out: the directory of the models, the prompts and the runs.
        arm: a key of ``ARMS``.
        settings: settings that replace those of the bundled config in every run, by dotted name.
    """
    raw = example_config(out)
    for dotted, value in {**(settings or {}), **ARMS[arm].changes}.items():
        override(raw, dotted, value)
    raw["run_dir"] = str((out / arm).absolute())
    return raw


def example_config(out: Path) -> dict[str, Any]:
    """The bundled config, with paths into this installation and into ``out``."""
    raw: dict[str, Any] = yaml.safe_load((EXAMPLE / "config.yaml").read_text(encoding="utf-8"))
    out = out.absolute()  # Relative paths in the files that are written would start in their folders.
    override(raw, "model.path", str(out / "model"))
    override(raw, "data.path", str(out / "train.jsonl"))
    override(raw, "evaluation.data.path", str(out / "held_out.jsonl"))
    for entry in [*raw["rewards"], raw["anchor"]]:
        if "function" in entry:
            entry["function"] = str(EXAMPLE / Path(entry["function"]).name)
        if "model" in entry:
            entry["model"] = str(out / "reward_model")
    return raw
