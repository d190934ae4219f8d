"""Alarms, the best checkpoint by a figure of training, and samples, in runs of the trainer."""

from __future__ import annotations

import copy
import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import TrainerCallback, TrainingArguments

from maestro_fast import watching
from maestro_fast.cli import main
from maestro_fast.reporting.json_lines import read_jsonl
from maestro_fast.reporting.recorded_run import recorded_train
from maestro_fast.settings import SettingsError
from maestro_fast.training import MaestroTrainer, PromptDataset, parse_config, train
from maestro_fast.training.arguments import training_arguments
from maestro_fast.training.evaluation import check_best_metric
from maestro_fast.training.interrupt import Interrupted
from maestro_fast.watching import check_alarms
from tests.training.test_checkpoint import KillAt, Killed, assert_same_run, killed_and_resumed

RECORDED = "maestro_fast.reporting.recorded_run"


@pytest.fixture
def make_raw(steady: dict[str, Any]) -> Callable[..., dict[str, Any]]:
    """A run of six steps in a directory of its own."""

    def make(name: str, **sections: Any) -> dict[str, Any]:
        raw = copy.deepcopy(steady) | {"run_dir": f"{steady['run_dir']}-{name}", "weights": "equal"}
        raw["batch"] = {"prompts_per_batch": 2, "micro_batch": 8}
        raw["trainer"] |= {"max_steps": 6, "save_steps": 2}
        for section, value in sections.items():
            raw[section] = {**raw.get(section, {}), **value} if isinstance(value, dict) else value
        return raw

    return make


