"""Contenders on a CUDA device: time on the wall, on the host, in a CUDA graph, launches, host syncs.

BENCH_DRY=1 runs every contender once, on small sizes, where there is no device in Triton's interpreter: it shows that
the benchmarks work. Ours are not timed then, and the times of others mean nothing.

Whatever fails is recorded as such, and everything else still measured; the test fails at its end.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import median
from typing import Any, TypeVar

import pytest
import torch

from bench.tables import emit, record

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
# --no-compile, --no-peers
COMPILING, HEAD_PEERS = (os.environ.get(f"BENCH_{x}", "1") == "1" for x in ("COMPILE", "PEERS"))
EMPTIES = "five torch.empty"
COMPILED = "torch.compile of it"
faults: list[str] = []  # what is wrong with ours in the case that runs: the report prints it, and fails
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
        host: of the same calls, until the last one has returned: what Python and the launches take.
        graph: replayed from a CUDA graph of many calls, so the inputs are in the L2 as far as they fit.
        cold: the same, the L2 overwritten before each call; the time of the overwriting is taken off.
        launches: kernels, copies and fills of one call.
        syncs: times that the host waited for the device in one call.
    """

    wall: float | None
    host: float | None = None
    graph: float | None = None
    cold: float | None = None
    launches: int | None = None
    syncs: int | None = None


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


def compiled(run: Callable[[], Any]) -> list[Contender]:
    """``run`` by torch.compile, in one graph; none of it with --no-compile."""
    if not COMPILING:
        return []
    torch._dynamo.reset()
    whole = torch.compile(run, fullgraph=True, dynamic=False, backend="aot_eager" if DRY else "inductor")
    return [Contender(COMPILED, whole)]


