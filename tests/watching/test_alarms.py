"""Alarms on a log that is written by hand: when they ring, what they keep, what they refuse."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from maestro_fast.settings import SettingsError, build
from maestro_fast.watching import Alarm, AlarmConfig, Alarms, check_alarms

ARGS = TrainingArguments("unused", use_cpu=True, report_to="none", save_strategy="steps")


class Run:
    """The log of a run, as the trainer tells it to a callback."""

    def __init__(self, *alarms: dict[str, Any], state: TrainerState | None = None, main: bool = True) -> None:
        self.rang: list[Alarm] = []
        self.alarms = Alarms([build(AlarmConfig, alarm) for alarm in alarms], [self.rang.append])
        self.state = state or TrainerState(stateful_callbacks=[])
        self.state.is_world_process_zero = main
        self.control = TrainerControl()
        self.alarms.on_train_begin(ARGS, self.state, self.control)

    def log(self, **figures: float) -> None:
        self.alarms.on_log(ARGS, self.state, self.control, logs=figures)

    def steps(self, name: str, values: list[float]) -> None:
        for value in values:
            self.state.global_step += 1
            self.log(loss=0.0, **{name: value})

    def resumed(self, *alarms: dict[str, Any]) -> Run:
        """Goes on from a checkpoint that was made just now."""
        saved = json.loads(json.dumps(self.state.stateful_callbacks))
        state = TrainerState(stateful_callbacks=[], global_step=self.state.global_step)
        state.stateful_callbacks = saved
        return Run(*alarms, state=state)


def rings(alarm: dict[str, Any], values: list[float]) -> list[int]:
    run = Run(alarm)
    run.steps(alarm["metric"], values)
    return [rang.step for rang in run.rang]


@pytest.mark.parametrize(
    ("alarm", "values", "steps"),
    [
        ({"above": 0.5}, [0.5, 0.6, 0.7, 0.5, 0.6], [2, 5]),
        ({"below": 0.5}, [0.5, 0.4, 0.3, 0.5, 0.4], [2, 5]),
        ({"above": 0.5, "lines": 3}, [1, 1, 0, 1, 1, 1, 1, 1], [6]),
        ({"above": 0.5, "lines": 2}, [1, float("nan"), 1], [3]),
        ({"no_better_for": 2}, [1, 2, 2, 1, 3, 0, 0, 0, 4, 0, 0], [4, 7, 11]),
        ({"no_better_for": 2, "better": "lower"}, [3, 2, 2, 3, 1, 5, 5], [4, 7]),
    ],
)
def test_an_alarm_rings_once_for_every_time_beyond_its_bound(
    alarm: dict[str, Any], values: list[float], steps: list[int]
) -> None:
    assert rings({"metric": "kl", **alarm}, values) == steps


def test_only_lines_with_the_metric_count() -> None:
    run = Run({"metric": "eval_rewards/x/mean", "below": 0.0, "lines": 2}, {"metric": "loss", "above": 0})
    for step in range(1, 5):
        run.state.global_step = step
        run.log(loss=0.0)
        if step % 2 == 0:
            run.log(**{"eval_rewards/x/mean": -float(step)})
    run.log(train_loss=1.0, loss=1.0)  # The summary at the end is no line.
    assert [(rang.step, rang.value, rang.bound) for rang in run.rang] == [(4, -4.0, 0.0)]


def test_the_counts_survive_a_resume_wherever_it_comes(caplog: pytest.LogCaptureFixture) -> None:
    alarms = (
        {"metric": "kl", "above": 0.5, "lines": 3},
        {"metric": "kl", "no_better_for": 2},
        {"metric": "nowhere", "above": 1.0},
    )
    values = [1.0, 1.5, 0.2, 1.0, 1.0, 1.0, 1.0, 2.0, 1.0, 1.0]
    whole = Run(*alarms)
    whole.steps("kl", values)
    for cut in range(1, len(values)):
        first = Run(*alarms)
        first.steps("kl", values[:cut])
        caplog.clear()
        second = first.resumed(*alarms)
        second.steps("kl", values[cut:])
        assert [*first.rang, *second.rang] == whole.rang
        assert second.state.stateful_callbacks == whole.state.stateful_callbacks
        assert "nowhere" not in caplog.text  # It has been said before.


def test_a_stop_ends_the_run_and_asks_for_a_checkpoint() -> None:
    run = Run({"metric": "kl", "above": 0.5, "then": "stop"})
    run.steps("kl", [0.1])
    assert not run.control.should_training_stop
    run.alarms.on_epoch_end(ARGS, run.state, run.control)
    assert not run.control.should_save
    run.steps("kl", [0.7])
    assert run.control.should_training_stop
    run.alarms.on_epoch_end(ARGS, run.state, run.control)
    assert run.control.should_save

    run.alarms.on_save(ARGS, run.state, run.control)
    run.control = TrainerControl()
    run.alarms.on_epoch_end(ARGS, run.state, run.control)
    assert not run.control.should_save, "the step was saved already"


def test_a_run_that_was_ended_stays_so_until_its_alarm_changes(caplog: pytest.LogCaptureFixture) -> None:
    alarm = {"metric": "kl", "above": 0.5, "then": "stop"}
    run = Run(alarm)
    run.steps("kl", [0.7])
    caplog.clear()
    again = run.resumed(alarm)
    assert again.control.should_training_stop
    assert "was ended after step 1 by kl above 0.5; change that alarm" in caplog.text
    again.log(train_loss=0.0)
    assert again.resumed(alarm).control.should_training_stop
    for changed in ({**alarm, "above": 0.8}, {**alarm, "then": "warn"}):
        other = run.resumed(changed)
        assert not other.control.should_training_stop
        other.steps("kl", [0.1])
        assert not other.resumed(alarm).control.should_training_stop, "it has gone on since"


def test_what_rings_is_told_in_words_by_the_main_process_alone(caplog: pytest.LogCaptureFixture) -> None:
    alarm = {"metric": "kl", "above": 0.5, "lines": 2, "then": "stop"}
    run, other = Run(alarm), Run(alarm, main=False)
    run.steps("kl", [0.7, 0.75])
    (line,) = caplog.messages
    assert line == "alarm at step 2: kl is 0.75 (kl above 0.5 for 2 lines of the log); the run ends here"
    other.steps("kl", [0.7, 0.75])
    assert other.control.should_training_stop and len(caplog.messages) == 1 and not other.rang


def test_a_metric_that_the_log_lacks_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    run = Run(
        {"metric": "entropyy", "below": 0.1}, {"metric": "eval_reward", "below": 0.1}, {"metric": "x", "above": 1}
    )
    with caplog.at_level(logging.WARNING):
        run.state.global_step = 1
        run.log(**{"eval_rewards/y/mean": 0.0})
        run.log(loss=0.0, entropy=1.0, x=0.0)
        run.log(loss=0.0, entropy=1.0)
    assert caplog.messages == [
        "alarms[1].metric: the first line of an evaluation has no 'eval_reward', which counts from where it comes, if "
        "it does; did you mean 'eval_rewards/y/mean'?",
        "alarms[0].metric: the first line of the log has no 'entropyy', which counts from where it comes, if it does; "
        "did you mean 'entropy'?",
    ]


@pytest.mark.parametrize(
    ("alarm", "complaint"),
    [
        ({}, r"metric: kl has no bound, expected one of above, below and no_better_for"),
        ({"above": 1, "below": 0}, r"metric: kl has above and below, expected one of"),
        ({"above": 1, "lines": 0}, r"lines: 0, expected at least 1"),
        ({"no_better_for": 0}, r"no_better_for: 0, expected at least 1"),
        ({"no_better_for": 2, "lines": 2}, r"lines: 2, expected no_better_for alone"),
        ({"above": 1, "better": "lower"}, r"better: lower, but there is no no_better_for"),
        ({"above": 1, "then": "halt"}, r"then: got str 'halt', expected one of warn, stop"),
    ],
)
def test_alarms_that_cannot_be_are_refused(alarm: dict[str, Any], complaint: str) -> None:
    with pytest.raises(SettingsError, match=complaint):
        build(AlarmConfig, {"metric": "kl", **alarm})


@pytest.mark.parametrize(
    ("metric", "evaluates", "complaint"),
    [
        ("eval_rewards/a/mean", False, r"^alarms\[0\]\.metric: 'eval_rewards/a/mean', but nothing is evaluated"),
        ("rewards/b/mean", False, r"'rewards/b/mean', expected one of rewards/a/mean, or another figure of"),
        ("eval_rewards/b/mean", True, r"expected one of eval_rewards/a/mean"),
        ("weights/b", True, r"'weights/b', expected one of weights/a"),
    ],
)
def test_metrics_that_no_line_can_hold_are_refused(metric: str, evaluates: bool, complaint: str) -> None:
    with pytest.raises(SettingsError, match=complaint):
        check_alarms([AlarmConfig(metric, above=0.0)], ("a",), evaluates=evaluates)
    fine = [AlarmConfig(name, above=0.0) for name in ("rewards/a/own", "weights/a", "families/b/rewards/a", "kl")]
    check_alarms(fine, ("a",), evaluates=False)


def test_two_alarms_of_one_condition_are_refused() -> None:
    alarm = AlarmConfig("kl", above=0.5)
    with pytest.raises(ValueError, match=r"^alarms\[1\]: is alarms\[0\] once more, kl above 0\.5$"):
        check_alarms([alarm, AlarmConfig("kl", above=0.5, then="stop")], ("a",), evaluates=False)
