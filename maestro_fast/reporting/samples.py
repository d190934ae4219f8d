"""Picks a few prompts of a run, each with a response from early in it and one from late, without a look at rewards."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maestro_fast.reporting.json_lines import counts_from_zero, iter_jsonl, read_tail

Row = dict[str, Any]

PAIRS = 8
_BYTES = 16 << 20  # This much is read at each end of the file.


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

    Only the first response of each group (one prompt in one step) is used. The two responses of a pair answer the same
    prompt: an early one from the first half of the steps, and the last one from the second half, at best from the first
    and the last fifth. A family of which no prompt comes in both halves has one pair of two different prompts, from the
    first and the last fifth. If that holds for every family, there are as many such pairs as of the same prompt.
    """
    more = int(counts_from_zero(path))
    size = os.path.getsize(path)
    tail = _first_of_groups(read_tail(path, _BYTES), more)
    head = tail
    if size > _BYTES:
        head, tail = _first_of_groups(_until(path, _BYTES), more), tail[1:]  # The first group of the tail is cut.
    if not head or not tail:
        return []
    first, last = head[0]["step"], tail[-1]["step"]
    same = _same_prompts(head, tail, first, last)
    early = [row for row in head if row["step"] <= first + (last - first) / 5]
    late = [row for row in reversed(tail) if row["step"] >= last - (last - first) / 5 and row["step"] > first]
    known = {pair.early["family"] for pair in same}
    pairs = _in_turns(same)
    for row in (pair.early for pair in _in_turns([Pair(row, None) for row in early])):
        if not same or row["family"] not in known:
            known.add(row["family"])
            pairs.append(Pair(row, _take_partner(row, late)))
    return _in_turns(pairs)[:count]


def say_pairs(pairs: Sequence[Pair]) -> str:
    """A sentence on whether the pairs answer the same prompts."""
    same = sum(pair.same_prompt for pair in pairs)
    if same == len(pairs):
        return "Both responses of a pair answer the same prompt."
    if same:
        return "Both responses of a pair answer the same prompt where one of that family came early and late."
    return "No prompt that the log shows came in both halves of the run, so a pair has two prompts of one family."


def _same_prompts(head: Sequence[Row], tail: Sequence[Row], first: int, last: int) -> list[Pair]:
    """The prompts that come in both halves of the steps; those that come in the first and the last fifth go first."""
    middle, fifth = (first + last) / 2, (last - first) / 5
    early: dict[str, Row] = {}
    for row in head:
        if row["step"] <= middle:
            early.setdefault(row["prompt"], row)
    late = {row["prompt"]: row for row in tail if row["step"] > middle}
    pairs = [Pair(row, late[prompt]) for prompt, row in early.items() if prompt in late]

    def narrow(pair: Pair) -> bool:
        assert pair.late is not None
        return bool(pair.early["step"] > first + fifth or pair.late["step"] < last - fifth)

    return sorted(pairs, key=narrow)  # The sort is stable, so the rest keeps the order of the file.


def _until(path: Path, size: int) -> Iterator[Row]:
    """The first rows of a file, about ``size`` bytes of them."""
    left = size
    for row in iter_jsonl(path):
        left -= len(row["prompt"]) + len(row["completion"]) + 400  # The rest of a row is short.
        if left < 0:
            return
        yield row


def _first_of_groups(rows: Iterable[Row], more: int) -> list[Row]:
    """The first row of each group, with ``more`` added to its step."""
    groups: dict[tuple[int, str], Row] = {}
    for row in rows:
        groups.setdefault((row["step"], row["prompt"]), row)
    return [row | {"step": row["step"] + more} for row in groups.values()]


def _in_turns(pairs: Sequence[Pair]) -> list[Pair]:
    """Orders the pairs as the first of each family, then the second of each, and so on; a prompt comes only once."""
    once: dict[str, Pair] = {}
    for pair in pairs:
        once.setdefault(pair.early["prompt"], pair)
    queues: dict[str, list[Pair]] = {}
    for pair in once.values():
        queues.setdefault(pair.early["family"], []).append(pair)
    turns = [(turn, i, pair) for i, queue in enumerate(queues.values()) for turn, pair in enumerate(queue)]
    return [pair for _, _, pair in sorted(turns, key=lambda item: item[:2])]


def _take_partner(row: Row, late: list[Row]) -> Row | None:
    """Removes a row of the same family as ``row`` from ``late`` and returns it."""
    for index, candidate in enumerate(late):
        if candidate["family"] == row["family"]:
            return late.pop(index)
    return None