class StopBehind(TrainerCallback):
    """Sends the process the signal of a job scheduler in a step, as the user's Ctrl-C would come."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


def with_callback(callback: TrainerCallback, *args: Any, callbacks: Any, **options: Any) -> MaestroTrainer:
    return train(*args, callbacks=[*callbacks, callback], **options)


def alarms_of(raw: dict[str, Any]) -> list[dict[str, Any]]:
    return read_jsonl(Path(raw["run_dir"]) / "alarms.jsonl")


def test_an_alarm_ends_a_run_with_a_checkpoint_and_a_final_policy(
    make_raw: Callable[..., dict[str, Any]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(f"{RECORDED}.try_report", lambda run_dir: "No report.")
    alarm = {"metric": "grad_norm", "above": 0.0, "lines": 3, "then": "stop"}
    raw, config = make_raw("whole", alarms=[alarm]), tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(raw), encoding="utf-8")
    assert main(["train", str(config)]) == 0
    run_dir = Path(raw["run_dir"])
    printed = capsys.readouterr().out
    lines = read_jsonl(run_dir / "metrics.jsonl")

    assert "\nThe alarm on grad_norm ended the run after step 3: it was " in printed
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert {path.name for path in run_dir.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-3"}
    assert alarms_of(raw) == [
        {
            "step": 3,
            "metric": "grad_norm",
            "value": lines[2]["grad_norm"],
            "bound": 0.0,
            "action": "stop",
            "condition": "grad_norm above 0.0 for 3 lines of the log",
        }
    ]
    policies = [load_file(run_dir / name / "model.safetensors") for name in ("checkpoint-3", "final")]
    assert all(torch.equal(value, policies[1][name]) for name, value in policies[0].items())

    killed = make_raw("killed", alarms=[alarm])
    killed_and_resumed(killed, step=3)
    assert_same_run(raw["run_dir"], killed["run_dir"])
    assert alarms_of(killed) == alarms_of(raw)
    recorded_train(killed, resume=True)  # It has ended, and stays so.
    assert_same_run(raw["run_dir"], killed["run_dir"])
    assert alarms_of(killed) == alarms_of(raw)
    trainer = recorded_train(killed | {"alarms": [alarm | {"then": "warn"}]}, resume=True)
    assert trainer.state.global_step == 6


def best_by_hand(raw: dict[str, Any], every: int) -> int:
    """The step of the checkpoint whose mean reward since the one before is the lowest."""
    rewards = [line["reward"] for line in read_jsonl(Path(raw["run_dir"]) / "metrics.jsonl")]
    means = {end: sum(rewards[end - every : end]) / every for end in range(every, len(rewards) + 1, every)}
    assert len(set(means.values())) == len(means)
    return min(means, key=lambda step: means[step])


def test_the_best_checkpoint_by_a_training_figure_is_kept_and_loaded(
    make_raw: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {
        "max_steps": 6,
        "save_total_limit": 1,
        "load_best_model_at_end": True,
        "metric_for_best_model": "reward",
        "greater_is_better": False,
    }
    whole = make_raw("whole", trainer=options)
    trainer = recorded_train(whole)
    best, run_dir = trainer.state.best_model_checkpoint, Path(whole["run_dir"])
    assert trainer.state.best_global_step == best_by_hand(whole, every=2) < 6
    assert best == str(run_dir / f"checkpoint-{trainer.state.best_global_step}") and Path(best).is_dir()
    ours, theirs = load_file(run_dir / "final" / "model.safetensors"), load_file(Path(best) / "model.safetensors")
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())

    stopped = make_raw("stopped", trainer=options)
    with monkeypatch.context() as patch:
        patch.setattr(f"{RECORDED}.train", partial(with_callback, StopBehind(3)))
        with pytest.raises(Interrupted):
            recorded_train(stopped)
        assert (Path(stopped["run_dir"]) / "checkpoint-3").is_dir(), "one that lies between two regular ones"
        patch.setattr(f"{RECORDED}.train", partial(with_callback, KillAt(5)))
        with pytest.raises(Killed):
            recorded_train(stopped, resume=True)
    again = recorded_train(stopped, resume=True).state
    assert_same_run(whole["run_dir"], stopped["run_dir"])
    assert (again.best_metric, again.best_global_step) == (trainer.state.best_metric, trainer.state.best_global_step)


def test_a_checkpoint_that_an_interrupted_evaluation_makes_is_not_judged(
    make_raw: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The evaluation is made again at the resume, with a checkpoint behind it, where none was due."""
    options = {"save_steps": 3, "eval_steps": 1, "eval_strategy": "steps", "metric_for_best_model": "reward"}
    states = []
    for stops in (False, True):
        raw = make_raw(f"{stops}", trainer=options | {"greater_is_better": False})
        raw["evaluation"] = {"data": raw["data"]}
        if stops:
            with monkeypatch.context() as patch:
                patch.setattr("maestro_fast.training.trainer.evaluate_rewards", raises_interrupt)
                with pytest.raises(KeyboardInterrupt):
                    recorded_train(raw)
            assert (Path(raw["run_dir"]) / "checkpoint-1").is_dir()
        states.append(recorded_train(raw, resume=stops).state)

    whole, resumed = ((state.best_global_step, state.best_metric) for state in states)
    assert resumed == whole


def raises_interrupt(*args: Any, **options: Any) -> None:
    raise KeyboardInterrupt


def test_an_evaluation_judges_only_what_it_has(make_raw: Callable[..., dict[str, Any]]) -> None:
    """With both at hand, a figure of training judges by training, and the evaluation is no obstacle."""
    raw = make_raw("run", trainer={"max_steps": 2, "save_steps": 1, "metric_for_best_model": "reward"})
    raw["evaluation"] = {"data": raw["data"]}
    state = recorded_train(raw).state
    lines = [line["reward"] for line in state.log_history if "loss" in line]
    assert state.best_metric == max(lines)


def args_of(raw: dict[str, Any], **options: Any) -> Any:
    raw["trainer"] |= options
    return training_arguments(parse_config(raw))


