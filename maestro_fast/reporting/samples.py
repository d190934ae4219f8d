"""A few responses from the beginning and the end of a run, picked without a look at their rewards."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from maestro_fast.reporting.json_lines import iter_jsonl, read_tail

Row = dict[str, Any]

PAIRS = 8
_WINDOW = 2048  # responses looked at, at either end
_TAIL_BYTES = 16 << 20


@dataclass(frozen=True)
class Pair:
    """Two responses to compare; ``late`` is None where the run has only one step, ``early`` never is."""

    early: Row
    late: Row | None

    @property
    def same_prompt(self) -> bool:
        return self.late is not None and self.early["prompt"] == self.late["prompt"]


def sample_pairs(path: Path, count: int = PAIRS) -> list[Pair]:
    """At most ``count`` pairs from a rollouts file, the task families taking turns.

    Of each group (one step, one prompt) the first response counts. Early ones are from the first fifth of the steps,
    late ones from the last fifth; a late one answers the same prompt where the windows hold it, else one of the family.
    """
    head = _first_of_groups(islice(iter_jsonl(path), _WINDOW))
    tail = _first_of_groups(read_tail(path, _TAIL_BYTES)[-_WINDOW:])
    if not head or not tail:
        return []
    first, last = head[0]["step"], tail[-1]["step"]
    fifth = (last - first) / 5
    early = [row for row in head if row["step"] <= first + fifth]
    late = [row for row in reversed(tail) if row["step"] >= last - fifth and row["step"] > first]
    late_prompts = {row["prompt"] for row in late}
    early.sort(key=lambda row: row["prompt"] not in late_prompts)  # stable: else in the order of the file
    return [Pair(row, _take_partner(row, late)) for row in _in_turns(early)[:count]]


def _first_of_groups(rows: Iterable[Row]) -> list[Row]:
    groups: dict[tuple[int, str], Row] = {}
    for row in rows:
        groups.setdefault((row["step"], row["prompt"]), row)
    return list(groups.values())


def _in_turns(rows: Sequence[Row]) -> list[Row]:
    """One row of each family, then the second of each, and so on; a prompt comes once."""
    once = {row["prompt"]: row for row in reversed(rows)}
    queues: dict[str, list[Row]] = {}
    for row in rows:
        if once[row["prompt"]] is row:
            queues.setdefault(row["family"], []).append(row)
    turns = [(turn, i, row) for i, queue in enumerate(queues.values()) for turn, row in enumerate(queue)]
    return [row for _, _, row in sorted(turns, key=lambda item: item[:2])]


def _take_partner(row: Row, late: list[Row]) -> Row | None:
    """The best match, removed from ``late``."""
    for key in ("prompt", "family"):
        for index, candidate in enumerate(late):
            if candidate[key] == row[key]:
                return late.pop(index)
    return None
