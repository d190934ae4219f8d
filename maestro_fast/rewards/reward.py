"""What a reward is, and a named set of rewards: one [B, K] tensor from one batch of completions.

A reward judges all completions of a batch at once. It returns one finite number for each completion, or None where it
abstains, because what it measures does not apply to that completion. In the tensor an abstention is NaN, and nothing
else is: a reward that computes NaN or inf is at fault and stops the run.

A reward may be asynchronous. One event loop, on a thread of its own, serves all asynchronous rewards of a process. It
works whether or not the caller's thread runs a loop already, and it lives as long as the process, so an HTTP client
that a reward keeps between batches stays bound to a loop that is open.
"""

from __future__ import annotations

import asyncio
import atexit
import logging
import math
import os
from collections.abc import Awaitable, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import contextmanager
from functools import cache
from inspect import isawaitable, iscoroutine
from threading import Thread
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

from maestro_fast.records import RewardBatch, Text
from maestro_fast.rewards.whereabouts import prompts_of_error, shown, whereabouts, with_prompts

T = TypeVar("T")
RewardValues = Sequence[float | None] | Tensor

logger = logging.getLogger(__name__)

LOGGED = frozenset({"mean", "std", "abstained", "utility", "labelled"})  # what the log says of every reward or anchor
_LARGEST = torch.finfo(torch.float32).max
_LONGEST = 200  # characters of a value in an error


@runtime_checkable
class Reward(Protocol):
    """One reward over a batch.

    Attributes:
        name: the reward's name, which is unique within a run.
        needs_entropy: whether the reward reads ``batch.mean_entropies_B``.
        needs_policy: whether the reward calls ``batch.score_texts``.

    A reward may also have ``reads_only``: True says that it changes nothing of the batch, which is then not copied for
    it. With ``needs_columns``, names of columns, data that lack one are refused before the run. It may have the method
    ``why_silent``, see ``rewards.first_batches``. And it may have ``metrics(self) -> dict[str, float]``, which
    returns figures of its own since the last call and forgets them; they are logged as rewards/<name>/<figure>.
    """

    @property
    def name(self) -> str: ...

    @property
    def needs_entropy(self) -> bool: ...

    @property
    def needs_policy(self) -> bool: ...

    def __call__(self, batch: RewardBatch) -> RewardValues | Awaitable[RewardValues]:
        """Returns B finite numbers, with None where it abstains, or a tensor [B], or an awaitable of one of these."""
        ...


