"""What one trained policy is worth, as every tier of the suite writes it: one line of results.jsonl.

A result belongs to an arm (what was done), a condition (where, under which settings) and a seed. Two arms are compared
over the seeds of the same condition, because these share prompts, first parameters and random draws.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

Value = str | int | float
Condition = tuple[tuple[str, Value], ...]
_NUMBERS = ("utility", "length")  # the fields of a result that may be NaN


@dataclass(frozen=True)
class Result:
    """The outcome of one training, measured on prompts that were held out from it.

    Attributes:
        arm: what was done, for example "equal" or "anchored".
        seed: the seed of the training.
        condition: where it was done, for example {"world": "strong", "share": 0.05, "steps": 80}. An arm that reads no
            labels has no "share", and counts at every share.
        utility: the mean true utility, over families and then over the prompts of each.
        families: the mean true utility of each family.
        length: the mean number of tokens (or choices) of a held-out response; NaN if responses have no length.
        tokens: the number of completion tokens sampled in training.
        figures: diagnostics by name, as means over the last quarter of the training.
        history: figures over time: for each name, pairs of a step and a value.
        settings: the settings of the arm that were chosen for it on validation worlds or prompts.
    """

    arm: str
    seed: int
    condition: Mapping[str, Value]
    utility: float
    families: Mapping[str, float] = field(default_factory=dict)
    length: float = math.nan
    tokens: int = 0
    figures: Mapping[str, float] = field(default_factory=dict)
    history: Mapping[str, list[tuple[int, float]]] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """The result as a mapping of JSON's types, in which null stands for a NaN."""
        unknown = {name: None for name in _NUMBERS if math.isnan(getattr(self, name))}
        return asdict(self) | unknown

    @staticmethod
    def from_json(row: Mapping[str, Any]) -> Result:
        """Reads what ``as_json`` gave. JSON has no NaN, so a null stands for it."""
        numbers = {name: math.nan if row[name] is None else row[name] for name in _NUMBERS}
        return Result(**{name: row[name] for name in Result.__dataclass_fields__ if name in row} | numbers)


def conditions(results: Iterable[Result]) -> list[Condition]:
    """The different conditions, in the order in which they first occur, each as sorted pairs."""
    return list(dict.fromkeys(key(result.condition) for result in results))


def key(condition: Mapping[str, Value]) -> Condition:
    """A condition as sorted pairs, which can be a key."""
    return tuple(sorted(condition.items()))


def by_arm(results: Iterable[Result], condition: Mapping[str, Value]) -> dict[str, dict[int, Result]]:
    """The results under a condition, by arm and seed.

    An arm whose results lack a name of the condition counts there, too: the equal weights of a world stand beside the
    anchored weights at every share of labels.
    """
    found: dict[str, dict[int, Result]] = {}
    for result in results:
        if all(condition.get(name) == value for name, value in result.condition.items()):
            found.setdefault(result.arm, {})[result.seed] = result
    return found
