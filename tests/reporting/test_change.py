from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import t as student

from maestro_fast.reporting.change import LEAST, change, late_mean

FLAT = np.tile([1.0, -1.0], 20)  # its neighbours are opposed, so the noise counts as independent


def noise(steps: int, rho: float, rng: np.random.Generator) -> np.ndarray:
    """Stationary noise of variance 1 whose neighbours have the correlation rho."""
    values = np.empty(steps)
    values[0] = rng.normal()
    for step in range(1, steps):
        values[step] = rho * values[step - 1] + np.sqrt(1 - rho * rho) * rng.normal()
    return values


def test_independent_steps_have_the_interval_of_two_means() -> None:
    values = FLAT + 0.1 * np.arange(40)  # The line is no noise.
    error = np.sqrt(2 * 40 / 35 / 8)  # from a sum of squares of 40 with 35 degrees of freedom, and 8 values in a part

    found = change(values)

    assert found is not None
    np.testing.assert_allclose(found.means, values.reshape(5, 8).mean(axis=1))
    np.testing.assert_allclose(found.half_width, student.ppf(0.975, 35) * error)
    np.testing.assert_allclose(found.difference, 3.2)


@pytest.mark.parametrize(("steps", "rho", "most"), [(100, 0.0, 0.08), (100, 0.6, 0.10), (36, 0.3, 0.12)])
def test_runs_without_a_trend_seldom_show_one(steps: int, rho: float, most: float) -> None:
    rng = np.random.default_rng(0)
    found = [change(noise(steps, rho, rng)) for _ in range(500)]
    wrong = np.mean([one is not None and one.direction != 0 for one in found])
    assert 0.01 < wrong < most
    assert np.mean([one is not None and one.turned() is not None for one in found]) < 0.05


def test_a_trend_beyond_the_noise_is_found_in_either_direction() -> None:
    rng = np.random.default_rng(1)
    trend = np.linspace(0, 4, 60) + noise(60, 0.3, rng)
    up, down = change(trend), change(-trend)
    assert up is not None and down is not None
    assert (up.direction, down.direction) == (1, -1)
    assert up.half_width == pytest.approx(down.half_width)


def test_steps_that_depend_on_each_other_say_less() -> None:
    rng = np.random.default_rng(2)
    slow = noise(200, 0.8, rng)
    quick = rng.permutation(slow)
    wide, narrow = change(slow), change(quick)
    assert wide is not None and narrow is not None
    assert wide.half_width > 1.5 * narrow.half_width


def test_equal_numbers_do_not_change_by_their_rounding() -> None:
    values = np.float32(1 / 3) + np.linspace(0, 5e-8, 50)
    for series in (values, np.zeros(50)):
        found = change(series)
        assert found is not None
        assert (found.direction, found.turned()) == (0, None)


def test_a_series_that_came_back_names_the_part_it_came_from() -> None:
    hill = np.interp(np.arange(40), [0, 8, 20, 32, 40], [0.0, 1.0, 5.0, 2.0, 0.5]) + 0.1 * FLAT
    found = change(hill)
    assert found is not None and found.turned() == 2
    valley = change(-hill)
    assert valley is not None and valley.turned() == 2
    slope = change(0.1 * np.arange(40) + 0.1 * FLAT)
    assert slope is not None and slope.turned() is None


def test_gaps_are_left_out_and_short_series_say_nothing() -> None:
    values = np.full(80, np.nan)
    values[::2] = FLAT
    with_gaps, without = change(values), change(FLAT)
    assert with_gaps == without
    assert change(FLAT[: LEAST - 1]) is None
    assert change(FLAT[:LEAST]) is not None
    assert late_mean(FLAT[: LEAST - 1]) is None


def test_the_late_mean_has_the_interval_of_one_mean() -> None:
    values = FLAT + 3
    mean, half = late_mean(values) or (0.0, 0.0)
    assert mean == pytest.approx(3.0)
    assert half == pytest.approx(student.ppf(0.975, 35) * np.sqrt(8 / 7 / 8))
