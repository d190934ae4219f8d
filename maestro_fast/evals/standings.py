"""How the arms of a suite stand under each condition: means over seeds, and paired tests between arms.

Under one condition all arms share their seeds, so a seed's worlds, prompts and draws are common to them, and every
comparison is made seed by seed. A seed on which an arm has no utility (its training diverged) is left out of that arm's
figures and counted.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from maestro_fast.evals.results import Condition, Result, Value, by_arm, conditions, key
from maestro_fast.evals.statistics import Difference, PairedTest, adjusted, mean_interval, paired_test

SHARE = "share"
EQUAL, PUBLISHED = "equal", "conductor"
# The arm that a suite is about, in this order of preference. It is named before the results are seen: an arm that is
# picked because it came out best would be flattered by the choice.
SUBJECTS = ("anchored_residual", "anchored_hybrid", "anchored")
ORACLES = ("static_oracle", "router")  # They know what no user knows, so they are bounds and no rivals.


@dataclass(frozen=True)
class Row:
    """One arm under one condition, as means over its seeds.

    Attributes:
        arm: its name.
        reads_labels: whether its results depend on the share of labels.
        utility: the mean true utility, with its interval over the seeds.
        lost: the number of seeds without a utility.
        families: the mean true utility of each family.
        length: the mean length of a held-out response in tokens (or choices); NaN if there is none.
        tokens: the mean number of completion tokens sampled in a training.
        settings: the different settings that it had, in the order of its seeds.
    """

    arm: str
    reads_labels: bool
    utility: Difference
    lost: int
    families: dict[str, float]
    length: float
    tokens: float
    settings: tuple[Mapping[str, Any], ...]


@dataclass(frozen=True)
class Standing:
    """All arms under one condition.

    Attributes:
        condition: the condition.
        rows: the arms, the best mean utility first.
        tests: for each reference, each other arm minus it, with ``p_holm`` over the arms. A reference that was not run
            under this condition is missing.
        subject: the subject minus each other arm, with ``p_holm`` over these; empty if it was not run.
        results: the results by arm and seed.
    """

    condition: Mapping[str, Value]
    rows: tuple[Row, ...]
    tests: Mapping[str, Mapping[str, PairedTest]]
    subject: Mapping[str, PairedTest]
    results: Mapping[str, Mapping[int, Result]]

    @property
    def share(self) -> float | None:
        """The share of labels, or None if no arm here reads any."""
        share = self.condition.get(SHARE)
        return None if share is None else float(share)

    @property
    def place(self) -> Condition:
        """The condition without the share of labels."""
        return key({name: value for name, value in self.condition.items() if name != SHARE})

    def row(self, arm: str) -> Row | None:
        """The row of an arm, or None if it was not run here."""
        return next((row for row in self.rows if row.arm == arm), None)


@dataclass(frozen=True)
class Standings:
    """The outcome of a suite.

    Attributes:
        each: the standing under each condition; those that differ by the share alone follow one another, ascending.
        reference: the arm that all others are compared with.
        others: further arms that all others are compared with.
        subject: the arm that the suite is about, which is compared with every other; None if there is none.
    """

    each: tuple[Standing, ...]
    reference: str
    others: tuple[str, ...]
    subject: str | None

    def places(self) -> dict[Condition, list[Standing]]:
        """The standings that differ by the share of labels alone, by what they have in common."""
        found: dict[Condition, list[Standing]] = {}
        for standing in self.each:
            found.setdefault(standing.place, []).append(standing)
        return found

    def as_json(self) -> dict[str, Any]:
        """All figures as JSON's types, but those over time."""
        return {
            "reference": self.reference,
            "others": list(self.others),
            "subject": self.subject,
            "conditions": [_as_json(standing) for standing in self.each],
        }


def standings(
    results: Iterable[Result], *, reference: str | None = None, others: Sequence[str] = (), subject: str | None = None
) -> Standings:
    """Compares the arms under every condition.

    Args:
        results: the results of all arms, conditions and seeds.
        reference: the arm that all others are compared with; by default "equal", or the first arm if that was not run.
        others: further arms that all others are compared with.
        subject: the arm that the suite is about; by default the first of ``SUBJECTS`` that was run, if any was.

    Raises:
        ValueError: there are no results, or a named arm was not run under any condition.
    """
    results = list(results)
    arms = list(dict.fromkeys(result.arm for result in results))
    if not arms:
        raise ValueError("results: none, expected at least one")
    reference = reference or (EQUAL if EQUAL in arms else arms[0])
    named = {"reference": [reference], "others": others, "subject": [subject] if subject else []}
    for argument, names in named.items():
        if unknown := [name for name in names if name not in arms]:
            raise ValueError(f"{argument}: {unknown[0]!r} has no results, expected one of {', '.join(arms)}")
    subject = subject or next((name for name in SUBJECTS if name in arms), None)
    references = list(dict.fromkeys((reference, *others)))
    each = [_standing(results, condition, references, subject) for condition in _whole(results)]
    order = list(dict.fromkeys(standing.place for standing in each))
    each.sort(key=lambda standing: (order.index(standing.place), standing.share or 0.0))
    return Standings(tuple(each), reference, tuple(references[1:]), subject)


