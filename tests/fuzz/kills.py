"""Kills a run at random moments, resumes it each time, and compares what it leaves with a run that nobody killed.

    python -m tests.fuzz kills --kills 20 --json tests/fuzz/kills.json
    python -m tests.fuzz kills --kills 20 --processes 2 --json tests/fuzz/kills_of_two.json

A kill is a SIGKILL at a random moment of a random stage: generation, a refill of dynamic sampling, scoring, rewards,
weights, advantages, the Conductor's update, the training forward and backward, an evaluation, a checkpoint being
written. With several processes one of them is killed, and a launcher ends the others, as torchrun does. The run has
every kind of state: several updates from a batch, refills, evaluations, an optimiser with moments, a Conductor.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import multiprocessing
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch

from maestro_fast.manifest import check_manifest
from maestro_fast.reporting import read_jsonl
from maestro_fast.reporting.recorded_run import recorded_train
from maestro_fast.training import dynamic_sampling
from maestro_fast.training.metrics import StageClock
from tests.tiny import tiny_checkpoint
from tests.training.test_checkpoint import assert_same_run

REFILL = "refill"  # the part of the stage "generate" that takes the place of silent groups
_ENTRIES = 6  # A process dies in one of so many entries into a stage; a run enters each five to twenty times.
_LONGEST = 300.0  # seconds that a run of the tiny model may take
_OWN = """
def parity(completion_ids, **columns):
    return [float(sum(ids) % 2) for ids in completion_ids]


def rare(completion_ids, **columns):
    return [float(sum(ids) % 5 == 0) for ids in completion_ids]
"""


@dataclass(frozen=True)
class Moment:
    """When a process dies: ``delay`` seconds after it has entered ``stage`` for the ``entry``-th time, from 1."""

    stage: str
    entry: int
    delay: float
    rank: int


@dataclass(frozen=True)
class Kill:
    """A kill that took place: its moment, and the checkpoint from which that process had started (0: from nothing)."""

    moment: Moment
    resumed_from: int


def make_config(folder: Path, processes: int) -> dict[str, Any]:
    """A run of ten steps of a tiny model, from five batches, in which a third of the groups or so are silent."""
    (folder / "own.py").write_text(_OWN, encoding="utf-8")
    rows = [json.dumps({"prompt": f"Name colour {i}.", "family": f"family {i % 2}"}) for i in range(32)]
    (folder / "prompts.jsonl").write_text("\n".join(rows), encoding="utf-8")
    return {
        "run_dir": str(folder / "whole"),
        "model": {"path": str(tiny_checkpoint(folder / "model"))},
        "data": {"path": str(folder / "prompts.jsonl")},
        "rewards": [f"{folder}/own.py:parity", f"{folder}/own.py:rare"],
        "weights": {"type": "conductor", "period": 2, "learning_rate": 0.05},
        "sampling": {"group_size": 2, "max_new_tokens": 6},
        "batch": {
            "prompts_per_batch": 8,
            "micro_batch": 8 // processes,
            "updates_per_batch": 2,
            "no_signal": "refill",
            "max_refills": 2,
        },
        "evaluation": {"data": {"path": str(folder / "prompts.jsonl"), "limit": 4}},
        "trainer": {
            "learning_rate": 1e-3,
            "max_steps": 10,
            "save_steps": 1,
            "save_total_limit": 3,
            "eval_steps": 2,
            "disable_tqdm": True,
            "use_cpu": True,
        },
    }


# --- the process that dies ---


def train(
    raw: dict[str, Any], moment: Moment | None, rank: int, processes: int, port: int, resume: bool, log: str
) -> None:
    """Runs one process of the training, up to ``moment`` or to its end."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    torch.set_num_threads(1)
    if processes > 1:
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
        os.environ |= {name: str(number) for name, number in place.items()}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    if moment is not None and moment.rank == rank:
        _die_at(moment)
    recorded_train(raw, resume=resume)


def _die_at(moment: Moment) -> None:
    entries = 0

    def enter(stage: str) -> None:
        nonlocal entries
        entries += stage == moment.stage
        if stage == moment.stage and entries == moment.entry:
            threading.Timer(moment.delay, os.kill, (os.getpid(), signal.SIGKILL)).start()

    staged, spare = StageClock.stage, dynamic_sampling.DynamicSampling._spare

    @contextlib.contextmanager
    def stage(self: StageClock, name: str) -> Iterator[None]:
        enter(name)
        with staged(self, name):
            yield

    @functools.wraps(spare)
    def spared(*args: Any) -> Any:
        enter(REFILL)
        return spare(*args)

    StageClock.stage = stage  # type: ignore[method-assign]
    dynamic_sampling.DynamicSampling._spare = spared  # type: ignore[method-assign]


# --- the launcher ---


