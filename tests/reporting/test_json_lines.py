from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from maestro_fast.reporting.json_lines import JsonLines, iter_jsonl, read_jsonl, read_tail


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "new" / "lines.jsonl"


def test_rows_come_back_as_they_were(path: Path) -> None:
    rows = [
        {"step": 1, "loss": 0.1 + 0.2, "text": "zwei\nZeilen \u2028 \x85 漢字"},
        {"step": 2, "nested": {"a": [1, None]}},
    ]
    lines = JsonLines(path)
    lines.append(rows[0])
    lines.append(rows[1])
    assert read_jsonl(path) == rows
    assert path.read_bytes().count(b"\n") == 2


def test_numbers_without_json_become_null_and_tensors_become_numbers(path: Path) -> None:
    JsonLines(path).append(
        {
            "nan": math.nan,
            "deep": {"inf": [math.inf, -math.inf, np.float32("nan"), torch.tensor(math.nan)]},
            "float32": np.float32(0.1),
            "tensor": torch.tensor(3),
            "flag": np.bool_(True),
        }
    )
    assert read_jsonl(path) == [
        {"nan": None, "deep": {"inf": [None] * 4}, "float32": float(np.float32(0.1)), "tensor": 3, "flag": True}
    ]


def test_a_lone_surrogate_does_not_stop_the_log(path: Path) -> None:
    JsonLines(path).append({"text": "a\ud800b"})
    assert read_jsonl(path) == [{"text": "a?b"}]


def test_a_row_that_cannot_be_written_leaves_the_file_alone(path: Path) -> None:
    lines = JsonLines(path)
    lines.append({"step": 1})
    with pytest.raises(TypeError, match="cannot write a set"):
        lines.append({"step": 2}, {"step": 3, "bad": {1, 2}})
    assert read_jsonl(path) == [{"step": 1}]


def test_a_killed_process_loses_nothing(path: Path) -> None:
    program = (
        "import os, signal, sys\n"
        "from maestro_fast.reporting.json_lines import JsonLines\n"
        "lines = JsonLines(sys.argv[1])\n"
        "lines.append({'step': 1}); lines.append({'step': 2})\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert subprocess.run([sys.executable, "-c", program, path]).returncode == -9
    assert read_jsonl(path) == [{"step": 1}, {"step": 2}]


def test_a_torn_last_line_is_cut_off_and_the_log_says_so(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path.parent.mkdir()
    path.write_bytes(b'{"step": 1}\n{"step": 2, "text": "' + b"x" * 200_000)
    lines = JsonLines(path)
    assert path.read_bytes() == b'{"step": 1}\n'
    assert "lines.jsonl: cut off an unfinished last line" in caplog.text
    lines.append({"step": 3})
    assert read_jsonl(path) == [{"step": 1}, {"step": 3}]


def test_a_whole_last_line_without_its_newline_stays(path: Path) -> None:
    path.parent.mkdir()
    path.write_bytes(b'{"step": 1}\n{"step": 2}')
    JsonLines(path).append({"step": 3})
    assert [row["step"] for row in read_jsonl(path)] == [1, 2, 3]


def test_reading_leaves_out_a_line_that_is_being_written(path: Path) -> None:
    path.parent.mkdir()
    path.write_bytes(b'{"step": 1}\n{"step"')
    assert read_jsonl(path) == [{"step": 1}]
    assert read_tail(path, 1000) == [{"step": 1}]
    assert path.read_bytes().endswith(b'{"step"')


@pytest.mark.parametrize("broken", ["{'step': 2}", "[2]"])
def test_a_broken_line_is_named(path: Path, broken: str) -> None:
    path.parent.mkdir()
    path.write_text(f'{{"step": 1}}\n{broken}\n{{"step": 3}}\n')
    with pytest.raises(ValueError, match=r"lines\.jsonl, line 2"):
        list(iter_jsonl(path))


def test_an_absent_file_is_named(path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"lines\.jsonl"):
        read_jsonl(path)


def test_dropping_goes_from_a_step_to_the_end(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lines = JsonLines(path)
    assert lines.drop_from(0) == 0
    lines.append(*({"step": step, "x": 1} for step in (1, 2, 2, 3)), {"x": 1, "step": 40})
    assert lines.drop_from(41) == 0
    assert lines.drop_from(2) == 4
    assert read_jsonl(path) == [{"step": 1, "x": 1}]
    assert "dropped 4 lines of step 2 and later" in caplog.text


def test_dropping_needs_steps(path: Path) -> None:
    lines = JsonLines(path)
    lines.append({"step": 1}, {"loss": 1.0})
    with pytest.raises(ValueError, match=r"lines\.jsonl, line 2: no step"):
        lines.drop_from(5)


def test_the_last_line_can_be_read_and_replaced(path: Path) -> None:
    lines = JsonLines(path)
    assert lines.last() is None
    lines.append({"step": 1}, {"step": 2, "text": "x" * 200_000})
    assert lines.last() == {"step": 2, "text": "x" * 200_000}
    lines.replace_last({"step": 2, "text": "short"})
    lines.append({"step": 3})
    assert read_jsonl(path) == [{"step": 1}, {"step": 2, "text": "short"}, {"step": 3}]


def test_the_tail_holds_whole_lines_only(path: Path) -> None:
    JsonLines(path).append(*({"step": step} for step in range(10)))  # A line has 12 bytes.
    assert [row["step"] for row in read_tail(path, 24)] == [8, 9]
    assert [row["step"] for row in read_tail(path, 35)] == [8, 9]
    assert [row["step"] for row in read_tail(path, 36)] == [7, 8, 9]
    assert len(read_tail(path, 120)) == len(read_tail(path, 10_000)) == 10
