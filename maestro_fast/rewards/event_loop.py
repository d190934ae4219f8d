"""One event loop, on a thread of its own, for all asynchronous rewards of a process.

It works whether or not the caller's thread runs a loop already, and it lives as long as the process: an HTTP
client that a reward keeps between batches stays bound to a loop that is still open.
"""

from __future__ import annotations

import asyncio
import atexit
import os
from collections.abc import Coroutine, Sequence
from functools import cache
from threading import Thread
from typing import Any, TypeVar

T = TypeVar("T")


def gather(coroutines: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """Runs coroutines concurrently and waits for all of them.

    Returns:
        Their results, in order.

    Raises:
        Exception: the first that one of them raised; the others are cancelled.
    """
    background = _background_loop(os.getpid())
    future = asyncio.run_coroutine_threadsafe(_gather(coroutines), background.loop)
    try:
        return future.result()
    finally:
        future.cancel()  # only an interrupted wait leaves anything to cancel


async def _gather(coroutines: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


class _BackgroundLoop:
    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.thread = Thread(target=self.loop.run_forever, name="maestro-fast-rewards", daemon=True)
        self.thread.start()

    def close(self, pid: int) -> None:
        if os.getpid() == pid:  # a forked child inherits the handler, but not the thread
            self.loop.call_soon_threadsafe(self.loop.stop)
            self.thread.join()
            self.loop.close()


@cache
def _background_loop(pid: int) -> _BackgroundLoop:
    background = _BackgroundLoop()
    atexit.register(background.close, pid)
    return background
