"""``maestro-fast eval``: runs a suite, a bundled one or the user's own, and writes what came of it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from maestro_fast.evals.page import as_text, write_summary
from maestro_fast.evals.results import Result
from maestro_fast.evals.standings import EQUAL, standings
from maestro_fast.settings import SettingsError, convert, near

CONFLICT = "conflict"
BUNDLED = {"conflict_lm": Path(__file__).with_name("conflict_lm.yaml")}
_RIVALS = ("static", "labelled")  # What a user would do instead of adaptive weights; tables compare with them, too.


def evaluate(what: str, settings: Sequence[tuple[str, Any]]) -> str:
    """Runs what is missing of a suite, writes its summary into its directory, and returns the summary as text.

    Args:
        what: "conflict", the name of another bundled suite, or the path of a YAML file, see ``suite.read_suite``.
        settings: dotted settings and their values, from the command line. "conflict" has ``out`` and ``workers``.

    Raises:
        SettingsError: something is wrong; the message names the setting.
        ImportError: matplotlib is not installed, which is found before anything runs.
    """
    if find_spec("matplotlib") is None:  # The figures need it, and they come hours later.
        raise ImportError("eval: needs matplotlib for its figures, see pip install 'maestro-fast[report]'")
    if what == CONFLICT:
        return _conflict(dict(settings))
    from maestro_fast.evals.suite import GRID_FILE, read_suite, run_suite

    suite = read_suite(BUNDLED.get(what, Path(what)), settings)
    results = run_suite(suite)
    return _written(results, suite.folder, f"Suite {Path(what).stem}", GRID_FILE)


def _conflict(given: dict[str, Any]) -> str:
    from maestro_fast.evals.conflict_suite import GRID_FILE, run_suite

    known: dict[str, Any] = {"out": "runs/eval-conflict", "workers": 2}
    for name in given:
        if name not in known:
            raise SettingsError(f"{name}: unknown setting, expected one of {', '.join(known)}{near(name, known)}")
    options = {name: convert(given.get(name, value), type(value), name) for name, value in known.items()}
    if options["workers"] < 1:
        raise SettingsError(f"workers: {options['workers']}, expected at least 1")
    folder = Path(options["out"])
    results = run_suite(folder, workers=options["workers"])
    return _written(results, folder, "Conflict worlds", GRID_FILE)


def _written(results: Sequence[Result], folder: Path, title: str, grid_file: str) -> str:
    """Writes the summary, and returns it as text."""
    arms = {result.arm for result in results}
    found = standings(results, others=[name for name in _RIVALS if name in arms and arms - {EQUAL, name}])
    path = folder / grid_file
    grid = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    page = write_summary(found, results, folder, title=title, grid=grid)
    return f"{as_text(found)}\n\nFigures and all tables: {page}"
