"""Contenders timed in turn, A B C A B C ..., so that what else the machine does falls on all of them alike.

Twice: in a loop of calls, whose data and code are in the caches; and one call at a time after 64 MiB were written, as a
training step makes them, between whose calls a model runs.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from bench.tables import emit

_EVICTING = 64 << 20  # bytes, many times a core's own caches


@dataclass(frozen=True)
class Contender:
    """What is timed: ``calls`` calls of ``run`` a round where caches are warm, one where they are cold."""

    name: str
    run: Callable[[], Any]
    calls: int = 1


@dataclass(frozen=True)
class Timing:
    """Microseconds per call over the rounds: median and least in a loop, and with cold caches."""

    median: float
    best: float
    cold: float
    cold_best: float


def race(contenders: list[Contender], *, rounds: int = 40) -> dict[str, Timing]:
    """Times by name. The first contender is ours; every one is run before the clock is."""
    warm: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    cold: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    rubbish = torch.zeros(_EVICTING, dtype=torch.int8)
    for contender in contenders:
        for _ in range(3):
            contender.run()
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            for contender in contenders:
                rubbish.add_(1)
                cold[contender.name].append(_seconds(contender.run, 1))
            for contender in contenders:
                contender.run()
                warm[contender.name].append(_seconds(contender.run, contender.calls))
    finally:
        gc.enable()
    return {
        name: Timing(*(1e6 * of(seconds[name]) for seconds in (warm, cold) for of in (median, min))) for name in warm
    }


def _seconds(run: Callable[[], Any], calls: int) -> float:
    """Per call."""
    start = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - start) / calls


def report(benchmark: Any, capsys: Any, title: str, case: str, times: dict[str, Timing], moved: int) -> None:
    """Prints a line of the op's table, and leaves the times with pytest-benchmark.

    Args:
        title: of the table, the same for all cases of an op.
        times: of a ``race``, ours first; the others also as a multiple of it.
        moved: bytes that our op has to read and write.
    """
    benchmark.extra_info["bytes"] = moved
    benchmark.extra_info["times_us"] = {name: vars(t) for name, t in times.items()}
    ours, *peers = times.values()
    header = "".join(f"{name:>32}" for name in times)
    figures = f"{ours.cold:18.1f}{ours.median:14.1f}" + "".join(
        f"{t.cold:10.1f}{t.cold / ours.cold:6.1f}x{t.median:9.1f}{t.median / ours.median:6.1f}x" for t in peers
    )
    emit(
        capsys,
        f"{title}; median us, multiples of ours: in turn, {_EVICTING >> 20} MiB written before each call; in a loop",
        [f"{case:50}{figures}"],
        header=[f"  {'':50}{header}"],
    )
