"""A stream gives the rows that the file has, in an order that depends on the seed alone, and holds few of them."""

from __future__ import annotations

import gzip
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from maestro_fast.data.conditions import check_conditions
from maestro_fast.data.config import DataConfig
from maestro_fast.data.files import open_rows, read_rows
from maestro_fast.data.load import load_prompts
from maestro_fast.data.streaming import StreamPrompts
from maestro_fast.rewards import build_rewards
from maestro_fast.weighting import Equal
from tests.data.test_files import ROWS, written
from tests.tiny import tiny_tokenizer


class Source:
    """Counts how often reading has begun and how many rows were read."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows, self.begun, self.read = rows, 0, 0

    def __call__(self) -> Iterator[dict[str, Any]]:
        self.begun += 1
        for row in self.rows:
            self.read += 1
            yield row


def stream(source: Source, chunk: int, **options: Any) -> StreamPrompts:
    found = StreamPrompts(source, chunk, max_prompt_tokens=20, **options)
    found.check_prompts(tiny_tokenizer())
    return found


def test_a_stream_is_read_once_and_little_of_it_is_held() -> None:
    source = Source([{"prompt": f"Sea {i}"} for i in range(1000)])
    data = stream(source, 10)
    order = data.order(4, 7, batches=100)
    source.begun = source.read = 0
    seen = [data[index]["prompt"] for number in range(100) for index in order.rows(number)]

    assert sorted(seen) == sorted(f"Sea {i}" for i in range(400)) and seen != [f"Sea {i}" for i in range(400)]
    assert (source.begun, source.read) == (1, 400)
    assert sum(len(chunk.rows) for chunk in data._chunks) <= 50
    for number in (0, 60, 99, 61):  # It reads back as far as it must.
        assert [data[index]["prompt"] for index in order.rows(number)] == seen[4 * number : 4 * number + 4]
    other = stream(Source(source.rows), 10)
    assert [row["prompt"] for row in other.rows] == [f"Sea {i}" for i in range(10)]
    again = other.order(4, 8, batches=100)
    assert [other[index]["prompt"] for number in range(100) for index in again.rows(number)] != seen


def test_spare_rows_and_the_batch_ahead_are_held() -> None:
    """No row is read twice when batches are refilled, and the next one is asked for early."""
    source = Source([{"prompt": f"Sea {i}"} for i in range(1000)])
    data = stream(source, 5)
    order = data.order(4, 7, batches=100)
    source.begun = 0
    for number in range(50):
        spare = order.spare_rows(number, 1, 8, {*order.rows(number)})
        assert all(data[index] for index in (*order.rows(number), *order.rows(number + 1), *spare))
        assert all(data[index] for index in (*order.rows(max(0, number - 1)), *order.rows(number)))
    assert source.begun == 1


def test_a_stream_that_ends_begins_anew_in_another_order(caplog: pytest.LogCaptureFixture) -> None:
    data = stream(Source([{"prompt": f"Sea {i}"} for i in range(12)]), 6)
    data.order(4, 7, batches=6)
    with caplog.at_level(logging.INFO, logger="maestro_fast"):
        first, second = ([data[i]["prompt"] for i in range(start, start + 12)] for start in (0, 12))

    assert sorted(first) == sorted(second) and first != second
    assert data.name_of(3) == f"row {first[3][4:]}" and data.name_of(15) == f"row {second[3][4:]} of pass 2"
    assert "data: the stream has ended after 12 prompts, and begins anew" in caplog.text


def test_a_row_that_cannot_be_served_is_named_when_it_comes() -> None:
    rows: list[dict[str, Any]] = [{"prompt": f"Sea {i}"} for i in range(9)]
    for bad, complaint in (
        ({"prompt": 3}, r"data\.prompt_column: the prompt of row 7 is int '3'"),
        (
            {"prompt": "the sea " * 40},
            r"data\.max_prompt_tokens: the prompt of row 7 has \d+ tokens",
        ),
        ({"question": "a"}, r"data\.prompt_column: no column 'prompt' in row 7"),
    ):
        data = stream(Source([*rows[:7], bad]), 3)
        data.order(2, 0, batches=9)
        assert [data[i]["prompt"] for i in range(6)]
        with pytest.raises(ValueError, match=complaint):
            data[6]
    with pytest.raises(ValueError, match=r"max_prompt_tokens: 20, but all prompts of the stream have more tokens"):
        stream(Source([{"prompt": "the sea " * 40}]), 3, too_long="drop")
    with pytest.raises(ValueError, match=r"trainer\.max_steps: missing, and the data is a stream"):
        stream(Source(rows), 3).order(2, 0, batches=0)
    with pytest.raises(ValueError, match=r"data: a stream is checked as it comes, expected a call of check_prompts"):
        StreamPrompts(Source(rows), 3, max_prompt_tokens=20).order(2, 0, batches=1)


@pytest.mark.parametrize("name", ["a.jsonl", "bom.jsonl", "a.jsonl.gz", "a.parquet", "saved", "folder", "a.csv"])
def test_a_stream_gives_the_rows_of_the_file(tmp_path: Path, name: str) -> None:
    if name in ("a.parquet", "saved", "folder"):
        data = pytest.importorskip("datasets").Dataset.from_list(ROWS)
        if name == "folder":
            (tmp_path / "folder").mkdir()
            written(tmp_path / "folder", "train.jsonl")
        else:
            (data.to_parquet if name == "a.parquet" else data.save_to_disk)(str(tmp_path / name))
    elif name == "a.csv":
        (tmp_path / name).write_text('prompt,code\n"a, ""b""\nc",007\n\n', encoding="utf-8")
    else:
        written(tmp_path, name)
    rows = open_rows(str(tmp_path / name), "train")

    assert list(rows()) == list(rows()) == read_rows(str(tmp_path / name), "train") != []


def test_fields_that_arrow_has_filled_in_are_dropped_in_a_stream(tmp_path: Path) -> None:
    pytest.importorskip("datasets").Dataset.from_list(
        [{"prompt": [{"role": "user", "content": "a", "name": None}]}]
    ).to_parquet(str(tmp_path / "a.parquet"))
    (row,) = open_rows(str(tmp_path / "a.parquet"), "train", structured=["prompt"])()

    assert row == {"prompt": [{"role": "user", "content": "a"}]}


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("a.jsonl", b'{"a": 1}\n\n{"a": ', r"a\.jsonl, line 3 is not JSON"),
        ("a.jsonl", b'{"a": 1}\n"\xe9"', r"a\.jsonl, line 2 is not UTF-8 text"),
        ("a.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 99, mtime=0)[:-9], r"a\.jsonl\.gz cannot be read to its end: "),
        ("a.json", b'[{"a": 1}]', r"a\.json is one JSON document, which is read as a whole, expected \.jsonl"),
        ("a.csv", b"a,b\n1,2\n3\n", r"a\.csv, line 3 has 1 values"),
        ("a.parquet", b"plain", r"a\.parquet is not a Parquet file: "),
        ("a.txt", b"plain", r"a\.txt ends in '\.txt', expected one of"),
    ],
)
def test_a_broken_stream_is_described(tmp_path: Path, name: str, content: bytes, complaint: str) -> None:
    if name.endswith(".parquet"):
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"^data\.(path|streaming): .*{complaint}"):
        list(open_rows(str(tmp_path / name), "train")())


def test_a_config_with_a_stream_reads_no_more_than_it_needs(tmp_path: Path) -> None:
    lines = [json.dumps({"messages": [{"role": "user", "content": f"Sea {i}"}], "n": i}) for i in range(9)]
    (tmp_path / "a.jsonl").write_text("\n".join([*lines, "broken"]), encoding="utf-8")
    config = DataConfig(str(tmp_path / "a.jsonl"), streaming=True, shuffle_buffer=4, max_prompt_tokens=30, limit=8)
    data = load_prompts(config)
    data.check_prompts(tiny_tokenizer())
    order = data.order(4, 0, batches=4)
    numbers = [[data[index]["n"] for index in order.rows(number)] for number in range(4)]

    assert [sorted(block) for block in numbers] == [[0, 1, 2, 3], [4, 5, 6, 7]] * 2
    assert data.describe()[0].startswith("data: a stream, whose rows are shuffled 4 at a time")


def test_the_columns_of_a_stream_are_checked_and_its_values_are_not(caplog: pytest.LogCaptureFixture) -> None:
    data = stream(Source([{"prompt": f"Sea {i}", "level": i} for i in range(9)]), 3)
    late = build_rewards(["format", {"type": "length", "target": 3, "where": {"level": 8}}])
    with caplog.at_level(logging.INFO, logger="maestro_fast"):
        check_conditions(late, None, Equal(), data, None)
    assert "data.streaming: whether values of the data fit rewards[1].where is not known before" in caplog.text
    missing = build_rewards(["format", {"type": "length", "target": 3, "where": {"grade": 8}}])
    with pytest.raises(ValueError, match=r"rewards\[1\]: 'length' reads the column 'grade', the columns of"):
        check_conditions(missing, None, Equal(), data, None)
