"""Times contenders on the CPU in turn, A B C A B C ..., so that other work of the machine slows all of them alike.

Each contender is timed in two ways. In a loop of calls, its data and code are in the caches. Alone, after 64 MiB were
written, they are not: that is how a training step makes the call, since a model runs between two of them.
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

_EVICTING = 64 << 20  # bytes that are written to empty the caches, many times the size of a core's own


@dataclass(frozen=True)
class Contender:
    """What is timed. A round makes ``calls`` calls of ``run`` with warm caches, and one call with cold caches."""

    name: str
    run: Callable[[], Any]
    calls: int = 1


@dataclass(frozen=True)
class Timing:
    """Microseconds per call over the rounds.

    Attributes:
        median: The median in a loop of calls.
        best: The least in a loop of calls.
        cold: The median with cold caches.
        cold_best: The least with cold caches.
    """

    median: float
    best: float
    cold: float
    cold_best: float


def race(contenders: list[Contender], *, rounds: int = 40) -> dict[str, Timing]:
    """The times by name, in the order of ``contenders``. Every contender makes three calls before it is timed."""
    warm: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    cold: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    eviction = torch.zeros(_EVICTING, dtype=torch.int8)
    for contender in contenders:
        for _ in range(3):
            contender.run()
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            for contender in contenders:
                eviction.add_(1)
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
    """Seconds per call."""
    start = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - start) / calls


def report(benchmark: Any, capsys: Any, title: str, case: str, times: dict[str, Timing], moved: int) -> None:
    """Prints one line of the op's table, and stores the times in pytest-benchmark's JSON.

    Args:
        benchmark: The fixture of pytest-benchmark.
        capsys: The fixture of pytest.
        title: The title of the table, the same for all cases of an op.
        case: The first column of the line.
        times: What ``race`` returned, ours first. The times of the others are printed as multiples of ours, too.
        moved: The number of bytes that our op has to read and write.
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
