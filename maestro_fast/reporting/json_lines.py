"""Files of one JSON object per line: a killed run loses nothing, a torn last line is repaired when it is reopened."""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

logger = logging.getLogger(__name__)

# What a run directory holds, besides config.yaml, checkpoint-*/ and report/.
METRICS_FILE = "metrics.jsonl"
ROLLOUTS_FILE = "rollouts.jsonl"
TIMINGS_FILE = "timings.jsonl"

_CHUNK = 1 << 16  # bytes
_STEP_FIRST = re.compile(rb'\{"step": (\d+)[,}]')


class JsonLines:
    """A file that grows by one line per dictionary.

    Every call opens, writes and closes, so that whatever it wrote survives the process. Floats are written as their
    full repr, NaN and the infinities as null; numbers of NumPy and PyTorch (0-d) as Python's. Opening repairs what a
    crash left behind: an unfinished last line is cut off, and the log says so.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            _repair(self.path)

    def append(self, *rows: Mapping[str, Any]) -> None:
        """Adds one line per row.

        Raises:
            TypeError: a value is not JSON's, nor a number of NumPy or PyTorch; nothing is written then.
        """
        data = b"".join(_encoded(row) for row in rows)
        with self.path.open("ab") as file:
            file.write(data)

    def last(self) -> dict[str, Any] | None:
        """The last line, None in an empty or absent file."""
        if not self.path.exists():
            return None
        with self.path.open("rb") as file:
            file.seek(_start_of_last_line(file))
            line = file.readline()
        return _decoded(line, self.path, "the last line") if line else None

    def replace_last(self, row: Mapping[str, Any]) -> None:
        """Writes ``row`` over the last line; the rest of the old line is cut off only after that."""
        data = _encoded(row)
        with self.path.open("r+b") as file:
            file.seek(_start_of_last_line(file))
            file.write(data)
            file.truncate()

    def drop_from(self, step: int) -> int:
        """Cuts the file before the first line whose ``step`` is at least ``step``: a resumed run repeats those.

        Returns:
            The number of lines that went. Steps never descend in a file that only this class wrote.
        """
        if not self.path.exists():
            return 0
        dropped, start = 0, None
        with self.path.open("r+b") as file:
            offset = 0
            for number, line in enumerate(file, 1):
                if start is None and _step_of(line, self.path, number) >= step:
                    start = offset
                dropped += start is not None
                offset += len(line)
            if start is not None:
                file.truncate(start)
        if dropped:
            logger.warning("%s: dropped %d lines of step %d and later", self.path.name, dropped, step)
        return dropped


def iter_jsonl(path: str | Path) -> Iterator[dict[str, Any]]:
    """The rows of a file, one at a time; an unfinished last line (of a run that still writes) is left out.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: another line is not a JSON object; the message names the file and the line.
    """
    path = Path(path)
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n") and not _is_whole(line):
                logger.warning("%s: left out the unfinished last line, %d", path.name, number)
            else:
                yield _decoded(line, path, f"line {number}")


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """All rows of a file; see ``iter_jsonl``."""
    return list(iter_jsonl(path))


def read_tail(path: str | Path, max_bytes: int) -> list[dict[str, Any]]:
    """The rows that lie whole in the last ``max_bytes`` of a file, however long the file is."""
    path = Path(path)
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - max_bytes - 1))
        if size > max_bytes:
            file.readline()  # the rest of a line that began earlier
        lines = file.readlines()
    if lines and not lines[-1].endswith(b"\n") and not _is_whole(lines[-1]):
        lines.pop()
    return [_decoded(line, path, "a line near the end") for line in lines]


def _encoded(row: Mapping[str, Any]) -> bytes:
    text = json.dumps(_plain(row), ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8", errors="replace") + b"\n"  # a lone surrogate has no UTF-8


def _plain(value: Any) -> Any:
    """JSON's own types, with None for what JSON has no number for."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, (str, int)):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        return _plain(value.item())
    raise TypeError(f"row: cannot write a {type(value).__name__} ({value!r:.80}) as JSON")


def _decoded(line: bytes, path: Path, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{path}, {where}: not JSON ({error})") from error
    if not isinstance(row, dict):
        raise ValueError(f"{path}, {where}: expected a JSON object, got {type(row).__name__}")
    return row


def _is_whole(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def _step_of(line: bytes, path: Path, number: int) -> int:
    if match := _STEP_FIRST.match(line):  # rollouts can be gigabytes: no parsing where step comes first
        return int(match[1])
    step = _decoded(line, path, f"line {number}").get("step")
    if not isinstance(step, int):
        raise ValueError(f"{path}, line {number}: no step")
    return step


def _repair(path: Path) -> None:
    with path.open("r+b") as file:
        size = file.seek(0, 2)
        start = _line_start(file, size)
        file.seek(start)
        tail = file.read()
        if not tail:
            return
        if _is_whole(tail):
            file.write(b"\n")
        else:
            file.truncate(start)
            logger.warning("%s: cut off an unfinished last line of %d bytes", path.name, len(tail))


def _start_of_last_line(file: BinaryIO) -> int:
    size = file.seek(0, 2)
    return _line_start(file, max(0, size - 1))


def _line_start(file: BinaryIO, end: int) -> int:
    """The offset behind the last newline before ``end``."""
    while end > 0:
        start = max(0, end - _CHUNK)
        file.seek(start)
        found = file.read(end - start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        end = start
    return 0
