"""The conflict benchmark in a small size: what it measures, and its two main findings."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from maestro_fast.evals.conflict import (
    FAMILIES,
    REWARDS,
    WORLDS,
    Bench,
    ConflictConfig,
    ConflictResult,
    K,
    run_conflict,
)
from maestro_fast.evals.statistics import paired_difference
from maestro_fast.reporting.plots import CONDUCTOR_CURVES

SMALL = ConflictConfig(steps=40, prompts=8, evaluation=32, learning_rate=0.03, labelled=0.5)
SEEDS = range(4)
ENTRIES: dict[str, Any] = {
    "equal": "equal",
    "anchored": {"type": "anchored", "context": "prompt_mean", "steps": 8},
    "advantage": {
        "type": "conductor",
        "learning_rate": 0.05,
        "alpha": 0.7,
        "entropy_coef": 0.01,
        "min_prob": 0.0,
        "period": 1,
    },
}


@pytest.fixture(scope="module")
def results() -> dict[str, ConflictResult]:
    return {name: run_conflict("strong", entry, SEEDS, SMALL) for name, entry in ENTRIES.items()}


def test_a_learning_conductor_logs_what_the_report_draws_of_it(results: dict[str, ConflictResult]) -> None:
    assert {curve.key for curve in CONDUCTOR_CURVES} <= results["advantage"].figures.keys()


def test_anchored_beats_equal_under_strong_conflict(results: dict[str, ConflictResult]) -> None:
    found = paired_difference(results["anchored"].utility_S, results["equal"].utility_S)
    print(f"anchored over equal: {found.mean:+.3f} +- {found.half_width:.3f}, {found.n} seeds")
    assert found.low > 0


def test_the_self_flattery_alarm_fires_for_the_published_objective_alone(results: dict[str, ConflictResult]) -> None:
    name = "diagnostics/self_flattery"
    assert results["advantage"].alarms.get(name, 0) == len(SEEDS) and results["advantage"].figures[name] > 0.05
    for quiet in ("equal", "anchored"):
        assert name not in results[quiet].alarms and abs(results[quiet].figures[name]) < 1e-4


def test_the_published_objective_does_not_beat_equal(results: dict[str, ConflictResult]) -> None:
    found = paired_difference(results["advantage"].utility_S, results["equal"].utility_S)
    print(f"advantage over equal: {found.mean:+.3f} +- {found.half_width:.3f}, {found.n} seeds")
    assert found.low < 0


def test_all_start_from_the_same_policies(results: dict[str, ConflictResult]) -> None:
    starts = [result.start_S for result in results.values()]
    assert torch.equal(starts[0], starts[1]) and torch.equal(starts[0], starts[2]) and starts[0].std() > 0


def test_a_seed_does_not_depend_on_its_company() -> None:
    tiny = ConflictConfig(steps=3, prompts=4, group_size=4, evaluation=8)
    together = run_conflict("hack", "random", (3, 5), tiny).utility_S
    alone = torch.cat([run_conflict("hack", "random", (seed,), tiny).utility_S for seed in (3, 5)])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)
    assert torch.equal(run_conflict("hack", "random", (3, 5), tiny).utility_S, together)


def test_utility_by_hand() -> None:
    bench = Bench(WORLDS["hack"], (0,), ConflictConfig(prompts=2))
    v = torch.zeros(1, 2, 1, 2 * K)
    v[0, :, 0, 0], v[0, 0, 0, K + 1], v[0, 1, 0, K + 2] = 1.5, -3.0, 1.5
    good = torch.tanh(torch.tensor(1.0)).item()
    found = bench.utility(v, torch.tensor([0, 1]))
    # Half of what family 0 needs is brevity, and negative exploitation does no harm. Family 1 does not need brevity.
    assert found[0, :, 0].tolist() == pytest.approx([0.5 * good, -0.4 * good])
    rewards = bench.rewards(v, 0) - bench.rewards(torch.zeros_like(v), 0)
    assert rewards[0, :, 0].tolist() == [pytest.approx([1.5, -4.5, 0, 0, 0]), pytest.approx([1.5, 0, 2.25, 0, 0])]


def test_qualities_are_scaled_and_opposed() -> None:
    bench = Bench(WORLDS["strong"], range(20), ConflictConfig())
    z = bench.fixed["qualities"].view(20, 8, 4, 2 * K)
    v_variance = z.square().mean(2).sum(1)  # Choices are independent, and each has mean 0.
    torch.testing.assert_close(v_variance, torch.ones(20, 2 * K))
    opposed = (z[..., 0] * z[..., 1]).mean(2).sum(1).mean().item()
    assert opposed == pytest.approx(-0.9, abs=0.06)


def test_a_router_may_read_the_family() -> None:
    needs = enumerate(WORLDS["strong"].needs)
    routes = {str(f): dict(zip(REWARDS, row, strict=True)) for f, row in needs}
    tiny = ConflictConfig(steps=2, prompts=4, group_size=4, evaluation=8)
    result = run_conflict("strong", {"type": "router", "column": "family", "routes": routes}, (0, 1), tiny)
    assert result.family_SF.shape == (2, FAMILIES) and result.utility_S.isfinite().all()


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match=r"^world: 'calm', expected one of strong, mild, aligned, hack"):
        run_conflict("calm", "equal", (0,))
    with pytest.raises(ValueError, match=r"^seeds: none given"):
        run_conflict("strong", "equal", ())
