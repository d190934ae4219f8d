"""RewardSet: order, abstentions, faults, and rewards that are awaited."""

from __future__ import annotations

import asyncio
import logging
import math
import traceback
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from inspect import CORO_CLOSED, getcoroutinestate
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from maestro_fast.records import RewardBatch
from maestro_fast.rewards import FunctionReward, Reward, RewardSet, build_anchor, gate


@dataclass
class Constant:
    """Returns, raises or awaits what it is told."""

    name: Any
    value: Any
    needs_entropy: bool = False
    needs_policy: bool = False

    def __call__(self, batch: RewardBatch) -> Any:
        if isinstance(self.value, Exception):
            raise self.value
        return self.value() if callable(self.value) else self.value


def batch_of(size: int) -> RewardBatch:
    return RewardBatch(["Why?"] * size, ["Because."] * size, [[7]] * size)


def run_one(value: Any, size: int = 4) -> Tensor:
    return RewardSet([Constant("x", value)])(batch_of(size))


float32s = st.floats(width=32, allow_nan=False, allow_infinity=False)
shapes = st.tuples(st.integers(0, 6), st.integers(1, 4))


@given(
    shapes.flatmap(
        lambda shape: st.lists(
            st.lists(st.none() | float32s, min_size=shape[0], max_size=shape[0]),
            min_size=shape[1],
            max_size=shape[1],
        )
    )
)
def test_holds_every_value_and_nan_exactly_for_none(columns: list[list[float | None]]) -> None:
    rewards = RewardSet([Constant(f"r{k}", column) for k, column in enumerate(columns)])
    rewards_BK = rewards(batch_of(len(columns[0])))
    assert rewards_BK.shape == (len(columns[0]), len(columns))
    assert rewards_BK.dtype == torch.float32
    assert rewards_BK.device.type == "cpu"
    expected = [[math.nan if value is None else value for value in column] for column in columns]
    torch.testing.assert_close(rewards_BK.T, torch.tensor(expected), rtol=0, atol=0, equal_nan=True)


def test_names_and_needs() -> None:
    rewards = RewardSet([Constant("b", [1]), Constant("a", [2], needs_policy=True)])
    assert rewards.names == ("b", "a")
    assert len(rewards) == 2
    assert (rewards.needs_entropy, rewards.needs_policy) == (False, True)
    other = RewardSet([Constant("b", [1], needs_entropy=True), Constant("a", [2])])
    assert (other.needs_entropy, other.needs_policy) == (True, False)
    assert rewards(batch_of(1)).tolist() == [[1.0, 2.0]]
    assert isinstance(rewards.rewards[0], Reward)


@pytest.mark.parametrize(
    "value",
    [
        [0, True, 2.5, -1],
        (0, True, 2.5, -1),
        torch.tensor([0.0, 1.0, 2.5, -1.0], dtype=torch.bfloat16),
        torch.tensor([0.0, 1.0, 2.5, -1.0], requires_grad=True),
        [torch.tensor(0), torch.tensor(1.0), np.float64(2.5), np.int32(-1)],
        np.array([0, 1, 2.5, -1]),
    ],
    ids=["list", "tuple", "bfloat16", "with gradient", "scalars", "numpy"],
)
def test_takes_numbers_of_every_make(value: Any) -> None:
    rewards_BK = run_one(value)
    assert rewards_BK.tolist() == [[0.0], [1.0], [2.5], [-1.0]]
    assert not rewards_BK.requires_grad


