"""A guard around a reward: how long a batch may take, and what becomes of a batch on which the reward fails.

    on_error: stop      The run stops with the reward's own error, or a ``RewardTimeoutError``. This is the default.
    on_error: abstain   The reward abstains from all responses of that batch, the log says why and counts it.

A reward without a ``timeout`` is called as it would be without a guard. With one, an ``async`` function is cancelled
when its time is up. Any other is called in a thread of the guard's own, which the run stops waiting for. Python cannot
end a thread, so the call goes on in the background, with a copy of the batch that is its own, and what it returns in
the end is thrown away. A few such calls may go on at once; after that the reward fails without being called.

Code that never lets go of Python's global lock (a long regular expression, a C extension that keeps it) holds up the
waiting thread as well. No deadline interrupts it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import sys
import time
import weakref
from collections.abc import Awaitable, Callable
from concurrent.futures import Future, wait
from contextvars import copy_context
from inspect import isawaitable, iscoroutine
from queue import SimpleQueue
from threading import Thread
from types import FrameType
from typing import Any, Literal, get_args

import torch

from maestro_fast.records import RewardBatch
from maestro_fast.rewards.first_batches import Look, own_reason
from maestro_fast.rewards.reward import Reward, RewardValues, column_of, figures, judge, uncancelled
from maestro_fast.rewards.whereabouts import own_frame, prompts_of_call, prompts_of_error, whereabouts, with_prompts

OnError = Literal["stop", "abstain"]
MOST_HANGING = 4  # calls of one reward that may go on behind their deadlines

logger = logging.getLogger(__name__)


class RewardTimeoutError(TimeoutError):
    """A reward was not back in time."""


class Guarded:
    """Gives ``reward`` a deadline, and says what becomes of a batch on which it fails.

    A reward fails if it raises, is not back in time, or returns what is no reward: another number of values, NaN, or
    something else than numbers. An interrupt from the keyboard is no failure and passes.

    Args:
        reward: the reward, whose name the guard takes. Masks and gates go around the guard.
        timeout: the seconds that a batch may take; None means as long as it takes.
        on_error: "stop" or "abstain".

    Raises:
        TypeError: ``reward`` is no Reward.
        ValueError: an option is out of its range, or the reward needs the policy. Its forwards are made on all
            processes together, so one process may not go on alone.
    """

    reads_only = True  # The reward gets a copy.

    def __init__(self, reward: Reward, *, timeout: float | None = None, on_error: OnError = "stop") -> None:
        if isinstance(reward, type) or not isinstance(reward, Reward):
            raise TypeError(f"reward: got {type(reward).__name__}, expected a Reward")
        check_guard(timeout, on_error)
        if reward.needs_policy:
            given = f"on_error: {on_error!r}" if timeout is None else f"timeout: {timeout:g}"
            raise ValueError(
                f"{given}, but reward {reward.name!r} asks the policy for log-probs, which all processes compute "
                "together, so one of them cannot give up alone; expected neither"
            )
        self.reward, self.timeout, self.on_error = reward, timeout, on_error
        self.name, self.needs_entropy, self.needs_policy = reward.name, reward.needs_entropy, False
        self._thread: _CallThread | None = None
        self._hanging: list[Callable[[], bool]] = []  # for each call behind its deadline, whether it has ended by now
        self._said: set[type[Exception]] = set()
        self._last: str | None = None
        self._counts = {"errors": 0, "timeouts": 0}

    def __call__(self, batch: RewardBatch) -> RewardValues | Awaitable[RewardValues]:
        began = time.monotonic()
        try:
            values = judge(self.reward, batch) if self.timeout is None else self._called(batch, self.timeout)
            if not isawaitable(values):
                return self._checked(values, batch)
        except Exception as error:
            if self.on_error == "stop":
                raise
            return self._abstained(error, batch)
        left = None if self.timeout is None else self.timeout - (time.monotonic() - began)
        return self._later(values, batch, left)

    async def _later(self, values: Awaitable[RewardValues], batch: RewardBatch, left: float | None) -> RewardValues:
        try:
            own = values if left is None else self._awaited(values, batch, left)
            return self._checked(await uncancelled(self.name, own), batch)
        except Exception as error:
            if self.on_error == "stop":
                raise
            return self._abstained(error, batch)

    def _called(self, batch: RewardBatch, timeout: float) -> RewardValues | Awaitable[RewardValues]:
        """Calls the reward, in the guard's thread unless the call merely makes a coroutine."""
        self._hanging = [ended for ended in self._hanging if not ended()]
        if len(self._hanging) >= MOST_HANGING:
            raise RuntimeError(
                f"reward {self.name!r}: was not called, because {len(self._hanging)} calls that were not back in time "
                "still go on in the background"
            )
        own = batch.copied()
        if asyncio.iscoroutinefunction(getattr(self.reward, "function", type(self.reward).__call__)):
            return self.reward(own)
        if self._thread is None or not self._thread.is_alive():
            self._thread = _CallThread(f"reward {self.name}")
        call, thread = self._thread.submit(lambda: self.reward(own)), self._thread.ident
        ended, frame = False, None
        try:
            ended = bool(wait([call], timeout).done)
            frame = None if ended else sys._current_frames().get(thread)
        finally:
            if not ended:  # It is late, or a signal has ended the wait. The next call gets another thread.
                self._thread.finish()
                self._thread = None
                self._hanging.append(call.done)
                call.add_done_callback(_drop)
        if not ended:
            raise self._too_late(batch, frame)
        values: RewardValues | Awaitable[RewardValues] = call.result()
        return values

    async def _awaited(self, values: Awaitable[RewardValues], batch: RewardBatch, left: float) -> RewardValues:
        """Waits for ``left`` seconds. A coroutine that does not heed its cancellation is not waited for."""
        task = asyncio.ensure_future(values)
        try:
            await asyncio.wait([task], timeout=max(0.0, left))
            if task.done():
                return task.result()
            stack = task.get_stack()
        finally:
            task.cancel()
        self._hanging.append(task.done)
        task.add_done_callback(lambda late: late.cancelled() or late.exception())  # asyncio wants it to be looked at.
        raise self._too_late(batch, stack[-1] if stack else None)

    def _too_late(self, batch: RewardBatch, frame: FrameType | None) -> RewardTimeoutError:
        """The error of a call that still goes on; ``frame`` is where, and the user's own line there is told."""
        words = f"reward {self.name!r}: was not back within {self.timeout:g} s for {len(batch)} responses"
        error = with_prompts(RewardTimeoutError(words), prompts_of_call(batch, frame))
        if (own := own_frame(frame)) is not None:
            code = own.f_code
            error.add_note(f"it is in {code.co_name}, line {own.f_lineno} of {code.co_filename}")
        return error

    def _checked(self, values: RewardValues, batch: RewardBatch) -> RewardValues:
        if self.on_error == "abstain":  # Otherwise whoever asked checks them.
            column_of(self.name, values, len(batch), batch.prompts)
        return values

    def _abstained(self, error: Exception, batch: RewardBatch) -> list[None]:
        late = isinstance(error, RewardTimeoutError)
        self._counts["timeouts" if late else "errors"] += 1
        self._last = _words(error)
        if type(error) not in self._said:
            self._said.add(type(error))
            logger.warning(
                "reward %r abstains from all %d responses of a batch%s: %s. This is said once for each kind of error; "
                "the log counts errors and timeouts",
                self.name,
                len(batch),
                f", {whereabouts(batch, prompts_of_error(batch, error))}" if batch.place else "",
                "; ".join([self._last, *(getattr(error, "__notes__", []) if late else [])]),
                exc_info=None if late else error,
            )
        return [None] * len(batch)

    def metrics(self) -> dict[str, float]:
        """The reward's own figures, and with ``on_error: abstain`` the number of failures since the last call."""
        if self.on_error == "stop":
            return figures(self.reward)
        counts = {name: float(count) for name, count in self._counts.items()}
        self._counts = dict.fromkeys(counts, 0)
        return figures(self.reward) | counts

    def why_silent(self, look: Look) -> str:
        """The likely reason why it taught nothing, see ``first_batches``."""
        return own_reason(self.reward, look) if self._last is None else f"it failed, last with {self._last}"

    @property
    def patience(self) -> float | None:
        """The seconds for which the event loop of asynchronous rewards may stand still, see ``reward.gather``."""
        return self.timeout

    @property
    def needs_columns(self) -> tuple[str, ...]:
        """The columns that the reward needs."""
        return tuple(getattr(self.reward, "needs_columns", ()))


