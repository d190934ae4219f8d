"""A smaller run of ``tests.fuzz.kills``."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzz.kills import kill_and_compare

pytestmark = pytest.mark.long


@pytest.mark.parametrize(("processes", "kills"), [(1, 8), (2, 4)])
def test_a_run_that_is_killed_at_random_moments(tmp_path: Path, processes: int, kills: int) -> None:
    done = kill_and_compare(tmp_path, kills, processes, seed=11)
    assert len(done) == kills
    assert any(kill.resumed_from for kill in done)
