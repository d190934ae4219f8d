"""Files with one JSON object per line.

A run that is killed loses no finished line, and an unfinished last line is repaired when the file is opened again. Nor
does a full disk cost one: the file is then as it was before, and the error names it.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Iterator, Mapping
from io import FileIO
from pathlib import Path
from typing import Any, BinaryIO

logger = logging.getLogger(__name__)

# A run directory holds these files, config.yaml, checkpoint-*/ and report/.
METRICS_FILE = "metrics.jsonl"
ROLLOUTS_FILE = "rollouts.jsonl"
TIMINGS_FILE = "timings.jsonl"
ALARMS_FILE = "alarms.jsonl"
COSTS_FILE = "costs.jsonl"

_CHUNK = 1 << 16  # bytes
_STEP_FIRST = re.compile(rb'\{"step": (\d+)[,}]')


class JsonLines:
    """A file that grows by one line for each dictionary.

    Every call opens and closes the file, so that all it wrote survives the process. Floats are written with all their
    digits, NaN and infinities as null, and numbers of NumPy and PyTorch (0-d) like Python's. The constructor cuts off
    an unfinished last line that a crash left behind, and the log says so.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            _repair(self.path)

    def append(self, *rows: Mapping[str, Any]) -> None:
        """Adds one line for each row.

        Raises:
            TypeError: A value is neither JSON's nor a number of NumPy or PyTorch. Nothing is written then.
            OSError: The lines could not be written; the file is as it was.
        """
        data = b"".join(_encoded(row) for row in rows)
        with self.path.open("ab", buffering=0) as file:
            _write_whole(file, file.seek(0, 2), data, self.path)

    def last(self) -> dict[str, Any] | None:
        """The last line, or None if the file is empty or absent."""
        if not self.path.exists():
            return None
        with self.path.open("rb") as file:
            file.seek(_start_of_last_line(file))
            line = file.readline()
        return _decoded(line, self.path, "the last line") if line else None

    def replace_last(self, row: Mapping[str, Any]) -> None:
        """Writes ``row`` over the last line, and then cuts off the rest of the old line.

        Raises:
            OSError: The line could not be written; the file is as it was.
        """
        data = _encoded(row)
        with self.path.open("r+b", buffering=0) as file:
            _write_whole(file, _start_of_last_line(file), data, self.path)

    def count_from_one(self) -> None:
        """Adds 1 to the step of every line if the first one is of step 0, see ``counts_from_zero``."""
        if not counts_from_zero(self.path):
            return
        renumbered = self.path.with_name(f".{self.path.name}")
        with self.path.open("rb") as old, renumbered.open("wb") as new:
            for number, line in enumerate(old, 1):
                row = _decoded(line, self.path, f"line {number}")
                new.write(_encoded(row | {"step": _step_of(line, self.path, number) + 1}))
        renumbered.replace(self.path)

    def drop_from(self, step: int) -> int:
        """Cuts the file off before the first line of ``step`` or a later one, since a resumed run repeats these steps.

        Steps must not descend from line to line; they never do in the logs of a run.

        Returns:
            The number of lines that were dropped.
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


def counts_from_zero(path: Path) -> bool:
    """Whether a log of responses is one of version 0.1, whose steps were the numbers of optimiser steps done before.

    Since then a response has the number of the first optimiser step that trains on it, as in metrics.jsonl.
    """
    if not path.exists():
        return False
    with path.open("rb") as file:
        line = file.readline()
    return line.endswith(b"\n") and _step_of(line, path, 1) == 0


def iter_jsonl(path: str | Path) -> Iterator[dict[str, Any]]:
    """Yields the rows of a file. An unfinished last line is left out, since the run may still be writing it.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: Another line is not a JSON object; the message names the file and the line.
    """
    path = Path(path)
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n") and not _is_whole(line):
                logger.warning("%s: left out the unfinished last line, %d", path.name, number)
            else:
                yield _decoded(line, path, f"line {number}")


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """All rows of a file. See ``iter_jsonl``."""
    return list(iter_jsonl(path))


def read_tail(path: str | Path, max_bytes: int) -> list[dict[str, Any]]:
    """The rows that lie completely in the last ``max_bytes`` of a file. The rest of the file is not read."""
    path = Path(path)
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - max_bytes - 1))
        if size > max_bytes:
            file.readline()  # skips the rest of a line that began earlier
        lines = file.readlines()
    if lines and not lines[-1].endswith(b"\n") and not _is_whole(lines[-1]):
        lines.pop()
    return [_decoded(line, path, "a line near the end") for line in lines]


def _encoded(row: Mapping[str, Any]) -> bytes:
    text = json.dumps(plain(row), ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8", errors="replace") + b"\n"  # UTF-8 cannot encode a lone surrogate.


def plain(value: Any) -> Any:
    """Converts a value to JSON's own types. NaN and infinities, which JSON lacks, become None."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if value is None or isinstance(value, (str, int)):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        return plain(value.item())
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
    if match := _STEP_FIRST.match(line):  # A line that begins with its step is not parsed, as files can be gigabytes.
        return int(match[1])
    step = _decoded(line, path, f"line {number}").get("step")
    if not isinstance(step, int):
        raise ValueError(f"{path}, line {number}: no step")
    return step


def _repair(path: Path) -> None:
    """Ends a whole last line that lacks its newline, and cuts off an unfinished one."""
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


def _write_whole(file: FileIO, start: int, data: bytes, path: Path) -> None:
    """Ends the file with ``data`` from ``start`` on, or leaves it as it is and raises OSError with its name."""
    file.seek(start)
    old = file.read() if file.readable() else b""
    try:
        file.seek(start)
        left = memoryview(data)
        while left:  # On a disk that is nearly full a call writes a part, and the next one fails.
            left = left[file.write(left) or 0 :]
        file.truncate(start + len(data))
    except OSError as error:
        file.seek(start)
        file.write(old)  # These bytes have their room already.
        file.truncate(start + len(old))
        raise OSError(error.errno, error.strerror, str(path)) from error


def _start_of_last_line(file: BinaryIO | FileIO) -> int:
    size = file.seek(0, 2)
    return _line_start(file, max(0, size - 1))


def _line_start(file: BinaryIO | FileIO, end: int) -> int:
    """The offset just after the last newline before ``end``."""
    while end > 0:
        start = max(0, end - _CHUNK)
        file.seek(start)
        found = file.read(end - start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        end = start
    return 0
