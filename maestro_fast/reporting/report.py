"""A run's report: one HTML page that needs nothing else, and its pictures as PNG files beside it."""

from __future__ import annotations

import base64
import json
import platform
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from maestro_fast.reporting import plots
from maestro_fast.reporting.figure import DPI, require_matplotlib
from maestro_fast.reporting.history import History
from maestro_fast.reporting.json_lines import METRICS_FILE, ROLLOUTS_FILE, TIMINGS_FILE, iter_jsonl
from maestro_fast.reporting.samples import sample_pairs
from maestro_fast.reporting.sections import PLOTS, RecordedRun
from maestro_fast.reporting.spread import family_spread
from maestro_fast.reporting.tables import Table, cell_texts, numeric_columns

if TYPE_CHECKING:
    pass

_PACKAGES = ("maestro-fast", "torch", "transformers", "trl", "verl", "vllm", "numpy", "matplotlib")


def write_report(
    run_dir: str | Path,
    *,
    title: str | None = None,
    summary: Sequence[str] = (),
    tables: Sequence[Table] = (),
    compare: Mapping[str, Path] | None = None,
) -> Path:
    """Writes ``run_dir``/report/report.html and report/*.png from what the run logged.

    The page loads nothing and runs no script. Only metrics.jsonl is indispensable; a plot or section whose data is not
    there is left out, and the page says which and why.

    Args:
        run_dir: a run directory.
        title: of the page; the directory's name if None.
        summary: sentences to stand first, as they are.
        tables: to follow them.
        compare: up to three other run directories by label; their weights are laid dotted over this run's.

    Returns:
        The path of the page.

    Raises:
        FileNotFoundError: a run directory or its metrics.jsonl does not exist; the message names it.
        ValueError: a metrics.jsonl holds no line or a broken one, or ``compare`` names more than three runs.
        ImportError: matplotlib is not installed.
    """
    require_matplotlib()
    run = _load(Path(run_dir), compare or {})
    path = run.directory / "report" / "report.html"
    path.parent.mkdir(exist_ok=True)
    path.write_text(_page(run, title, summary, tables), encoding="utf-8")
    return path


def _page(run: RecordedRun, title: str | None, summary: Sequence[str], tables: Sequence[Table]) -> str:
    """The HTML; the pictures are written on the way."""
    pictures, left_out = _draw(run, run.directory / "report")
    rollouts = run.directory / ROLLOUTS_FILE
    pairs = sample_pairs(rollouts) if rollouts.exists() else []
    if not pairs:
        left_out.append(("Sample responses", f"there is no {ROLLOUTS_FILE}, or nothing in it"))
    if run.config is None:
        left_out.append(("Configuration", "there is no config.yaml"))
    more = [table for table in _spread_tables(run) if table not in tables]
    page: str = _template().render(
        title=title or f"Training run {run.directory.resolve().name}",
        facts=[*_facts(run.history, run.timings), *_kept(run.directory)],
        summary=summary,
        tables=[_table(table) for table in (*tables, *more)],
        pictures=pictures,
        left_out=left_out,
        pairs=pairs,
        config=run.config,
        versions=_versions(),
        written=datetime.now(UTC).strftime("%d %B %Y, %H:%M UTC"),
    )
    return page


def _load(directory: Path, compare: Mapping[str, Path]) -> RecordedRun:
    if len(compare) > plots.MAX_OTHERS:
        raise ValueError(f"compare: got {len(compare)} runs, expected at most {plots.MAX_OTHERS}")
    history = _history(directory)
    others = {label: _history(Path(other)) for label, other in compare.items()}
    config, timings = directory / "config.yaml", directory / TIMINGS_FILE
    return RecordedRun(
        directory,
        history,
        others,
        History.of(iter_jsonl(timings)) if timings.exists() else None,
        config.read_text(encoding="utf-8") if config.exists() else None,
    )


def _history(directory: Path) -> History:
    path = directory / METRICS_FILE
    if not path.exists():
        what = f"there is no {METRICS_FILE}" if directory.is_dir() else "there is no such run directory"
        raise FileNotFoundError(f"{path}: {what}")
    history = History.of(iter_jsonl(path))
    if not len(history):
        raise ValueError(f"{path}: holds no lines, expected one per logged step")
    return history


def _draw(run: RecordedRun, target: Path) -> tuple[list[dict[str, str]], list[tuple[str, str]]]:
    """The pictures of the page, and (heading, reason) of those that cannot be drawn."""
    pictures, left_out = [], []
    for plot in PLOTS:
        path = target / f"{plot.name}.png"
        path.unlink(missing_ok=True)  # of an earlier report
        try:
            figure = plot.draw(run)
        except plots.MissingData as missing:
            left_out.append((plot.heading, str(missing)))
            continue
        figure.savefig(path, dpi=DPI)
        data = base64.b64encode(path.read_bytes()).decode()
        reading = plot.reading
        if plot.name == "weights_by_family" and run.others:
            reading = f"{reading[:-1]}; dotted, the same in {' and '.join(run.others)}."
        pictures.append({"name": plot.name, "heading": plot.heading, "reading": reading, "data": data})
    return pictures, left_out


def _facts(history: History, timings: History | None) -> Iterator[str]:
    took = ""
    if timings is not None and timings.has("total"):
        took = f", in {_duration(float(np.nansum(timings.get('total'))))}"
    steps = f"{len(history):,} logged step{'s' if len(history) > 1 else ''}"
    yield f"{steps}, up to step {int(history.steps[-1]):,}{took}."
    for names, noun in ((history.rewards, "rewards"), (history.families, "task families")):
        if names:
            yield f"{len(names)} {noun}: {', '.join(name or '(no family)' for name in names)}."


def _kept(directory: Path) -> Iterator[str]:
    """Which policy ``final/`` holds, where it is not the last one."""
    path = directory / "final" / "best.json"
    about = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if about.get("step") is not None:
        yield (
            f"final/ holds the policy after step {about['step']:,}: the utility of its labelled responses, over the "
            f"last {about['window']} batches with labels, was the best of the run, {about['utility']:.4g}."
        )


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


def _spread_tables(run: RecordedRun) -> Iterator[Table]:
    """Whether the weights depend on the task: the number and the means behind it."""
    spreads = {}
    for label, history in {"this run": run.history, **run.others}.items():
        if any(key.startswith("families/") and "/weights/" in key for key in history.columns):
            spreads[label] = family_spread(history)
    if "this run" in spreads and len(spreads["this run"].families) > 1:
        yield spreads["this run"].table()
        if len(spreads) > 1:
            caption = "Between-family spread of the weights, against the other runs: noise alone spreads them too"
            yield Table(caption, ("run", "spread"), tuple((label, s.spread) for label, s in spreads.items()))


def _table(table: Table) -> dict[str, Any]:
    rows, numeric = cell_texts(table), numeric_columns(table)
    return {"caption": table.caption, "header": table.header, "rows": rows, "numeric": numeric}


def _versions() -> list[tuple[str, str]]:
    installed = [("Python", platform.python_version())]
    for package in _PACKAGES:
        try:
            installed.append((package, metadata.version(package)))
        except metadata.PackageNotFoundError:
            continue
    return installed


def _template() -> Any:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = lambda value: "-" if value is None else f"{value:.3f}"
    return environment.get_template("report.html.j2")
