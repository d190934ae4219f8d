"""What a command prints about an error: a sentence, the user's own lines, or nothing in place of the traceback."""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from maestro_fast import error_report
from maestro_fast.error_report import explain
from maestro_fast.settings import SettingsError, override


def raised(action: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> BaseException:
    """The error of ``action``, with this folder counted among the libraries, since the calls begin here.

    Other tests may have named functions of Python's own in a config, which then are a user's.
    """
    monkeypatch.setattr(error_report, "loaded_files", frozenset)
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


def run_file(path: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> BaseException:
    """The error of a file that is run."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    return raised(lambda: runpy.run_path(str(path)), monkeypatch)


def test_a_wrong_setting_is_its_sentence_whoever_called_us(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A launcher, or a library that is installed as a clone, lies between the command and the check."""
    text = "from maestro_fast.settings import override\noverride({'a': 1}, 'a.b', 2)\n"
    error = run_file(tmp_path / "launch.py", text, monkeypatch)

    assert isinstance(error, SettingsError) and explain(error) == f"maestro-fast: {error}"


@pytest.mark.parametrize("folder", ["clone", "torchinductor_me"])
def test_a_library_elsewhere_and_what_it_writes_are_not_the_users(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / folder / "mine.py"
    if folder == "clone":
        module = ModuleType("trl.of_a_clone")
        module.__file__ = str(path)
        monkeypatch.setitem(sys.modules, "trl.of_a_clone", module)
    words = explain(run_file(path, "raise ValueError('too long')\n", monkeypatch))

    assert words is not None and words.startswith("maestro-fast: too long\nValueError at")
