"""Contenders timed in turn, A B C A B C ..., so that what else the machine does falls on all of them alike."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

from bench.tables import emit


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


def report(benchmark: Any, capsys: Any, title: str, case: str, times: dict[str, Timing], moved: int) -> None:
    """Prints a line of the op's table, and leaves the times with pytest-benchmark.

    Args:
        title: of the table, the same for all cases of an op.
        times: of a ``race``, ours first; the others also as a multiple of it.
        moved: bytes that our op has to read and write.
    """
    benchmark.extra_info["bytes"] = moved
    benchmark.extra_info["times_us"] = {name: (t.median, t.best) for name, t in times.items()}
    ours, *peers = times.values()
    header = "".join(f"{name:>24}" for name in times)
    figures = f"{ours.median:13.1f} {ours.best:10.1f}" + "".join(
        f"{t.median:16.1f} {t.median / ours.median:6.1f}x" for t in peers
    )
    emit(
        capsys,
        f"{title}; us: our median and best, medians of others and their multiples of ours",
        [f"{case:50}{figures}{moved / ours.best / 1e3:9.2f}"],
        header=[f"  {'':50}{header}{'GB/s':>9}"],
    )
