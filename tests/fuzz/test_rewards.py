"""A smaller run of ``tests.fuzz.rewards``."""

from __future__ import annotations

from typing import Any

import pytest

from maestro_fast.rewards import reward as module
from tests.fuzz import rewards

pytestmark = pytest.mark.long


def test_whatever_a_reward_function_does_is_answered() -> None:
    tally, failures = rewards.run(inputs=1500, seed=11)
    assert not failures, "\n\n".join(failures)
    assert tally["right"] > 500 and tally["refused by name"] > 300


@pytest.mark.parametrize("fault", ["a number", "no name"])
def test_a_fault_would_be_seen(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    original = module.column_of

    def broken(name: str, values: Any, *rest: Any) -> Any:
        try:
            return original(name, values, *rest) + (0.1 if fault == "a number" else 0.0)
        except (TypeError, ValueError) as error:
            raise type(error)("no rewards" if fault == "no name" else str(error)) from error

    monkeypatch.setattr(module, "column_of", broken)
    tally, _ = rewards.run(inputs=100, seed=11)
    assert tally["wrong" if fault == "a number" else "refused wrongly"] > 8
