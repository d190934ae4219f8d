"""Guarded: deadlines of rewards, what becomes of a batch on which one fails, and the figures of rewards themselves."""

from __future__ import annotations

import asyncio
import logging
import math
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from maestro_fast.records import RewardBatch
from maestro_fast.rewards import (
    FunctionReward,
    Guarded,
    Labelled,
    LabelsConfig,
    RewardSet,
    RewardTimeoutError,
    Where,
    build_anchor,
    build_rewards,
    gate,
)
from maestro_fast.rewards.first_batches import Look
from maestro_fast.rewards.guarded import MOST_HANGING
from maestro_fast.rewards.reward import figures
from maestro_fast.settings import SettingsError

MakeBatch = Callable[..., RewardBatch]
SOON = 0.05  # seconds after which the tests' deadlines are over


@pytest.fixture
def hanging() -> Iterator[threading.Event]:
    """What rewards wait for that hang; they end with the test."""
    event = threading.Event()
    yield event
    event.set()


def guarded(function: Callable[..., Any], **options: Any) -> Guarded:
    return Guarded(FunctionReward(function, "mine"), **options)


def judged(reward: Any, batch: RewardBatch) -> list[float]:
    return RewardSet([reward])(batch)[:, 0].tolist()


def all_nan(values: list[float]) -> bool:
    return all(math.isnan(value) for value in values)


# --- what fails ---


def raises(completions: Any) -> list[float]:
    return [1 / 0]


async def raises_later(completions: Any) -> list[float]:
    await asyncio.sleep(0)
    return [1 / 0]


async def sleeps(completions: Any) -> list[float]:
    await asyncio.sleep(30)
    return [0.0]


@pytest.mark.parametrize("timeout", [None, 20])
@pytest.mark.parametrize("function", [raises, raises_later])
def test_an_error_stops_the_run_or_makes_the_reward_abstain(
    function: Any, timeout: float | None, make_batch: MakeBatch, caplog: pytest.LogCaptureFixture
) -> None:
    batch = make_batch(["a", "b c"])
    with pytest.raises(ZeroDivisionError) as caught:
        judged(guarded(function, timeout=timeout), batch)
    assert caught.value.__notes__ == ["raised by reward 'mine'"]
    assert caught.traceback[-1].name == function.__name__  # The line of the user's own code is still the last one.

    reward = guarded(function, timeout=timeout, on_error="abstain")
    with caplog.at_level(logging.WARNING, logger="maestro_fast.rewards.guarded"):
        assert all_nan(judged(reward, batch)) and all_nan(judged(reward, batch))
    (said,) = [record for record in caplog.records if record.name == "maestro_fast.rewards.guarded"]
    assert "'mine' abstains from all 2 responses of a batch: ZeroDivisionError: division by zero" in said.getMessage()
    assert said.exc_info is not None
    assert reward.metrics() == {"errors": 2.0, "timeouts": 0.0}
    assert reward.metrics() == {"errors": 0.0, "timeouts": 0.0}


@pytest.mark.parametrize("kind", ["plain", "async"])
def test_a_reward_that_is_late_stops_the_run_or_abstains(
    kind: str, hanging: threading.Event, make_batch: MakeBatch, caplog: pytest.LogCaptureFixture
) -> None:
    batch, function = make_batch(["a", "b c"]), sleeps if kind == "async" else lambda completions: [hanging.wait(30)]
    began = time.monotonic()
    with pytest.raises(RewardTimeoutError, match=r"^reward 'mine': was not back within 0.05 s for 2 responses\n"):
        judged(guarded(function, timeout=SOON), batch)

    late = guarded(function, timeout=SOON, on_error="abstain")
    values = RewardSet([late, FunctionReward(lambda completions: [1.0, 2.0], "other")])(batch)
    assert values[:, 1].tolist() == [1.0, 2.0] and all_nan(values[:, 0].tolist())
    assert late.metrics() == {"errors": 0.0, "timeouts": 1.0}
    assert caplog.messages[0].startswith("reward 'mine' abstains from all 2 responses of a batch: reward 'mine': was n")
    assert time.monotonic() - began < 20


@pytest.mark.parametrize(
    ("values", "words"),
    [([1.0], "returned 1 values for 2"), ([0.0, math.nan], "row 1 is nan"), ("ab", "returned str"), (None, "NoneType")],
)
@pytest.mark.parametrize("timeout", [None, 20])
def test_what_is_no_reward_is_a_failure_of_the_reward(
    values: Any, words: str, timeout: float | None, make_batch: MakeBatch, caplog: pytest.LogCaptureFixture
) -> None:
    batch = make_batch(["a", "b c"])
    with pytest.raises((ValueError, TypeError), match=words):
        judged(guarded(lambda completions: values, timeout=timeout), batch)
    assert all_nan(judged(guarded(lambda completions: values, timeout=timeout, on_error="abstain"), batch))
    assert words in caplog.text


