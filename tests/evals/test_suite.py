"""A suite of trainings: what it plans, what it chooses, and that it goes on where it was stopped."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate import Accelerator

from maestro_fast.data.config import DataConfig
from maestro_fast.data.load import load_prompts
from maestro_fast.evals import suite as suites
from maestro_fast.evals import training_job
from maestro_fast.evals.jobs import run_jobs
from maestro_fast.evals.results import Result
from maestro_fast.evals.suite import Suite, assemble, choose, grid, read_suite, run_suite
from maestro_fast.evals.training_arms import ARMS, named_arms, weightings
from maestro_fast.generation import SamplingConfig, TransformersGenerator
from maestro_fast.model import ModelConfig, load_policy
from maestro_fast.records import RewardBatch
from maestro_fast.rewards import build_anchor
from maestro_fast.rewards.conditional import LabelsConfig
from maestro_fast.settings import SettingsError
from maestro_fast.training.batches import Processes
from maestro_fast.training.parts import Sampler
from maestro_fast.weighting import AnchoredConfig
from tests.tiny import tiny_checkpoint

FUNCTIONS = """
def vowels(completions, **columns):
    return [sum(c in "aeiou" for c in text) / 10 for text in completions]


def spaces(completions, **columns):
    return [text.count(" ") / 10 for text in completions]


def utility(completions, family, **columns):
    return [len(set(text)) / 40 if kind == "wide" else -len(text) / 100 for text, kind in zip(completions, family)]
