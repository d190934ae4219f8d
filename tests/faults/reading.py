"""What a user reads of a run: the error that ended it, and the lines of its logs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from maestro_fast.reporting import read_jsonl


def told(error: BaseException) -> str:
    """An error with its notes, as a command prints them."""
    return "\n".join([str(error), *getattr(error, "__notes__", [])])


def names_step(said: str, step: int) -> bool:
    """Whether a message says which step it is about; it has one batch here, which has the same number."""
    return re.search(rf"\bin (step|generation batch) {step}, ", said) is not None


def metrics(raw: dict[str, Any]) -> list[dict[str, Any]]:
    """The lines of the log that are about training, one for each step."""
    return [line for line in read_jsonl(Path(raw["run_dir"]) / "metrics.jsonl") if "loss" in line]


def rollouts(raw: dict[str, Any], step: int) -> list[dict[str, Any]]:
    """The responses of a step."""
    return [row for row in read_jsonl(Path(raw["run_dir"]) / "rollouts.jsonl") if row["step"] == step]