def test_what_fails_on_one_batch_counts_on_the_next(make_batch: MakeBatch) -> None:
    answers: list[Any] = [KeyError("topic"), [1.0, None]]

    def mine(completions: Any) -> Any:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    reward, batch = guarded(mine, on_error="abstain"), make_batch(["a", "b c"])
    assert all_nan(judged(reward, batch))
    first, second = judged(reward, batch)
    assert first == 1.0 and math.isnan(second)


# --- calls that hang ---


def test_a_late_call_goes_on_alone_and_only_so_many_may(make_batch: MakeBatch) -> None:
    """It keeps its own copy of the batch; what it returns in the end reaches nobody."""
    release, calls, seen = threading.Event(), [], []

    def mine(completions: Any, note: list[list[str]]) -> list[float]:
        calls.append(threading.get_ident())
        if len(calls) <= MOST_HANGING:
            release.wait(30)
            seen.append([list(own) for own in note])
            note[0].append("changed")
        return [7.0]

    reward, batch = guarded(mine, timeout=SOON, on_error="abstain"), make_batch(["a"], columns={"note": [["x"]]})
    for _ in range(MOST_HANGING):
        assert all_nan(judged(reward, batch))
    batch.columns["note"][0].append("later")
    assert all_nan(judged(reward, batch))  # It is not called any more.
    assert len(set(calls)) == len(calls) == MOST_HANGING
    assert reward.metrics() == {"errors": 1.0, "timeouts": float(MOST_HANGING)}
    with pytest.raises(RuntimeError, match=rf"'mine': was not called, because {MOST_HANGING} calls .* still go on in"):
        reward.on_error = "stop"
        judged(reward, batch)

    release.set()
    for _ in range(200):
        if all(ended() for ended in reward._hanging):
            break
        time.sleep(0.01)
    assert judged(reward, batch) == [7.0] and judged(reward, batch) == [7.0]
    assert calls[-1] == calls[-2]  # Calls that are in time share one thread.
    assert seen == [[["x"]]] * MOST_HANGING
    assert batch.columns["note"] == [["x", "later"]]


class Reads:
    """A reward that promises to change nothing, and looks at its batch when it is late already."""

    name, needs_entropy, needs_policy, reads_only = "mine", False, False, True

    def __init__(self, release: threading.Event) -> None:
        self.release, self.done = release, threading.Event()
        self.notes: list[str] = []

    def __call__(self, batch: RewardBatch) -> list[float]:
        self.release.wait(30)
        self.notes = batch.columns["note"]
        self.done.set()
        return [0.0]


def test_a_late_call_sees_nothing_of_what_becomes_of_the_batch(make_batch: MakeBatch) -> None:
    release, batch = threading.Event(), make_batch(["a"], columns={"note": ["x"]})
    reward = Reads(release)
    assert all_nan(judged(Guarded(reward, timeout=SOON, on_error="abstain"), batch))
    batch.columns["note"][0] = "later"
    release.set()
    assert reward.done.wait(20) and reward.notes == ["x"]


def test_a_late_coroutine_is_cancelled_and_one_that_goes_on_is_left(make_batch: MakeBatch) -> None:
    cancelled: list[str] = []

    async def heeds(completions: Any) -> list[float]:
        try:
            await asyncio.sleep(30)
        except asyncio.CancelledError:
            cancelled.append("heeds")
            raise
        return [0.0]

    async def goes_on(completions: Any) -> list[float]:
        for _ in range(3):
            try:
                await asyncio.sleep(2 * SOON)
            except asyncio.CancelledError:
                cancelled.append("goes on")
        return [0.0]

    async def quick(completions: Any) -> list[float]:
        return [3.0]

    rewards = [
        Guarded(FunctionReward(function), timeout=SOON, on_error="abstain") for function in (heeds, goes_on, quick)
    ]
    values = RewardSet(rewards)(make_batch(["a"]))[0].tolist()
    assert values[2] == 3.0 and all_nan(values[:2])
    judged(FunctionReward(quick), make_batch(["a"]))  # The loop has had a turn.
    assert not rewards[1]._hanging[0]()
    assert sorted(cancelled) == ["goes on", "heeds"]


