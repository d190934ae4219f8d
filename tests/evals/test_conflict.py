"""The conflict benchmark in a small size: what it measures, and its two main findings."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from maestro_fast.evals import conflict
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
from maestro_fast.weighting import WeightContext

SMALL = ConflictConfig(steps=40, prompts=8, evaluation=32, learning_rate=0.03, labelled=0.5)
SEEDS = range(4)
ENTRIES: dict[str, Any] = {
    "equal": "equal",
    "anchored": {"type": "anchored", "context": "prompt_mean", "steps": 3},
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


def test_in_anyof_the_best_quality_that_a_family_needs_counts() -> None:
    bench = Bench(WORLDS["anyof"], (0,), ConflictConfig(prompts=2))
    v = torch.zeros(1, 2, 1, 2 * K)
    v[..., 0], v[..., 1], v[..., 2], v[..., 3] = -1.5, -3.0, 3.0, 1.5
    # Family 0 needs brevity or facts, family 1 richness or creativity; nothing can be exploited.
    expected = [math.tanh(1.0), math.tanh(2.0)]
    assert bench.utility(v, torch.tensor([0, 1]))[0, :, 0].tolist() == pytest.approx(expected)


def test_in_null_the_oracle_is_equal_weights() -> None:
    needs = enumerate(WORLDS["null"].needs)
    routes = {str(f): dict(zip(REWARDS, row, strict=True)) for f, row in needs}
    tiny = ConflictConfig(steps=3, prompts=4, group_size=4, evaluation=8)
    oracle = run_conflict("null", {"type": "router", "column": "family", "routes": routes}, (0, 1), tiny)
    torch.testing.assert_close(oracle.family_SF, run_conflict("null", "equal", (0, 1), tiny).family_SF)


def seen_by_policies(config: ConflictConfig) -> list[WeightContext]:
    """What a weight policy is shown in one world."""
    seen: list[WeightContext] = []

    def weights(context: WeightContext) -> Tensor:
        seen.append(context)
        return torch.full((K,), 1 / K)

    run_conflict("strong", {"type": "function", "function": weights}, (0,), config)
    return seen


def test_early_labels_are_a_part_of_the_share() -> None:
    config = ConflictConfig(steps=40, prompts=16, group_size=2, evaluation=4, labelled=0.25, early=5)
    known = [context.utilities_B.view(-1, 2).isfinite() for context in seen_by_policies(config)]
    assert all(step.all() for step in known[:5]) and all(torch.equal(step[:, 0], step[:, 1]) for step in known)
    assert sum(config.label_chance(step) for step in range(40)) == pytest.approx(0.25 * 40)
    assert torch.stack(known).double().mean().item() == pytest.approx(0.25, abs=0.04)


def test_shuffled_contexts_are_those_of_other_prompts() -> None:
    config = ConflictConfig(steps=2, prompts=8, group_size=2, evaluation=4)
    plain, shuffled = seen_by_policies(config), seen_by_policies(replace(config, shuffled=True))
    for one, other in zip(plain, shuffled, strict=True):
        whole_NGd, own_Nd = other.context_Bd.view(8, 2, -1), one.context_Bd[::2]
        assert torch.equal(whole_NGd[:, 0], whole_NGd[:, 1])
        same_NN = (whole_NGd[:, None, 0] == own_Nd).all(-1)
        assert same_NN.sum(0).tolist() == same_NN.sum(1).tolist() == [1] * 8 and not same_NN.diagonal().all()


def test_labelled_alone_averages_over_labelled_groups() -> None:
    config = ConflictConfig(prompts=4, group_size=4, labelled=0.15, evaluation=4)
    training = conflict._Training(Bench(WORLDS["strong"], range(8), config), "utility")
    training.step(0, diagnosed=False)
    bench = Bench(WORLDS["strong"], range(8), config)
    log_probs = bench.log_probs(bench.prompts(0, bench.families_N))
    y = bench.sample(log_probs.detach(), 4, 0)
    utility = bench.utility(bench.qualities(y), bench.families_N) + 0.3 * bench.random(0, 4, 4, stream=4)
    advantages = (utility - utility.mean(2, keepdim=True)) / (utility.std(2, keepdim=True) + 1e-4)
    labelled_SN = bench.random(0, 4, 1, kind="uniform", stream=5)[..., 0] < 0.15
    assert 0 < labelled_SN.any(1).sum() < 8
    surrogate = (log_probs[:, :, None] * y).sum((-1, -2)) * advantages
    for s, optimizer in enumerate(training.optimizers):
        own = optimizer.param_groups[0]["params"]
        if labelled_SN[s].any():
            mean = -surrogate[s][labelled_SN[s]].mean()
            for p, gradient in zip(own, torch.autograd.grad(mean, bench.parameters, retain_graph=True), strict=True):
                torch.testing.assert_close(p.grad, gradient[s], rtol=1e-3, atol=3e-5)
        else:
            assert all(p.grad is None and torch.equal(p, q[s]) for p, q in zip(own, bench.parameters, strict=True))


def test_a_profile_with_the_kl_in_the_loss_is_held_back_by_it() -> None:
    config = ConflictConfig(steps=8, prompts=4, group_size=4, evaluation=4, profile="dr_grpo", learning_rate=0.03)
    free, held = (
        run_conflict("strong", "equal", (0, 1), replace(config, beta=beta)).figures["kl"] for beta in (0.0, 3.0)
    )
    assert 0 < held < 0.7 * free


def test_watched_labels_show_the_utility_of_the_second_half() -> None:
    config = ConflictConfig(steps=8, prompts=4, group_size=2, evaluation=4, watched=(1.0,), label_noise=0.0)
    seen = seen_by_policies(replace(config, labelled=1.0))
    late = torch.stack([context.utilities_B for context in seen[4:]]).mean().item()
    found = run_conflict("strong", "equal", (0,), replace(config, labelled=0.0))
    assert found.figures["labelled_utility/1"] == pytest.approx(late, abs=1e-6)


def test_utility_over_time_ends_with_the_utility(results: dict[str, ConflictResult]) -> None:
    for s, history in enumerate(results["anchored"].history_S):
        assert len(history["utility"]) > 10 and history["utility"][0] == (0, results["anchored"].start_S[s].item())
        assert history["utility"][-1] == (SMALL.steps, pytest.approx(results["anchored"].utility_S[s].item()))
    # Weights that follow the prompt lie further apart between families than chance allows, equal ones do not.
    anchored, equal = results["anchored"].figures, results["equal"].figures
    assert anchored["diagnostics/family_spread"] > 1.3 * anchored["diagnostics/family_spread_shuffled"]
    assert equal["diagnostics/family_spread"] < 1e-6


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
    with pytest.raises(ValueError, match=r"^world: 'calm', expected one of strong, mild, hack, anyof, null"):
        run_conflict("calm", "equal", (0,))
    with pytest.raises(ValueError, match=r"^seeds: none given"):
        run_conflict("strong", "equal", ())
    with pytest.raises(ValueError, match=r"^profile: 'ppo', expected one of maestro"):
        ConflictConfig(profile="ppo")
    with pytest.raises(ValueError, match=r"^early: 11 of 100 batches, expected at most the labelled share 0\.1"):
        ConflictConfig(steps=100, labelled=0.1, early=11)
    with pytest.raises(ValueError, match=r"^steps: 0, expected at least 1"):
        ConflictConfig(steps=0)
