"""A run's report: one HTML page that needs no other file, and its pictures as PNG files beside it."""

from __future__ import annotations

import base64
import json
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from maestro_fast.records import TOKEN_COUNTS
from maestro_fast.reporting import plots
from maestro_fast.reporting.figure import DPI, require_matplotlib
from maestro_fast.reporting.history import History, family_spread
from maestro_fast.reporting.json_lines import ALARMS_FILE, METRICS_FILE, ROLLOUTS_FILE, TIMINGS_FILE, iter_jsonl
from maestro_fast.reporting.samples import sample_pairs, say_pairs
from maestro_fast.reporting.stage_times import stage_times
from maestro_fast.reporting.tables import Table, cell_texts, numeric_columns
from maestro_fast.reporting.verdict import Verdict, policy_name, verdict

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PACKAGES = ("maestro-fast", "torch", "transformers", "trl", "verl", "vllm", "numpy", "matplotlib")


@dataclass(frozen=True)
class RecordedRun:
    """What a run left in its directory.

    Attributes:
        directory: The run directory.
        history: The metrics.
        others: The metrics of the runs to compare with, by label.
        timings: The seconds of each stage by step, or None if there is no timings.jsonl.
        config: The text of config.yaml, or None if there is none.
        alarms: The alarms that rang, as they stand in alarms.jsonl.
    """

    directory: Path
    history: History
    others: dict[str, History]
    timings: History | None
    config: str | None
    alarms: tuple[dict[str, Any], ...]

    @property
    def verdict(self) -> Verdict:
        """What the run shows."""
        return verdict(self.history, self.others, alarms=self.alarms, policy=policy_name(self.config))


@dataclass(frozen=True)
class Plot:
    """A plot of the report. ``reading`` is one sentence that tells how to read it."""

    name: str
    heading: str
    reading: str
    draw: Callable[[RecordedRun], Figure]


def _stage_times(run: RecordedRun) -> Figure:
    if run.timings is None or not len(run.timings):
        raise plots.MissingData(f"there is no {TIMINGS_FILE}, or nothing in it")
    return stage_times(run.timings)


PLOTS = (  # in the order in which they stand on the page
    Plot(
        "weights_by_family",
        "Reward weights by task family",
        "Where a panel's lines leave the dashed one, that family's rewards are not weighted equally; where the panels "
        "differ, the weights depend on the task.",
        lambda run: plots.family_weights(run.history, run.others),
    ),
    Plot(
        "rewards",
        "Rewards",
        "Every reward has its own scale; if its line rises while its band gets narrower, the policy earns the reward "
        "more reliably.",
        lambda run: plots.rewards(run.history),
    ),
    Plot(
        "rewards_by_family",
        "Rewards by task family",
        "Lines that drift apart show a reward that some families earn and others pay for.",
        lambda run: plots.family_rewards(run.history),
    ),
    Plot(
        "evaluation",
        "Rewards on held-out prompts",
        "If a reward rises in training but not on held-out prompts, the policy has memorised the training prompts.",
        lambda run: plots.evaluation(run.history),
    ),
    Plot(
        "advantages",
        "Advantages",
        "The spread is the strength of the training signal; a degenerate group, whose responses all score the same, "
        "gives no signal.",
        lambda run: plots.advantages(run.history),
    ),
    Plot(
        "response_length",
        "Response length",
        "If lengths climb to the token limit, or a growing share of responses is cut off by it, the rewards judge "
        "unfinished answers.",
        lambda run: plots.response_length(run.history, token_limit(run.config)),
    ),
    Plot(
        "stage_times",
        "Time per stage",
        "The areas at the left are stacked from the bottom in the order and colours of the right panel, which gives "
        "each stage's mean time.",
        _stage_times,
    ),
    Plot(
        "advantage_shares",
        "What makes the advantage",
        "A reward whose line is near 100 % decides alone which responses are reinforced; a reward with a negative "
        "share is outvoted.",
        lambda run: plots.advantage_shares(run.history),
    ),
    Plot(
        "diagnostics",
        "Diagnostics of the weights",
        "A line outside its green range has a remedy, which the log names.",
        lambda run: plots.diagnostics(run.history),
    ),
    Plot(
        "conductor",
        "Conductor",
        "Entropy at its dashed maximum means equal weights; self-flattery above the green band means that the "
        "Conductor picks the rewards which flatter a response rather than those which the task needs.",
        lambda run: plots.conductor(run.history),
    ),
    Plot(
        "policy",
        "Policy update",
        "Sudden steps in the gradient, the entropy or the divergence mark the updates to look at more closely.",
        lambda run: plots.policy(run.history),
    ),
)