def test_a_coroutine_that_blocks_the_loop_is_an_error_and_no_endless_wait(
    hanging: threading.Event, make_batch: MakeBatch
) -> None:
    async def blocks(completions: Any) -> list[float]:
        hanging.wait(30)
        return [0.0]

    with pytest.raises(
        TimeoutError, match=r"the asynchronous ones \(mine\) has stood still for 0.05 s, so no deadline"
    ):
        judged(guarded(blocks, timeout=SOON, on_error="abstain"), make_batch(["a"]))
    hanging.set()
    judged(FunctionReward(raises_no_more), make_batch(["a"]))  # The loop turns again.


def test_the_deadline_of_a_plain_reward_is_none_for_an_asynchronous_one(make_batch: MakeBatch) -> None:
    """One without a deadline may block the event loop for as long as it likes."""

    async def blocks(completions: Any) -> list[float]:
        time.sleep(6 * SOON)
        return [2.0]

    plain = Guarded(FunctionReward(lambda completions: [1.0], name="plain"), timeout=SOON, on_error="abstain")
    assert RewardSet([plain, FunctionReward(blocks)])(make_batch(["a"])).tolist() == [[1.0, 2.0]]


def test_a_plain_reward_behind_an_asynchronous_gate_may_take_its_time(make_batch: MakeBatch) -> None:
    """It is called in the thread of the event loop, and another reward has a short deadline."""

    def slow(completions: Any) -> list[float]:
        time.sleep(6 * SOON)
        return [2.0]

    behind = gate(FunctionReward(slow), on=FunctionReward(raises_no_more), threshold=0)
    quick = Guarded(FunctionReward(lambda completions: [1.0], "quick"), timeout=SOON)
    assert RewardSet([behind, quick])(make_batch(["a"])).tolist() == [[2.0, 1.0]]


async def raises_no_more(completions: Any) -> list[float]:
    return [0.0]


# --- what passes ---


@pytest.mark.parametrize("timeout", [None, 20])
def test_an_interrupt_passes(timeout: float | None, make_batch: MakeBatch) -> None:
    def interrupts(completions: Any) -> list[float]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        judged(guarded(interrupts, timeout=timeout, on_error="abstain"), make_batch(["a"]))


def test_a_signal_ends_the_wait_for_a_late_call(hanging: threading.Event, make_batch: MakeBatch) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    hangs = True
    reward = guarded(lambda completions: [float(hanging.wait(30) if hangs else 1)], timeout=30)
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SOON)
    began = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt):
            judged(reward, make_batch(["a"]))
    finally:
        signal.signal(signal.SIGALRM, before)
    hangs = False
    assert judged(reward, make_batch(["a"])) == [1.0]  # It does not wait for the call that goes on.
    assert time.monotonic() - began < 20


def test_a_call_in_time_is_as_without_a_deadline(make_batch: MakeBatch) -> None:
    """The thread has torch's settings of the caller: gradients, and the precision of its products."""
    seen: list[tuple[bool, torch.dtype]] = []

    def mine(completions: Any, **columns: Any) -> torch.Tensor:
        seen.append((torch.is_grad_enabled(), (torch.ones(2, 2) @ torch.ones(2, 2)).dtype))
        return torch.tensor([1.5, 2.5])

    reward, batch = guarded(mine, timeout=20), make_batch(["a", "b c"])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert judged(reward, batch) == [1.5, 2.5]
    assert judged(reward, batch) == [1.5, 2.5]
    assert seen == [(False, torch.bfloat16), (True, torch.float32)]
    assert (reward.name, reward.needs_entropy, reward.needs_policy, reward.needs_columns) == ("mine", False, False, ())


# --- in a config ---