class RewardSet:
    """The K rewards of a run. Their names are unique, and their order is that of the columns of the result.

    Attributes:
        rewards: the K rewards.
        names: the K names.
        needs_entropy, needs_policy: True if at least one of the rewards needs it.

    Raises:
        ValueError: there is no reward, a name is empty, or a name occurs twice.
        TypeError: an entry is not a ``Reward``.
    """

    def __init__(self, rewards: Sequence[Reward], *, may_abstain: bool = False) -> None:
        """
        Args:
            rewards: the K rewards.
            may_abstain: whether all of them may abstain from all responses of a batch, as a utility does that is known
                for some prompts only. Otherwise the log warns of it, once.
        """
        if not rewards:
            raise ValueError("rewards: none given, expected at least one")
        for i, reward in enumerate(rewards):
            if isinstance(reward, type) or not isinstance(reward, Reward):
                got = f"the class {reward.__name__}" if isinstance(reward, type) else type(reward).__name__
                raise TypeError(f"rewards[{i}]: got {got}, expected a Reward (FunctionReward wraps a function)")
            if not isinstance(reward.name, str) or not reward.name:
                raise ValueError(f"rewards[{i}]: the name is {reward.name!r}, expected a non-empty string")
        self.rewards = tuple(rewards)
        self.names = tuple(reward.name for reward in rewards)
        repeated = sorted({name for name in self.names if self.names.count(name) > 1})
        if repeated:
            raise ValueError(f"rewards: the name {repeated[0]!r} stands for more than one, expected unique names")
        self.needs_entropy = any(reward.needs_entropy for reward in rewards)
        self.needs_policy = any(reward.needs_policy for reward in rewards)
        self._warned = may_abstain

    def __len__(self) -> int:
        return len(self.rewards)

    def __call__(self, batch: RewardBatch) -> Tensor:
        """Computes all rewards of a batch. The asynchronous ones run concurrently, after the others.

        Each reward of the user's own gets a copy of the batch. So it may change the conversations, ids and columns that
        it is given, now or after it has returned: neither another reward nor the data set sees that.

        Returns:
            float32 [B, K] on the CPU, NaN exactly where a reward returned None.

        Raises:
            ValueError: a reward returned the wrong number of values, or NaN or inf.
            TypeError: a reward returned something else than numbers.
            Exception: a reward raised it; notes name the reward, and in training the step and the prompts.
            TimeoutError: an asynchronous reward blocks the event loop, and one of the rewards has a deadline.
        """
        with told_where(batch):
            found = self._call_all(batch)
            waiting = (own for own, value in zip(self.rewards, found, strict=True) if isawaitable(value))
            values = _await_all(self.names, found, min(map(_patience, waiting), default=math.inf))
            named = zip(self.names, values, strict=True)
            columns = [column_of(name, value, len(batch), batch.prompts) for name, value in named]
        rewards_BK = torch.stack(columns, dim=1)
        if len(batch) and not self._warned and bool(rewards_BK.isnan().all()):
            self._warned = True
            logger.warning(
                "every reward (%s) abstained on all %d completions of a batch%s, so nothing is learnt: are the "
                "columns that they read empty, or is the wanted format out of reach? This is said once.",
                ", ".join(self.names),
                len(batch),
                f", {whereabouts(batch)}" if batch.place else "",
            )
        return rewards_BK

    def metrics(self) -> dict[str, float]:
        """The figures of the rewards themselves since the last call, in this process, as rewards/<name>/<figure>.

        Raises:
            ValueError: a figure has a name that the log uses itself.
            TypeError: a reward returned something else than numbers by name.
        """
        return {f"rewards/{own.name}/{figure}": value for own in self.rewards for figure, value in figures(own).items()}

    def _call_all(self, batch: RewardBatch) -> list[object]:
        """What each reward returned, before awaitables are awaited."""
        values: list[object] = []
        try:
            for reward in self.rewards:
                with blame(reward.name):
                    values.append(judge(reward, batch))
        except BaseException:
            for value in values:  # Python would warn of coroutines that nobody awaited
                if iscoroutine(value):
                    value.close()
            raise
        return values


def judge(reward: Reward, batch: RewardBatch) -> RewardValues | Awaitable[RewardValues]:
    """Calls one reward, with a copy of the batch unless it is known to change nothing.

    A class that has a ``__call__`` of its own has to say ``reads_only`` itself; the one it inherits is about another.
    """
    bases = type(reward).__mro__
    own = next((base for base in bases if {"__call__", "reads_only"} & vars(base).keys()), type(reward))
    said = "reads_only" in vars(own) or "reads_only" in getattr(reward, "__dict__", {})
    return reward(batch if said and getattr(reward, "reads_only", False) else batch.copied())


def figures(reward: Any, name: str | None = None) -> dict[str, float]:
    """What a reward's own method ``metrics`` returns; {} if it has none.

    Args:
        reward: a reward, or a function that serves as one.
        name: its name; by default it is ``reward.name``.

    Raises:
        ValueError: a figure has a name that the log uses itself.
        TypeError: something else than numbers by name was returned.
    """
    name = reward.name if name is None else name
    pop = getattr(reward, "metrics", None)
    if not callable(pop):
        return {}
    with blame(str(name)):
        found = pop()
    if not isinstance(found, Mapping) or not all(
        isinstance(figure, str) and isinstance(value, int | float) for figure, value in found.items()
    ):
        raise TypeError(f"reward {name!r}: metrics() returned {found!r}, expected a dict of numbers by name")
    taken = sorted(found.keys() & LOGGED)
    if taken:
        raise ValueError(f"reward {name!r}: metrics() returned {taken[0]!r}, a name that the log uses for the reward")
    return {figure: float(value) for figure, value in found.items()}


