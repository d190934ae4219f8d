from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

from maestro_fast.reporting import report
from maestro_fast.reporting.history import History
from maestro_fast.reporting.verdict import Finding, Verdict, plot_of, policy_name, verdict
from maestro_fast.watching.alarms import Alarm

STEPS = 60
RISE = np.linspace(0.2, 0.8, STEPS)
NOISE = 0.01 * np.random.default_rng(0).normal(size=STEPS)
ALARM = {"step": 40, "metric": "kl", "value": 0.61234, "bound": 0.5, "action": "warn", "condition": "kl above 0.5"}


def history(steps: int = STEPS, **columns: Any) -> History:
    """A history with a column for each keyword, where two underscores stand for a slash. Numbers are repeated."""
    values = {name.replace("__", "/"): np.broadcast_to(value, steps).astype(float) for name, value in columns.items()}
    return History(1.0 + np.arange(steps), values)


def sentences(findings: tuple[Finding, ...]) -> str:
    return "\n".join(finding.text for finding in findings)


def urgent(found: Verdict) -> str:
    return sentences(found.next)


def test_what_rose_fell_and_stayed_is_told_apart() -> None:
    found = verdict(
        history(
            rewards__up__mean=RISE + NOISE,
            rewards__down__mean=-10 * RISE + NOISE,
            rewards__still__mean=0.5 + NOISE,
            rewards__rare__mean=np.where(np.arange(STEPS) % 10 == 0, 1.0, np.nan),
        )
    )
    rose, fell, still, rare = (finding.text for finding in found.headline)
    assert re.fullmatch(r"Rose: up, 0\.25\d+ to 0\.74\d+ \(\+0\.48\d+ ± 0\.0\d+\)\.", rose)
    assert fell.startswith("Fell: down, -2.5")
    assert re.match(r"No change beyond noise: still \([+-]0\.00\d+ ± 0\.00\d+\)\.", still)
    assert rare == "Logged in too few steps to tell: rare."
    assert urgent(found).startswith("down fell from -2.5") and "up fell" not in urgent(found)
    assert "steps 1 to 12, and steps 49 to 60" in found.note


def test_a_short_run_names_no_trend() -> None:
    found = verdict(history(6, rewards__up__mean=np.arange(6.0), conductor__gradient_snr=0.0))
    assert sentences(found.headline) == (
        "6 logged steps are too few to tell a change from noise (20 are needed), so no trend is named here."
    )
    assert found.note == "" and found.next == ()


def test_a_reward_that_came_back_is_named_with_the_steps() -> None:
    hill = np.interp(np.arange(STEPS), [0, 15, 30, 45, STEPS], [0.0, 0.5, 1.0, 0.5, 0.1]) + NOISE
    assert re.search(
        r"up was at 0\.\d+ in the middle of the run \(steps 25 to 36\) and came back to 0\.2",
        urgent(verdict(history(rewards__up__mean=hill))),
    )


def test_held_out_prompts_that_go_another_way_are_urgent() -> None:
    evaluated = np.full(STEPS, np.nan)
    evaluated[[9, 29, 59]] = [0.3, 0.4, 0.6]
    along = verdict(history(rewards__a__mean=RISE + NOISE, eval_rewards__a__mean=evaluated))
    assert "went the way of the training prompts (3 evaluations from step 10 to 60" in sentences(along.facts)
    assert "a 0.30 to 0.60" in sentences(along.facts) and along.next == ()
    against = verdict(history(rewards__a__mean=RISE + NOISE, eval_rewards__a__mean=-evaluated))
    assert "did NOT go the way of the training prompts" in urgent(against)
    still = verdict(history(rewards__a__mean=RISE + NOISE, eval_rewards__a__mean=0.3 + 0.01 * evaluated))
    assert "On held-out prompts (3 evaluations" in sentences(still.facts) and still.next == ()


def test_the_best_utility_on_held_out_prompts_is_named() -> None:
    utility = np.full(STEPS, np.nan)
    utility[[9, 29, 59]] = [0.1, 0.5, 0.3]
    found = verdict(history(eval_utility=utility))
    assert "went from 0.1 to 0.3; it was best at step 30, with 0.5." in sentences(found.facts)


@pytest.mark.parametrize(
    ("columns", "warning"),
    [
        ({"completions__clipped_ratio": np.linspace(0, 1, STEPS)}, "91 % of the responses are cut off"),
        ({"rewards__a__mean": 0.5, "rewards__a__std": 0.0}, "a had the same value for all responses of a batch in 60"),
        ({"rewards__a__mean": 0.5, "rewards__a__abstained": 0.95}, "a abstained from 95 % of the responses"),
        (
            {"rewards__a__mean": 0.5, "rewards__a__errors": 0, "rewards__a__timeouts": np.repeat([0, 2], 30)},
            "a had timeouts in 30 of 60 logged steps",
        ),
        ({"entropy": 2.5 * RISE[::-1] + NOISE}, "lost more than half of its entropy"),
        (
            {"diagnostics__flat_groups": 0.7},
            "diagnostics/flat_groups ended at 0.7, above 0.6: most groups have no spread",
        ),
        ({"anchor__utility": -RISE + NOISE, "rewards__a__mean": 0.5}, "The known utility FELL from -0.2"),
    ],
)
def test_what_goes_wrong_is_to_be_looked_at(columns: dict[str, Any], warning: str) -> None:
    assert warning in urgent(verdict(history(**columns)))


