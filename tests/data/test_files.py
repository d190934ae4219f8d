"""Rows out of files of every kind, and what is said when a file is broken."""

from __future__ import annotations

import csv
import gzip
import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from maestro_fast.data.config import DataConfig
from maestro_fast.data.files import read_rows
from maestro_fast.data.load import load_prompts

ROWS: list[dict[str, Any]] = [
    {"prompt": "Name a colour, “red”.", "number": 1, "share": 0.5, "tags": ["a", "b"], "about": {"x": 1}, "yes": True},
    {"prompt": "Two\nlines\u2028", "number": 0, "share": 0.0, "tags": [], "about": {"x": 2}, "yes": None},
]
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Bern"}}}
TALK = [
    {"role": "user", "content": "How is Bern?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "name": "weather", "content": "Wet."},
]
FULL = [TALK[0], {"role": "assistant", "tool_calls": [CALL]}, TALK[2]]
TOOLS = [
    {"name": "weather", "parameters": {"city": {"type": "string"}}},
    {"name": "time", "parameters": {"zone": {"type": "string"}}},
]


def written(folder: Path, name: str) -> str:
    """The path of a file with ``ROWS`` in the format that its name says."""
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)
    kind = name.removesuffix(".gz")
    text = {"array.json": json.dumps(ROWS, indent=1), "bom.jsonl": f"\ufeff{lines}\r\n"}.get(kind, f"{lines}\n\n")
    data = text.encode()
    (folder / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return str(folder / name)


@pytest.mark.parametrize(
    "name", ["a.jsonl", "bom.jsonl", "a.ndjson", "a.jsonl.gz", "array.json", "array.json.gz", "lines.json"]
)
def test_json_keeps_every_value_as_it_is(tmp_path: Path, name: str) -> None:
    assert read_rows(written(tmp_path, name), "train") == ROWS


def test_parquet_and_datasets_keep_every_value_as_it_is(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_list(ROWS)
    data.to_parquet(str(tmp_path / "a.parquet"))
    data.save_to_disk(str(tmp_path / "saved"))
    datasets.DatasetDict({"train": data, "test": data.select([1])}).save_to_disk(str(tmp_path / "splits"))
    (tmp_path / "folder").mkdir()
    written(tmp_path / "folder", "train.jsonl")

    for name in ("a.parquet", "saved", "splits", "folder"):
        assert read_rows(str(tmp_path / name), "train") == ROWS, name
    assert read_rows(str(tmp_path / "splits"), "test") == ROWS[1:]
    with pytest.raises(
        ValueError, match=r"data\.path: .*splits is .*no split 'dev', expected data\.split to be one of tr"
    ):
        read_rows(str(tmp_path / "splits"), "dev")


def test_csv_holds_text_and_conversations_as_json(tmp_path: Path) -> None:
    out = io.StringIO()
    rows = [{"prompt": 'a, "b"\nc', "code": "007"}, {"prompt": json.dumps(TALK[:1]), "code": ""}]
    for delimiter, name in ((",", "a.csv"), ("\t", "a.tsv")):
        out = io.StringIO()
        writer = csv.DictWriter(out, ["prompt", "code"], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
        (tmp_path / name).write_bytes(out.getvalue().encode())
        assert read_rows(str(tmp_path / name), "train") == rows
    assert [row["prompt"] for row in load_prompts(DataConfig(str(tmp_path / "a.csv"))).rows] == ['a, "b"\nc', TALK[:1]]


def test_fields_that_arrow_has_filled_in_are_dropped_where_the_template_reads(tmp_path: Path) -> None:
    """Arrow gives every mapping the fields of all of them: each message a name, and each tool every parameter."""
    datasets = pytest.importorskip("datasets")
    rows = [
        {"prompt": TALK, "tools": TOOLS, "chat_template_kwargs": {"a": 1}, "info": [{"x": 1}, {"y": 2}]},
        {"prompt": TALK[:1], "tools": TOOLS[:1], "chat_template_kwargs": {"b": 1}, "info": [{"x": 1}]},
    ]
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "a.parquet"))
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    first, second = load_prompts(DataConfig(str(tmp_path / "a.parquet"))).rows

    assert (first["prompt"], first["tools"], first["chat_template_kwargs"]) == (FULL, TOOLS, {"a": 1})
    assert (second["prompt"], second["tools"], second["chat_template_kwargs"]) == (TALK[:1], TOOLS[:1], {"b": 1})
    assert first["info"] == [{"x": 1, "y": None}, {"x": None, "y": 2}]  # A column for the rewards stays as it was read.
    assert load_prompts(DataConfig(str(tmp_path / "a.jsonl"))).rows == rows


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("a.jsonl", b'{"a": 1}\n\n{"a": ', r"a\.jsonl, line 3 is not JSON"),
        ("a.jsonl", b'{"a": 1}\n"\xe9"', r"a\.jsonl, line 2 is not UTF-8 text"),
        ("a.jsonl.gz", b"plain", r"a\.jsonl\.gz is not a whole gzip file: "),
        ("a.jsonl.gz", gzip.compress(b'{"a": 1}' * 99, mtime=0)[:-9], r"a\.jsonl\.gz is not a whole gzip file: "),
        ("a.json", b'[{"a": 1}, 2]', r"a\.json, entry 1 \(from 0\) holds a int, expected an object"),
        ("a.json", b'[{"a": 1},', r"a\.json is not JSON: "),
        ("a.json", b'{"data":\n []}', r"a\.json holds a dict, expected an array of objects"),
        ("a.csv", b"a,b\n1,2\n3\n", r"a\.csv, line 3 has 1 values, expected 2, one for each of a, b"),
        ("a.csv", b'a,b\n1,"2\n', r"a\.csv, line \d is not CSV: "),
        ("a.csv", b"a,a\n1,2\n", r"a\.csv has a column name twice"),
        ("a.parquet", b"plain", r"a\.parquet is not a Parquet file: "),
        ("a.txt", b"plain", r"a\.txt ends in '\.txt', expected one of \.jsonl, \.ndjson, \.json, \.csv"),
    ],
)
def test_a_broken_file_is_described(tmp_path: Path, name: str, content: bytes, complaint: str) -> None:
    if name.endswith(".parquet"):
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"^evaluation\.data\.path: .*{complaint}") as caught:
        read_rows(str(tmp_path / name), "train", field="evaluation.data")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["none.jsonl", "none.parquet", "none.csv", "none.json.gz", "none"])
def test_a_missing_file_is_described(tmp_path: Path, name: str) -> None:
    with pytest.raises(FileNotFoundError, match=r"data\.path: no file (or folder )?.*none"):
        load_prompts(DataConfig(str(tmp_path / name)))


def test_what_needs_datasets_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("datasets", "pyarrow"):
        monkeypatch.setitem(sys.modules, module, None)
    (tmp_path / "folder").mkdir()
    (tmp_path / "a.parquet").write_bytes(b"")
    for path in (str(tmp_path / "folder"), "owner/name", str(tmp_path / "a.parquet")):
        with pytest.raises(ImportError, match=r'^data\.path: .*pip install "maestro-fast\[data\]"'):
            read_rows(path, "train")