def copy_of(moved: int) -> Contender:
    """The limit: torch's copy that reads and writes as many bytes."""
    source = torch.ones(max(1, moved // 8), device=DEVICE)
    target = torch.empty_like(source)
    return Contender("torch copy of as many bytes", lambda: target.copy_(source))


def race(contenders: list[Contender], *, seconds: float | None = None) -> tuple[dict[str, Figures], list[str]]:
    """Figures by name, ours first, and a line for each figure that is missing: why a contender that failed has none,
    or why a call cannot be captured in a CUDA graph. Rounds go through the contenders in turn.

    ``seconds`` is for contenders that take milliseconds: rounds end after as many, but not before the third, and there
    are no CUDA graphs, which would hold the memory of their calls.

    Raises:
        Exception: that of the first contender, without which there is nothing to compare.
    """
    ready, notes = [], []
    for contender in contenders:
        try:
            for _ in range(1 if DRY else 3 if seconds is None else 2):
                contender.run()
        except Exception as error:
            if contender is contenders[0]:
                raise
            note = f"{contender.name}: left out, {reason(error)}"
            notes.append(note) if contender.peer else faults.append(note)
        else:
            ready.append(contender)
    timers = {c.name: _wall_timer(c.run) for c in ready if c.peer or not DRY}  # ours take long in the interpreter
    if seconds is None:
        timers[EMPTIES] = _wall_timer(_five_empties)
    times = _in_turn(timers, seconds)
    found = {c.name: Figures(None) for c in ready} | {name: Figures(*found) for name, found in times.items()}
    if DEVICE.type == "cpu":
        return found, notes
    for c in ready:
        found[c.name] = replace(found[c.name], launches=count_launches(c.run), syncs=count_syncs(c.run))
    return (found if seconds is not None else _in_graphs(ready, found, notes)), notes


def _in_graphs(ready: list[Contender], found: dict[str, Figures], notes: list[str]) -> dict[str, Figures]:
    """``found`` with the times of what can be captured."""
    warm, cold = {}, {"": _graph_timer(lambda: None, _COLD_CALLS, flush=True)}
    for c in ready:
        try:
            if syncs := found[c.name].syncs:
                raise RuntimeError(f"the host waits {syncs} times")
            timers = _graph_timer(c.run, _CALLS, flush=False), _graph_timer(c.run, _COLD_CALLS, flush=True)
        except Exception as error:
            torch.cuda.synchronize()
            notes.append(f"{c.name}: not capturable: {reason(error)}")
        else:
            warm[c.name], cold[c.name] = timers
    graph, evicted = _in_turn(warm), _in_turn(cold)
    flush = evicted.pop("")
    times = {name: {"graph": graph[name], "cold": max(0.0, us - flush)} for name, us in evicted.items()}
    return {name: replace(figures, **times.get(name, {})) for name, figures in found.items()}


def reason(error: BaseException) -> str:
    """The first line of what went wrong first: a capture that is broken off fails once more at its end."""
    while error.__context__ is not None:
        error = error.__context__
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _five_empties() -> None:
    """What as many allocations take, the measure of a host path."""
    for _ in range(5):
        torch.empty(4096, device=DEVICE)


Times = TypeVar("Times", float, tuple[float, float])


def _in_turn(timers: dict[str, Callable[[], Times]], seconds: float | None = None) -> dict[str, Times]:
    """Medians of each over the rounds, A B C A B C ..."""
    values: dict[str, list[Times]] = {name: [] for name in timers}
    start = time.perf_counter()
    for done in range(ROUNDS):
        if seconds is not None and done >= 3 and time.perf_counter() - start > seconds:
            break
        for name, timer in timers.items():
            values[name].append(timer())
    return {name: _medians(v) for name, v in values.items()}


def _medians(values: list[Times]) -> Times:
    if isinstance(values[0], tuple):
        return tuple(median(column) for column in zip(*values, strict=True))  # type: ignore[return-value, arg-type]
    return median(values)


def wait() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def _wall_timer(run: Callable[[], Any]) -> Callable[[], tuple[float, float]]:
    """On the wall and on the host; a round is as many calls as take 2 ms, at most ``_CALLS``, which fill no queue."""
    calls = 1
    if not DRY:
        wait()
        start = time.perf_counter()
        run()
        wait()
        calls = max(1, min(_CALLS, int(2e-3 / (time.perf_counter() - start))))

    def timer() -> tuple[float, float]:
        wait()
        start = time.perf_counter()
        for _ in range(calls):
            run()
        host = time.perf_counter() - start
        wait()
        return 1e6 * (time.perf_counter() - start) / calls, 1e6 * host / calls

    return timer


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

    def timer(kept: Any = body) -> float:
        """The graph writes to the memory that ``body`` holds, so whoever holds the graph has to hold that, too."""
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


def count_launches(run: Callable[[], Any]) -> int | None:
    """Kernels, copies and fills that one call has the device run; None where the profiler sees nothing."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    torch.cuda.synchronize()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the profiler's, about itself
        with torch.profiler.profile(activities=activities) as profile:
            run()
            torch.cuda.synchronize()
        events = profile.events() or []
    on_device = [event for event in events if event.device_type == torch.autograd.DeviceType.CUDA]
    return sum(not getattr(event, "is_user_annotation", False) for event in on_device) or None


def ratio(figures: dict[str, Figures], peer: str, kind: str) -> float | None:
    """How many times as long as ours, the first, a peer takes; ``kind`` is a field of ``Figures``."""
    ours = getattr(next(iter(figures.values())), kind)
    theirs = getattr(figures[peer], kind) if peer in figures else None
    return theirs / ours if theirs is not None and ours else None


def report(
    capsys: Any,
    op: str,
    case: str,
    raced: tuple[dict[str, Figures], list[str]],
    moved: int,
    targets: list[Target],
    notes: list[str] | None = None,
    columns: dict[str, dict[str, str]] | None = None,
) -> None:
    """Prints a block of the op's table, leaves everything in the JSON, and fails if there are faults.

    Args:
        moved: bytes that our op has to read and write.
        notes: further lines, e.g. which peers were left out.
        columns: further ones by title, the cells by name of the contender; the same titles in all cases of an op.

    Raises:
        AssertionError: something of ours was wrong.
    """
    figures, missing = raced
    columns = columns or {}
    notes = [*(notes or []), *missing, *(f"WRONG: {fault}" for fault in faults)]
    lines = [f"{case}; {moved / 1e6:.2f} MB"]
    for name, f in figures.items():
        times = "".join(f"{'-' if x is None else format(x, '.1f'):>10}" for x in (f.wall, f.host, f.graph, f.cold))
        fastest = f.cold or f.graph
        speed = "-" if not fastest or name == EMPTIES else f"{moved / fastest / 1e3:.1f}"
        counts = "".join(f"{'-' if x is None else x:>10}" for x in (f.launches, f.syncs))
        lines.append(f"  {name:36}{times}{speed:>10}{counts}{_multiples(figures, name)}")
        lines[-1] += "".join(f"{cells.get(name, '-'):>10}" for cells in columns.values())
    lines += [f"  {target}" for target in targets] + [f"  {note}" for note in notes]
    values = {"bytes": moved, "figures": {name: vars(f) for name, f in figures.items()}, "columns": columns}
    record({"op": op, "case": case, "dry": DRY, **values, "targets": [str(x) for x in targets], "notes": notes})
    names = ("wall us", "host us", "graph us", "cold us", "GB/s", "launches", "syncs", "x wall", "x graph", *columns)
    dry = " (dry run: the times mean nothing)" if DRY else ""
    emit(capsys, f"{op} by Triton{dry}", lines, header=[" " * 40 + "".join(f"{name:>10}" for name in names)])
    assert not faults, faults


def _multiples(figures: dict[str, Figures], name: str) -> str:
    values = ratio(figures, name, "wall"), ratio(figures, name, "graph")
    return "".join(f"{'-' if x is None else format(x, '.2f'):>10}" for x in values)
