"""A smaller run of ``tests.fuzz.configs``."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzz import configs

pytestmark = pytest.mark.long


def test_a_config_that_is_almost_right_is_answered(tmp_path: Path) -> None:
    tally, failures = configs.run(tmp_path, inputs=400, seed=11)
    assert not failures, "\n\n".join(failures)
    assert tally["prepared"] > 10 and tally["refused by name"] > 100


def test_a_failure_would_be_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(values: object) -> None:
        raise ZeroDivisionError if values else AssertionError

    monkeypatch.setattr(configs, "parse_config", broken)
    tally, failures = configs.run(tmp_path, inputs=20, seed=11)
    assert tally["traceback"] > 10 and "ZeroDivisionError" in failures[0]
