"""The best checkpoint by a figure of training, on a log that is written by hand."""

from __future__ import annotations

import json
import math
import random

import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from maestro_fast.watching import BestCheckpoint

ARGS = TrainingArguments("unused", use_cpu=True, report_to="none")


class Run:
    def __init__(self, *, greater: bool = True, state: TrainerState | None = None) -> None:
        self.best = BestCheckpoint("reward", greater_is_better=greater)
        self.state = state or TrainerState(stateful_callbacks=[])
        self.best.on_train_begin(ARGS, self.state, TrainerControl())

    def log(self, value: float | None, **more: float) -> None:
        figures = {} if value is None else {"reward": value}
        self.best.on_log(ARGS, self.state, TrainerControl(), logs={"loss": 0.0, **figures, **more})

    def resumed(self) -> Run:
        saved = json.loads(json.dumps(vars(self.state)))
        return Run(state=TrainerState(**saved))


@pytest.mark.parametrize("greater", [True, False])
def test_the_best_mean_between_checkpoints_wins(greater: bool) -> None:
    draw = random.Random(0)
    run, means = Run(greater=greater), []
    for step in range(1, 41):
        run.state.global_step = step
        value = draw.random()
        run.log(value)
        means.append(value)
        if step % 4 == 0:
            run.best.judge(run.state)
    blocks = {4 * (i + 1): math.fsum(means[4 * i : 4 * i + 4]) / 4 for i in range(10)}
    expected = (max if greater else min)(blocks, key=lambda step: blocks[step])
    assert run.state.best_global_step == expected not in (4, 40)
    assert run.state.best_metric == pytest.approx(blocks[expected], rel=1e-12)


def test_the_sum_goes_on_behind_a_checkpoint_that_is_not_judged() -> None:
    whole, cut = Run(), Run()
    for step in range(1, 13):
        for run in (whole, cut):
            run.state.global_step = step
            run.log(float(step * 5 % 7))
            if step % 4 == 0:
                run.best.judge(run.state)
        if step in (3, 4, 6):  # A signal stops the run behind these steps.
            cut = cut.resumed()
    assert vars(cut.state) == vars(whole.state)


def test_a_checkpoint_without_a_line_is_not_judged(caplog: pytest.LogCaptureFixture) -> None:
    run = Run()
    run.state.global_step = 1
    run.log(1.0)
    run.best.judge(run.state)
    run.best.judge(run.state)  # The same checkpoint is written once more.
    assert not caplog.messages
    run.state.global_step = 2
    run.log(None)
    run.best.judge(run.state)
    run.log(9.0, train_loss=0.0)
    assert run.state.best_global_step == 1
    assert caplog.messages == [
        "trainer.metric_for_best_model: checkpoint-2 is not judged, no line of the log since the one before has reward"
    ]


def test_a_run_that_loads_no_best_one_says_so(caplog: pytest.LogCaptureFixture) -> None:
    run, args = Run(), TrainingArguments("unused", use_cpu=True, report_to="none")
    args.load_best_model_at_end = True
    run.best.on_train_end(args, run.state, TrainerControl())
    assert "final/ holds the last policy, no checkpoint was judged" in caplog.text


def test_sums_of_another_metric_are_not_taken_over() -> None:
    run = Run()
    run.state.global_step = 1
    run.log(100.0)
    state = run.resumed().state
    other = BestCheckpoint("kl", greater_is_better=False)
    other.on_train_begin(ARGS, state, TrainerControl())
    state.global_step = 2
    other.on_log(ARGS, state, TrainerControl(), logs={"loss": 0.0, "kl": 0.5})
    other.judge(state)
    assert state.best_metric == 0.5
