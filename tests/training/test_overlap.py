"""A generator that works elsewhere gives the same results, and other work goes on meanwhile."""

from __future__ import annotations

import copy
import re
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import TrainerCallback

from maestro_fast.generation import TransformersGenerator
from maestro_fast.records import Prompts, RewardBatch, Rollouts
from maestro_fast.reporting.recorded_run import recorded_train
from maestro_fast.rewards import FunctionReward, RewardSet
from maestro_fast.training import build, parse_config, train
from maestro_fast.training.overlap import check_parts, run_together
from maestro_fast.weighting.conductor import Conductor
from tests.training.test_checkpoint import assert_same_run, killed_and_resumed
from tests.training.test_trainer import parameters, run

PATIENCE = 60.0  # seconds; only a test that fails waits for all of them


class Elsewhere(TransformersGenerator):
    """Stands for a generator behind a server: it is called from threads, and works on one call after the other."""

    concurrent_parts = 1
    lock = threading.Lock()

    def generate(self, model: nn.Module, prompts: Prompts, *, seed: int) -> Rollouts:
        assert threading.current_thread() is not threading.main_thread()
        with self.lock:
            return super().generate(model, prompts, seed=seed)


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes the trainer use ``Elsewhere``, or a subclass of it."""

    def use(generator: type[Elsewhere] = Elsewhere, parts: int = 1) -> None:
        monkeypatch.setattr(generator, "concurrent_parts", parts)
        monkeypatch.setattr(build, "TransformersGenerator", generator)

    return use


@pytest.fixture
def raw(raw_config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A run whose rewards tell all responses apart and do not need the whole batch."""

    def letters(completions: Sequence[str], **_: Any) -> list[float]:
        return [float(len(text)) for text in completions]

    def codes(completions: Sequence[str], **_: Any) -> list[float]:
        return [float(sum(map(ord, text)) % 97) for text in completions]

    rewards = RewardSet([FunctionReward(letters, name="letters"), FunctionReward(codes, name="codes")])
    monkeypatch.setattr("maestro_fast.training.run.build_rewards", lambda _: rewards)
    raw_config["trainer"] |= {"max_steps": 4}
    return raw_config


def test_it_trains_as_one_in_this_process_does(raw: dict[str, Any], elsewhere: Callable[..., None]) -> None:
    here, _ = run(copy.deepcopy(raw), run_dir=raw["run_dir"] + "-here")
    elsewhere()
    there, _ = run(raw)
    assert all(torch.equal(value, parameters(there)[name]) for name, value in parameters(here).items())
    ours, theirs = (x.step.weights.state_dict() for x in (here, there))
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())  # the last lesson was learnt, too


def test_figures_of_a_lesson_stand_one_line_later(raw: dict[str, Any], elsewhere: Callable[..., None]) -> None:
    raw["trainer"]["logging_steps"] = 1
    here, _ = run(copy.deepcopy(raw), run_dir=raw["run_dir"] + "-here")
    elsewhere()
    there, _ = run(raw)
    name = "conductor/objective"
    ours, theirs = ([line.get(name) for line in x.state.log_history if "loss" in line] for x in (here, there))
    assert theirs[0] is None and theirs[1:3] == ours[:2]
    assert theirs[3] == pytest.approx((ours[2] + ours[3]) / 2)  # those of the last batch go into the last line


