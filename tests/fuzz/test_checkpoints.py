"""A smaller run of ``tests.fuzz.checkpoints``."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzz import checkpoints

pytestmark = pytest.mark.long


def test_a_damaged_checkpoint_is_refused_or_harmless(tmp_path: Path) -> None:
    tally, failures = checkpoints.run(tmp_path, inputs=150, seed=11)
    assert not failures, "\n\n".join(failures)
    assert tally["refused by name"] > 50 and tally["right"] > 10 and tally["trusted"]


def test_a_fault_would_be_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "check_resumed", lambda *_: None)  # as before there were checksums
    tally, failures = checkpoints.run(tmp_path, inputs=100, seed=11)
    assert tally["wrong"] >= 3, failures