def test_kl_is_better_where_it_is_lower(make_raw: Callable[..., dict[str, Any]]) -> None:
    assert args_of(make_raw("a"), metric_for_best_model="kl").greater_is_better is False
    assert args_of(make_raw("a"), metric_for_best_model="kl", greater_is_better=True).greater_is_better is True
    assert args_of(make_raw("a"), metric_for_best_model="reward").greater_is_better is True


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"metric_for_best_model": "rewards/b/mean"}, r"'rewards/b/mean', expected one of rewards/a/mean"),
        ({"metric_for_best_model": "eval_reward"}, r"'eval_reward', but nothing is evaluated"),
        ({"metric_for_best_model": "loss"}, r"^trainer\.metric_for_best_model: 'loss', which does not tell"),
        (
            {"load_best_model_at_end": True},
            r"^trainer\.load_best_model_at_end: expected trainer\.metric_for_best_model",
        ),
        (
            {"load_best_model_at_end": True, "metric_for_best_model": "reward", "save_strategy": "no"},
            r"^trainer\.load_best_model_at_end: needs checkpoints",
        ),
        (
            {"save_strategy": "best", "metric_for_best_model": "reward"},
            r"^trainer\.save_strategy: best needs a figure of an evaluation, and .* is reward",
        ),
    ],
)
def test_metrics_that_cannot_judge_are_refused(
    make_raw: Callable[..., dict[str, Any]], options: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(ValueError, match=complaint):
        check_best_metric(args_of(make_raw("run"), **options), ("a",), None)


def test_a_schedule_that_follows_an_evaluation_needs_its_figure() -> None:
    options = {"lr_scheduler_type": "reduce_lr_on_plateau", "metric_for_best_model": "reward"}
    args = TrainingArguments("unused", use_cpu=True, report_to="none", eval_strategy="steps", **options)
    with pytest.raises(ValueError, match=r"^trainer\.lr_scheduler_type: reduce_lr_on_plateau needs a figure"):
        check_best_metric(args, ("a",), PromptDataset([{"prompt": "x"}]))


def test_settings_of_trackers_are_checked(
    make_raw: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(SettingsError, match=r"^trackers: trainer\.report_to is none, .* expected tensorboard or wandb"):
        args_of(make_raw("run", trackers={}))
    module = "transformers.integrations.integration_utils.get_available_reporting_integrations"
    monkeypatch.setattr(module, lambda: [])
    monkeypatch.setattr("transformers.integrations.get_available_reporting_integrations", lambda: [])
    args_of(make_raw("run"), report_to="all")
    assert "trainer.report_to: all is none, because no tracker is installed here" in caplog.text


def test_an_alarm_on_a_reward_that_there_is_not_is_refused_before_a_model_is_loaded(
    make_raw: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = make_raw("run", alarms=[{"metric": "rewards/brevty/mean", "above": 1}])
    monkeypatch.setattr("maestro_fast.training.run.load_policy", None)
    with pytest.raises(SettingsError, match=r"^alarms\[0\]\.metric: 'rewards/brevty/mean', expected one of "):
        train(parse_config(raw), raw)


def test_the_example_of_the_readme_is_understood(make_raw: Callable[..., dict[str, Any]]) -> None:
    page = (Path(watching.__file__).parent / "README.md").read_text(encoding="utf-8")
    sections = yaml.safe_load(page.partition("```yaml\n")[2].partition("```")[0])
    raw = make_raw("run")
    config = parse_config(raw | sections | {"evaluation": {"data": raw["data"]}})
    check_alarms(config.alarms, ("brevity",), evaluates=True)
    assert [alarm.condition for alarm in config.alarms] == [
        "kl above 0.5 for 3 lines of the log",
        "entropy below 0.1",
        "eval_rewards/brevity/mean not higher for 5 lines of the log",
    ]


def test_what_is_shown_changes_nothing(make_raw: Callable[..., dict[str, Any]]) -> None:
    """Console and trackers read a run; MaestroTrainer draws and logs as without them."""
    pytest.importorskip("tensorboard")
    shown = {"console": {"every": 1}, "trackers": {"every": 1}}
    runs = [
        make_raw("plain", trainer={"max_steps": 2}),
        make_raw("shown", trainer={"max_steps": 2, "report_to": "tensorboard"}, **shown),
    ]
    trainers: list[MaestroTrainer] = [recorded_train(raw) for raw in runs]
    assert_same_run(runs[0]["run_dir"], runs[1]["run_dir"])
    assert all(trainer.state.global_step == 2 for trainer in trainers)
