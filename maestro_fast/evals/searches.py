"""The searches of a suite as tables: every setting and static weighting that validation tried, and what was taken.

A search that is not reported can be as long as it takes to win, so nothing that was tried is left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from maestro_fast.evals.summary import setting_text, share_name
from maestro_fast.reporting.tables import Cell, Table

_CAPTION = "mean utility over the validation seeds, the true one and that which the labels of each share showed"


def search_tables(grid: Mapping[str, Any]) -> list[Table]:
    """The tables of a search, as ``suite.grid`` and ``conflict_suite`` describe it.

    Args:
        grid: "tried" and "taken" of static weightings by steps; or "settings" of the arms, and "static" weightings by
            world with the names of the "rewards". What is missing has no table.
    """
    tables = []
    if "tried" in grid:
        tables.append(_by_steps(grid["tried"], grid["taken"]))
    if grid.get("settings"):
        tables.append(_settings(grid["settings"]))
    tables += [_of_world(world, found, grid["rewards"]) for world, found in grid.get("static", {}).items()]
    return tables


def _by_steps(tried: Sequence[Mapping[str, Any]], chosen: Sequence[Mapping[str, Any]]) -> Table:
    taken: dict[tuple[int, int], list[str]] = {}
    for one in chosen:
        label = one["arm"] + (f" at {share_name(one['share'])}" if "share" in one else "")
        taken.setdefault((one["steps"], one["weighting"]), []).append(label)
    figures = [name for name in tried[0] if name not in ("steps", "weighting", "values")]
    rows = [
        (
            _weights(one["values"]),
            one["steps"],
            *(one[name] for name in figures),
            ", ".join(taken.get((one["steps"], one["weighting"]), [])) or None,
        )
        for one in tried
    ]
    header = ("weights", "steps", *map(_column, figures), "taken by")
    return Table(f"The static weightings that were tried: {_CAPTION}", header, tuple(rows))


def _settings(arms: Mapping[str, Mapping[str, Any]]) -> Table:
    rows: list[tuple[Cell, ...]] = []
    for arm, found in arms.items():
        for one in found["tried"]:
            setting = {name: value for name, value in one.items() if name != "utility"}
            rows.append((arm, setting_text(setting), one["utility"], "yes" if setting == found["taken"] else None))
    counts = sorted({len(found["tried"]) for found in arms.values()})
    count = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    caption = f"The {count} settings that were tried for each arm, with their mean true utility in validation"
    return Table(caption, ("arm", "settings", "utility", "taken"), tuple(rows))


def _of_world(world: str, found: Mapping[str, Any], rewards: Sequence[str]) -> Table:
    figures = [name for name in found["tried"][0] if name != "values"]
    taken: dict[int, list[str]] = {}
    for arm, number in found["taken"].items():
        name, _, share = arm.partition(" at ")
        taken.setdefault(number, []).append(f"{name} at {share_name(float(share))}" if share else name)
    rows = [
        (_weights(dict(zip(rewards, one["values"], strict=True))), *(one[name] for name in figures), _listed(taken, i))
        for i, one in enumerate(found["tried"])
    ]
    caption = f"The static weightings that were tried, {world}: {_CAPTION}"
    return Table(caption, ("weights", *map(_column, figures), "taken by"), tuple(rows))


def _listed(taken: Mapping[int, Sequence[str]], number: int) -> str | None:
    return ", ".join(taken.get(number, ())) or None


def _weights(values: Mapping[str, float]) -> str:
    """Weights as text, without those of 0."""
    return setting_text({name: float(value) for name, value in values.items() if value})


def _column(figure: str) -> str:
    """The header of a figure: "utility", or that of the labels of a share."""
    name, _, share = figure.rpartition("/")
    return f"labels {share_name(float(share))}" if name else figure
