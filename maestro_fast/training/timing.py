"""How long each stage of a step takes."""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Callable, Iterator

import torch


class StageClock:
    """Adds up seconds by stage; tells a listener which stage begins.

    On a CUDA device it waits for the device at both ends of a stage, else the time would go to whoever waits next.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seconds: dict[str, float] = defaultdict(float)
        self._began = time.perf_counter()
        self.on_stage: Callable[[str], None] = lambda stage: None

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        self.on_stage(name)
        self._wait()
        began = time.perf_counter()
        try:
            yield
        finally:
            self._wait()
            self._seconds[name] += time.perf_counter() - began

    def lap(self) -> dict[str, float]:
        """Seconds by stage since the last lap, and their ``total`` on the wall; starts the next lap."""
        now = time.perf_counter()
        seconds = {**self._seconds, "total": now - self._began}
        self._seconds.clear()
        self._began = now
        return seconds

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
