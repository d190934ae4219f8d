"""Times contenders on a CUDA device in turn: wall time, host time, time in a CUDA graph, launches and host syncs.

BENCH_DRY=1 runs every contender once on small sizes, in Triton's interpreter where there is no device. It shows that
the benchmarks work. Our ops are not timed then, and the times of others mean nothing.

A contender that fails is reported as failed, and everything else is still measured. If it is one of ours, the test
fails at its end.
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

from bench.table import judged
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
# bench/conftest.py sets these variables for --no-compile and --no-peers.
COMPILING, HEAD_PEERS = (os.environ.get(f"BENCH_{x}", "1") == "1" for x in ("COMPILE", "PEERS"))
EMPTIES = "five torch.empty"
COMPILED = "torch.compile of it"
faults: list[str] = []  # what is wrong with our ops in the current case; ``report`` prints it and fails
_CALLS = 20  # calls in one round of wall time, at most, and in one CUDA graph
_COLD_CALLS = 5  # calls in one CUDA graph with a cold L2
_FLUSH_BYTES = 256 << 20  # several times the size of the largest L2


@dataclass(frozen=True)
class Contender:
    """What is timed.

    Attributes:
        name: The name in the table.
        run: Makes one call.
        peer: Whether it is not ours. A peer that fails is left out; an op of ours that fails is a fault.
    """

    name: str
    run: Callable[[], Any]
    peer: bool = True


@dataclass(frozen=True)
class Figures:
    """Medians in microseconds per call, and counts. A figure that was not measured is None.

    Attributes:
        wall: Wall time of calls one after another, with one wait for the device at the end.
        host: The time until the last of these calls has returned, which Python and the launches take.
        graph: Time in a replayed CUDA graph of many calls. Inputs that fit into the L2 stay there.
        cold: The same, with the L2 overwritten before each call. The time of the overwriting is subtracted.
        launches: The number of kernels, copies and fills in one call.
        syncs: How often the host waits for the device in one call.
    """

    wall: float | None
    host: float | None = None
    graph: float | None = None
    cold: float | None = None
    launches: int | None = None
    syncs: int | None = None


def compiled(run: Callable[[], Any]) -> list[Contender]:
    """``run`` compiled by torch.compile into one graph, as a contender. The list is empty with --no-compile."""
    if not COMPILING:
        return []
    torch._dynamo.reset()
    whole = torch.compile(run, fullgraph=True, dynamic=False, backend="aot_eager" if DRY else "inductor")
    return [Contender(COMPILED, whole)]


def copy_of(moved: int) -> Contender:
    """The limit of an op bound by memory: a copy by torch that reads and writes ``moved`` bytes in all."""
    source = torch.ones(max(1, moved // 8), device=DEVICE)
    target = torch.empty_like(source)
    return Contender("torch copy of as many bytes", lambda: target.copy_(source))


def race(contenders: list[Contender], *, seconds: float | None = None) -> tuple[dict[str, Figures], list[str]]:
    """Times the contenders, the first of which is ours, in rounds that go through all of them.

    Args:
        contenders: What is timed.
        seconds: The time after which rounds end, but not before the third. It is for contenders that take milliseconds;
            they are not captured in CUDA graphs, which would hold on to the memory of their calls.

    Returns:
        The figures by name, in the order of the contenders, and a note for each figure that is missing: why a contender
        failed, or why it cannot be captured in a CUDA graph.

    Raises:
        Exception: The first contender failed, and without it there is nothing to compare.
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
    timers = {c.name: _wall_timer(c.run) for c in ready if c.peer or not DRY}  # our ops are slow in the interpreter
    if seconds is None:
        timers[EMPTIES] = _wall_timer(_five_empties)
    times = _in_turn(timers, seconds)
    found = {c.name: Figures(None) for c in ready} | {name: Figures(*pair) for name, pair in times.items()}
    if DEVICE.type == "cpu":
        return found, notes
    for c in ready:
        found[c.name] = replace(found[c.name], launches=count_launches(c.run), syncs=count_syncs(c.run))
    return (found if seconds is not None else _in_graphs(ready, found, notes)), notes


def _in_graphs(ready: list[Contender], found: dict[str, Figures], notes: list[str]) -> dict[str, Figures]:
    """``found`` with the times in CUDA graphs, and a note for each contender that cannot be captured.

    The empty name stands for the overwriting of the L2 alone, whose time is subtracted.
    """
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
    """The first line of the first error. A capture that fails raises a second error when it is ended."""
    while error.__context__ is not None:
        error = error.__context__
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _five_empties() -> None:
    """Five allocations: the yardstick for the host time of an op that allocates its outputs."""
    for _ in range(5):
        torch.empty(4096, device=DEVICE)