@pytest.mark.parametrize(
    ("value", "error", "words"),
    [
        ([1.0, 2.0, 3.0], ValueError, "reward 'x': returned 3 values for 4 completions"),
        (torch.zeros(5), ValueError, "reward 'x': returned 5 values for 4 completions"),
        ([0, math.nan, 0, 0], ValueError, "reward 'x': row 1 is nan, .* None to abstain"),
        ([0, 0, -math.inf, 0], ValueError, "reward 'x': row 2 is -inf, .* None to abstain"),
        (torch.tensor([0, 0, 0, math.nan]), ValueError, "reward 'x': row 3 is nan"),
        ([1e300, 0, 0, 0], ValueError, r"reward 'x': row 0 is 1e\+300"),
        ([10**400, 0, 0, 0], ValueError, "reward 'x': row 0 is 1000"),
        ([0, "1.0", 0, 0], TypeError, "reward 'x': row 1 is '1.0', expected a finite number"),
        ([0, 0, [1.0], 0], TypeError, r"reward 'x': row 2 is \[1.0\]"),
        ([0, 0, torch.zeros(2), 0], TypeError, r"reward 'x': row 2 is tensor\(\[0., 0.\]\)"),
        ([1j, 0, 0, 0], TypeError, "reward 'x': row 0 is 1j"),
        ([torch.zeros((), device="meta")] * 4, TypeError, "reward 'x': row 0 is tensor.*device='meta'"),
        (torch.zeros(4, 1), TypeError, r"reward 'x': row 0 is \[0.0\]"),
        (torch.tensor(1.0), TypeError, r"reward 'x': returned a tensor of shape \(\), expected 4 numbers"),
        (None, TypeError, "reward 'x': returned NoneType, expected 4 numbers"),
        ("1234", TypeError, "reward 'x': returned str"),
        ({1, 2, 3, 4}, TypeError, "reward 'x': returned set"),
        (dict.fromkeys(range(4)), TypeError, "reward 'x': returned dict"),
    ],
)
def test_a_fault_names_the_reward(value: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        run_one(value)


@pytest.mark.parametrize(
    ("rewards", "error", "words"),
    [
        ([], ValueError, "rewards: none given"),
        ([Constant("a", 0), Constant("b", 0), Constant("a", 0)], ValueError, "rewards: the name 'a' stands for"),
        ([Constant("", 0)], ValueError, r"rewards\[0\]: the name is ''"),
        ([Constant(3, 0)], ValueError, r"rewards\[0\]: the name is 3"),
        ([Constant("a", 0), print], TypeError, r"rewards\[1\]: got builtin_function_or_method"),
        ([Reward], TypeError, r"rewards\[0\]: got the class Reward"),
    ],
)
def test_bad_sets_are_refused(rewards: list[Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        RewardSet(rewards)


def test_what_a_reward_raises_comes_through_with_its_name() -> None:
    fault = KeyError("topic")
    with pytest.raises(KeyError) as caught:
        RewardSet([Constant("fine", [1]), Constant("broken", fault)])(batch_of(1))
    assert caught.value is fault
    assert caught.value.__notes__ == ["raised by reward 'broken'"]


def fails(completions: Any) -> list[float]:
    return [1 / 0]  # the line that a user looks for


async def fails_later(completions: Any) -> list[float]:
    await asyncio.sleep(0)
    return fails(completions)


@pytest.mark.parametrize("function", [fails, fails_later])
def test_an_error_keeps_its_line_and_names_the_reward(function: Any) -> None:
    broken, name = FunctionReward(function), function.__name__
    behind = gate(FunctionReward(lambda completions: [1.0], "style"), on=broken, threshold=1)
    for rewards, notes in (
        ([broken], [f"raised by reward {name!r}"]),
        ([behind], [f"raised by reward {name!r}, the gate of 'style'", "raised by reward 'style'"]),
    ):
        with pytest.raises(ZeroDivisionError) as caught:
            RewardSet(rewards)(batch_of(1))
        frame = traceback.extract_tb(caught.value.__traceback__)[-1]
        assert (frame.filename, frame.name) == (__file__, "fails") and "the line that a user" in (frame.line or "")
        assert caught.value.__notes__ == notes


def test_a_batch_without_any_reward_is_allowed_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    rewards = RewardSet([Constant("a", [None, None]), Constant("b", [None, None])])
    with caplog.at_level(logging.WARNING, logger="maestro_fast"):
        assert rewards(batch_of(2)).isnan().all()
        assert [record.getMessage() for record in caplog.records] != []
        assert "every reward (a, b) abstained on all 2 completions" in caplog.text
        caplog.clear()
        rewards(batch_of(2))
        RewardSet([Constant("a", [None, 0.0])])(batch_of(2))
        RewardSet([Constant("a", [])])(batch_of(0))
        assert build_anchor(lambda completions: [None] * len(completions))(batch_of(2)).isnan().all()
    assert not caplog.records


async def later(value: Any) -> Any:
    await asyncio.sleep(0)
    if isinstance(value, Exception):
        raise value
    return value


def awaiting(value: Any) -> Callable[[], Awaitable[Any]]:
    return lambda: later(value)


def mixed() -> RewardSet:
    return RewardSet([Constant("a", awaiting([1.0])), Constant("b", [2.0]), Constant("c", awaiting([None]))])


def check_mixed(rewards_BK: Tensor) -> None:
    expected = torch.tensor([[1.0, 2.0, math.nan]])
    torch.testing.assert_close(rewards_BK, expected, rtol=0, atol=0, equal_nan=True)


def test_awaits_without_a_running_loop() -> None:
    check_mixed(mixed()(batch_of(1)))


def test_awaits_within_a_running_loop() -> None:
    async def caller() -> Tensor:
        return mixed()(batch_of(1))

    check_mixed(asyncio.run(caller()))


def test_awaited_rewards_run_concurrently() -> None:
    """Each waits for the other: one after the other they would never end."""
    events: dict[str, asyncio.Event] = {}

    async def meet(own: str, other: str) -> list[float]:
        events.setdefault(own, asyncio.Event()).set()
        await asyncio.wait_for(events.setdefault(other, asyncio.Event()).wait(), timeout=10)
        return [1.0]

    rewards = [Constant("a", lambda: meet("a", "b")), Constant("b", lambda: meet("b", "a"))]
    assert RewardSet(rewards)(batch_of(1)).tolist() == [[1.0, 1.0]]


def test_the_loop_outlives_a_batch() -> None:
    """A client that is bound to the loop of its first use still works with the second batch."""
    loops: list[asyncio.AbstractEventLoop] = []

    async def remember() -> list[float]:
        loops.append(asyncio.get_running_loop())
        return [0.0]

    rewards = RewardSet([Constant("a", remember)])
    rewards(batch_of(1))
    rewards(batch_of(1))
    assert loops[0] is loops[1]
    assert not loops[0].is_closed()


def test_what_an_awaited_reward_raises_comes_through_with_its_name() -> None:
    cancelled: list[bool] = []

    async def endless() -> list[float]:
        try:
            await asyncio.sleep(20)
        except asyncio.CancelledError:
            cancelled.append(True)
            raise
        return [0.0]

    rewards = RewardSet([Constant("slow", endless), Constant("broken", awaiting(KeyError("topic")))])
    with pytest.raises(KeyError, match="topic") as caught:
        rewards(batch_of(1))
    assert caught.value.__notes__ == ["raised by reward 'broken'"]
    RewardSet([Constant("a", awaiting([0.0]))])(batch_of(1))  # the loop has had a turn
    assert cancelled == [True]


def test_an_awaited_result_is_checked_too() -> None:
    with pytest.raises(ValueError, match="reward 'x': returned 2 values for 1 completions"):
        run_one(awaiting([1.0, 2.0]), size=1)


def test_nothing_stays_unawaited_when_a_later_reward_raises() -> None:
    pending = later([1.0])
    rewards = RewardSet([Constant("a", lambda: pending), Constant("broken", ZeroDivisionError())])
    with pytest.raises(ZeroDivisionError):
        rewards(batch_of(1))
    assert getcoroutinestate(pending) == CORO_CLOSED


class NoLength(list[float]):
    def __len__(self) -> int:
        raise OSError("no length")


NESTED = torch.nested.nested_tensor([torch.ones(1)] * 2, layout=torch.jagged)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.ones(2, device="meta"), r"a tensor of shape \(2,\), expected 2 numbers.*; it cannot be read: "),
        (torch.ones(2).to_sparse(), r"a tensor of shape \(2,\), expected 2 numbers.*; it cannot be read: "),
        (NESTED, "NestedTensor, expected 2 numbers.*; it cannot be read: "),
        (NoLength([1.0, 2.0]), "NoLength, expected 2 numbers.*; it cannot be read: no length"),
        (bytearray(b"12"), "bytearray, expected 2 numbers"),
        (memoryview(b"12"), "memoryview, expected 2 numbers"),
    ],
)
def test_what_cannot_be_read_names_the_reward(value: Any, message: str) -> None:
    with pytest.raises(TypeError, match=rf"^reward 'mine': returned {message}"):
        RewardSet([Constant("mine", value)])(batch_of(2))


