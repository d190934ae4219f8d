"""A smaller run of ``tests.fuzz.data_files``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.fuzz import data_files

pytestmark = pytest.mark.long


def test_a_file_that_is_almost_right_is_answered(tmp_path: Path) -> None:
    tally, failures = data_files.run(tmp_path, inputs=600, seed=11)
    assert not failures, "\n\n".join(failures)
    assert tally["read"] > 100 and tally["refused by name"] > 100


def test_a_failure_would_be_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise KeyError("prompt")

    monkeypatch.setattr(data_files, "load_prompts", broken)
    tally, failures = data_files.run(tmp_path, inputs=20, seed=11)
    assert tally["traceback"] == 20 and "KeyError" in failures[0]