def _whole(results: Sequence[Result]) -> list[Condition]:
    """The conditions that are not part of another one. Arms that read no labels have a part of the condition only."""
    found = conditions(results)
    return [one for one in found if not any(set(one) < set(other) for other in found)]


def _standing(results: Sequence[Result], pairs: Condition, references: Sequence[str], subject: str | None) -> Standing:
    condition = dict(pairs)
    arms = by_arm(results, condition)
    rows = sorted((_row(arm, seeds) for arm, seeds in arms.items()), key=lambda row: -_sortable(row.utility.mean))
    utilities = {
        arm: {seed: one.utility for seed, one in sorted(seeds.items()) if math.isfinite(one.utility)}
        for arm, seeds in arms.items()
    }
    names = [row.arm for row in rows]
    tests = {ref: _tests([(arm, arm, ref) for arm in names if arm != ref], utilities) for ref in references}
    tests = {ref: found for ref, found in tests.items() if ref in arms}
    against: dict[str, PairedTest] = {}
    if subject in arms:
        against = _tests([(arm, subject, arm) for arm in names if arm != subject], utilities)
    return Standing(condition, tuple(rows), tests, against, arms)


def _sortable(mean: float) -> float:
    return mean if math.isfinite(mean) else -math.inf


def _row(arm: str, seeds: Mapping[int, Result]) -> Row:
    found = [seeds[seed] for seed in sorted(seeds)]
    utilities = [one.utility for one in found if math.isfinite(one.utility)]
    families = dict.fromkeys(name for one in found for name in one.families)
    return Row(
        arm,
        any(SHARE in one.condition for one in found),
        mean_interval(utilities) if utilities else Difference(math.nan, math.nan, 0),
        len(found) - len(utilities),
        {name: known_mean([one.families.get(name) for one in found]) for name in families},
        known_mean([one.length for one in found]),
        known_mean([one.tokens for one in found]),
        tuple({repr(one.settings): one.settings for one in found if one.settings}.values()),
    )


def _tests(
    pairs: Iterable[tuple[str, str, str]], utilities: Mapping[str, Mapping[int, float]]
) -> dict[str, PairedTest]:
    """The tests of pairs (name, ours, theirs) of arms, by the name, over the seeds that both have."""
    found = {}
    for name, ours, theirs in pairs:
        one, other = utilities.get(ours, {}), utilities.get(theirs, {})
        if common := [seed for seed in one if seed in other]:
            found[name] = _compared(tuple(one[seed] for seed in common), tuple(other[seed] for seed in common))
    return dict(zip(found, adjusted(list(found.values())), strict=True))


@lru_cache(maxsize=4096)
def _compared(ours: tuple[float, ...], theirs: tuple[float, ...]) -> PairedTest:
    """The paired test; arms that read no labels come here once for each share, with the same values."""
    return paired_test(ours, theirs)


def known_mean(values: Iterable[float | None]) -> float:
    """The mean of the values that are known and finite; NaN if none is."""
    known = [value for value in values if value is not None and math.isfinite(value)]
    return float(np.mean(known)) if known else math.nan


def _as_json(standing: Standing) -> dict[str, Any]:
    return {
        "condition": dict(standing.condition),
        "arms": [
            {
                "arm": row.arm,
                "utility": _interval(row.utility),
                "lost_seeds": row.lost,
                "families": {name: _number(value) for name, value in row.families.items()},
                "length": _number(row.length),
                "tokens": _number(row.tokens),
                "settings": list(row.settings),
                "minus": {ref: _test(found[row.arm]) for ref, found in standing.tests.items() if row.arm in found},
                "subject_minus_this": _test(standing.subject[row.arm]) if row.arm in standing.subject else None,
            }
            for row in standing.rows
        ],
    }


def _test(test: PairedTest) -> dict[str, Any]:
    return {
        **_interval(test.difference),
        "p": _number(test.p),
        "p_holm": _number(test.p_holm),
        "p_permutation": _number(test.p_permutation),
        "bootstrap": None if test.bootstrap is None else list(test.bootstrap),
        "effect_size": _number(test.effect),
        "verdict": test.verdict,
    }


def _interval(one: Difference) -> dict[str, Any]:
    return {"mean": _number(one.mean), "low": _number(one.low), "high": _number(one.high), "n": one.n}


def _number(value: float) -> float | None:
    """The value, or None for NaN and infinities, which JSON lacks."""
    return value if math.isfinite(value) else None
