"""A smaller run of ``tests.fuzz.groups``."""

from __future__ import annotations

from typing import Any

import pytest

from maestro_fast import ops
from tests.fuzz import groups

pytestmark = pytest.mark.long


def test_any_structure_of_groups_is_answered() -> None:
    tally, failures = groups.run(inputs=1000, seed=11)
    assert not failures, "\n\n".join(failures)
    assert tally["right"] > 500 and tally["refused by name"] > 100


def test_a_fault_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    original = ops.group_advantages

    def broken(**given: Any) -> Any:
        found = original(**given)
        return found._replace(advantages=found.advantages.flip(0))

    monkeypatch.setattr(ops, "group_advantages", broken)
    tally, _ = groups.run(inputs=100, seed=11)
    assert tally["wrong"] > 15


def test_the_rule_by_hand() -> None:
    """Two groups of two, by GRPO: (r - mean) / (std + 1e-4), with the sample's standard deviation."""
    batch = groups.Batch([0, 0, 5, 5], [[1.0], [0.0], [3.0], [3.0]], [[1.0]] * 4, [0.0] * 4, 0.0, [1] * 4)
    truth = groups.evaluate(batch, ops.PROFILES["grpo"])
    assert truth.advantages == pytest.approx([0.5 / (0.5**0.5 + 1e-4), -0.5 / (0.5**0.5 + 1e-4), 0.0, 0.0])
    assert truth.degenerate == [False, False, True, True]