def check_guard(timeout: float | None, on_error: str) -> None:
    """Raises ValueError unless the options of a guard are in their ranges."""
    if timeout is not None and not (math.isfinite(timeout) and timeout > 0):
        raise ValueError(f"timeout: {timeout!r}, expected a positive number of seconds, or null")
    if on_error not in get_args(OnError):
        raise ValueError(f"on_error: {on_error!r}, expected one of {get_args(OnError)}")


def _words(error: Exception) -> str:
    return str(error) if isinstance(error, RewardTimeoutError) else f"{type(error).__name__}: {error}"


def _drop(call: Future[Any]) -> None:
    """Throws away what a late call returned. Python would warn of a coroutine that nobody awaited."""
    if call.exception() is None and iscoroutine(call.result()):
        call.result().close()


class _CallThread:
    """A thread that makes one call after another, and that does not keep the process from ending.

    The calls of a reward share a thread for as long as none of them hangs, so a connection that belongs to the thread
    which opened it serves all batches.
    """

    def __init__(self, name: str) -> None:
        self._calls: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread = Thread(target=_make_calls, args=(self._calls,), name=name, daemon=True)
        self._thread.start()
        weakref.finalize(self, self._calls.put, None).atexit = False  # A thread may not wake up when Python ends.

    @property
    def ident(self) -> int:
        """The number of the thread among those that run."""
        return self._thread.ident or 0

    def is_alive(self) -> bool:
        """Whether the thread runs; it does not in a process that was forked."""
        return self._thread.is_alive()

    def finish(self) -> None:
        """Ends the thread once its call has ended."""
        self._calls.put(None)

    def submit(self, call: Callable[[], Any]) -> Future[Any]:
        """Makes a call under the settings of torch and the context variables of the calling thread."""
        result: Future[Any] = Future()
        context, settings = copy_context(), _torch_settings()

        def run() -> None:
            try:
                with settings:
                    found = context.run(call)
            except BaseException as error:
                result.set_exception(error)
            else:
                result.set_result(found)

        self._calls.put(run)
        return result


def _make_calls(calls: SimpleQueue[Callable[[], None] | None]) -> None:
    while (call := calls.get()) is not None:
        call()
        del call  # It holds a batch, whose tensors must not be freed in this thread when Python ends: that would abort.


def _torch_settings() -> contextlib.AbstractContextManager[Any]:
    """What torch keeps for each thread: whether gradients are recorded, the device, and mixed precision."""
    grad = torch.is_grad_enabled()
    device = torch.cuda.current_device() if torch.cuda.is_initialized() else None
    mixed = {kind: torch.get_autocast_dtype(kind) for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)}

    @contextlib.contextmanager
    def applied() -> Any:
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.set_grad_enabled(grad))
            if device is not None:
                stack.enter_context(torch.cuda.device(device))
            for kind, dtype in mixed.items():
                stack.enter_context(torch.autocast(kind, dtype))
            yield

    return applied()