def test_what_goes_well_needs_no_look() -> None:
    found = verdict(
        history(
            rewards__a__mean=RISE + NOISE,
            rewards__a__std=0.2,
            rewards__a__abstained=0.1,
            completions__clipped_ratio=0.1,
            completions__mean_length=100 * RISE + NOISE,
            entropy=2.0 + NOISE,
            kl=0.01 * RISE,
            frac_reward_zero_std=0.05,
            anchor__utility=RISE + NOISE,
        )
    )
    assert found.next == ()
    for fact in (
        "The responses got longer: 25.",
        "The token limit cut off 10 % of the responses",
        "The entropy of the policy shows no change beyond noise: 2.0",
        "The KL from the reference rose: 0.002",
        "5 % of the groups gave no signal",
        "Rewards abstained from responses: a from 10 %.",
    ):
        assert fact in sentences(found.facts)
    assert "The known utility rose from 0.2" in sentences(found.headline)


WEIGHED = {"rewards__a__mean": 0.5, "rewards__b__mean": 0.5, "weights__a": 0.7, "weights__b": 0.3}


def test_weights_are_compared_with_equal_ones() -> None:
    assert "At the end a had the most weight (0.70) and b the least (0.30); equal is 0.50." in sentences(
        verdict(history(**WEIGHED)).facts
    )
    near = history(**WEIGHED | {"weights__a": 0.501, "weights__b": 0.499})
    assert "within 0.001 of equal (0.5), so this run does NOT differ" in urgent(verdict(near))
    assert "equal by configuration" in sentences(verdict(near, policy="equal").facts)
    assert verdict(near, policy="equal").next == ()
    families = history(**WEIGHED | {"weights__a": 0.5, "weights__b": 0.5}, families__x__weights__a=0.9)
    assert verdict(families).next == ()  # They are equal on average alone.


@pytest.mark.parametrize(("shuffled", "says"), [(0.1, "The weights depend on"), (0.3, "The weights do NOT depend on")])
def test_the_spread_between_families_is_compared_with_a_shuffled_one(shuffled: float, says: str) -> None:
    spread = {"diagnostics__family_spread": 0.3 + NOISE, "diagnostics__family_spread_shuffled": shuffled}
    found = verdict(history(**WEIGHED, **spread))
    assert (says in sentences(found.facts)) == (shuffled == 0.1)
    assert (says in urgent(found)) == (shuffled == 0.3)


def test_alarms_come_first_and_those_of_a_kind_together() -> None:
    alarms = [ALARM, ALARM | {"step": 50}, ALARM | {"action": "stop", "metric": "entropy", "condition": "below 1"}]
    assert set(ALARM) == set(Alarm.__annotations__)
    found = verdict(history(completions__clipped_ratio=1.0), alarms=alarms)
    stop, warn, cut = found.next
    assert stop.text == "An alarm rang at step 40: entropy was 0.6123 (below 1). It ended the run."
    assert warn.text == "An alarm rang 2 times, the last time at step 50: kl was 0.6123 (kl above 0.5)."
    assert "cut off" in cut.text


def test_another_run_is_compared_step_by_step() -> None:
    swing = 5 * np.sin(np.arange(STEPS))  # It is common to both runs, so it must not widen the interval.
    ours = history(rewards__a__mean=swing + 0.1 + NOISE, rewards__b__mean=swing, anchor__utility=0.5 + NOISE)
    theirs = history(rewards__a__mean=swing, rewards__b__mean=swing + NOISE, anchor__utility=0.5)
    found = verdict(ours, {"equal": theirs})
    assert re.search(r"This run minus equal, .*: a \+0\.\d+ ± 0\.0\d+\.", sentences(found.facts))
    assert re.search(r"No difference from equal beyond noise: the known utility .*, b ", sentences(found.facts))
    assert "do NOT show that the weights helped" in urgent(found)
    worse = verdict(history(anchor__utility=0.4 + NOISE), {"equal": theirs})
    assert "The known utility is LOWER than in equal: -0.0989 ± 0.0" in urgent(worse)
    same = verdict(history(rewards__a__mean=NOISE), {"equal": history(rewards__a__mean=-NOISE)})
    assert "No reward differs from equal beyond noise" in urgent(same)


def test_the_printed_verdict_is_short() -> None:
    found = verdict(
        history(
            rewards__a__mean=-RISE,
            rewards__a__std=0.0,
            rewards__a__abstained=0.95,
            completions__clipped_ratio=0.9,
            entropy=RISE[::-1],
        )
    )
    lines = found.text(80).splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0].startswith("Fell: a, -0.2")
    assert [line[:2] for line in lines if line[:2] in ("1.", "2.", "3.", "4.")] == ["1.", "2.", "3."]
    assert lines[-1] == f"The report has {len(found.next) - 3} more."
    assert [finding.urgency for finding in found.next] == sorted((f.urgency for f in found.next), reverse=True)


def test_every_metric_points_to_a_plot_of_the_report() -> None:
    plots = {plot.name for plot in report.PLOTS}
    expected = {
        "kl": "policy",
        "reward": "rewards",
        "rewards/a/mean": "rewards",
        "rewards_correlation/min": "diagnostics",
        "eval_rewards/a/mean": "evaluation",
        "conductor/entropy": "conductor",
        "conductor/gradient_snr": "diagnostics",
        "completions/clipped_ratio": "response_length",
    }
    assert {metric: plot_of(metric) for metric in expected} == expected
    assert set(expected.values()) <= plots


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ("weights: equal", "equal"),
        ("weights: {type: anchored, alpha: 1}", "anchored"),
        ("model: x", None),
        ("not: [yaml", None),
        ("- a list", None),
        (None, None),
    ],
)
def test_the_policy_is_found_in_the_configuration(config: str | None, name: str | None) -> None:
    assert policy_name(config) == name
