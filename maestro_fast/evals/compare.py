"""``maestro-fast compare RUN...``: the arms of suites, or the held-out figures of training runs, side by side.

Runs of several seeds are compared seed by seed. A run directory keeps no figures of single held-out prompts, so a
single run of each kind gives no interval, and the comparison says so.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import yaml

from maestro_fast.evals.figures import CURVES
from maestro_fast.evals.jobs import RESULTS_FILE
from maestro_fast.evals.page import ARMS_FILE, as_text, read_arms, write_summary
from maestro_fast.evals.results import Result
from maestro_fast.evals.standings import EQUAL, SUBJECTS, standings
from maestro_fast.evals.statistics import PairedTest, adjusted, mean_interval, paired_test
from maestro_fast.evals.summary import value_text
from maestro_fast.reporting.history import History
from maestro_fast.reporting.json_lines import METRICS_FILE, iter_jsonl
from maestro_fast.reporting.tables import Table

_POINTS = 200  # At most this many values of a figure over time are drawn.
_REWARD = ("eval_rewards/", "/mean")
_FAMILY = ("eval_families/", "/utility")


@dataclass(frozen=True)
class _Runs:
    """What one argument names: a label and its directories."""

    label: str
    folders: tuple[Path, ...]

    @property
    def is_suite(self) -> bool:
        return len(self.folders) == 1 and (self.folders[0] / ARMS_FILE).exists()


def compare(runs: Sequence[str | Path], out: Path | None = None) -> str:
    """Compares suites or training runs.

    Args:
        runs: directories of suites, or of training runs. A run may be given as LABEL=DIRECTORY,DIRECTORY,... where the
            directories are runs of the same kind with other seeds; without a label, it has the directory's name. The
            first run is what all others are compared with; in suites, this is "equal".
        out: where summary.json, summary.md, report.html and the figures go; None writes nothing.

    Returns:
        The tables and sentences for a terminal.

    Raises:
        ValueError: a directory is neither, suites and runs are mixed, two have the same label or the same seed, or a
            run was never evaluated on held-out prompts; the message begins with "runs".
        ImportError: ``out`` is given, and matplotlib is not installed.
    """
    named = [_named(str(run)) for run in runs]
    if not named:
        raise ValueError("runs: none, expected directories of suites or training runs")
    if twice := [one.label for i, one in enumerate(named) if one.label in [other.label for other in named[:i]]]:
        raise ValueError(f"runs: two are called {twice[0]!r}, expected LABEL=DIRECTORY for one of them")
    suites = [one.is_suite for one in named]
    if any(suites) and not all(suites):
        raise ValueError("runs: suites and training runs, expected one kind")
    tables: list[Table] = []
    if all(suites):
        results, reference, subject = _of_suites(named)
    else:
        results, reference, subject = [result for one in named for result in _of_runs(one)], named[0].label, None
        tables = list(_reward_tables(results, reference))
    found = standings(results, reference=reference, subject=subject)
    text = as_text(found, tables=tables)
    if out is not None:
        page = write_summary(found, results, out, title=f"Comparison of {_listed(named)}", tables=tables)
        text += f"\n\nFigures and all tables: {page}"
    return text


def _named(text: str) -> _Runs:
    """Reads one argument. A directory whose own name has an equals sign is a directory."""
    label, equals, rest = text.partition("=")
    folders = [Path(text)] if Path(text).exists() or not equals else [Path(part) for part in rest.split(",") if part]
    if not folders or (equals and not label):
        raise ValueError(f"runs: {text!r}, expected DIRECTORY or LABEL=DIRECTORY,DIRECTORY")
    for folder in folders:
        if (folder / ARMS_FILE).exists():
            if len(folders) > 1:
                raise ValueError(f"runs: {folder} is one suite of several in {text!r}, expected it alone")
        elif (folder / RESULTS_FILE).exists():
            raise ValueError(f"runs: {folder} is a suite that has not ended; maestro-fast eval goes on with it")
        elif not (folder / METRICS_FILE).exists():
            raise ValueError(f"runs: {folder} has neither {ARMS_FILE} nor {METRICS_FILE}, expected a suite or a run")
    return _Runs(label if folders != [Path(text)] else folders[0].resolve().name, tuple(folders))


def _of_suites(named: Sequence[_Runs]) -> tuple[list[Result], str | None, str | None]:
    """The results of all suites, the reference and the subject. An arm of several suites gets the suite's label."""
    found = {one.label: read_arms(one.folders[0]) for one in named}
    arms = {label: {result.arm for result in results} for label, results in found.items()}
    shared = {arm for own in arms.values() for arm in own if sum(arm in other for other in arms.values()) > 1}

    def renamed(label: str, arm: str) -> str:
        return f"{arm} [{label}]" if arm in shared else arm

    results = [replace(one, arm=renamed(label, one.arm)) for label, rows in found.items() for one in rows]
    first = named[0].label
    subject = next((renamed(first, arm) for arm in SUBJECTS if arm in arms[first]), None)
    return results, renamed(first, EQUAL) if EQUAL in arms[first] else None, subject


