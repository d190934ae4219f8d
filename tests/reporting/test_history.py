from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from maestro_fast.reporting.history import History, family_spread


def line(step: int, **weights: Any) -> dict[str, Any]:
    """line(3, story_a=0.2) -> {"step": 3, "families/story/weights/a": 0.2}"""
    return {"step": step, **{"families/{}/weights/{}".format(*k.split("_")): v for k, v in weights.items()}}


def test_the_spread_by_hand() -> None:
    lines = [line(step, x_a=1.0, x_b=0.0, y_a=0.0, y_b=1.0) for step in range(1, 5)]  # before the last third
    lines += [
        line(5, x_a=0.5, x_b=0.5, y_a=0.1, y_b=0.7),
        line(6, x_a=0.7, x_b=0.3, y_a=None, y_b=0.9),
        {"step": 6, "train_runtime": 3.0},  # A line without weights does not count.
    ]
    result = family_spread(lines)
    assert (result.families, result.rewards) == (("x", "y"), ("a", "b"))
    # The means of x are 0.6 and 0.4, those of y 0.1 (from one line) and 0.8. The population std of two numbers is half
    # their distance.
    np.testing.assert_allclose(result.means_FK, [[0.6, 0.4], [0.1, 0.8]])
    assert result.spread == pytest.approx((0.25 + 0.2) / 2)
    assert (result.first_step, result.last_step) == (5, 6)


def test_three_families_have_the_population_deviation() -> None:
    result = family_spread([line(1, x_a=0.1, y_a=0.2, z_a=0.6)])
    assert result.spread == pytest.approx(math.sqrt((0.04 + 0.01 + 0.09) / 3))


def test_the_last_third_is_rounded_up() -> None:
    lines = [line(step, x_a=0.5) for step in range(1, 8)]
    assert family_spread(lines).first_step == 5  # The last third of 7 lines are 3.


def test_families_without_difference_have_no_spread() -> None:
    assert family_spread([line(1, x_a=0.3, x_b=0.7, y_a=0.3, y_b=0.7)]).spread == pytest.approx(0, abs=1e-15)
    assert family_spread([line(1, x_a=0.3)]).spread == 0


def test_a_family_that_lacks_a_reward_does_not_count_there() -> None:
    result = family_spread([line(1, x_a=0.2, y_a=0.4, x_b=0.8)])
    assert np.isnan(result.means_FK[1, 1])
    assert result.spread == pytest.approx((0.1 + 0.0) / 2)
    assert result.table().rows[1] == ("y", 0.4, None)


def test_the_table_shows_means_and_deviations() -> None:
    table = family_spread([line(1, x_a=0.2, y_a=0.4)]).table()
    assert table.header == ("family", "a")
    assert table.rows == (("x", 0.2), ("y", 0.4), ("std over families", pytest.approx(0.1)))
    assert table.caption == "Mean weight by task family, step 1; between-family spread 0.1000"


@pytest.mark.parametrize("lines", [[], [{"step": 1, "loss": 0.1}], [line(1, x_a=None)]])
def test_a_run_without_family_weights_is_refused(lines: list[dict[str, Any]]) -> None:
    with pytest.raises(ValueError, match="families/<family>/weights/<name>"):
        family_spread(lines)


def test_history_gathers_columns_with_gaps() -> None:
    history = History.of([{"step": 2, "a": 1}, {"step": 4, "b": 2.5, "note": "text"}, {"step": 6, "a": None}])
    np.testing.assert_array_equal(history.steps, [2, 4, 6])
    np.testing.assert_array_equal(history.get("a"), [1, np.nan, np.nan])
    np.testing.assert_array_equal(history.get("b"), [np.nan, 2.5, np.nan])
    assert (history.has("a"), history.has("note"), history.has("step"), len(history)) == (True, False, False, 3)


def test_history_finds_names_with_slashes() -> None:
    keys = ["rewards/judge/v2/mean", "weights/length", "families/a/b/weights/only here", "families//completion_length"]
    history = History.of([{"step": 1, **dict.fromkeys(keys, 1.0)}])
    assert history.rewards == ("judge/v2", "length", "only here")
    assert history.families == ("", "a/b")


def test_history_needs_steps() -> None:
    with pytest.raises(ValueError, match="line 2 has no step"):
        History.of([{"step": 1}, {"loss": 1.0}])