def _patience(reward: Any) -> float:
    """The shortest deadline of a reward and of those inside it, in seconds; inf if there is none."""
    own = getattr(reward, "patience", None)
    inside = [_patience(inner) for name in ("reward", "on") if (inner := getattr(reward, name, None)) is not None]
    return min([math.inf if own is None else float(own), *inside])


def _await_all(names: Sequence[str], values: list[object], patience: float) -> list[object]:
    """``values``, with the result of each awaitable in its place."""

    async def awaited(name: str, value: Awaitable[object]) -> object:
        with blame(name):
            return await uncancelled(name, value)

    pending = {i: awaited(names[i], value) for i, value in enumerate(values) if isawaitable(value)}
    if pending:
        who = ", ".join(names[i] for i in pending)
        results = gather(list(pending.values()), patience, who)
        for i, result in zip(pending, results, strict=True):
            values[i] = result
    return values


@contextmanager
def blame(name: str, role: str = "") -> Iterator[None]:
    """Notes on an error which reward raised it, and its ``role`` if it has one.

    The error itself goes on with its traceback, whose last frame is the line that failed.
    """
    try:
        yield
    except Exception as error:
        error.add_note(f"raised by reward {name!r}{role}")
        raise


@contextmanager
def told_where(batch: RewardBatch) -> Iterator[None]:
    """Notes on an error of a reward, in training, the step and the prompts whose responses it judged."""
    try:
        yield
    except Exception as error:
        if batch.place:
            error.add_note(whereabouts(batch, prompts_of_error(batch, error)))
        raise


def column_of(name: str, values: object, batch: int, prompts: Sequence[Text] = ()) -> Tensor:
    """float32 [B] on the CPU from what a reward returned: a list, a tuple, a tensor or a numpy array.

    Args:
        name: the reward's name.
        values: what it returned.
        batch: B.
        prompts: B prompts, one of which the error names; without them it names the row alone.
    """
    items = _items(name, values, batch)
    if len(items) != batch:
        raise ValueError(f"reward {name!r}: returned {len(items)} values for {batch} completions")
    numbers = []
    for row, item in enumerate(items):
        try:
            numbers.append(math.nan if item is None else _number(item))
        except (TypeError, ValueError) as error:
            to = f"; it is a response to {shown(prompts[row])}" if prompts else ""
            wrong = f"reward {name!r}: row {row} is {_said(item)}, expected a finite number, or None to abstain{to}"
            raise with_prompts(type(error)(wrong), prompts[row : row + 1]) from error.__cause__
    return torch.tensor(numbers, dtype=torch.float32)


def _items(name: str, values: object, batch: int) -> list[object]:
    """What a reward returned as a list, which may have another length; TypeError unless it can be read as one."""
    plain = isinstance(values, Tensor) and not values.is_nested
    got = f"a tensor of shape {tuple(values.shape)}" if plain else type(values).__name__  # type: ignore[attr-defined]
    wrong = f"reward {name!r}: returned {got}, expected {batch} numbers, one per completion"
    try:
        items = values.tolist() if hasattr(values, "tolist") else values
        if isinstance(items, Sequence) and not isinstance(values, (str, bytes, bytearray, memoryview)):
            return list(items)
    except Exception as error:  # Tensors that are sparse or on meta have no list, and other classes may raise anything.
        raise TypeError(f"{wrong}; it cannot be read: {error}") from error
    raise TypeError(wrong)


def _said(item: object) -> str:
    """An item in the words of an error, which an object's own ``__repr__`` may neither fill nor prevent."""
    try:
        text = repr(item)
    except Exception:
        return f"of type {type(item).__name__}"
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..."


