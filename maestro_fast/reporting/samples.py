"""Picks a few responses from the beginning and the end of a run, without a look at their rewards."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from maestro_fast.reporting.json_lines import counts_from_zero, iter_jsonl, read_tail

Row = dict[str, Any]

PAIRS = 8
_WINDOW = 2048  # This many responses are read at each end of the file.
_TAIL_BYTES = 16 << 20


@dataclass(frozen=True)
class Pair:
    """Two responses to compare. ``late`` is None if the run has no later response of that family."""

    early: Row
    late: Row | None

    @property
    def same_prompt(self) -> bool:
        """Whether both responses answer the same prompt."""
        return self.late is not None and self.early["prompt"] == self.late["prompt"]


def sample_pairs(path: Path, count: int = PAIRS) -> list[Pair]:
    """Picks at most ``count`` pairs from a rollouts file, where task families take turns.

    Only the first response of each group (one prompt in one step) is used. An early response is from the first fifth of
    the steps and a late one from the last fifth. The late response of a pair answers the same prompt if there is one,
    else another prompt of the family.
    """
    more = int(counts_from_zero(path))
    head = _first_of_groups(islice(iter_jsonl(path), _WINDOW), more)
    tail = _first_of_groups(read_tail(path, _TAIL_BYTES)[-_WINDOW:], more)
    if not head or not tail:
        return []
    first, last = head[0]["step"], tail[-1]["step"]
    fifth = (last - first) / 5
    early = [row for row in head if row["step"] <= first + fifth]
    late = [row for row in reversed(tail) if row["step"] >= last - fifth and row["step"] > first]
    late_prompts = {row["prompt"] for row in late}
    # Prompts that come again late go first. The sort is stable, so the rest keeps the order of the file.
    early.sort(key=lambda row: row["prompt"] not in late_prompts)
    return [Pair(row, _take_partner(row, late)) for row in _in_turns(early)[:count]]


def _first_of_groups(rows: Iterable[Row], more: int) -> list[Row]:
    """The first row of each group, with ``more`` added to its step."""
    groups: dict[tuple[int, str], Row] = {}
    for row in rows:
        groups.setdefault((row["step"], row["prompt"]), row)
    return [row | {"step": row["step"] + more} for row in groups.values()]


def _in_turns(rows: Sequence[Row]) -> list[Row]:
    """Orders the rows as the first of each family, then the second of each, and so on; a prompt comes only once."""
    once = {row["prompt"]: row for row in reversed(rows)}
    queues: dict[str, list[Row]] = {}
    for row in rows:
        if once[row["prompt"]] is row:
            queues.setdefault(row["family"], []).append(row)
    turns = [(turn, i, row) for i, queue in enumerate(queues.values()) for turn, row in enumerate(queue)]
    return [row for _, _, row in sorted(turns, key=lambda item: item[:2])]


def _take_partner(row: Row, late: list[Row]) -> Row | None:
    """Removes the best partner for ``row`` from ``late`` and returns it."""
    for key in ("prompt", "family"):
        for index, candidate in enumerate(late):
            if candidate[key] == row[key]:
                return late.pop(index)
    return None