OWN = """
def raises(completions, **columns):
    raise ValueError("no topic")

def ones(completions, **columns):
    return [1.0] * len(completions)

def limited(completions, timeout=3):
    return [float(timeout)] * len(completions)

def free(completions, topic, **columns):
    return [0.0] * len(completions)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "own.py").write_text(OWN, encoding="utf-8")
    return tmp_path


def test_every_entry_has_a_guard_of_its_own(folder: Path, make_batch: MakeBatch) -> None:
    """The guard is inside a mask and a gate, so the rows that are left out are not its failures."""
    rewards = build_rewards(
        [
            {"function": "own.py:raises", "name": "masked", "on_error": "abstain", "where": "fact"},
            {
                "function": "own.py:ones",
                "gate": {"on": {"function": "own.py:raises", "on_error": "abstain", "timeout": 20}, "threshold": 0},
            },
            {"function": "own.py:ones", "name": "plain"},
        ],
        base_dir=folder,
    )
    anchor = build_anchor(
        {"function": "own.py:raises", "on_error": "abstain", "labels": {"share": 1.0}}, base_dir=folder
    )
    fact, none = (make_batch(["a", "b"], columns={"fact": [own, False]}, step=0) for own in (True, False))

    assert all_nan(rewards(fact)[:, :2].flatten().tolist()) and rewards(fact)[:, 2].tolist() == [1.0, 1.0]
    rewards(none)
    anchor(fact)

    assert rewards.metrics() == {
        "rewards/masked/errors": 2.0,  # two calls with a row that counts, and one with none
        "rewards/masked/timeouts": 0.0,
        "rewards/ones/gate/errors": 3.0,
        "rewards/ones/gate/timeouts": 0.0,
    }
    assert figures(anchor.rewards[0]) == {"errors": 1.0, "timeouts": 0.0}


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        (
            {"function": "own.py:ones", "timeout": 0},
            r"rewards\[0\]\.timeout: 0.0, expected a positive number of seconds",
        ),
        ({"function": "own.py:ones", "timeout": math.inf}, r"rewards\[0\]\.timeout: inf, expected a positive"),
        ({"function": "own.py:ones", "on_error": "skip"}, r"rewards\[0\]\.on_error: .*skip.*expected .*stop.*abstain"),
        ({"type": "perplexity", "timeout": 3}, r"rewards\[0\]\.timeout: 3, but reward 'perplexity' asks the policy"),
        ({"type": "nover", "on_error": "abstain"}, r"rewards\[0\]\.on_error: 'abstain', but reward 'nover' asks the"),
        (
            {"function": "own.py:limited", "timeout": 3},
            r"rewards\[0\]\.timeout: a setting of every reward, but 'limited'",
        ),
    ],
)
def test_what_cannot_be_guarded_is_refused(entry: dict[str, Any], words: str, folder: Path) -> None:
    with pytest.raises(SettingsError, match=f"^{words}"):
        build_rewards([entry], base_dir=folder)


def test_a_reward_that_always_fails_says_so(make_batch: MakeBatch) -> None:
    reward, look = guarded(raises, on_error="abstain"), Look(None, True, ["a"], [1], "a", "Why?")
    assert "find what it needs" in reward.why_silent(look)
    judged(reward, make_batch(["a"]))
    assert reward.why_silent(look) == "it failed, last with ZeroDivisionError: division by zero"


# --- the figures of rewards themselves ---


class Counting:
    """A function that counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, completions: list[str], **columns: Any) -> list[float]:
        self.calls += len(completions)
        return [1.0] * len(completions)

    def metrics(self) -> dict[str, float]:
        found, self.calls = {"asked": float(self.calls)}, 0
        return found


def test_figures_come_through_whatever_stands_around_the_reward(make_batch: MakeBatch) -> None:
    batch = make_batch(["a", "b", "c"], columns={"fact": [1, 0, 1]}, step=0)
    own = FunctionReward(Counting(), "mine")
    rewards = RewardSet(
        [
            Labelled(Where(Guarded(own, timeout=20), "fact"), LabelsConfig()),
            gate(FunctionReward(Counting(), "style"), on=FunctionReward(Counting(), "form"), threshold=1),
            FunctionReward(lambda completions: [0.0] * 3, "plain"),
        ]
    )
    rewards(batch)
    assert rewards.metrics() == {
        "rewards/mine/asked": 2.0,
        "rewards/style/asked": 3.0,
        "rewards/style/gate/asked": 3.0,
    }
    assert set(rewards.metrics().values()) == {0.0}


@pytest.mark.parametrize(
    ("found", "error", "words"),
    [
        ({"mean": 1.0}, ValueError, "reward 'mine': metrics.. returned 'mean', a name that the log uses"),
        ({"asked": "3"}, TypeError, "reward 'mine': metrics.. returned .*, expected a dict of numbers by name"),
        ([1.0], TypeError, "reward 'mine': metrics.. returned .*, expected a dict of numbers by name"),
    ],
)
def test_wrong_figures_are_refused(found: Any, error: type[Exception], words: str) -> None:
    function = Counting()
    function.metrics = lambda: found  # type: ignore[method-assign]
    with pytest.raises(error, match=words):
        RewardSet([FunctionReward(function, "mine")]).metrics()


ENDING = """
import torch
from maestro_fast.records import RewardBatch
from maestro_fast.rewards import FunctionReward
from maestro_fast.rewards.guarded import Guarded
batch = RewardBatch(["p"], ["c"], [[1]], {"values": [[torch.ones(1)] * 4000]})
kept = [Guarded(FunctionReward(lambda completions, values: torch.ones(1)), timeout=30.0) for _ in range(20)]
for guard in kept:
    assert guard(batch).item() == 1.0
"""


def test_a_process_with_guards_ends_well() -> None:
    """Threads that wait for the next call must not free tensors of the last one while Python ends: that aborts."""
    done = subprocess.run([sys.executable, "-c", ENDING], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
