"""Baselines and ablations change what they are named for, and the grid of static weightings is whole."""

from __future__ import annotations

import copy
import math
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import yaml

from maestro_fast.evals.baselines import baseline_arms, baseline_config, grid_arms, main, simplex_grid
from maestro_fast.rewards import build_rewards
from maestro_fast.settings import SettingsError
from maestro_fast.training import parse_config, read_config
from maestro_fast.weighting import Conductor, build_weight_policy

RECIPES = Path(__file__).resolve().parents[2] / "examples" / "recipes"
RAW: dict[str, Any] = {
    "model": {"path": "model"},
    "data": {"path": "data.jsonl"},
    "rewards": ["format", {"type": "length", "name": "brevity", "target": 2}, "entropy"],
    "weights": {"type": "anchored"},
    "anchor": {"type": "function", "function": "mine.py:utility"},
    "sampling": {"group_size": 4, "max_new_tokens": 6},
    "loss": {"kl_coef": 0.05},
}


def test_the_paper_and_its_reviewers_are_served() -> None:
    arms = baseline_arms(RAW)
    assert [*arms] == [
        "base", "sft", "nover", "em_grpo", "equal", "random", "single:format", "single:brevity", "single:entropy",
        "conductor", "conductor_synchronous", "conductor_no_entropy", "conductor_first_layer", "conductor_shuffled",
        "conductor_prompt", "conductor_mean",
    ]  # fmt: skip
    assert all(name == arm.name and arm.about.endswith(".") and not arm.labels for name, arm in arms.items())


@pytest.mark.parametrize("name", [name for name in baseline_arms(RAW) if name != "sft"])
def test_each_is_a_run_that_differs_in_what_it_changes(name: str) -> None:
    before = copy.deepcopy(RAW)
    changed = baseline_config(RAW, name)
    assert before == RAW, "the run itself stays as it was"
    config = parse_config({"run_dir": "x", **copy.deepcopy(changed)})
    names = build_rewards(config.rewards).names
    policy = build_weight_policy(config.weights, names, 4)
    assert not set(policy.needs_columns) and policy.name in ("equal", "random", "static", "conductor")
    touched = {dotted.partition(".")[0] for dotted in baseline_arms(RAW)[name].changes}
    assert {key for key in {*changed, *RAW} if changed.get(key) != RAW.get(key)} == touched
    assert changed["loss"]["kl_coef"] == 0.05 and changed["sampling"] == RAW["sampling"]


@pytest.mark.parametrize("name", ["nover", "em_grpo"])
def test_the_paper_s_single_rewards_are_those_of_the_recipes(name: str) -> None:
    ours = parse_config({"run_dir": "x", **baseline_config(RAW, name)})
    theirs = parse_config(read_config(RECIPES / f"{name}.yaml"))
    assert ours.rewards == theirs.rewards and ours.advantages == theirs.advantages
    assert ours.weights.policy == theirs.weights.policy if name == "nover" else ours.weights == theirs.weights
    if name == "nover":
        for option in ("normalization", "ratio", "clip_low", "clip_high"):
            assert getattr(ours.loss, option) == getattr(theirs.loss, option)
        assert ours.loss.max_completion_length == ours.sampling.max_new_tokens == 6  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("ablation", "option", "value"),
    [
        ("synchronous", "period", 1),
        ("no_entropy", "entropy_coef", 0.0),
        ("first_layer", "context", "response_first_layer"),
        ("shuffled", "shuffle", True),
        ("prompt", "context", "prompt_last"),
        ("mean", "context", "response_mean"),
    ],
)
def test_an_ablation_changes_one_option_of_the_published_conductor(ablation: str, option: str, value: object) -> None:
    arms = baseline_arms(RAW)
    found = [
        build_weight_policy(arms[name].changes["weights"], ("a", "b"), 4)
        for name in ("conductor", f"conductor_{ablation}")
    ]
    published, changed = (vars(policy.config) for policy in found if isinstance(policy, Conductor))
    assert published["context"] == "response" and published["estimator"] == "reinforce" and published["period"] == 5
    assert {name for name in changed if changed[name] != published[name]} == {option} and changed[option] == value


def test_an_unknown_baseline_is_named() -> None:
    with pytest.raises(SettingsError, match=r"^name: 'em_grop', expected one of base, sft, nover, .*em_grpo"):
        baseline_config(RAW, "em_grop")
    with pytest.raises(SettingsError, match=r"^name: 'sft' is no config of this kind"):
        baseline_config(RAW, "sft")


@pytest.mark.parametrize(("size", "parts"), [(1, 4), (2, 5), (3, 4), (3, 7), (5, 2)])
def test_the_grid_has_every_weighting_of_its_step_once(size: int, parts: int) -> None:
    found = simplex_grid(size, parts)
    units = [units for units in product(range(parts + 1), repeat=size) if sum(units) == parts]
    assert found == [tuple(unit / parts for unit in row) for row in units]
    assert len(found) == math.comb(parts + size - 1, size - 1)


def test_the_grid_as_arms() -> None:
    arms = grid_arms(["a", "b"], 2)
    assert [arm.name for arm in arms] == ["static:a=0,b=1", "static:a=0.5,b=0.5", "static:a=1,b=0"]
    assert arms[0].changes == {"weights": {"type": "static", "values": {"a": 0.0, "b": 1.0}}}
    with pytest.raises(ValueError, match=r"^parts: 0, expected at least 1"):
        grid_arms(["a"], 0)


def test_the_command_prints_a_config_for_another_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"run_dir": "runs/mine", **RAW}))
    main([str(tmp_path / "run.yaml"), "em_grpo", "--seed", "3"])
    printed = parse_config(yaml.safe_load(capsys.readouterr().out))
    assert printed.seed == 3 and build_rewards(printed.rewards).names == ("entropy",)
    assert printed.run_dir == str(tmp_path / "runs" / "mine")
