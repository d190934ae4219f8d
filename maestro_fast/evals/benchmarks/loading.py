"""Reads the rows of a benchmark, checks their columns, parts them for training and testing, and writes training data.

Rows come from the hub, or from local files with the same columns. Where a data set has one split, a fifth of it is
held out here: a hash of its question or story decides which part a row falls into, so it is the same for everybody, and
rows about one story do not stand in both parts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from maestro_fast.data.files import Row, read_rows
from maestro_fast.evals.benchmarks.benchmark import Benchmark, Part

HELD_OUT = 5  # One row in this many is held out where the data set does not say which are.


def load(
    benchmark: Benchmark, path: str | Path | None = None, *, part: Part = "held_out", limit: int | None = None
) -> list[Row]:
    """Reads one part of a benchmark.

    Args:
        benchmark: Which one.
        path: A file that ``DataConfig.path`` may name, with the columns of the data set, or a folder of such files
            ending in .jsonl; None reads the data set from the hub, which needs the network and ``datasets``.
        part: "train" or "held_out". If the data set has a split for each, a local file is taken for the wanted one.
        limit: How many rows are read at most; None means all. They are the first ones.

    Returns:
        The rows, without those that the benchmark does not use, and without those that ask what an earlier one asked.

    Raises:
        ValueError: A column is missing (it is named, with those that are there) or null, a row asks nothing that can be
            answered, no row is left, or the data are on no hub and there is no path.
        FileNotFoundError: There is nothing at ``path``.
        ImportError: What reads the data is not installed.
    """
    if part not in benchmark.splits:
        raise ValueError(f"part: {part!r}, expected 'train' or 'held_out'")
    if limit is not None and limit < 1:
        raise ValueError(f"limit: {limit}, expected at least 1 or None")
    one_split = len({*benchmark.splits.values()}) == 1
    found: list[Row] = []
    asked_before: set[str] = set()
    for number, row in enumerate(_rows(benchmark, path, part)):
        _check_columns(benchmark, row, number)
        if not benchmark.keeps(row):
            continue
        prompt = json.dumps(_checked_prompt(benchmark, row, number), ensure_ascii=False)
        if prompt in asked_before or (one_split and _is_held_out(benchmark.unit(row)) != (part == "held_out")):
            continue
        asked_before.add(prompt)
        found.append(row)
        if len(found) == limit:
            break
    if not found:
        where = path or benchmark.dataset
        raise ValueError(f"{benchmark.name}: {where} has no row that can be used for part {part!r}")
    return found


def as_rows(benchmark: Benchmark, rows: Sequence[Row]) -> list[Row]:
    """Rows to train on, one for each of the benchmark's: ``prompt`` (messages), ``reference`` and ``family``."""
    return [
        {"prompt": benchmark.prompt(row), "reference": benchmark.reference(row), "family": benchmark.name}
        for row in rows
    ]


def write_rows(benchmark: Benchmark, rows: Sequence[Row], path: str | Path) -> dict[str, Any]:
    """Writes the rows of ``as_rows`` as JSONL.

    Returns:
        The section ``data`` of a config that trains on them.
    """
    lines = [json.dumps(row, ensure_ascii=False) for row in as_rows(benchmark, rows)]
    Path(path).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return {"path": str(path), "prompt_column": "prompt", "family_column": "family"}


def _rows(benchmark: Benchmark, path: str | Path | None, part: Part) -> Iterator[Row]:
    split = benchmark.splits[part]
    if path is None:
        for config in benchmark.configs:
            yield from _hub_rows(benchmark, config, split)
        return
    place = Path(path)
    if not place.exists():
        raise FileNotFoundError(f"path: no file or folder {path}")
    files = sorted(place.glob("*.jsonl")) or [place]
    for file in files:
        yield from read_rows(str(file), split, field=benchmark.name)


def _hub_rows(benchmark: Benchmark, config: str | None, split: str) -> Iterator[Row]:
    """Rows of the hub, read as they are needed: some data sets have gigabytes, and ``limit`` may want a few rows."""
    name = benchmark.dataset
    if name is None:
        raise ValueError(f"path: None, but {benchmark.name} is on no hub, expected its files from {benchmark.home}")
    try:
        import datasets
    except ImportError as error:
        raise ImportError(f'{benchmark.name}: needs datasets, pip install "maestro-fast[data]"') from error
    try:
        for row in datasets.load_dataset(name, config, split=split, streaming=True):
            yield dict(row)
    except Exception as error:  # datasets raises errors of the hub, of the network, of Arrow and of its own.
        words = (str(error) or type(error).__name__).strip().splitlines()[0]
        raise ValueError(f"{benchmark.name}: cannot load {name}, config {config}, split {split}: {words}") from error


def _check_columns(benchmark: Benchmark, row: Row, number: int) -> None:
    missing = min(([name for name in layout if name not in row] for layout in benchmark.columns), key=len)
    if missing:
        raise ValueError(
            f"{benchmark.name}: no column {missing[0]!r} in row {number}, columns are {', '.join(map(repr, row))}; "
            f"expected those of {benchmark.home}"
        )


def _checked_prompt(benchmark: Benchmark, row: Row, number: int) -> Any:
    layout = next(names for names in benchmark.columns if all(name in row for name in names))
    for name in layout:
        if row[name] is None:
            raise ValueError(f"{benchmark.name}: column {name!r} of row {number} is null, expected a value")
    try:
        benchmark.reference(row)
        return benchmark.prompt(row)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{benchmark.name}: row {number}: {error}") from error


def _is_held_out(unit: str) -> bool:
    return int.from_bytes(hashlib.sha256(unit.encode()).digest()[:8], "big") % HELD_OUT == 0
