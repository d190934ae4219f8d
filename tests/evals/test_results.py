"""What a result keeps on its way through JSON, and which results stand side by side."""

from __future__ import annotations

import json
import math
from pathlib import Path

from maestro_fast.evals.results import Result, by_arm, conditions, key
from maestro_fast.reporting.json_lines import JsonLines, read_jsonl


def result(arm: str, seed: int = 1, utility: float = 0.5, **condition: str | float) -> Result:
    return Result(arm, seed, condition, utility)


def test_a_result_survives_json(tmp_path: Path) -> None:
    whole = Result(
        "anchored",
        3,
        {"world": "strong", "share": 0.05},
        0.25,
        {"poem": 0.5},
        12.5,
        1000,
        {"conductor/entropy": 1.5},
        {"utility": [(0, 0.1), (80, 0.25)]},
        {"values": {"brevity": 0.5}},
    )
    file = JsonLines(tmp_path / "results.jsonl")
    file.append(whole.as_json(), Result("broken", 1, {}, math.nan).as_json())
    first, second = map(Result.from_json, read_jsonl(file.path))

    assert first.as_json() == json.loads(json.dumps(whole.as_json()))
    assert first.history["utility"] == [[0, 0.1], [80, 0.25]]
    assert math.isnan(second.utility) and math.isnan(second.length) and second.tokens == 0
    assert json.loads(json.dumps(second.as_json(), allow_nan=False))["utility"] is None


def test_the_conditions_come_once_each_in_the_order_of_their_first_result() -> None:
    found = conditions([result("a", steps=80, world="x"), result("b", world="x", steps=80), result("a", world="w")])
    assert found == [(("steps", 80), ("world", "x")), (("world", "w"),)]
    assert key({"b": 1, "a": 2}) == (("a", 2), ("b", 1))


def test_an_arm_without_a_share_counts_at_every_share_and_one_with_another_share_does_not() -> None:
    results = [
        result("equal", world="x"),
        result("equal", 2, world="x"),
        result("equal", world="y"),
        result("anchored", world="x", share=0.05),
        result("anchored", 2, 0.75, world="x", share=0.1),
    ]
    found = by_arm(results, {"world": "x", "share": 0.1})
    assert {arm: sorted(seeds) for arm, seeds in found.items()} == {"equal": [1, 2], "anchored": [2]}
    assert found["anchored"][2].utility == 0.75
    assert "anchored" not in by_arm(results, {"world": "x"})
