"""The answers of judges on disk, so that no question is paid for twice and a resumed run judges as it did before.

The file is a SQLite database. A question is kept as a hash of everything that decides its answer, and an answer as the
judge's text with the tokens that it cost. Neither keys of an API nor prompts are in the file.

Every answer is committed when it comes, so a process that is killed at any moment leaves whole answers. Several
processes may use one file at once: SQLite's write-ahead log serves readers beside a writer, and writers wait for each
other. That log needs memory which the processes share, so processes on several machines need a file each.
"""

from __future__ import annotations

import contextlib
import sqlite3
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

_APPLICATION = 0x4D4A4447  # This number in its header marks a file as ours.
_WAIT = 60.0  # seconds for which a process waits for others that write
_AT_ONCE = 500  # questions that one statement looks up; old versions of SQLite take 999 at most


class Answer(NamedTuple):
    """What a judge said: its text, and the tokens of the question and of the answer, 0 if the server does not say."""

    text: str
    prompt_tokens: int = 0
    completion_tokens: int = 0


class JudgeCache:
    """A file of answers. It is made, with its folder, if there is none.

    A connection lasts for one batch and belongs to the thread that opened it, so a process may fork in between.

    Raises:
        ValueError: the file cannot be opened, or is something else.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"cache: cannot make the folder {path.parent}: {error.strerror}") from error
        with self.opened():
            pass

    @contextlib.contextmanager
    def opened(self) -> Iterator[OpenCache]:
        """Opens the file for one batch.

        Raises:
            ValueError: the file is broken or something else, or cannot be read or written. The message names it.
        """
        try:
            with contextlib.closing(sqlite3.connect(self.path, timeout=_WAIT, isolation_level=None)) as connection:
                _prepare(connection)
                yield OpenCache(connection)
        except sqlite3.Error as error:
            raise ValueError(
                f"cache: {self.path}: {error}; expected a file of judges' answers that can be read and written. Remove "
                "it if it is broken, or name another one"
            ) from error


class OpenCache:
    """The answers of one connection."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    def find(self, keys: Sequence[str]) -> dict[str, Answer]:
        """The answers that are known to the questions with these keys."""
        found: dict[str, Answer] = {}
        for start in range(0, len(keys), _AT_ONCE):
            some = keys[start : start + _AT_ONCE]
            marks = ", ".join("?" * len(some))
            rows = self._connection.execute(
                f"SELECT key, text, prompt_tokens, completion_tokens FROM answers WHERE key IN ({marks})", some
            )
            found |= {key: Answer(*answer) for key, *answer in rows}
        return found

    def put(self, key: str, answer: Answer) -> Answer:
        """Keeps an answer and returns it. If another process was first, its answer stays, and is returned."""
        self._connection.execute("INSERT OR IGNORE INTO answers VALUES (?, ?, ?, ?)", (key, *answer))
        return self.find([key])[key]


def _prepare(connection: sqlite3.Connection) -> None:
    """Makes a new file a cache, and refuses one that holds something else."""
    connection.execute("PRAGMA synchronous = NORMAL")  # With the log, a loss of power costs the last answers at most.
    with _transaction(connection, "DEFERRED"):
        new = _is_new(connection)
    if not new:
        return
    _write_ahead(connection)
    with _transaction(connection, "IMMEDIATE"):
        if _is_new(connection):  # Another process may have been faster.
            connection.execute(
                "CREATE TABLE answers (key TEXT PRIMARY KEY, text TEXT NOT NULL, "
                "prompt_tokens INTEGER NOT NULL, completion_tokens INTEGER NOT NULL) WITHOUT ROWID"
            )
            connection.execute(f"PRAGMA application_id = {_APPLICATION}")


def _is_new(connection: sqlite3.Connection) -> bool:
    if _number(connection, "PRAGMA application_id") == _APPLICATION:
        return False
    if _number(connection, "SELECT count(*) FROM sqlite_master"):
        raise sqlite3.DatabaseError("is the database of another program")
    return True


@contextlib.contextmanager
def _transaction(connection: sqlite3.Connection, kind: str) -> Iterator[None]:
    connection.execute(f"BEGIN {kind}")
    try:
        yield
    except BaseException:
        connection.execute("ROLLBACK")
        raise
    connection.execute("COMMIT")


def _number(connection: sqlite3.Connection, query: str) -> int:
    return int(connection.execute(query).fetchone()[0])


def _write_ahead(connection: sqlite3.Connection) -> None:
    """Turns the write-ahead log on. SQLite does not wait here while another process does the same."""
    deadline = time.monotonic() + _WAIT
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.01)