def write_report(
    run_dir: str | Path,
    *,
    title: str | None = None,
    summary: Sequence[str] = (),
    tables: Sequence[Table] = (),
    compare: Mapping[str, Path] | None = None,
) -> Path:
    """Writes ``run_dir``/report/report.html and report/*.png from what the run logged.

    The page loads nothing and runs no script. Only metrics.jsonl is required. If the data of another plot or section is
    missing, the page leaves it out and says which and why.

    Args:
        run_dir: The run directory.
        title: The title of the page; by default it has the directory's name.
        summary: The sentences that stand first on the page.
        tables: The tables that follow them.
        compare: Maps labels to up to three other run directories. Their weights are drawn dotted over this run's.

    Returns:
        The path of the page.

    Raises:
        FileNotFoundError: A run directory or its metrics.jsonl does not exist; the message names it.
        ValueError: A metrics.jsonl holds no line or a broken one, or ``compare`` names more than three runs.
        ImportError: matplotlib is not installed.
    """
    require_matplotlib()
    run = _load(Path(run_dir), compare or {})
    path = run.directory / "report" / "report.html"
    path.parent.mkdir(exist_ok=True)
    path.write_text(_page(run, title, summary, tables), encoding="utf-8")
    return path


def printed_verdict(run_dir: str | Path, *, compare: Mapping[str, Path] | None = None) -> str:
    """What the report says first, in a few lines for a terminal; it needs no matplotlib.

    Raises:
        FileNotFoundError, ValueError: as for ``write_report``.
    """
    return _load(Path(run_dir), compare or {}).verdict.text()


def _page(run: RecordedRun, title: str | None, summary: Sequence[str], tables: Sequence[Table]) -> str:
    """Returns the HTML of the page, and writes the pictures into the report's folder."""
    pictures, left_out = _draw(run, run.directory / "report")
    rollouts = run.directory / ROLLOUTS_FILE
    pairs = sample_pairs(rollouts) if rollouts.exists() else []
    if not pairs:
        left_out.append(("Sample responses", f"there is no {ROLLOUTS_FILE}, or nothing in it"))
    if run.config is None:
        left_out.append(("Configuration", "there is no config.yaml"))
    more = [table for table in _spread_tables(run) if table not in tables]
    page: str = page_template(Path(__file__).with_name("report.html.j2")).render(
        title=title or f"Training run {run.directory.resolve().name}",
        facts=[*_facts(run.history, run.timings), *_kept(run.directory), *_about_data(run.directory)],
        summary=summary,
        verdict=run.verdict,
        headings={plot.name: plot.heading for plot in PLOTS if any(p["name"] == plot.name for p in pictures)},
        tables=[table_cells(table) for table in (*tables, *more)],
        pictures=pictures,
        left_out=left_out,
        pairs=pairs,
        about_pairs=say_pairs(pairs),
        config=run.config,
        versions=versions(),
        written=datetime.now(UTC).strftime("%d %B %Y, %H:%M UTC"),
    )
    return page