def _number(item: object) -> float:
    """A finite number in float32; otherwise TypeError or ValueError, whose words ``column_of`` finds."""
    if isinstance(item, (str, bytes)):  # float() would read "1"
        raise TypeError
    try:
        value = float(item)  # type: ignore[arg-type]
    except OverflowError as error:
        raise ValueError from error
    except Exception as error:  # an object may raise anything in its __float__
        raise TypeError from error
    if not abs(value) <= _LARGEST:  # this also refuses what overflows in float32
        raise ValueError
    return value


# --- the event loop of asynchronous rewards ---


def gather(coroutines: Sequence[Coroutine[Any, Any, T]], patience: float, who: str) -> list[T]:
    """Runs coroutines concurrently and waits for all of them.

    Args:
        coroutines: the coroutines.
        patience: the seconds for which the event loop may stand still while one of them waits without ``await``: a
            loop that does so keeps no deadline. inf stands for any time.
        who: the names of the rewards, for the error.

    Returns:
        Their results, in order.

    Raises:
        Exception: one of them raised it first. The others are cancelled.
        TimeoutError: the event loop stood still for longer.
    """
    background = _background_loop(os.getpid())
    future = asyncio.run_coroutine_threadsafe(_gather(coroutines), background.loop)
    try:
        while not wait([future], None if patience == math.inf else patience).done:
            turn = asyncio.run_coroutine_threadsafe(asyncio.sleep(0), background.loop)
            waiting: list[Future[Any]] = [turn, future]
            if not wait(waiting, patience, FIRST_COMPLETED).done and not _PLAIN_CALLS:
                raise TimeoutError(
                    f"rewards: the event loop of the asynchronous ones ({who}) has stood still for {patience:g} s, so "
                    "no deadline can be kept: one of them waits without await. Written as a plain function, it would "
                    "be called in a thread of its own"
                )
        results = future.result()
        if isinstance(results, Exception):
            raise results
        return results
    finally:
        future.cancel()  # this has an effect only where the wait was interrupted


async def uncancelled(name: str, value: Awaitable[T]) -> T:
    """Awaits what a reward returned. One that is cancelled from inside fails as others do: nobody has cancelled us."""
    try:
        return await value
    except asyncio.CancelledError as error:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        raise RuntimeError(f"reward {name!r}: something that it waited for was cancelled") from error


@contextmanager
def plain_call() -> Iterator[None]:
    """Marks that a plain reward is called in the thread of the loop, which may take long and is no fault."""
    _PLAIN_CALLS.append(None)
    try:
        yield
    finally:
        _PLAIN_CALLS.pop()


_PLAIN_CALLS: list[None] = []


async def _gather(coroutines: Sequence[Coroutine[Any, Any, T]]) -> list[T] | Exception:
    """Their results, or the first error. It is returned, since asyncio would hand on a copy of a TimeoutError."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    try:
        return await asyncio.gather(*tasks)
    except Exception as error:
        return error
    finally:
        for task in tasks:
            task.cancel()


class _BackgroundLoop:
    """An event loop that runs on a thread of its own until the process ends."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.thread = Thread(target=self._serve, name="maestro-fast-rewards", daemon=True)
        self.thread.start()

    def _serve(self) -> None:
        """Runs the loop until it is told to stop.

        A reward that calls ``sys.exit`` ends the loop, too. It goes on, because whoever waits for that reward would
        otherwise never hear of it.
        """
        while True:
            try:
                return self.loop.run_forever()
            except (SystemExit, KeyboardInterrupt):  # The task has it, and so has whoever waits.
                continue

    def close(self, pid: int) -> None:
        if os.getpid() == pid:  # a forked child inherits this handler, but not the thread
            self.loop.call_soon_threadsafe(self.loop.stop)
            self.thread.join(timeout=1.0)  # A reward may block the loop, see ``gather``.
            if not self.thread.is_alive():
                self.loop.close()


@cache
def _background_loop(pid: int) -> _BackgroundLoop:
    background = _BackgroundLoop()
    atexit.register(background.close, pid)
    return background
