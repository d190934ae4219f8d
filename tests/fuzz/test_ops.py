"""A smaller run of ``tests.fuzz.ops``."""

from __future__ import annotations

from typing import Any

import pytest

from tests.fuzz import ops
from tests.fuzz.calls import Call

pytestmark = pytest.mark.long


def test_a_call_that_is_almost_right_is_answered() -> None:
    tally, failures = ops.run(inputs=2000, seed=11)
    assert not failures, "\n\n".join(failures)
    assert tally["right"] > 500 and tally["refused by name"] > 500


@pytest.mark.parametrize("fault", ["a number", "a NaN", "an error"])
def test_a_fault_would_be_seen(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    original = ops.answer

    def broken(call: Call, backend: str, exact: bool = False) -> Any:
        found = original(call, backend, exact)
        if exact or isinstance(found, Exception):
            return found
        if fault == "an error":
            raise AttributeError
        return {name: x * (1.001 if fault == "a number" else float("nan")) for name, x in found.items()}

    monkeypatch.setattr(ops, "answer", broken)
    tally, _ = ops.run(inputs=100, seed=11)
    assert tally["traceback" if fault == "an error" else "wrong"] > 20
