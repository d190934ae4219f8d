"""The README's table of targets says what the raw figures say: what was missed, what was not measured, and where."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from bench import records, table
from bench.records import read
from bench.table import RESULTS, ROOT, ROWS, filled, markdown
from bench.tables import machine

GROUP = "`group_advantages`, grpo"  # how the title of a row begins
GPU = {"name": "NVIDIA H200", "driver": "580"}


def figures(**fields: float) -> dict[str, float | None]:
    """The figures of one contender, as the GPU benchmarks record them."""
    return dict.fromkeys(("wall", "host", "graph", "cold", "launches", "syncs")) | fields


def group_line(notes: list[str] | None = None, peer: float | None = None, **fields: float) -> dict[str, Any]:
    """A line of the benchmark of group_advantages, with TRL's wall time if ``peer`` gives it."""
    raced = {"triton": figures(**fields)} | ({} if peer is None else {"TRL's block": figures(wall=peer)})
    case = "grpo, B = 4096, K = 8, G = 16, cuda"
    rest = {"figures": raced, "columns": {}, "notes": notes or []}
    return {"op": "group_advantages", "case": case, "dry": False, **rest}


def write(path: Path, *lines: dict[str, Any], date: str | None = None, commit: str = "0123456789") -> str:
    """Writes a file of results as ``bench.tables.record`` does, and returns its name."""
    facts = {"commit": commit, "packages": {"torch": "2.11.0", "triton": "3.6.0"}, "gpu": GPU}
    first = {"machine": facts if date is None else {"date": date, **facts}}
    path.write_text("".join(f"{json.dumps(line)}\n" for line in (first, *lines)))
    return path.name


def cells(page: str, title: str) -> dict[str, str]:
    """The cells of the row whose title begins like this, by verdict."""
    (line,) = (line for line in page.splitlines() if line.startswith(f"| {title}"))
    return dict(zip(("met", "missed", "not measured"), (x.strip() for x in line.split("|")[2:5]), strict=True))


def made(folder: Path, *lines: dict[str, Any]) -> str:
    """The table made of a single file with these lines."""
    return markdown(read([write(folder / "one.jsonl", *lines)], folder))


# --- the committed table ---


def test_the_table_in_the_readme_is_what_the_results_give() -> None:
    page = (ROOT / "README.md").read_text(encoding="utf-8")

    assert page == filled(page, markdown(read(RESULTS))), "run: python -m bench.table --write"


def test_every_kept_file_of_a_gpu_is_shown() -> None:
    assert {path.name for path in records.FOLDER.glob("gpu_*.jsonl")} <= set(RESULTS)


def test_the_contenders_of_the_targets_are_those_of_the_benchmarks() -> None:
    """A name that no benchmark uses would leave its target unmeasured for ever."""
    paths = [path for path in (ROOT / "bench").glob("*.py") if path.name != "table.py"]
    sources = "".join(path.read_text(encoding="utf-8") for path in paths)
    rows = [row for row in ROWS if row.op != "trainer_step"]  # which nothing measures yet
    names = {name for row in rows for x in row.targets for name in (x.ours or row.ours, x.peer, *dict(x.beside))}

    assert len(names) > 15
    parts = {part for name in names if name is not None for part in re.split(r", |^\d ", name)}
    assert not [part for part in parts if part not in sources]
    assert len({row.title for row in ROWS}) == len(ROWS), "a row is found by its title"


# --- verdicts ---


def test_a_missed_target_says_missed_and_why(tmp_path: Path) -> None:
    page = made(tmp_path, group_line(wall=123.04, host=20.0, graph=3.0004, launches=1, syncs=0, peer=1500.0))

    row = cells(page, GROUP)
    assert page.startswith("| op and case | met | missed: why | not measured: why |\n")
    assert row["missed"] == (
        "graph 3.0004 us (≤ 3): a chain of dependent instructions<br>"
        "wall 123 us (≤ 25): the host is slower than the kernels"
    )
    assert row["met"] == "launches 1 (≤ 1), syncs 0 (≤ 0), host 20 us (≤ 25), TRL 12.2 x (≥ 12)"
    assert row["not measured"].startswith("verl's loop ≥ 1,000 x: ")


def test_a_case_that_no_file_has_says_not_measured(tmp_path: Path) -> None:
    page = made(tmp_path)

    count = sum(len(row.targets) for row in ROWS)
    assert f"{count} targets: 0 met, 0 missed, {count} not measured." in page
    assert "<sup>" not in page and "one.jsonl" not in page
    for row in ROWS:
        found = cells(page, f"{row.title} |")
        assert not found["met"] + found["missed"]
        assert found["not measured"].endswith(f": {row.unmeasured}")
        assert all(target.what in found["not measured"] for target in row.targets)


@pytest.mark.parametrize(
    ("note", "reason"),
    [
        ("TRL's block: left out, trl is not installed", "trl is not installed"),
        ("TRL's block: skipped, none are wanted", "left out of that run"),
        ("TRL's block: left out, RuntimeError: no memory", "RuntimeError"),
        ("triton: not capturable: CUDA error", "not in the file"),
    ],
)
def test_a_peer_that_was_left_out_is_named_with_the_reason(tmp_path: Path, note: str, reason: str) -> None:
    row = cells(made(tmp_path, group_line([note], wall=20.0)), GROUP)

    assert f"TRL ≥ 12 x: {reason}<br>" in row["not measured"]
    assert row["met"] == "wall 20 us (≤ 25)"


