"""The tables and sentences that say what a suite found, whichever way it came out.

A sentence says "better" or "worse" only where the 95 % interval leaves zero out and Holm's procedure over all arms
agrees; all else is no evidence.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from maestro_fast.evals.results import Value
from maestro_fast.evals.standings import ORACLES, PUBLISHED, SHARE, Row, Standing, Standings, known_mean
from maestro_fast.evals.statistics import BETTER, NO_EVIDENCE, NO_INTERVAL, WORSE, Difference, PairedTest
from maestro_fast.reporting.tables import Cell, Table

_PLUS_MINUS = "±: 95 % interval over the seeds (Student's t)"
_HOLM = '"not by Holm": the interval leaves zero out, but p does not confirm it'
_IN_TABLE = {BETTER: BETTER, WORSE: WORSE, NO_EVIDENCE: "no evidence", NO_INTERVAL: "-"}
_NAMED = ("world", "profile", "share", "steps")  # conditions with words of their own
_RIVALS = ("equal", "static", "labelled", "reward_model", "reward_model_hybrid")  # what a user would do instead


def name_of(condition: Mapping[str, Value] | Iterable[tuple[str, Value]]) -> str:
    """A condition in words, for example "strong, 5 % labels, 80 steps"."""
    known = dict(condition)
    words = [str(known[name]) for name in ("world", "profile") if name in known]
    words += [f"{name} {value}" for name, value in known.items() if name not in _NAMED and value != "test"]
    words += [f"{share_name(known['share'])} labels"] if "share" in known else []
    words += [f"{known['steps']} steps"] if "steps" in known else []
    return ", ".join(words)


def share_name(share: Value) -> str:
    """A share as a percentage, for example "2.5 %"."""
    return f"{100 * float(share):g} %"


def all_tables(found: Standings) -> list[Table]:
    """All tables, from what matters most to the details."""
    tables: list[Table] = []
    for standings in found.places().values():
        tables += share_tables(found, standings)
    for standing in found.each:
        tables += _measured([standing], found)
        if standing.subject:
            tables.append(subject_table(found, standing))
        tables += [other_table(found, standing, other) for other in found.others if standing.tests.get(other)]
        tables += [*family_table(standing), *diagnostics_table(standing)]
    return [*tables, *settings_table(found)]


def short_tables(found: Standings) -> list[Table]:
    """The tables for a terminal: those over the shares of labels, and all on the arms where conditions are few."""
    tables: list[Table] = []
    for standings in found.places().values():
        over_shares = share_tables(found, standings)
        tables += over_shares
        if not over_shares or len(found.each) <= 4:
            tables += _measured(standings, found)
    return tables


def _measured(standings: Sequence[Standing], found: Standings) -> list[Table]:
    """The main tables of the conditions under which any utility is known."""
    return [main_table(found, standing) for standing in standings if any(row.utility.n for row in standing.rows)]


def main_table(found: Standings, standing: Standing) -> Table:
    """Every arm under one condition: its utility, and what it has over the reference."""
    tests, reference = standing.tests.get(found.reference, {}), found.reference
    digits = _digits([row.utility for row in standing.rows])
    fine = _digits([test.difference for test in tests.values()])
    rows = []
    for row in standing.rows:
        test = tests.get(row.arm)
        count = f"{row.utility.n} of {row.utility.n + row.lost}" if row.lost else str(row.utility.n)
        tail: list[Cell] = [_length(row.length), _count(row.tokens), count]
        rows.append((row.arm, value_text(row.utility, digits), *_against(test, fine), *tail))
    legend = (
        f"{_PLUS_MINUS}. p: paired t-test, adjusted by Holm over {_arms(tests)}; d_z: the difference in its standard "
        f"deviations, with Hedges' correction; {_HOLM}"
    )
    if all(row.utility.n < 2 for row in standing.rows):
        legend = "one seed each, so there is no interval"
    caption = (
        f"Utility on held-out prompts{_at(standing)}; {legend}; length: of a response; tokens: sampled in a training; "
        "n: seeds"
    )
    header = ("arm", "utility", f"minus {reference}", "p", "d_z", "verdict", "length", "tokens", "n")
    return Table(caption, header, tuple(rows))


def other_table(found: Standings, standing: Standing, other: str) -> Table:
    """Every arm under one condition minus another reference."""
    tests = standing.tests[other]
    digits = _digits([test.difference for test in tests.values()])
    rows = [(arm, *_against(test, digits), test.difference.n) for arm, test in tests.items()]
    caption = (
        f"Utility minus that of {other}{_at(standing)}; {_PLUS_MINUS}. p: adjusted by Holm over {_arms(tests)}; {_HOLM}"
    )
    return Table(caption, ("arm", f"minus {other}", "p", "d_z", "verdict", "n"), tuple(rows))


def subject_table(found: Standings, standing: Standing) -> Table:
    """What the subject has over each other arm, by all tests."""
    tests = standing.subject
    digits = _digits([test.difference for test in tests.values()])
    rows = []
    for arm, test in tests.items():
        low, high = test.bootstrap or (math.nan, math.nan)
        bootstrap = "-" if math.isnan(low) else f"{low:+.{digits}f} to {high:+.{digits}f}"
        rows.append((arm, *_against(test, digits)[:2], _p(test.p_permutation), bootstrap, *_against(test, digits)[2:]))
    caption = (
        f"{found.subject}, the subject, minus each other arm{_at(standing)}; {_PLUS_MINUS}. p: paired t-test, adjusted "
        f"by Holm over {_arms(tests)}; p signs: sign-flip permutation test, not adjusted; bootstrap: BCa interval, "
        f"from 8 seeds on; {_HOLM}"
    )
    header = ("arm", "subject minus it", "p", "p signs", "bootstrap", "d_z", "verdict")
    return Table(caption, header, tuple(rows))


def share_tables(found: Standings, standings: Sequence[Standing]) -> list[Table]:
    """The utility of all arms over the shares of labels, and what they have over the reference.

    ``standings`` differ by the share alone; a single one has no such tables. Arms that read no labels have a table of
    their own.
    """
    by_share = [standing for standing in standings if standing.share is not None]
    if len(by_share) < 2:
        return []
    place = name_of(by_share[0].place)
    at = f": {place}" if place else ""
    columns = [share_name(standing.share or 0.0) for standing in by_share]
    rows = {row.arm: row for standing in by_share for row in standing.rows}
    readers = [arm for arm, row in rows.items() if row.reads_labels]
    utilities = {arm: [_utility(standing.row(arm)) for standing in by_share] for arm in readers}
    readers.sort(key=lambda arm: -known_mean([one.mean if one else None for one in utilities[arm]]))
    tests = {arm: [standing.tests.get(found.reference, {}).get(arm) for standing in by_share] for arm in readers}
    digits = _digits([one for arm in readers for one in utilities[arm]])
    fine = _digits([test.difference for arm in readers for test in tests[arm] if test])
    tables = [
        Table(
            f"Utility by the share of labels{at}; {_PLUS_MINUS}",
            ("arm", *columns),
            tuple((arm, *(value_text(one, digits) for one in utilities[arm])) for arm in readers),
        ),
        Table(
            f"Utility minus that of {found.reference} by the share of labels{at}; {_PLUS_MINUS}. *: p < 0.05 in the "
            "paired t-test, adjusted by Holm over all arms of the column",
            ("arm", *columns),
            tuple((arm, *(_starred(test, fine) for test in tests[arm])) for arm in readers if arm != found.reference),
        ),
    ]
    return [*tables, *_without_labels(found, by_share[0], at)]


def _without_labels(found: Standings, standing: Standing, at: str) -> Iterator[Table]:
    """The arms that read no labels. Their results are the same at every share."""
    tests = standing.tests.get(found.reference, {})
    alone = [row for row in standing.rows if not row.reads_labels]
    digits, fine = _digits([row.utility for row in alone]), _digits([test.difference for test in tests.values()])
    rows = [(row.arm, value_text(row.utility, digits), *_against(tests.get(row.arm), fine)) for row in alone]
    if rows:
        caption = f"Arms that read no labels of the training prompts{at}; {_PLUS_MINUS}"
        yield Table(caption, ("arm", "utility", f"minus {found.reference}", "p", "d_z", "verdict"), tuple(rows))


def family_table(standing: Standing) -> Iterator[Table]:
    """The mean utility of each family under one condition, if there are several."""
    families = list(dict.fromkeys(name for row in standing.rows for name in row.families))
    if len(families) > 1:
        rows = [(row.arm, *(_cell(row.families.get(name)) for name in families)) for row in standing.rows]
        yield Table(f"Mean utility of each family{_at(standing)}", ("arm", *families), tuple(rows))


def diagnostics_table(standing: Standing) -> Iterator[Table]:
    """What was logged in training under one condition: from the first values to the last, as means over the seeds."""
    found: dict[str, dict[str, str]] = {}
    for arm in (row.arm for row in standing.rows):
        results = list(standing.results[arm].values())
        over_time = dict.fromkeys(name for one in results for name in one.history if name != "utility")
        for name in over_time:
            series = [known for one in results if (known := known_values(one.history.get(name, [])))]
            if series:
                first, last = (known_mean([values[i][1] for values in series]) for i in (0, -1))
                found.setdefault(name, {})[arm] = f"{first:.3g} to {last:.3g}"
        for name in dict.fromkeys(name for one in results for name in one.figures if name not in over_time):
            mean = known_mean([one.figures.get(name) for one in results])
            if math.isfinite(mean):
                found.setdefault(name, {})[arm] = f"{mean:.3g}"
    arms = [row.arm for row in standing.rows if any(row.arm in cells for cells in found.values())]
    if arms:
        caption = f"Diagnostics{_at(standing)}, means over the seeds: the first value of a training to the last, or one"
        rows = [(arm, *(found[name].get(arm) for name in found)) for arm in arms]
        yield Table(caption, ("arm", *(name.replace("/", " ").replace("_", " ") for name in found)), tuple(rows))


def settings_table(found: Standings) -> Iterator[Table]:
    """The settings that arms had, where any were chosen for them."""
    where: dict[str, dict[str, list[str]]] = {}
    for standings in found.places().values():
        for standing in standings:
            for row in standing.rows:
                at = {k: v for k, v in standing.condition.items() if row.reads_labels or k != SHARE}
                text = "; or ".join(setting_text(one) for one in row.settings)
                names = where.setdefault(row.arm, {}).setdefault(text, [])
                names += [name] if (name := name_of(at)) not in names else []
    rows = [
        (arm, text, "; ".join(names) if len(by_text) > 1 else "all")
        for arm, by_text in sorted(where.items())
        for text, names in by_text.items()
        if text
    ]
    if rows:
        yield Table(
            "The settings of the arms that were chosen in validation", ("arm", "settings", "under"), tuple(rows)
        )


def setting_text(settings: Any) -> str:
    """Settings as text, for example "lr 0.1, values (a 0.5, b 0.5)"."""
    if isinstance(settings, Mapping):
        parts = [
            f"{name} ({text})" if isinstance(value, Mapping) else f"{name} {text}"
            for name, value in settings.items()
            if (text := setting_text(value))
        ]
        return ", ".join(parts)
    return f"{settings:.3g}" if isinstance(settings, float) else str(settings)


def sentences(found: Standings) -> list[str]:
    """What the suite shows, and what it does not, most important first."""
    said = []
    for standings in found.places().values():
        place = name_of(standings[0].place)
        start = f"{place[0].upper()}{place[1:]}: " if place else ""
        if found.subject:
            said += [start + text for text in _subject_sentences(found, standings)]
        said += [start + text for text in _published(found, standings)]
        said += [start + text for text in _reference_sentences(found, standings)]
    return [*said, *_limits(found)]


def _subject_sentences(found: Standings, standings: Sequence[Standing]) -> Iterator[str]:
    """One sentence on each condition: what the subject beats, what beats it, and what it cannot be told from."""
    for standing in standings:
        if not standing.subject:
            continue
        groups: dict[str, list[str]] = {BETTER: [], WORSE: [], NO_EVIDENCE: [], NO_INTERVAL: []}
        for arm, test in standing.subject.items():
            groups[_decided(test)].append(arm)
        said = []
        if groups[BETTER]:
            said.append(f"beats {_beaten(standing.subject, groups[BETTER])}")
        if groups[WORSE]:
            said.append(f"is WORSE than {_with_figures(standing.subject, groups[WORSE])}")
        if groups[NO_EVIDENCE]:
            said.append(
                f"no evidence of benefit or harm against {_with_figures(standing.subject, groups[NO_EVIDENCE])}"
            )
        if groups[NO_INTERVAL]:
            said.append(f"without an interval against {_with_figures(standing.subject, groups[NO_INTERVAL])}")
        share = "" if standing.share is None else f"at {share_name(standing.share)} labels "
        yield f"{share}{found.subject} {'; '.join(said)}."


def _beaten(tests: Mapping[str, PairedTest], arms: Sequence[str]) -> str:
    """The arms that were beaten. What a user would do instead stands first, with figures."""
    first = [arm for arm in arms if arm in _RIVALS or arm in ORACLES] or list(arms[:3])
    rest = [arm for arm in arms if arm not in first]
    return f"{_with_figures(tests, first)}{f', and {_listed(rest)}' if rest else ''}"


def _with_figures(tests: Mapping[str, PairedTest], arms: Sequence[str]) -> str:
    known = {arm: f"an oracle, {_signed(tests[arm].difference)}" for arm in arms if arm in ORACLES}
    return _listed([f"{arm} ({known.get(arm, _signed(tests[arm].difference))})" for arm in arms])


def _published(found: Standings, standings: Sequence[Standing]) -> Iterator[str]:
    """How the Conductor of the paper does against the reference, whichever way that is."""
    if found.subject == PUBLISHED or found.reference == PUBLISHED:
        return
    for standing in standings[:1]:  # It reads no labels, so it is the same at every share.
        test = standing.tests.get(found.reference, {}).get(PUBLISHED)
        if test is not None:
            yield (
                f"MAESTRO as published ({PUBLISHED}) against {found.reference}: {_decided(test)} "
                f"({_signed(test.difference)})."
            )


def _reference_sentences(found: Standings, standings: Sequence[Standing]) -> Iterator[str]:
    """From which share of labels on each arm is above the reference, and which arms never are."""
    tests = [standing.tests.get(found.reference, {}) for standing in standings]
    arms = dict.fromkeys(arm for one in tests for arm in one if arm not in ORACLES)
    never, harmful, at = [], [], []
    for arm in arms:
        verdicts = {
            standing.share: _decided(one[arm]) for standing, one in zip(standings, tests, strict=True) if arm in one
        }
        good = [share for share, verdict in verdicts.items() if verdict == BETTER]
        row = next(row for standing in standings if (row := standing.row(arm)) is not None)
        if any(verdict == WORSE for verdict in verdicts.values()):
            harmful.append(arm)
        elif not good and NO_INTERVAL not in verdicts.values():
            never.append(arm)
        elif good and row.reads_labels and len(standings) > 1:
            every = len(good) == len(standings)
            at.append(f"{arm} at {'every share' if every else _listed([share_name(share or 0) for share in good])}")
        elif good:
            at.append(arm)
    if at:
        yield f"above {found.reference}: {'; '.join(at)}."
    many = len(standings) > 1
    if never:
        yield f"no evidence of benefit over {found.reference}{' at any share' if many else ''}: {_listed(never)}."
    if harmful:
        yield f"WORSE than {found.reference}{' at one share of labels at least' if many else ''}: {_listed(harmful)}."


def _limits(found: Standings) -> Iterator[str]:
    """What stands between these figures and a conclusion."""
    numbers = [row.utility.n for standing in found.each for row in standing.rows]
    if max(numbers) == 0:
        yield "No utility was measured, so nothing here says which arm is the best."
        return
    lost: dict[str, int] = {}
    for row in (row for standing in found.each for row in standing.rows if row.lost):
        lost[row.arm] = max(row.lost, lost.get(row.arm, 0))
    if lost:
        counts = _listed([f"{'up to ' if len(found.each) > 1 else ''}{count} of {arm}" for arm, count in lost.items()])
        yield f"Seeds without a utility were left out of the figures: {counts}. That flatters these arms."
    if max(numbers) == 1:
        yield "There is one seed for each arm, so there are no intervals, and no difference here is beyond chance."
    elif max(numbers) < 5:
        yield f"At most {max(numbers)} seeds stand behind a figure: only large differences can be told from chance."
    if len(set(numbers)) > 1:
        yield "The arms do not all have the same number of seeds; they are compared over the seeds that both have."
    tests = [test for standing in found.each for one in standing.tests.values() for test in one.values()]
    tests += [test for standing in found.each for test in standing.subject.values()]
    apart = [test for test in tests if test.bootstrap is not None and _by_bootstrap(test) != test.verdict]
    if apart:
        yield (
            f"In {len(apart)} of {len(tests)} comparisons the bootstrap interval covers zero and the t interval does "
            "not, or the reverse. The verdicts follow the t interval, which is the wider one with few seeds."
        )


def _by_bootstrap(test: PairedTest) -> str:
    assert test.bootstrap is not None
    low, high = test.bootstrap
    return BETTER if low > 0 else WORSE if high < 0 else NO_EVIDENCE


def _decided(test: PairedTest) -> str:
    """The verdict, which Holm's procedure has to confirm."""
    return test.verdict if test.holds or test.verdict == NO_INTERVAL else NO_EVIDENCE


