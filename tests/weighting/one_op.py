"""Which ops a batch's weights and advantages came from: calls are counted where our own code makes them."""

from __future__ import annotations

import importlib
from collections import Counter
from typing import Any

import pytest

CALLS = {
    "maestro_advantages": ("maestro_fast.weighting.adaptive_step",),
    "conductor_weights": ("maestro_fast.weighting.conductor.conductor",),
    "group_advantages": ("maestro_fast.weighting.adaptive_step", "maestro_fast.integrations.trl.trainer"),
}
FUSED = {"maestro_advantages": 1}
SINGLE = {"conductor_weights": 1, "group_advantages": 1}


def counted(monkeypatch: pytest.MonkeyPatch, *, trl: bool = False) -> Counter[str]:
    """Counts from now on. What an op calls inside itself, and what a Conductor compares to learn, is not counted."""
    found: Counter[str] = Counter()

    def spy(name: str, op: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            found[name] += 1
            return op(*args, **kwargs)

        return call

    for name, modules in CALLS.items():
        for module in map(importlib.import_module, modules[: 1 + trl]):
            monkeypatch.setattr(module, name, spy(name, getattr(module, name)))
    return found


def apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on, Conductors give their weights first, as every other policy does."""
    monkeypatch.setattr("maestro_fast.weighting.adaptive_step.is_one_op", lambda *_: False)
