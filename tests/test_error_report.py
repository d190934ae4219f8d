"""What a command prints about an error: a sentence, the user's own lines, or nothing in place of the traceback."""

from __future__ import annotations

import json
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from maestro_fast import error_report
from maestro_fast.error_report import explain
from maestro_fast.settings import override


def raised(action: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> BaseException:
    """The error of ``action``, with this folder counted among the libraries, since the calls begin here."""
    monkeypatch.setattr(error_report, "_library_folders", lambda: [*FOLDERS, str(Path(__file__).parent)])
    with pytest.raises(Exception) as caught:
        action()
    return caught.value


FOLDERS = error_report._library_folders()


def test_our_own_errors_are_their_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    error = raised(lambda: override({"a": 1}, "a.b", 2), monkeypatch)

    assert explain(error) == f"maestro-fast: {error}"


def test_a_librarys_error_says_where_it_was_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    words = explain(raised(lambda: json.loads("{"), monkeypatch))

    assert words is not None
    first, second = words.splitlines()
    assert first.startswith("maestro-fast: Expecting property name")
    assert second.startswith("JSONDecodeError at ") and "/json/decoder.py:" in second and "-v shows" in second


def test_what_no_setting_can_cause_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    assert explain(raised(lambda: {}["a"], monkeypatch)) is None


def test_the_users_lines_are_found_behind_an_error_that_was_raised_from_theirs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own.py").write_text("def f():\n    return [][3]\nf()\n")

    def wrapped() -> None:
        try:
            runpy.run_path(str(tmp_path / "own.py"))
        except IndexError as error:
            raise RuntimeError("the step failed") from error

    words = explain(raised(wrapped, monkeypatch))
    assert words is not None and 'own.py", line 2, in f' in words and "IndexError: list index" in words
