"""What a suite leaves for readers: report.html, which needs no other file, summary.md, and all figures as JSON."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from maestro_fast.evals.figures import Picture, pictures
from maestro_fast.evals.results import Result
from maestro_fast.evals.searches import search_tables
from maestro_fast.evals.standings import Standings
from maestro_fast.evals.summary import all_tables, sentences, short_tables
from maestro_fast.reporting.json_lines import JsonLines, iter_jsonl
from maestro_fast.reporting.report import page_template, table_cells, versions
from maestro_fast.reporting.tables import Table, format_table, markdown_table

# What is written: all results as one Result a line, with those arms that were chosen in validation, under the names of
# the tables; the figures of the tables; and the same for readers.
ARMS_FILE, SUMMARY_FILE, MARKDOWN_FILE, PAGE_FILE = "arms.jsonl", "summary.json", "summary.md", "report.html"


def as_text(found: Standings, *, tables: Sequence[Table] = (), width: int = 100) -> str:
    """What a terminal shows: the tables that matter most, then the sentences. ``tables`` stand first."""
    parts = [format_table(table, width) for table in (*tables, *short_tables(found))]
    return "\n\n".join([*parts, "\n".join(f"- {sentence}" for sentence in sentences(found))])


def write_summary(
    found: Standings,
    results: Sequence[Result],
    folder: Path,
    *,
    title: str,
    tables: Sequence[Table] = (),
    grid: Mapping[str, Any] | None = None,
) -> Path:
    """Writes arms.jsonl, summary.json, summary.md, report.html and its pictures as PNG into ``folder``.

    Args:
        found: how the arms stand.
        results: all results, which arms.jsonl keeps, so that others can compare with them.
        folder: where the files go; it is made.
        title: the title of the page.
        tables: further tables, which stand first.
        grid: what validation tried, see ``searches.search_tables``.

    Returns:
        The path of report.html.

    Raises:
        ImportError: matplotlib is not installed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    drawn = [_drawn(picture, folder) for picture in pictures(found)]
    (folder / ARMS_FILE).unlink(missing_ok=True)
    JsonLines(folder / ARMS_FILE).append(*(result.as_json() for result in results))
    data = {"title": title, **found.as_json(), "sentences": sentences(found)}
    (folder / SUMMARY_FILE).write_text(json.dumps(data, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    listed = [*tables, *all_tables(found), *search_tables(grid or {})]
    said, facts = sentences(found), list(_facts(found))
    (folder / MARKDOWN_FILE).write_text(_markdown(title, [*facts, *said], drawn, listed), encoding="utf-8")
    page: str = page_template(Path(__file__).with_name("page.html.j2")).render(
        title=title,
        facts=facts,
        sentences=said,
        pictures=drawn,
        tables=[table_cells(table) for table in listed],
        versions=versions(),
        written=datetime.now(UTC).strftime("%d %B %Y, %H:%M UTC"),
    )
    path = folder / PAGE_FILE
    path.write_text(page, encoding="utf-8")
    return path


def read_arms(folder: Path) -> list[Result]:
    """The results that ``write_summary`` kept in arms.jsonl."""
    return [Result.from_json(row) for row in iter_jsonl(folder / ARMS_FILE)]


def _drawn(picture: Picture, folder: Path) -> dict[str, str]:
    """Writes a picture, and gives what the page needs of it."""
    path = folder / f"{picture.name}.png"
    picture.save(path)
    data = base64.b64encode(path.read_bytes()).decode()
    return {"name": picture.name, "heading": picture.heading, "reading": picture.reading, "data": data}


def _markdown(title: str, said: Sequence[str], drawn: Sequence[Mapping[str, str]], tables: Sequence[Table]) -> str:
    parts = [f"# {title}", "\n".join(f"- {sentence}" for sentence in said)]
    parts += [f"![{one['heading']}]({one['name']}.png)\n\n{one['heading']}. {one['reading']}" for one in drawn]
    return "\n\n".join([*parts, *(markdown_table(table) for table in tables)]) + "\n"


def _facts(found: Standings) -> Iterator[str]:
    """What was compared, and how the comparisons are to be read."""
    arms = list(dict.fromkeys(row.arm for standing in found.each for row in standing.rows))
    seeds = max(row.utility.n for standing in found.each for row in standing.rows)
    conditions = f"{len(found.each)} condition{'s' if len(found.each) > 1 else ''}"
    yield f"{len(arms)} arms, {conditions}, up to {seeds} seed{'s' if seeds > 1 else ''}: {', '.join(arms)}."
    yield "Every comparison is made seed by seed. Utility is measured on held-out prompts, which no arm trains on."
    if len(found.each) > 1:
        yield (
            f"Holm's procedure corrects for the arms under one condition, and not for the {len(found.each)} conditions."
        )
