"""Contenders timed in turn, A B C A B C ..., so that what else the machine does falls on all of them alike."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any


@dataclass(frozen=True)
class Contender:
    """What is timed: ``calls`` calls of ``run`` a round."""

    name: str
    run: Callable[[], Any]
    calls: int = 1


@dataclass(frozen=True)
class Timing:
    """Microseconds per call: the median and the least over the rounds."""

    median: float
    best: float


def race(contenders: list[Contender], *, rounds: int = 60) -> dict[str, Timing]:
    """Times by name. The first contender is ours; every one is run before the clock is."""
    seconds: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    for contender in contenders:
        for _ in range(3):
            contender.run()
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            for contender in contenders:
                start = time.perf_counter()
                for _ in range(contender.calls):
                    contender.run()
                seconds[contender.name].append((time.perf_counter() - start) / contender.calls)
    finally:
        gc.enable()
    return {name: Timing(1e6 * median(values), 1e6 * min(values)) for name, values in seconds.items()}


def table(title: str, times: dict[str, Timing], moved: int) -> str:
    """The times, each also as a multiple of the first; ``moved`` is the bytes that our op has to read and write."""
    ours = next(iter(times.values()))
    lines = [f"\n{title}; {moved / 1e6:.2f} MB, {moved / ours.best / 1e3:.2f} GB/s at our best"]
    lines.append(f"  {'':34}{'median us':>11}{'best us':>11}{'x ours':>9}{'best x':>9}")
    for name, t in times.items():
        lines.append(f"  {name:34}{t.median:11.1f}{t.best:11.1f}{t.median / ours.median:9.2f}{t.best / ours.best:9.2f}")
    return "\n".join(lines)


def report(benchmark: Any, capsys: Any, title: str, times: dict[str, Timing], moved: int) -> None:
    """Prints the table, and leaves it and the first contender's times with pytest-benchmark."""
    benchmark.extra_info["bytes"] = moved
    benchmark.extra_info["times_us"] = {name: (t.median, t.best) for name, t in times.items()}
    with capsys.disabled():
        print(table(title, times, moved))
