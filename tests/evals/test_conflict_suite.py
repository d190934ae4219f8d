"""The suite of the conflict worlds in a tiny size: it chooses as it says, compares fairly and goes on after a stop."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from maestro_fast.evals.conflict import CONTEXT, REWARDS, WORLDS
from maestro_fast.evals.conflict_arms import ARMS, SETTINGS, WEIGHTINGS, static_arm
from maestro_fast.evals.conflict_suite import (
    GRID_FILE,
    SuiteSize,
    comparison_jobs,
    pick_static,
    run_suite,
    static_jobs,
    tuning_jobs,
)
from maestro_fast.evals.jobs import RESULTS_FILE
from maestro_fast.evals.results import Result
from maestro_fast.weighting import build_weight_policy

TINY = SuiteSize(
    worlds=("hack",),
    tuned_on=("hack",),
    arms=("equal", "labelled", "single:facts", "static", "static_oracle"),
    shares=(0.25, 0.5),
    tuned_share=0.5,
    profiles=("rloo",),
    profile_arms=("equal", "labelled", "static_oracle"),
    steps=2,
    prompts=4,
    evaluation=4,
    test_seeds=2,
    validation_seeds=1,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("suite")
    run_suite(folder, workers=0, size=TINY)
    return folder


def test_every_tuned_arm_tries_twelve_settings_that_its_policy_takes() -> None:
    for arm in ARMS.values():
        settings = arm.settings
        assert len({json.dumps(setting) for setting in settings}) == len(settings) == SETTINGS
        for setting in ARMS[arm.like or arm.name].settings:
            assert setting["training"].keys() <= {"learning_rate", "beta"}
            for world in WORLDS:
                build_weight_policy(arm.entry(world, setting), REWARDS, CONTEXT)


def test_controls_differ_from_their_arm_in_the_context_alone() -> None:
    setting = ARMS["conductor"].settings[5]
    own = ARMS["conductor"].entry("strong", setting)
    assert ARMS["conductor_prompt"].entry("strong", setting) == {**own, "context": "prompt_mean"}
    assert ARMS["conductor_shuffled"].entry("strong", setting) == {**own, "shuffle": True}
    shuffled, plain = ARMS["anchored_shuffled"], ARMS["anchored"]
    assert shuffled.weights == plain.weights and shuffled.shuffled and not plain.shuffled


def test_the_router_knows_what_each_family_needs() -> None:
    routes = ARMS["router"].entry("strong", ARMS["router"].settings[0])["routes"]
    assert routes["2"] == {"brevity": 0, "richness": 0.35, "creativity": 0, "facts": 0.35, "format": 0.3}


def test_the_plan_is_the_same_for_all_arms() -> None:
    size = SuiteSize()
    tuned = [arm for arm, _, _ in tuning_jobs(size)]
    assert {tuned.count(arm) for arm in tuned} == {SETTINGS * len(size.tuned_on)}
    assert {*tuned} == {arm.name for arm in ARMS.values() if not arm.like}
    picked = {(world, share): 3 for world in WORLDS for share in (None, *size.shares)}
    chosen = {arm: ARMS[arm].settings[7] for arm in tuned}
    tests = comparison_jobs(size, chosen, picked)
    validation = [job for _, _, job in tuning_jobs(size) + static_jobs(size, chosen["equal"])]
    seeds = {frozenset(job.payload["seeds"]) for job in tests}, {frozenset(job.payload["seeds"]) for job in validation}
    assert [len(found) for found in seeds] == [1, 1] and len(next(iter(seeds[0]))) == 10
    assert next(iter(seeds[0])).isdisjoint(next(iter(seeds[1])))
    names = [job.name for job in tests + validation]
    assert len(names) == len(set(names))
    for world in WORLDS:
        for arm in size.arms:
            found = [
                job.payload for job in tests if f"test/{world}/maestro/{arm}" in (job.name, job.name.rpartition("/")[0])
            ]
            labels = arm == "static" or (arm in ARMS and ARMS[arm].labels)
            if arm in ARMS and ARMS[arm].control:
                assert len(found) == (world in size.tuned_on)
            else:
                assert [job["condition"].get("share") for job in found] == (list(size.shares) if labels else [None])


def test_arms_without_labels_see_none_and_the_others_half_of_theirs_early() -> None:
    for arm, _, job in tuning_jobs(SuiteSize()):
        training = job.payload["training"]
        assert training["labelled"] == (0.05 if ARMS[arm].labels else 0.0)
        assert training.get("early", 0) == (1 if ARMS[arm].labels else 0)  # 0.05 * 50 / 2 = 1.25 batches


def test_static_weights_are_chosen_by_what_each_may_know() -> None:
    def run(i: int, utility: float, **figures: float) -> list[Result]:
        return [Result("weighting", 1, {}, utility, figures={f"labelled_utility/{n}": v for n, v in figures.items()})]

    weighed = {
        0: run(0, 0.2, **{"0.25": 0.1}),
        1: run(1, 0.5, **{"0.25": 0.4}),
        2: run(2, 0.4, **{"0.25": 0.9}),
    }
    # No label was dealt out at a half, so that choice stays with the first one, equal weights.
    assert pick_static(TINY, {"hack": weighed}) == {("hack", None): 1, ("hack", 0.25): 2, ("hack", 0.5): 0}
    assert static_arm("static", 0).weights["values"] == dict.fromkeys(REWARDS, 0.2)


def test_what_was_best_in_validation_worlds_is_taken(folder: Path) -> None:
    grid = json.loads((folder / GRID_FILE).read_text())
    for arm in ("equal", "labelled"):
        tried, taken = grid["settings"][arm]["tried"], grid["settings"][arm]["taken"]
        best = max(tried, key=lambda row: row["utility"])
        assert len(tried) == SETTINGS and taken == {"training": best["training"], "weights": best["weights"]}
    static = grid["static"]["hack"]
    assert len(static["tried"]) == WEIGHTINGS and len(static["taken"]) == 3
    for name, column in (("static_oracle", "utility"), ("static at 0.5", "labelled_utility/0.5")):
        values = [row[column] for row in static["tried"]]
        assert values[static["taken"][name]] == max(values)


def test_a_stopped_suite_goes_on_with_what_is_missing(folder: Path) -> None:
    path = folder / RESULTS_FILE
    whole = path.read_text().splitlines()
    first = [result.as_json() for result in run_suite(folder, workers=0, size=TINY)]
    assert path.read_text().splitlines() == whole
    path.write_text("".join(line + "\n" for line in whole[:-2]))
    again = [result.as_json() for result in run_suite(folder, workers=0, size=TINY)]
    assert json.dumps(again) == json.dumps(first)
    lines = path.read_text().splitlines()
    assert lines[:-2] == whole[:-2] and [json.loads(line)["job"] for line in lines] == [
        json.loads(line)["job"] for line in whole
    ]
    with pytest.raises(ValueError, match=r"^jobs: .* with other settings"):
        run_suite(folder, workers=0, size=SuiteSize(**{**vars(TINY), "steps": 3}))


def test_results_say_what_they_are(folder: Path) -> None:
    found = run_suite(folder, workers=0, size=TINY)
    assert all(result.condition["split"] == "test" and result.seed in (1, 2) for result in found)
    one = next(result for result in found if result.arm == "labelled" and result.condition["profile"] == "maestro")
    assert one.condition == {"world": "hack", "profile": "maestro", "split": "test", "share": 0.25}
    assert sum(one.families.values()) / 4 == pytest.approx(one.utility, abs=1e-4)
    assert [step for step, _ in one.history["utility"]] == [0, 1, 2] and one.tokens == 2 * 4 * 8 * 8
    assert {"start", "alarms", "kl", "diagnostics/family_spread"} <= one.figures.keys()
    profiles = {(r.arm, r.condition.get("share")) for r in found if r.condition["profile"] == "rloo"}
    assert profiles == {("equal", None), ("labelled", 0.5), ("static_oracle", None)}


def test_bad_sizes_are_named() -> None:
    with pytest.raises(ValueError, match=r"^worlds: 'calm', expected some of strong, mild, hack, anyof, null"):
        SuiteSize(worlds=("calm",))
    with pytest.raises(ValueError, match=r"^arms: without 'anchored', whose settings another arm takes over"):
        SuiteSize(arms=("equal", "anchored_shuffled"))
    with pytest.raises(ValueError, match=r"^arms: without 'equal', whose settings static weights take over"):
        SuiteSize(arms=("static",))