def test_words_of_an_item_neither_fill_nor_prevent_an_error() -> None:
    class Wordless:
        def __repr__(self) -> str:
            raise OSError

    with pytest.raises(TypeError, match="row 0 is of type Wordless, expected a finite number"):
        RewardSet([Constant("mine", [Wordless()])])(batch_of(1))
    with pytest.raises(TypeError, match=r"row 0 is \[0, 0.* \.\.\., expected a finite number") as caught:
        RewardSet([Constant("mine", [[0] * 10_000])])(batch_of(1))
    assert len(str(caught.value)) < 500


async def raising(error: BaseException) -> list[float]:
    raise error


def test_an_async_reward_that_ends_the_program_is_heard() -> None:
    """The event loop ends with it, and would leave whoever waits for the reward waiting."""
    with pytest.raises(SystemExit):
        RewardSet([Constant("mine", lambda: raising(SystemExit(3)))])(batch_of(1))
    assert RewardSet([Constant("after", awaiting([1.0]))])(batch_of(1)).tolist() == [[1.0]]


@pytest.mark.parametrize("error", [TimeoutError("mine"), asyncio.CancelledError()], ids=repr)
def test_errors_that_asyncio_uses_itself_name_the_reward(error: BaseException) -> None:
    with pytest.raises((TimeoutError, RuntimeError)) as caught:
        RewardSet([Constant("mine", lambda: raising(error))])(batch_of(1))
    assert "raised by reward 'mine'" in caught.value.__notes__
    assert any(
        frame.name == "raising"
        for frame in traceback.extract_tb((caught.value.__cause__ or caught.value).__traceback__)
    )
