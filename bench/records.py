"""Reads the raw figures in bench/results: JSON lines of the GPU benchmarks, and JSON of pytest-benchmark on a CPU.

Every case of every benchmark becomes a ``Record``, whatever the form of its file. Records come in the order of their
files' dates. Files without a date are older than files with one, and keep the order in which they are named.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

FOLDER = Path(__file__).resolve().parent / "results"


@dataclass(frozen=True)
class Source:
    """A file of results.

    Attributes:
        file: Its name.
        facts: The machine, the versions and the commit.
        date: The date and time in UTC, in the form of ISO 8601, or "" where the file has none.
    """

    file: str
    facts: str
    date: str


@dataclass(frozen=True)
class Record:
    """The figures of one case.

    Attributes:
        op: The op. For a benchmark on a CPU it is the name of its test, followed by ", CPU".
        case: The case.
        figures: The figures by contender and by field. wall, host, graph and cold are microseconds, as in
            ``bench.gpu_race.Figures``, and so are loop and turn, the medians with warm and cold caches on a CPU. ms is
            the wall time in milliseconds, GB the memory beyond inputs and outputs.
        notes: Why figures are missing, and what was wrong.
    """

    op: str
    case: str
    figures: Mapping[str, Mapping[str, float | None]]
    notes: tuple[str, ...] = ()


def read(files: Iterable[str], folder: Path = FOLDER) -> list[tuple[Source, Record]]:
    """All records of the files, oldest first.

    Raises:
        ValueError: A file is broken, or a part of it has no known form. The message says where.
        FileNotFoundError: There is no such file.
    """
    found: list[tuple[Source, Record]] = []
    for file in files:
        found += (_of_lines if file.endswith(".jsonl") else _of_pytest_benchmark)(folder / file)
    return sorted(found, key=lambda pair: pair[0].date[:19])  # The sort is stable.


# --- on a GPU ---


def record_of(line: Mapping[str, Any]) -> Record | None:
    """The record in what a GPU benchmark passes to ``bench.tables.record``.

    Returns:
        The record, or None for a dry run, for the ceilings of a device and for a part of a run that is summed up later.

    Raises:
        KeyError, TypeError, ValueError: The line has no known form.
    """
    op = line["op"]
    if line["dry"] or op == "ceilings" or (op == "step" and "block" in line):
        return None
    if op == "step":
        return Record(op, "", {"Conductor": {"share": 100 * line["added_ms"] / line["ms"][1]}})
    if op == "shared_prefix":
        return _of_shared_prompts(line)
    found = {name: dict(fields) for name, fields in line["figures"].items()}
    for fields in found.values():
        fields["ms"] = None if fields["wall"] is None else fields["wall"] / 1e3
    for title, cells in line["columns"].items():
        for name, cell in cells.items():
            found.setdefault(name, {})[title] = None if cell == "-" else float(cell)
    return Record(op, line["case"], found, tuple(line["notes"]))


def _of_shared_prompts(line: Mapping[str, Any]) -> Record:
    figures = {
        name: {"ms": median(ms), "tokens": line["tokens"][name], "peak": line["peak_bytes"][name]}
        for name, ms in line["ms"].items()
    }
    case = ", ".join(f"{name} = {size}" for name, size in line["group"].items())
    judged = ("shared: WRONG", "varlen: WRONG")  # That another contender failed says nothing about these.
    notes = tuple(f"WRONG: {fault}" if fault.startswith(judged) else fault for fault in line["faults"])
    return Record(line["op"], case, figures, notes)


def _of_lines(path: Path) -> Iterator[tuple[Source, Record]]:
    """The records of a file of JSON lines, in which a line about the machine comes before its figures."""
    source = None
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            line = json.loads(text)
            if "machine" in line:
                source = _gpu(path.name, line["machine"])
            elif source is None:
                raise ValueError("no line about the machine comes before it")
            elif (record := record_of(line)) is not None:
                yield source, record
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            problem = f"{type(error).__name__}: {error}"
            raise ValueError(f"{path}, line {number} is no line of a GPU benchmark: {problem}") from error


def _gpu(file: str, machine: Mapping[str, Any]) -> Source:
    """What ``bench.tables.machine`` found."""
    gpu, packages = machine["gpu"], machine["packages"]
    facts = f"{gpu['name']}, driver {gpu['driver']}, torch {packages['torch']}, Triton {packages['triton']}"
    return Source(file, f"{facts}, commit {machine['commit'][:7]}", machine.get("date", ""))


# --- on a CPU ---


def _of_pytest_benchmark(path: Path) -> Iterator[tuple[Source, Record]]:
    """The records of a file that pytest-benchmark wrote."""
    try:
        whole = json.loads(path.read_text(encoding="utf-8"))
        machine, commit = whole["machine_info"], whole["commit_info"]
        facts = f"{machine['cpu']['brand_raw']}, torch {machine['packages']['torch']}, commit {commit['id'][:7]}"
        source = Source(path.name, facts + " with changes" * commit["dirty"], whole["datetime"])
        entries = list(whole["benchmarks"])
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno} is no JSON: {error}") from error
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is no file of pytest-benchmark: {type(error).__name__}: {error}") from error
    for number, entry in enumerate(entries, 1):
        try:
            name, _, case = entry["name"].removeprefix("test_").partition("[")
            yield source, Record(f"{name}, CPU", case.removesuffix("]"), _cpu_figures(name, entry["extra_info"]))
        except (AttributeError, KeyError, TypeError) as error:
            problem = f"{type(error).__name__}: {error}"
            raise ValueError(f"{path}, benchmark {number} is none of ours: {problem}") from error


def _cpu_figures(name: str, extra: Mapping[str, Any]) -> dict[str, dict[str, float | None]]:
    """The figures that a benchmark left with pytest-benchmark. Those of other forms than these two have no targets."""
    if name == "conductor_share":
        shares = extra["share"]
        clocks = "all of these, by the clocks"
        return {"Conductor": {"share": shares[clocks if clocks in shares else "all of these"][1]}}  # an older name
    times = extra.get("times_us", {})
    return {x: {"loop": t["median"], "turn": t["cold"]} for x, t in times.items() if isinstance(t, dict)}