def test_the_weight_policy_learns_while_the_next_batch_is_sampled(
    raw: dict[str, Any], elsewhere: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    learnt = threading.Event()

    class Second(Elsewhere):
        """Its second batch comes only once the policy has learnt from the first."""

        calls = 0

        def generate(self, model: nn.Module, prompts: Prompts, *, seed: int) -> Rollouts:
            type(self).calls += 1
            if type(self).calls == 2:
                assert learnt.wait(PATIENCE)
            return super().generate(model, prompts, seed=seed)

    observe = Conductor.observe

    def observed(self: Conductor, outcome: Any) -> None:
        observe(self, outcome)
        learnt.set()

    monkeypatch.setattr(Conductor, "observe", observed)
    elsewhere(Second)
    run(raw, trainer__max_steps=2)
    assert learnt.is_set() and Second.calls == 2


def test_parts_are_judged_while_others_are_sampled(
    raw: dict[str, Any], elsewhere: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    judged = threading.Event()
    sizes: list[int] = []

    def words(completions: Sequence[str], **_: Any) -> list[float]:
        sizes.append(len(completions))
        judged.set()
        return [float(len(text)) for text in completions]

    class OneByOne(Elsewhere):
        """The second part comes only once the first is judged; either may be asked for first."""

        def generate(self, model: nn.Module, prompts: Prompts, *, seed: int) -> Rollouts:
            if seed >> 48:  # The number of the part stands there.
                assert judged.wait(PATIENCE)
            return super().generate(model, prompts, seed=seed)

    elsewhere(OneByOne, parts=2)
    rewards = RewardSet([FunctionReward(words, name="words")])
    monkeypatch.setattr("maestro_fast.training.run.build_rewards", lambda _: rewards)
    _, (record,) = run(raw, trainer__max_steps=1)
    assert sizes == [8, 8]
    expected = torch.tensor([float(len(text)) for text in record.completions])
    assert torch.equal(record.rewards_BK[:, 0], expected)  # in the order of the responses


def test_a_killed_run_goes_on_bit_by_bit(raw: dict[str, Any], elsewhere: Callable[..., None]) -> None:
    elsewhere(parts=2)
    raw["trainer"] |= {"save_steps": 1, "logging_steps": 1}
    whole = raw | {"run_dir": raw["run_dir"] + "-whole"}
    recorded_train(copy.deepcopy(whole))
    killed_and_resumed(raw, 3)
    assert_same_run(whole["run_dir"], raw["run_dir"])


def test_a_generator_that_fails_costs_no_lesson(raw: dict[str, Any], elsewhere: Callable[..., None]) -> None:
    class Failing(Elsewhere):
        calls = 0

        def generate(self, model: nn.Module, prompts: Prompts, *, seed: int) -> Rollouts:
            type(self).calls += 1
            if type(self).calls == 3:
                raise RuntimeError("gone")
            return super().generate(model, prompts, seed=seed)

    whole = raw | {"run_dir": raw["run_dir"] + "-whole"}
    elsewhere()
    recorded_train(copy.deepcopy(whole))
    elsewhere(Failing)
    with pytest.raises(RuntimeError, match="gone"):
        recorded_train(copy.deepcopy(raw))
    assert (Path(raw["run_dir"]) / "checkpoint-2").is_dir()
    recorded_train(raw, resume=True)
    assert_same_run(whole["run_dir"], raw["run_dir"])


def test_a_lesson_that_fails_after_the_last_step_costs_no_step(
    raw: dict[str, Any], elsewhere: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    observe = Conductor.observe

    def failing(self: Conductor, outcome: Any) -> None:
        observe(self, outcome)
        if outcome.context.step == 3:
            raise RuntimeError("no lesson")

    monkeypatch.setattr(Conductor, "observe", failing)
    elsewhere()
    with pytest.raises(RuntimeError, match="no lesson") as caught:
        run(raw)
    assert "The run as it was after step 4 is in " in caught.value.__notes__[0]
    assert (Path(raw["run_dir"]) / "checkpoint-4").is_dir()


def test_a_lesson_is_learnt_however_a_run_ends_and_by_that_run_alone(
    raw: dict[str, Any], elsewhere: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    learnt: list[int] = []

    class Ends(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop |= state.global_step == 2

    monkeypatch.setattr(Conductor, "observe", lambda self, outcome: learnt.append(outcome.context.step))
    raw["trainer"]["logging_steps"] = 1
    elsewhere()
    ended = train(parse_config(raw), raw, callbacks=[Ends()])
    assert learnt == [0, 1]
    ended._lessons.add(None, postpone=True)  # type: ignore[arg-type] - as one that was interrupted leaves it
    ended.train()
    assert learnt == [0, 1, 0, 1]


def test_no_part_is_being_sampled_any_more_when_a_run_has_failed(
    raw: dict[str, Any], elsewhere: Callable[..., None]
) -> None:
    ended, failed = threading.Event(), threading.Event()

    class OneFails(Elsewhere):
        calls = 0

        def generate(self, model: nn.Module, prompts: Prompts, *, seed: int) -> Rollouts:
            with self.lock:
                type(self).calls += 1
                fails = type(self).calls == 1
            if fails:
                failed.set()
                raise RuntimeError("gone")
            assert failed.wait(PATIENCE)
            time.sleep(0.5)  # a run that does not wait is over by then
            ended.set()
            return super().generate(model, prompts, seed=seed)

    elsewhere(OneFails, parts=2)
    with pytest.raises(RuntimeError, match="gone"):
        run(raw)
    assert ended.is_set()


def test_calls_run_together_and_their_results_come_in_order() -> None:
    barrier = threading.Barrier(3, timeout=PATIENCE)

    def call(i: int) -> int:
        barrier.wait()  # lets all three through at once or none
        return i

    results, _ = run_together([lambda i=i: call(i) for i in range(3)], torch.device("cpu"))
    assert [get() for get in results] == [0, 1, 2]


def needing(name: str, **needs: bool) -> RewardSet:
    reward = FunctionReward(lambda completions, **_: [0.0] * len(completions), name=name)
    for attribute, value in needs.items():
        setattr(reward, attribute, value)
    return RewardSet([reward])


@pytest.mark.parametrize(
    ("parts", "rewards", "anchor", "words"),
    [
        (3, needing("a"), None, "generation.parts: 3, expected a divisor of the 4 prompts"),
        (2, needing("a", needs_entropy=True), None, "generation.parts: 2, but reward 'a' reads the policy's own"),
        (2, needing("a"), needing("b", needs_policy=True), "generation.parts: 2, but reward 'b' reads the policy's"),
    ],
)
def test_parts_that_cannot_be_are_refused(parts: int, rewards: RewardSet, anchor: RewardSet | None, words: str) -> None:
    with pytest.raises(ValueError, match="^" + re.escape(words)):
        check_parts(parts, 4, rewards, anchor)
    check_parts(1, 4, rewards, anchor)


def test_prompts_and_responses_divide_and_join() -> None:
    prompts = Prompts(list("abcd"), [[1], [2], [3], [4]], {"x": [5, 6, 7, 8]}, list("ffgg"))
    halves = prompts.split(2)
    assert [half.texts for half in halves] == [["a", "b"], ["c", "d"]]
    assert (halves[1].token_ids, halves[1].columns, halves[1].families) == ([[3], [4]], {"x": [7, 8]}, ["g", "g"])
    parts = [Rollouts(half, [[9], [9, 9]], ["u", "v"], torch.tensor([True, False]), torch.ones(3)) for half in halves]
    joined = Rollouts.joined(prompts, parts)
    assert joined.prompts is prompts and joined.completion_ids == [[9], [9, 9], [9], [9, 9]]
    assert joined.truncated_B.tolist() == [True, False, True, False] and joined.sampling_logprobs_C.shape == (6,)
    assert RewardBatch(joined.prompts.texts, joined.completions, joined.completion_ids).select([3]).prompts == ["d"]