def _against(test: PairedTest | None, digits: int) -> tuple[Cell, ...]:
    """The cells of a comparison: difference, adjusted p-value, effect size, verdict."""
    if test is None:
        return None, None, None, None
    effect = None if math.isnan(test.effect) else f"{test.effect:+.2f}"
    verdict = "not by Holm" if test.verdict != _decided(test) else _IN_TABLE[test.verdict]
    return value_text(test.difference, digits, sign="+"), _p(test.p_holm), effect, verdict


def _arms(tests: Mapping[str, PairedTest]) -> str:
    return "1 arm" if len(tests) == 1 else f"{len(tests)} arms"


def _utility(row: Row | None) -> Difference | None:
    return None if row is None else row.utility


def value_text(one: Difference | None, digits: int | None = None, sign: str = "") -> str | None:
    """A mean with its half width; the mean alone where there is no interval. Decimals suit the width unless given."""
    if one is None or math.isnan(one.mean):
        return None
    digits = _digits([one]) if digits is None else digits
    mean = f"{one.mean:{sign}.{digits}f}"
    return mean if math.isnan(one.half_width) else f"{mean} ± {one.half_width:.{digits}f}"


def _starred(test: PairedTest | None, digits: int) -> str | None:
    if test is None:
        return None
    star = "*" if test.holds else " "
    return f"{value_text(test.difference, digits, sign='+')}{star}"