def test_a_wrong_result_and_a_dry_run_have_no_figures(tmp_path: Path) -> None:
    page = made(tmp_path, group_line(["WRONG: element 3"], wall=20.0), group_line(wall=1.0) | {"dry": True})

    row = cells(page, GROUP)
    assert row["met"] == row["missed"] == ""
    assert row["not measured"].endswith(": a result was wrong")


def test_figures_of_other_forms_are_computed(tmp_path: Path) -> None:
    step = {"op": "step", "dry": False}
    shared = {
        "op": "shared_prefix",
        "dry": False,
        "group": {"P": 2048, "R": 512, "G": 8},
        "ms": {"shared": [9.0, 10.0, 30.0], "varlen": [26.0]},
        "tokens": {"shared": 6144, "varlen": 20480},
        "peak_bytes": {"shared": 10, "varlen": 5},
        "faults": ["flex: left out, RuntimeError: no compiler", "masked: WRONG, the error of its gradients is 1"],
    }
    blocks = {**step, "block": 1, "conductor_ms": [1.0], "equal_ms": [1.0]}
    page = made(tmp_path, blocks, {**step, "blocks": 1, "added_ms": 3.0, "ms": [999.0, 200.0]}, shared)

    assert cells(page, "the Conductor in a step")["missed"].startswith("share 1.5 % (< 1)")
    assert cells(page, "shared prompts")["met"] == "tokens 6,144 (≤ 6,144), packed 2.6 x (≥ 2.5)"
    assert cells(page, "shared prompts")["missed"].startswith("its memory 0.5 x (≥ 1)")
    wrong = shared | {"faults": ["shared: WRONG, the error of its gradients is 1"]}
    assert cells(made(tmp_path, shared, wrong), "shared prompts")["not measured"].endswith(": a result was wrong")


# --- files ---


def test_the_newest_file_wins(tmp_path: Path) -> None:
    new = write(tmp_path / "new.jsonl", group_line(graph=1.0), date="2026-12-02T00:00:00+00:00", commit="feedbee00")
    old = write(tmp_path / "old.jsonl", group_line(graph=2.0), date="2026-12-01T23:59:59+00:00")
    undated = write(tmp_path / "undated.jsonl", group_line(graph=2.5))
    later = write(tmp_path / "later.jsonl", group_line(graph=2.6), group_line(graph=2.7))

    def shown(*files: str) -> tuple[str, str]:
        page = markdown(read(files, tmp_path))
        return cells(page, GROUP)["met"].split(" us")[0], page.splitlines()[-1]

    note = "NVIDIA H200, driver 580, torch 2.11.0, Triton 3.6.0, commit"
    assert shown(new, old, undated) == ("graph 1", f"1. `new.jsonl`: {note} feedbee, 2026-12-02")
    assert shown(old, undated) == ("graph 2", f"1. `old.jsonl`: {note} 0123456, 2026-12-01")
    assert shown(undated, later) == ("graph 2.7", f"1. `later.jsonl`: {note} 0123456")
    assert shown(later, undated) == ("graph 2.5", f"1. `undated.jsonl`: {note} 0123456")


def test_what_is_recorded_from_now_on_has_a_date() -> None:
    assert machine()["date"].endswith("+00:00")


@pytest.mark.parametrize(
    "line", ["{", "[]", "{}", '{"op": "unknown", "dry": false}', '{"op": "step", "dry": false, "blocks": 1, "ms": [1]}']
)
def test_a_line_that_is_broken_or_unknown_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "bad.jsonl"
    write(path, group_line(graph=2.0))
    path.write_text(path.read_text() + line + "\n")

    with pytest.raises(ValueError, match=rf"{path}, line 3 is no line of a GPU benchmark: \w+: "):
        read([path.name], tmp_path)


def test_figures_without_a_machine_are_refused(tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text(json.dumps(group_line(graph=2.0)) + "\n")

    with pytest.raises(ValueError, match=r"bad\.jsonl, line 1 .*no line about the machine"):
        read(["bad.jsonl"], tmp_path)


@pytest.mark.parametrize(
    ("text", "complaint"), [("{\n\n!", "line 3 is no JSON"), ("{}", "no file of pytest-benchmark")]
)
def test_a_broken_file_of_a_cpu_is_named(tmp_path: Path, text: str, complaint: str) -> None:
    (tmp_path / "cpu.json").write_text(text)

    with pytest.raises(ValueError, match=rf"cpu\.json.* {complaint}"):
        read(["cpu.json"], tmp_path)


@pytest.mark.parametrize("page", ["", table.BEGIN, table.END + table.BEGIN, 2 * (table.BEGIN + table.END)])
def test_a_page_without_both_comments_is_refused(page: str) -> None:
    assert filled(f"a\n{table.BEGIN}old\n{table.END}b\n", "new\n") == f"a\n{table.BEGIN}new\n{table.END}b\n"

    with pytest.raises(ValueError, match="needs these two lines"):
        filled(page, "new\n")