Times = TypeVar("Times", float, tuple[float, float])


def _in_turn(timers: dict[str, Callable[[], Times]], seconds: float | None = None) -> dict[str, Times]:
    """The median of each timer over rounds of A B C A B C ..., which end after ``seconds``."""
    values: dict[str, list[Times]] = {name: [] for name in timers}
    start = time.perf_counter()
    for done in range(ROUNDS):
        if seconds is not None and done >= 3 and time.perf_counter() - start > seconds:
            break
        for name, timer in timers.items():
            values[name].append(timer())
    return {name: _medians(v) for name, v in values.items()}


def _medians(values: list[Times]) -> Times:
    """The median of numbers, or the medians of the columns of tuples."""
    if isinstance(values[0], tuple):
        return tuple(median(column) for column in zip(*values, strict=True))  # type: ignore[return-value, arg-type]
    return median(values)


def wait() -> None:
    """Waits until the device has done all work, if there is one."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def _wall_timer(run: Callable[[], Any]) -> Callable[[], tuple[float, float]]:
    """A timer of wall and host time per call.

    A round makes as many calls as take 2 ms, but at most ``_CALLS``, so that the queue of launches never fills up.
    """
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
    """A timer of one call in a CUDA graph of ``calls`` calls, each after the L2 was overwritten if ``flush`` is set."""
    flushed = torch.empty(_FLUSH_BYTES if flush else 0, device=DEVICE, dtype=torch.int8)

    def body() -> None:
        if flush:
            flushed.zero_()
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
        """Replays the graph. The default argument keeps ``body`` alive, because the graph uses the memory it holds."""
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        return float(1e3 * begin.elapsed_time(end) / calls)

    timer()
    return timer


def count_syncs(run: Callable[[], Any]) -> int:
    """How often torch makes the host wait for the device in one call of ``run``."""
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
    """The number of kernels, copies and fills in one call of ``run``, or None if the profiler sees nothing."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    torch.cuda.synchronize()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the profiler warns about itself
        with torch.profiler.profile(activities=activities) as profile:
            run()
            torch.cuda.synchronize()
        events = profile.events() or []
    on_device = [event for event in events if event.device_type == torch.autograd.DeviceType.CUDA]
    return sum(not getattr(event, "is_user_annotation", False) for event in on_device) or None


def ratio(figures: dict[str, Figures], peer: str, kind: str) -> float | None:
    """The time of ``peer`` as a multiple of ours, the first in ``figures``. ``kind`` is a field of ``Figures``."""
    ours = getattr(next(iter(figures.values())), kind)
    theirs = getattr(figures[peer], kind) if peer in figures else None
    return theirs / ours if theirs is not None and ours else None


def report(
    capsys: Any,
    op: str,
    case: str,
    raced: tuple[dict[str, Figures], list[str]],
    moved: int,
    notes: list[str] | None = None,
    columns: dict[str, dict[str, str]] | None = None,
) -> None:
    """Prints a block of the op's table with its targets, records everything as JSON, and fails if there are faults.

    Args:
        capsys: The fixture of pytest.
        op: The name of the op.
        case: The title of the block.
        raced: What ``race`` returned.
        moved: The number of bytes that our op has to read and write.
        notes: Further lines, such as the peers that were left out.
        columns: Further columns by title, each with cells by the name of the contender. All cases of an op have the
            same titles.

    Raises:
        AssertionError: One of our ops was wrong or failed.
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
    values = {"bytes": moved, "figures": {name: vars(f) for name, f in figures.items()}, "columns": columns}
    line = {"op": op, "case": case, "dry": DRY, **values, "notes": notes}
    targets = [str(target) for target in judged(line)]
    lines += [f"  {text}" for text in (*targets, *notes)]
    record({**line, "targets": targets})
    names = ("wall us", "host us", "graph us", "cold us", "GB/s", "launches", "syncs", "x wall", "x graph", *columns)
    dry = " (dry run: the times mean nothing)" if DRY else ""
    emit(capsys, f"{op} by Triton{dry}", lines, header=[" " * 40 + "".join(f"{name:>10}" for name in names)])
    assert not faults, faults


def _multiples(figures: dict[str, Figures], name: str) -> str:
    """The cells with a contender's wall time and graph time as multiples of ours."""
    values = ratio(figures, name, "wall"), ratio(figures, name, "graph")
    return "".join(f"{'-' if x is None else format(x, '.2f'):>10}" for x in values)