def _signed(one: Difference) -> str:
    return value_text(one, sign="+") or "-"


def _digits(*groups: Iterable[Difference | None]) -> int:
    """The number of decimals that shows two digits of the middle half width, or three of the middle mean."""
    known = [one for group in groups for one in group if one is not None and math.isfinite(one.mean)]
    widths = sorted(one.half_width for one in known if math.isfinite(one.half_width) and one.half_width > 0)
    sizes = sorted(abs(one.mean) for one in known if one.mean)
    size = widths[len(widths) // 2] if widths else sizes[len(sizes) // 2] / 10 if sizes else 0.01
    return min(max(1 - math.floor(math.log10(size)), 0), 6)


def _p(p: float) -> str | None:
    return None if math.isnan(p) else "< 0.001" if p < 0.001 else f"{p:.3f}"


def _length(length: float) -> str | None:
    return None if math.isnan(length) else f"{length:.1f}"


def _cell(value: float | None) -> float | None:
    return None if value is None or math.isnan(value) else value


def _count(number: float) -> str | None:
    """A large number in short, for example "1.23M"."""
    if not number or math.isnan(number):
        return None
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.0f}"


def _at(standing: Standing) -> str:
    name = name_of(standing.condition)
    return f": {name}" if name else ""


def _listed(items: Sequence[str]) -> str:
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


def known_values(series: Sequence[Sequence[Any]]) -> list[tuple[int, float]]:
    """The steps and values of a series from ``Result.history`` whose value is known."""
    return [(int(step), float(value)) for step, value in series if value is not None and math.isfinite(value)]