def _load(directory: Path, compare: Mapping[str, Path]) -> RecordedRun:
    if len(compare) > plots.MAX_OTHERS:
        raise ValueError(f"compare: got {len(compare)} runs, expected at most {plots.MAX_OTHERS}")
    history = _history(directory)
    others = {label: _history(Path(other)) for label, other in compare.items()}
    config, timings, alarms = (directory / name for name in ("config.yaml", TIMINGS_FILE, ALARMS_FILE))
    return RecordedRun(
        directory,
        history,
        others,
        History.of(iter_jsonl(timings)) if timings.exists() else None,
        config.read_text(encoding="utf-8") if config.exists() else None,
        tuple(iter_jsonl(alarms)) if alarms.exists() else (),
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
    """Draws the pictures of the page. Returns them, and for each that cannot be drawn its heading and the reason."""
    pictures, left_out = [], []
    for plot in PLOTS:
        path = target / f"{plot.name}.png"
        path.unlink(missing_ok=True)  # An earlier report may have left one.
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


def token_limit(config: str | None) -> int | None:
    """Finds the token limit of a response in the text of a configuration, at any depth.

    Our key is ``max_new_tokens``, and TRL's is ``max_completion_length``.
    """
    try:
        values = yaml.safe_load(config or "")
    except yaml.YAMLError:
        return None
    for name in ("max_new_tokens", "max_completion_length"):
        pending = [values]
        while pending:
            node = pending.pop()
            if isinstance(node, dict):
                if isinstance(node.get(name), int):
                    return int(node[name])
                pending.extend(node.values())
    return None


def _facts(history: History, timings: History | None) -> Iterator[str]:
    """Sentences on the length of the run, its rewards and its task families."""
    took = ""
    if timings is not None and timings.has("total"):
        took = f", in {_duration(float(np.nansum(timings.get('total'))))}"
    steps = f"{len(history):,} logged step{'s' if len(history) > 1 else ''}"
    yield f"{steps}, up to step {int(history.steps[-1]):,}{took}."
    if timings is not None and all(map(timings.has, TOKEN_COUNTS)):
        computed, of_sequences = (float(np.nansum(timings.get(name))) for name in TOKEN_COUNTS)
        if computed < of_sequences:
            saved = f"{computed:,.0f} computed for {of_sequences:,.0f} in the sequences"
            yield f"Shared prompts saved {1 - computed / of_sequences:.0%} of the forwards' tokens: {saved}."
    if history.has("dynamic_sampling/no_signal"):
        silent, refills, tokens = (
            float(np.nanmean(history.get(f"dynamic_sampling/{name}")))
            for name in ("no_signal", "refills", "extra_tokens")
        )
        yield (
            f"Dynamic sampling: {silent:.0%} of the groups had no signal at first; each batch was refilled "
            f"{refills:.1f} times on average, for {tokens:,.0f} more sampled tokens."
        )
    for names, noun in ((history.rewards, "rewards"), (history.families, "task families")):
        if names:
            yield f"{len(names)} {noun}: {', '.join(name or '(no family)' for name in names)}."


def _kept(directory: Path) -> Iterator[str]:
    """Says which policy ``final/`` holds if it is not the last one."""
    path = directory / "final" / "best.json"
    about = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if about.get("step") is not None:
        yield (
            f"final/ holds the policy after step {about['step']:,}: the utility of its labelled responses, over the "
            f"last {about['window']} batches with labels, was the best of the run, {about['utility']:.4g}."
        )


def _about_data(directory: Path) -> Iterator[str]:
    """What the run noted on its prompts: how many there are, and what has become of those that were too long."""
    path = directory / "data.txt"
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        yield f"{line[:1].upper()}{line[1:]}."


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


def _spread_tables(run: RecordedRun) -> Iterator[Table]:
    """Tables that show whether the weights depend on the task: mean weights by family, and the spread of all runs."""
    spreads = {}
    for label, history in {"this run": run.history, **run.others}.items():
        if any(key.startswith("families/") and "/weights/" in key for key in history.columns):
            spreads[label] = family_spread(history)
    if "this run" in spreads and len(spreads["this run"].families) > 1:
        yield spreads["this run"].table()
        if len(spreads) > 1:
            caption = "Between-family spread of the weights, against the other runs: noise alone spreads them too"
            yield Table(caption, ("run", "spread"), tuple((label, s.spread) for label, s in spreads.items()))


def table_cells(table: Table) -> dict[str, Any]:
    """What page_tables.html.j2 needs of a table."""
    rows, numeric = cell_texts(table), numeric_columns(table)
    return {"caption": table.caption, "header": table.header, "rows": rows, "numeric": numeric}


def versions() -> list[tuple[str, str]]:
    """The versions of Python and of the packages that matter, as far as they are installed."""
    installed = [("Python", platform.python_version())]
    for package in _PACKAGES:
        try:
            installed.append((package, metadata.version(package)))
        except metadata.PackageNotFoundError:
            continue
    return installed


def page_template(path: Path) -> Any:
    """The template at ``path``, which may include page.css and page_tables.html.j2 of this folder."""
    environment = Environment(
        loader=FileSystemLoader([path.parent, Path(__file__).parent]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = lambda value: "-" if value is None else f"{value:.3f}"
    return environment.get_template(path.name)