class Launcher:
    """Starts the processes of a run. They are forked from one that has imported everything."""

    def __init__(self, processes: int, log: Path) -> None:
        self.processes, self.log = processes, log
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["tests.fuzz.kills"])

    def runs_to_its_end(self, raw: dict[str, Any], moment: Moment | None) -> bool:
        """Starts or resumes the run. Returns False if a process was killed at ``moment``.

        Raises:
            RuntimeError: a process ended in another way, or the run hangs.
        """
        resume = newest_checkpoint(raw) > 0
        if not resume:
            shutil.rmtree(raw["run_dir"], ignore_errors=True)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        started = []
        for rank in range(self.processes):
            given = raw, moment, rank, self.processes, port, resume, str(self.log)
            started.append(self.context.Process(target=train, args=given))
            started[-1].start()
        end = time.monotonic() + _LONGEST
        while any(process.exitcode is None for process in started):
            wait([process.sentinel for process in started if process.exitcode is None], end - time.monotonic())
            failed = any(process.exitcode not in (None, 0) for process in started)
            if failed or time.monotonic() > end:
                codes = [process.exitcode for process in started]
                for process in started:
                    process.kill()
                    process.join()
                if moment is None or codes[moment.rank] != -signal.SIGKILL:
                    tail = self.log.read_text(encoding="utf-8", errors="replace")[-3000:]
                    raise RuntimeError(f"exit codes {codes}, expected a kill at {moment}\n{tail}")
                return False
        return True


def newest_checkpoint(raw: dict[str, Any]) -> int:
    """The step of the newest checkpoint, 0 where there is none. Each one that stands has to be whole."""
    steps = [0]
    for path in Path(raw["run_dir"]).glob("checkpoint-*"):
        assert check_manifest(path), path
        steps.append(int(path.name.split("-")[1]))
    return max(steps)


def typical_seconds(run_dir: str) -> dict[str, float]:
    """The mean seconds of each stage of a run, and of a refill, which is a part of the stage "generate"."""
    sums: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for line in read_jsonl(Path(run_dir) / "timings.jsonl"):
        for name, value in line.items():
            if name not in ("step", "total", "reference", "sync") and "/" not in name:
                sums[name] += value
                counts[name] += 1
    found = {name: sums[name] / counts[name] for name in sums}
    return found | {REFILL: found["generate"]}


def kill_and_compare(folder: Path, kills: int, processes: int, seed: int) -> list[Kill]:
    """Kills runs until there were ``kills``. Each run is resumed to its end, and has to equal the one that was not.

    Raises:
        AssertionError: a run left something else, or a checkpoint is not whole.
        RuntimeError: a run failed, or hangs.
    """
    raw, rng, done = make_config(folder, processes), random.Random(seed), []
    launcher = Launcher(processes, folder / "log")
    assert launcher.runs_to_its_end(raw, None)
    seconds = typical_seconds(raw["run_dir"])
    _say(f"stages, in seconds: {', '.join(f'{name} {value:.3f}' for name, value in sorted(seconds.items()))}")
    begun = time.monotonic()
    while len(done) < kills:
        killed = raw | {"run_dir": str(folder / f"killed-{len(done)}")}
        while True:
            moment = None
            if len(done) < kills:
                stage = rng.choice(sorted(seconds))
                moment = Moment(
                    stage, rng.randint(1, _ENTRIES), rng.uniform(0, seconds[stage]), rng.randrange(processes)
                )
            before = newest_checkpoint(killed)
            if launcher.runs_to_its_end(killed, moment):
                break
            assert moment is not None
            done.append(Kill(moment, before))
            left = (time.monotonic() - begun) / len(done) * (kills - len(done))
            _say(f"{len(done)} of {kills} kills, {left:.0f} s left: {moment.stage}, from step {before}")
        assert_same_run(raw["run_dir"], killed["run_dir"])
        assert newest_checkpoint(killed) == newest_checkpoint(raw)
        assert not [*Path(killed["run_dir"]).glob(".saving*")]
        shutil.rmtree(killed["run_dir"])
    return done


def _say(words: str) -> None:
    print(words, file=sys.stderr, flush=True)


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of ``python -m tests.fuzz kills``."""
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)


def main(given: argparse.Namespace) -> dict[str, Any]:
    """Runs the command, and returns its tally."""
    with tempfile.TemporaryDirectory() as folder:
        done = kill_and_compare(Path(folder), given.kills, given.processes, given.seed)
    return {
        "kills": len(done),
        "processes": given.processes,
        "seed": given.seed,
        "resumed_bit_by_bit": True,  # Anything else has ended this program.
        "stages": dict(sorted(Counter(kill.moment.stage for kill in done).items())),
        "moments": [asdict(kill) for kill in done],
    }
