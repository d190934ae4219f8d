"""How long each stage of a step takes."""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Callable, Iterator

import torch


class StageClock:
    """Adds up seconds by stage; tells a listener which stage begins.

    A stage inside another takes its time out of the outer one's, so that no second counts twice. On a CUDA device it
    waits for the device where a stage begins or ends, else the time would go to whoever waits next.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seconds: dict[str, float] = defaultdict(float)
        self._running: list[str] = []
        self._began = self._last = time.perf_counter()
        self.on_stage: Callable[[str], None] = lambda stage: None

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        self._switch()
        self._running.append(name)
        self.on_stage(name)
        try:
            yield
        finally:
            self._switch()
            self._running.pop()
            if self._running:
                self.on_stage(self._running[-1])

    def _switch(self) -> None:
        """Gives the time since the last switch to the stage that ran."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now = time.perf_counter()
        if self._running:
            self._seconds[self._running[-1]] += now - self._last
        self._last = now

    def lap(self) -> dict[str, float]:
        """Seconds by stage since the last lap, and their ``total`` on the wall; starts the next lap."""
        now = time.perf_counter()
        seconds = {**self._seconds, "total": now - self._began}
        self._seconds.clear()
        self._began = now
        return seconds