"""
RUN = {
    "model": {"path": "model"},
    "data": {"path": "train.jsonl"},
    "rewards": [{"name": name, "type": "function", "function": f"mine.py:{name}"} for name in ("vowels", "spaces")],
    "anchor": {"type": "function", "function": "mine.py:utility", "labels": {"share": 0.5}},
    "sampling": {"group_size": 2, "max_new_tokens": 4},
    "batch": {"prompts_per_batch": 2, "micro_batch": 4},
    "trainer": {"learning_rate": 0.01, "use_cpu": True},
}


def write(folder: Path, **changes: Any) -> Path:
    """A suite over a tiny model, with its files."""
    tiny_checkpoint(folder / "model", "llama")
    (folder / "mine.py").write_text(FUNCTIONS)
    for name, count in (("train", 8), ("test", 4), ("val", 2)):
        rows = [{"prompt": f"{name} {i}", "family": ("wide", "short")[i % 2]} for i in range(count)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "run.yaml").write_text(yaml.safe_dump(RUN))
    values = {
        "run": "run.yaml",
        "test": {"path": "test.jsonl"},
        "validation": {"path": "val.jsonl"},
        "out": str(folder / "out"),
        "arms": ["equal", "static", "static_oracle", "anchored"],
        "shares": [0.5],
        "seeds": 1,
        "steps": [1, 2],
        "samples": 2,
        "static": 3,
        "validation_seeds": 1,
        "workers": 1,
    }
    (folder / "suite.yaml").write_text(yaml.safe_dump(values | changes))
    return folder / "suite.yaml"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Suite, list[Result]]:
    """A suite that has run, in this process."""
    suite = read_suite(write(tmp_path_factory.mktemp("suite")))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(suites, "run_jobs", in_this_process)
        return suite, run_suite(suite)


def in_this_process(*arguments: Any, **options: Any) -> dict[str, list[Result]]:
    return run_jobs(*arguments, **options | {"workers": 0})


def test_every_arm_has_a_result_for_each_of_the_steps(whole: tuple[Suite, list[Result]]) -> None:
    _, results = whole
    found = {(result.arm, result.condition["steps"], result.condition.get("share")) for result in results}

    assert found == {
        (arm, steps, share)
        for arm, share in (("equal", None), ("static", 0.5), ("static_oracle", None), ("anchored", 0.5))
        for steps in (1, 2)
    }
    for result in results:
        assert set(result.families) == {"wide", "short"} and result.length == pytest.approx(4, abs=3)
        assert result.utility == pytest.approx(sum(result.families.values()) / 2)
        assert result.tokens > 0 and dict(result.history["utility"])[0] == results[0].history["utility"][0][1]


def test_a_result_is_the_utility_of_the_policy_that_the_training_left(whole: tuple[Suite, list[Result]]) -> None:
    """The final policy of the run, loaded from its directory and sampled with the same draws, has that utility."""
    suite, results = whole
    run_dir = suite.folder / "runs" / "test-equal-seed-1"
    trained, tokenizer = load_policy(ModelConfig(str(run_dir / "final")))
    start, _ = load_policy(ModelConfig(str(suite.base / "model")))
    moved = max((a - b).abs().max().item() for a, b in zip(trained.parameters(), start.parameters(), strict=True))
    assert moved > 1e-3, "the training changed nothing"
    data = load_prompts(DataConfig(str(suite.base / "test.jsonl")))
    drawn = Sampler(TransformersGenerator(tokenizer, SamplingConfig(2, 4)), 2, 1, Processes(Accelerator(cpu=True)))
    anchor = build_anchor({"type": "function", "function": str(suite.base / "mine.py:utility")})
    values = []
    for i in (0, 2):  # A generation batch has four responses, so two prompts are answered at a time.
        prompts = data.prompts(data.rows[i : i + 2], tokenizer).repeat(2)
        own = drawn(trained.eval(), prompts, -1 - i)
        values.append(anchor(RewardBatch(prompts.texts, own.completions, own.completion_ids, prompts.columns, step=-1)))
    by_family = torch.cat(values).view(2, 2, 2).mean((0, 2))
    found = next(r for r in results if r.arm == "equal" and r.condition["steps"] == 2)
    assert found.utility == pytest.approx(by_family.mean().item(), abs=1e-5)


def test_a_stopped_suite_goes_on_with_what_is_missing(
    whole: tuple[Suite, list[Result]], monkeypatch: pytest.MonkeyPatch
) -> None:
    suite, results = whole
    lines = (suite.folder / "results.jsonl").read_text().splitlines()
    torn = next(i for i, line in enumerate(lines) if '"test/equal/seed-1"' in line)
    kept = [line for i, line in enumerate(lines) if i != torn]
    (suite.folder / "results.jsonl").write_text("\n".join([*kept, lines[torn][:80]]))  # as a kill leaves it
    trained: list[str] = []
    real = training_job.run_training

    def watched(payload: dict[str, Any]) -> list[Result]:
        trained.append(payload["name"])
        return real(payload)

    monkeypatch.setattr(training_job, "run_training", watched)
    monkeypatch.setattr(suites, "run_jobs", in_this_process)
    again = run_suite(suite)

    assert trained == ["test/equal/seed-1"]
    assert [json.dumps(r.as_json()) for r in again] == [json.dumps(r.as_json()) for r in results]


def test_files_may_lie_elsewhere_when_a_suite_goes_on(
    whole: tuple[Suite, list[Result]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    suite, _ = whole
    moved = replace(suite, base=tmp_path)
    monkeypatch.setattr(suites, "run_jobs", in_this_process)
    monkeypatch.setattr(training_job, "run_training", lambda payload: pytest.fail(payload["name"]))

    assert len(run_suite(moved)) == 8
    with pytest.raises(ValueError, match=r"seed-100000 is in .* with other settings"):
        run_suite(replace(suite, config=replace(suite.config, samples=3)))


def test_arms_of_a_seed_see_the_same_prompts_and_learn_from_the_share_of_labels(
    whole: tuple[Suite, list[Result]],
) -> None:
    suite, _ = whole
    rows = {}
    for name in ("test-equal-seed-1", "test-anchored-0.5-seed-1"):
        lines = (suite.folder / "runs" / name / "rollouts.jsonl").read_text().splitlines()
        rows[name] = [json.loads(line) for line in lines]
    first, second = rows.values()
    assert [r["prompt"] for r in first] == [r["prompt"] for r in second]
    labels = LabelsConfig(**suite.labels(0.5))
    log = (suite.folder / "runs" / "test-anchored-0.5-seed-1" / "metrics.jsonl").read_text().splitlines()
    for step, line in enumerate(log, 1):
        labelled = [labels.chosen(step - 1, r["prompt"]) for r in second if r["step"] == step]
        assert json.loads(line)["anchor/labelled"] == pytest.approx(sum(labelled) / 4)


def of_weighting(i: int, utility: float, labelled: float, steps: int) -> Result:
    figures = {"labelled_utility/0.5": labelled}
    return Result("weighting", 0, {"steps": steps}, utility, figures=figures, settings={"weighting": i})


def test_static_is_chosen_by_labels_and_its_oracle_by_the_truth(whole: tuple[Suite, list[Result]]) -> None:
    suite, _ = whole
    found = [(0.1, 0.3), (0.5, 0.2), (0.2, 0.9)]  # the true utility and that of the labels
    validated = [of_weighting(i, *values, steps=s) for s in (1, 2) for i, values in enumerate(found)]
    picked = choose(suite, validated)

    assert picked == {("static", s, 0.5): 2 for s in (1, 2)} | {("static_oracle", s, None): 1 for s in (1, 2)}
    table = grid(suite, validated, picked)
    assert [row["utility"] for row in table["tried"][:3]] == [0.1, 0.5, 0.2] and len(table["taken"]) == 4
    unlabelled = [replace(result, figures={}) for result in validated]
    assert choose(suite, unlabelled)["static", 2, 0.5] == 0, "without a label it is equal weights"
    results = [replace(result, utility=float(result.settings["weighting"])) for result in validated]
    for result in assemble(suite, results, picked):
        assert result.utility == {"static": 2.0, "static_oracle": 1.0}[result.arm]
        assert ("share" in result.condition) == (result.arm == "static")


def test_half_of_the_labels_come_early(whole: tuple[Suite, list[Result]]) -> None:
    suite = replace(whole[0], steps=(80, 160))
    for share in (0.025, 0.05, 0.1, 0.25):
        labels = LabelsConfig(**suite.labels(share))
        assert labels.early == int(share * 40)
        assert sum(labels.chance(step) for step in range(80)) == pytest.approx(80 * share)


def test_weightings_go_from_coarse_to_fine() -> None:
    found = weightings(12, 5)
    assert len(set(found)) == 12 and found[0] == (0.2,) * 5 and found[1] == (0.5, 0.5, 0, 0, 0)
    assert all(sum(values) == pytest.approx(1) for values in weightings(36, 5))
    with pytest.raises(SettingsError, match=r"^static: 9, expected 1 to 3 weightings of 2 rewards"):
        weightings(9, 2)


def test_arms_are_named_or_ones_own() -> None:
    own = {"name": "mine", "set": {"weights": "saw"}, "labels": True}
    found = named_arms(["equal", "single", own], ("a", "b"))
    assert [arm.name for arm in found] == ["equal", "single:a", "single:b", "mine"]
    assert found[1].changes["weights"]["values"] == {"a": 1.0, "b": 0.0} and found[3].labels
    for entries, message in [
        (["equl"], r"^arms\[0\]: 'equl', expected one of .*equal"),
        (["equal", "equal"], r"^arms: 'equal' stands there twice"),
        ([{"name": "equal"}], r"^arms\[0\].name: 'equal'"),
        ([{"name": "x", "st": {}}], r"^arms\[0\].st: unknown setting"),
    ]:
        with pytest.raises(SettingsError, match=message):
            named_arms(entries, ("a", "b"))


@pytest.mark.parametrize("arm", list(ARMS))
def test_every_arm_is_a_config(arm: str, whole: tuple[Suite, list[Result]], tmp_path: Path) -> None:
    read_suite(write(tmp_path, arms=[arm]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": 0}, r"^seeds: 0"),
        ({"steps": [2, 1]}, r"^steps: \[2, 1\]"),
        ({"steps": None}, r"^steps: missing"),
        ({"shares": [1.5]}, r"^shares: 1.5"),
        ({"validation": None}, r"^validation: missing"),
        ({"run": "none.yaml"}, r"^config: no file .*none.yaml"),
        ({"arms": [{"name": "x", "set": {"weights": "eqal"}}]}, r"^arms: x: weights"),
        ({"sed": 1}, r"^sed: unknown setting"),
        ({"test": {"pth": "x"}}, r"^test.pth: unknown setting"),
        ({"test": [{"path": "test.jsonl"}, {"path": "none.jsonl"}]}, r"^test\[1\].path: there is no file .*none.jsonl"),
        ({"test": {"path": "test.jsonl", "share": 0.5}}, r"^test.share: 0.5"),
        ({"utility": {"type": "functio"}}, r"^utility.type: 'functio'"),
        ({"arms": ["static"], "shares": []}, r"^shares: none"),
        ({"arms": ["static"], "run": RUN | {"anchor": None}, "utility": RUN["anchor"]}, r"^run.anchor: missing"),
        ({"arms": [{"name": "x"}], "run": RUN | {"weights": "anchored"}}, r"^arms: x: anchor: missing"),
        ({"run": RUN | {"sampling": {"temprature": 1.0}}}, r"^run.sampling.temprature: unknown setting"),
        ({"run": RUN | {"model": {"path": "./none"}}}, r"^run.model.path: .*none"),
    ],
)
def test_a_wrong_suite_is_refused_before_anything_runs(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        read_suite(write(tmp_path, **changes))


def test_labels_are_dealt_out_to_generation_batches_and_not_to_optimiser_steps(
    whole: tuple[Suite, list[Result]],
) -> None:
    """With two optimiser steps from a batch, 80 steps are 40 batches, and these have the share of labels."""
    suite = replace(whole[0], steps=(80,), updates=2)
    for share in (0.05, 0.1, 0.25):
        labels = LabelsConfig(**suite.labels(share))
        assert sum(labels.chance(number) for number in range(40)) == pytest.approx(40 * share)


def test_few_rewards_have_few_weightings(tmp_path: Path) -> None:
    suite = read_suite(write(tmp_path, static=None))
    assert suite.tried == [(0.5, 0.5), (1.0, 0.0), (0.0, 1.0)] and len(suites.validation_jobs(suite)) == 3
    assert len(weightings(None, 5)) == 12


def test_an_oracle_needs_no_labels(tmp_path: Path) -> None:
    run = {name: value for name, value in RUN.items() if name != "anchor"}
    suite = read_suite(write(tmp_path, run=run, utility=RUN["anchor"], arms=["equal", "static_oracle"], shares=[]))
    assert {job.payload["labels"] for job in suites.validation_jobs(suite)} == {None}


def test_a_weighting_that_diverged_is_not_chosen() -> None:
    diverged = [Result("weighting", 0, {"steps": 1}, float("nan"), settings={"weighting": 0})]
    sound = [Result("weighting", 0, {"steps": 1}, u, settings={"weighting": i}) for i, u in ((1, 0.2), (2, 0.1))]
    means = suites._means(diverged + sound, 1, None)
    assert suites._best(means) == 1


def test_held_out_prompts_lie_beside_the_suite_and_the_run_beside_its_own_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path, run="runs/run.yaml", utility=RUN["anchor"])
    (tmp_path / "runs").mkdir()
    for name in ("run.yaml", "model", "train.jsonl"):
        (tmp_path / name).rename(tmp_path / "runs" / name)
    (tmp_path / "runs" / "mine.py").write_text(FUNCTIONS)
    monkeypatch.chdir(tmp_path / "runs")
    suite = read_suite(
        path, [("validation.path", "train.jsonl"), ("run.weights", "conductor"), ("run.weights.alpha", 1)]
    )

    places = suites.test_jobs(suite, [])[0].places
    assert places["test"] == {"path": str(tmp_path / "test.jsonl")} and places["base"] == str(tmp_path / "runs")
    assert places["utility"]["function"] == str(tmp_path / "mine.py:utility")
    assert suite.config.validation == {"path": str(tmp_path / "runs" / "train.jsonl")}
    assert suite.raw["weights"] == {"type": "conductor", "alpha": 1}
    assert suites.test_jobs(suite, [])[0].payload["test"] == {"path": "test.jsonl"}, "another place is the same suite"


def one_training(folder: Path, **changes: Any) -> list[Result]:
    suite = read_suite(write(folder, arms=["equal"], **changes))
    (job,) = suites.test_jobs(suite, [])
    return training_job.run_training({**job.payload, **job.places})


def test_a_training_that_diverges_has_no_utility_and_is_no_failure(tmp_path: Path) -> None:
    """So it counts as a lost seed, and does not keep the suite from its end."""
    wild = RUN | {"trainer": {"learning_rate": 1e39, "max_grad_norm": 0.0, "use_cpu": True}}
    found = one_training(tmp_path, run=wild, keep=False, steps=[1, 3])

    assert [result.condition["steps"] for result in found] == [1, 3] and math.isnan(found[1].utility)
    assert found[0].history["utility"][0][0] == 0 and found[1].tokens > 0


def test_a_training_that_ends_early_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(self: Any, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = True

    monkeypatch.setattr(training_job.Measure, "on_step_begin", stop)
    with pytest.raises(RuntimeError, match=r"^the training ended before step 2"):
        one_training(tmp_path, steps=[1, 2])


def test_alarms_and_evaluations_of_the_run_do_not_end_a_training(tmp_path: Path) -> None:
    run = RUN | {
        "alarms": [{"metric": "loss", "above": -1e9, "then": "stop"}],
        "evaluation": {"data": {"path": "val.jsonl"}},
        "trainer": RUN["trainer"]
        | {
            "load_best_model_at_end": True,
            "metric_for_best_model": "eval_utility",
            "eval_on_start": True,
            "eval_steps": 1,
        },
    }
    assert [result.condition["steps"] for result in one_training(tmp_path, run=run)] == [1, 2]


def test_prompts_that_are_trained_on_are_not_held_out(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r'^test: 8 of 8 prompts are training prompts, too, such as "train 0"'):
        one_training(tmp_path, test={"path": "train.jsonl"})


def test_a_family_without_a_utility_is_refused_before_anything_is_trained(tmp_path: Path) -> None:
    utility = RUN["anchor"] | {"where": {"family": "wide"}}
    with pytest.raises(ValueError, match=r"^utility: unknown for every response .* the family 'short'"):
        one_training(tmp_path, utility=utility)


def test_held_out_prompts_obey_the_limit_of_their_section(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^test.max_prompt_tokens: 1, but all 4 prompts"):
        one_training(tmp_path, test={"path": "test.jsonl", "max_prompt_tokens": 1, "too_long": "drop"})


def test_settings_of_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    suite = read_suite(path, [("run.model.path", "../model"), ("seeds", 7), ("run.trainer.learning_rate", 0.5)])

    assert suite.raw["model"]["path"] == str(tmp_path / "model") and suite.raw["data"]["path"] == "train.jsonl"
    assert len(suite.seeds) == 7 and suite.raw["trainer"]["learning_rate"] == 0.5


def test_a_user_of_anchored_gets_what_the_suites_have_measured() -> None:
    entry = ARMS["anchored_residual"].changes["weights"]
    assert AnchoredConfig() == AnchoredConfig(**{name: value for name, value in entry.items() if name != "type"})
    assert AnchoredConfig() != AnchoredConfig(residual=False)