def _of_runs(one: _Runs) -> Iterator[Result]:
    """A result for each run directory of a label, from its last evaluation."""
    seeds: set[int] = set()
    for number, folder in enumerate(one.folders, 1):
        seed = _seed(folder, number)
        if seed in seeds:
            raise ValueError(f"runs: two runs of {one.label} have the seed {seed}, expected one of each seed")
        seeds.add(seed)
        yield _result(one.label, seed, folder)


def _seed(folder: Path, number: int) -> int:
    """The seed in the run's config.yaml, or its number among the runs of the label."""
    path = folder / "config.yaml"
    config = yaml.safe_load(path.read_text(encoding="utf-8")) if path.exists() else None
    seed = config.get("seed") if isinstance(config, Mapping) else None
    return seed if isinstance(seed, int) else number


def _result(label: str, seed: int, folder: Path) -> Result:
    history = History.of(iter_jsonl(folder / METRICS_FILE))
    evaluated = [name for name in history.columns if name.startswith("eval_") and history.has(name)]
    if not evaluated:
        raise ValueError(
            f"runs: {folder} was never evaluated on held-out prompts, expected a section evaluation in its config"
        )
    last = max(int(np.flatnonzero(np.isfinite(history.get(name)))[-1]) for name in evaluated)

    def at_last(start: str, end: str) -> dict[str, float]:
        names = [name for name in evaluated if name.startswith(start) and name.endswith(end)]
        return {name[len(start) : -len(end)]: float(history.get(name)[last]) for name in names}

    figures = at_last(*_REWARD) | {"step": float(history.steps[last])}
    over_time = {"utility": "eval_utility", **{name: name for name in CURVES}}
    return Result(
        label,
        seed,
        {},
        float(history.get("eval_utility")[last]),
        at_last(*_FAMILY),
        float(history.get("eval_completions/mean_length")[last]),
        figures=figures,
        history={name: points for name, key in over_time.items() if (points := _points(history, key))},
    )


def _points(history: History, key: str) -> list[tuple[int, float]]:
    values = history.get(key)
    known = np.flatnonzero(np.isfinite(values))
    kept = known[:: max(1, math.ceil(len(known) / _POINTS))]
    return [(int(history.steps[i]), float(values[i])) for i in kept]


def _reward_tables(results: Sequence[Result], reference: str) -> Iterator[Table]:
    """The rewards and lengths on held-out prompts of each label, and what they have over the reference."""
    labels = list(dict.fromkeys(result.arm for result in results))
    names = list(dict.fromkeys(name for result in results for name in result.figures if name != "step"))
    values: dict[str, dict[str, dict[int, float]]] = {
        label: {name: {r.seed: r.figures.get(name, math.nan) for r in results if r.arm == label} for name in names}
        | {"length": {r.seed: r.length for r in results if r.arm == label}}
        for label in labels
    }
    columns = [*names, "length"]
    steps = {label: sorted({int(r.figures["step"]) for r in results if r.arm == label}) for label in labels}
    rows = []
    for label in labels:
        span = " to ".join(map(str, dict.fromkeys((steps[label][0], steps[label][-1]))))
        own = values[label]
        rows.append((label, span, len(own["length"]), *(_mean(own[name]) for name in columns)))
    several = any(len(own["length"]) > 1 for own in values.values())
    caption = "Mean rewards and lengths on held-out prompts at the last evaluation"
    caption += "; ±: 95 % interval over the seeds" if several else "; one seed each, so there is no interval"
    yield Table(caption, ("run", "step", "seeds", *columns), tuple(rows))
    tests = {}
    for label in labels:
        for name in columns:
            ours, theirs = values[label][name], values[reference][name]
            common = [s for s in ours if s in theirs and math.isfinite(ours[s]) and math.isfinite(theirs[s])]
            if label != reference and len(common) > 1:
                tests[label, name] = paired_test([ours[s] for s in common], [theirs[s] for s in common])
    if tests:
        tests = dict(zip(tests, adjusted(list(tests.values())), strict=True))
        gaps = [
            (label, *(_gap(tests[label, name]) if (label, name) in tests else None for name in columns))
            for label in labels
            if label != reference
        ]
        yield Table(
            f"The same minus those of {reference}, seed by seed; ±: 95 % interval. *: p < 0.05 in the paired t-test, "
            f"adjusted by Holm over the {len(tests)} figures of this table",
            ("run", *columns),
            tuple(gaps),
        )


def _mean(by_seed: Mapping[int, float]) -> str | None:
    known = [value for value in by_seed.values() if math.isfinite(value)]
    return value_text(mean_interval(known)) if known else None


def _gap(test: PairedTest) -> str:
    return f"{value_text(test.difference, sign='+')}{'*' if test.holds else ' '}"


def _listed(named: Sequence[_Runs]) -> str:
    return ", ".join(one.label for one in named)
