"""Contenders on a CUDA device: time on the wall, time in a CUDA graph, launches, host syncs.

BENCH_DRY=1 runs every contender once, on small sizes, where there is no device in Triton's interpreter: it shows that
the benchmarks work, and its times mean nothing.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import pytest
import torch

from bench.tables import emit

DRY = os.environ.get("BENCH_DRY") == "1"
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ROUNDS = 1 if DRY else 30
MARKS = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE.type == "cpu" and not DRY, reason="needs a CUDA device"),
    pytest.mark.skipif(
        DEVICE.type == "cpu" and DRY and os.environ.get("TRITON_INTERPRET") != "1",
        reason="a dry run without a CUDA device needs TRITON_INTERPRET=1",
    ),
]
_CALLS = 20  # of one round: on the wall, and copied into a CUDA graph
_COLD_CALLS = 5
_FLUSH_BYTES = 256 << 20  # several times the largest L2


@dataclass(frozen=True)
class Contender:
    """What is timed. ``peer``: not ours, so that it may wait for the device or refuse a CUDA graph."""

    name: str
    run: Callable[[], Any]
    peer: bool = True


@dataclass(frozen=True)
class Figures:
    """Medians in microseconds a call; None where there is no such figure.

    Attributes:
        wall: of calls one after another, the device waited for at the end.
        graph: replayed from a CUDA graph of many calls, so the inputs are in the L2 as far as they fit.
        cold: the same, the L2 overwritten before each call; the time of the overwriting is taken off.
        launches: kernels, copies and fills of one call.
        syncs: times that the host waited for the device in one call.
    """

    wall: float
    graph: float | None
    cold: float | None
    launches: int | None
    syncs: int | None


@dataclass(frozen=True)
class Target:
    """A line of DESIGN.md section 7: what was measured, and what it should be at most, or at least."""

    what: str
    value: float | None
    bound: float
    at_least: bool = False

    def __str__(self) -> str:
        sign = ">=" if self.at_least else "<="
        if self.value is None or DRY:
            return f"target: {self.what} {sign} {self.bound:g}: not measured"
        met = self.value >= self.bound if self.at_least else self.value <= self.bound
        return f"target: {self.what} {sign} {self.bound:g}: {self.value:.2f}, {'met' if met else 'MISSED'}"


def compiled(run: Callable[[], Any]) -> Callable[[], Any]:
    """``run`` by torch.compile, in one graph."""
    torch._dynamo.reset()
    return torch.compile(run, fullgraph=True, dynamic=False, backend="aot_eager" if DRY else "inductor")


def copy_of(moved: int) -> Contender:
    """The limit: torch's copy that reads and writes as many bytes."""
    source = torch.ones(max(1, moved // 8), device=DEVICE)
    target = torch.empty_like(source)
    return Contender("torch copy of as many bytes", lambda: target.copy_(source))


def race(contenders: list[Contender], *, seconds: float | None = None) -> tuple[dict[str, Figures], dict[str, str]]:
    """Figures by name, ours first, and why a peer that failed has none. Rounds go through the contenders in turn.

    ``seconds`` is for contenders that take milliseconds: rounds end after as many, but not before the third, and there
    are no CUDA graphs, which would hold the memory of their calls.
    """
    ready, failed = [], {}
    for contender in contenders:
        try:
            for _ in range(1 if DRY else 3 if seconds is None else 2):
                contender.run()
        except Exception as error:
            if not contender.peer:
                raise
            failed[contender.name] = f"{type(error).__name__}: {error}".splitlines()[0]
        else:
            ready.append(contender)
    wall = _in_turn({c.name: _wall_timer(c.run) for c in ready}, seconds)
    if DEVICE.type == "cpu":
        return {name: Figures(us, None, None, None, None) for name, us in wall.items()}, failed
    syncs = {c.name: count_syncs(c.run) for c in ready}
    warm, cold = {}, {}
    for c in ready:
        if syncs[c.name] == 0 and seconds is None:
            warm[c.name], cold[c.name] = _captured(c, _CALLS, flush=False), _captured(c, _COLD_CALLS, flush=True)
    graph = _in_turn({name: timer for name, timer in warm.items() if timer})
    cold_us = _in_turn({name: timer for name, timer in cold.items() if timer} | {"": _flush_timer()}) if cold else {}
    return {
        c.name: Figures(
            wall[c.name],
            graph.get(c.name),
            max(0.0, cold_us[c.name] - cold_us[""]) if c.name in cold_us else None,
            count_launches(c.run),
            syncs[c.name],
        )
        for c in ready
    }, failed


def _in_turn(timers: dict[str, Callable[[], float]], seconds: float | None = None) -> dict[str, float]:
    """Median of each over the rounds, A B C A B C ..."""
    values: dict[str, list[float]] = {name: [] for name in timers}
    start = time.perf_counter()
    for done in range(ROUNDS):
        if seconds is not None and done >= 3 and time.perf_counter() - start > seconds:
            break
        for name, timer in timers.items():
            values[name].append(timer())
    return {name: median(v) for name, v in values.items()}


def wait() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def _wall_timer(run: Callable[[], Any]) -> Callable[[], float]:
    """As many calls a round as take 2 ms, at most ``_CALLS``."""
    calls = 1
    if not DRY:
        wait()
        start = time.perf_counter()
        run()
        wait()
        calls = max(1, min(_CALLS, int(2e-3 / (time.perf_counter() - start))))

    def timer() -> float:
        wait()
        start = time.perf_counter()
        for _ in range(calls):
            run()
        wait()
        return 1e6 * (time.perf_counter() - start) / calls

    return timer


def _captured(contender: Contender, calls: int, *, flush: bool) -> Callable[[], float] | None:
    """A timer of replays, per call; None where a peer cannot be captured."""
    try:
        return _graph_timer(contender.run, calls, flush=flush)
    except RuntimeError:
        if not contender.peer:
            raise
        torch.cuda.synchronize()
        return None


def _flush_timer() -> Callable[[], float]:
    return _graph_timer(lambda: None, _COLD_CALLS, flush=True)


def _graph_timer(run: Callable[[], Any], calls: int, *, flush: bool) -> Callable[[], float]:
    rubbish = torch.empty(_FLUSH_BYTES if flush else 0, device=DEVICE, dtype=torch.int8)

    def body() -> None:
        if flush:
            rubbish.zero_()
        run()

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            body()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            body()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def timer() -> float:
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        return float(1e3 * begin.elapsed_time(end) / calls)

    timer()
    return timer


def count_syncs(run: Callable[[], Any]) -> int:
    """How often torch makes the host wait for the device in one call."""
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("called a synchronizing CUDA operation" in str(w.message) for w in caught)


def count_launches(run: Callable[[], Any]) -> int:
    """Kernels, copies and fills that one call has the device run."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    torch.cuda.synchronize()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the profiler's, about itself
        with torch.profiler.profile(activities=activities) as profile:
            run()
            torch.cuda.synchronize()
        events = profile.events() or []
    on_device = [event for event in events if event.device_type == torch.autograd.DeviceType.CUDA]
    return sum(not getattr(event, "is_user_annotation", False) for event in on_device)


def ratio(figures: dict[str, Figures], peer: str, kind: str) -> float | None:
    """How many times as long as ours, the first, a peer takes; ``kind`` is a field of ``Figures``."""
    ours = getattr(next(iter(figures.values())), kind)
    theirs = getattr(figures[peer], kind) if peer in figures else None
    return theirs / ours if theirs is not None and ours else None


def report(
    benchmark: Any,
    capsys: Any,
    op: str,
    case: str,
    raced: tuple[dict[str, Figures], dict[str, str]],
    moved: int,
    targets: list[Target],
    notes: list[str] | None = None,
    columns: dict[str, dict[str, str]] | None = None,
) -> None:
    """Prints a block of the op's table, and leaves everything with pytest-benchmark.

    Args:
        moved: bytes that our op has to read and write.
        notes: further lines, e.g. which peers were left out.
        columns: further ones by title, the cells by name of the contender; the same titles in all cases of an op.
    """
    figures, failed = raced
    columns = columns or {}
    notes = [*(notes or []), *(f"{name}: left out, {why}" for name, why in failed.items())]
    lines = [f"{case}; {moved / 1e6:.2f} MB"]
    for name, f in figures.items():
        times = "".join(f"{'-' if x is None else format(x, '.1f'):>10}" for x in (f.wall, f.graph, f.cold))
        fastest = f.cold or f.graph
        speed = "-" if not fastest else f"{moved / fastest / 1e3:.1f}"
        counts = "".join(f"{'-' if x is None else x:>10}" for x in (f.launches, f.syncs))
        lines.append(f"  {name:36}{times}{speed:>10}{counts}{_multiples(figures, name)}")
        lines[-1] += "".join(f"{cells.get(name, '-'):>10}" for cells in columns.values())
    lines += [f"  {target}" for target in targets] + [f"  {note}" for note in notes]
    benchmark.extra_info |= {
        "bytes": moved,
        "dry": DRY,
        "figures": {name: vars(f) for name, f in figures.items()},
        "targets": [str(target) for target in targets],
        "notes": notes,
        "columns": columns,
    }
    names = ("wall us", "graph us", "cold us", "GB/s", "launches", "syncs", "x wall", "x graph", *columns)
    dry = " (dry run: the times mean nothing)" if DRY else ""
    emit(capsys, f"{op} by Triton{dry}", lines, header=[" " * 40 + "".join(f"{name:>10}" for name in names)])


def _multiples(figures: dict[str, Figures], name: str) -> str:
    values = ratio(figures, name, "wall"), ratio(figures, name, "graph")
    return "".join(f"{'-' if x is None else format(x, '.2f'):>10}" for x in values)
