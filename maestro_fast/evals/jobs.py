"""Runs many independent trainings side by side, each once: a suite that is killed goes on with those that are missing.

A job is a name and a payload of JSON that says everything about it. A function, found by its name, turns the payload
into a list of results. Each worker is a process of its own with one thread. The results of a job are one line of
results.jsonl, written when the job has ended, so a kill costs the jobs in flight and nothing else. Where there are
GPUs, each worker has one, in turns: with twice as many workers as GPUs, two trainings share each.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from hashlib import sha256
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from maestro_fast.evals import worker
from maestro_fast.evals.results import Result
from maestro_fast.evals.worker import Attempt
from maestro_fast.reporting.json_lines import JsonLines, iter_jsonl

logger = logging.getLogger(__name__)
RESULTS_FILE = "results.jsonl"


@dataclass(frozen=True)
class Job:
    """One training of a suite.

    Attributes:
        name: a name that no other job of the suite has.
        payload: what the function is called with; JSON's types alone. It says everything that the results depend on.
        cost: how long the job takes, in any unit that all jobs share; the time left is told by it.
        places: what the function is called with beside the payload: where files are. Another place gives no other
            results, so it does not count when a suite goes on.
    """

    name: str
    payload: Mapping[str, Any]
    cost: float = 1.0
    places: Mapping[str, Any] = field(default_factory=dict)

    def fingerprint(self, function: str) -> str:
        """A short hash of the function's name and the payload."""
        text = json.dumps([function, self.payload], sort_keys=True)
        return sha256(text.encode()).hexdigest()[:16]


def run_jobs(
    jobs: Sequence[Job], function: str, folder: Path, *, workers: int = 2, title: str = "jobs"
) -> dict[str, list[Result]]:
    """Runs the jobs that have no results in ``folder`` yet, and shows the progress with the time left.

    Args:
        jobs: the jobs, in the order in which they are begun.
        function: "package.module:name" of a function that takes payload and places in one mapping, and returns a list
            of ``Result``.
        folder: where results.jsonl is. The caller keeps other processes out of it.
        workers: the number of processes. With 0, the jobs run in this process, one after another.
        title: what the bar is called.

    Returns:
        The results of each of these jobs, by the job's name, in the order of ``jobs``.

    Raises:
        ValueError: two jobs share a name, or results.jsonl holds a job of this name that was another one.
        RuntimeError: jobs failed, or a worker died. What has ended is kept, and the message names the jobs that have
            not. These run again next time. If jobs failed, all others have run, and the traceback of the first failure
            is in the error's notes.
    """
    known = _finished(jobs, function, folder)
    waiting = [job for job in jobs if job.name not in known]
    lines = JsonLines(folder / RESULTS_FILE)
    failed: dict[str, Attempt] = {}
    total = sum(job.cost for job in waiting)
    layout = "{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"
    with (
        tqdm(total=total, desc=title, bar_format=layout, dynamic_ncols=True, disable=not waiting) as bar,
        # An error in this loop ends the workers at once, rather than when the generator is collected.
        contextlib.closing(_outcomes(waiting, function, workers)) as outcomes,
    ):
        for job, outcome in outcomes:
            if outcome.results is None:
                failed[job.name] = outcome
                logger.error("%s failed: %s", job.name, outcome.error)
            else:
                rows = [result.as_json() for result in outcome.results]
                mark = {"job": job.name, "fingerprint": job.fingerprint(function), "seconds": round(outcome.seconds, 2)}
                lines.append(mark | {"results": rows})
                known[job.name] = outcome.results
            bar.set_postfix_str(f"{len(known)} of {len(jobs)} done, last {job.name}", refresh=False)
            bar.update(job.cost)
    if failed:
        name, first = next(iter(failed.items()))
        error = RuntimeError(
            f"{len(failed)} of {len(jobs)} jobs failed: {', '.join(failed)}. {name}: {first.error}. The others are "
            f"kept in {lines.path}; the same command runs the failed ones again."
        )
        error.add_note(first.trace)
        raise error
    return {job.name: known[job.name] for job in jobs}


def read_results(folder: Path) -> list[Result]:
    """All results in ``folder``, in the order in which their jobs ended."""
    rows = iter_jsonl(folder / RESULTS_FILE)
    return [Result.from_json(result) for row in rows for result in row["results"]]


def _finished(jobs: Sequence[Job], function: str, folder: Path) -> dict[str, list[Result]]:
    """The results that are there already, by the name of their job."""
    expected = {job.name: job.fingerprint(function) for job in jobs}
    if len(expected) < len(jobs):
        raise ValueError("jobs: two have the same name, expected a name for each")
    path, found = folder / RESULTS_FILE, {}
    for row in iter_jsonl(path) if path.exists() else ():
        name = row["job"]
        if name not in expected:
            continue
        if row["fingerprint"] != expected[name]:
            raise ValueError(f"jobs: {name} is in {path} with other settings, expected the same ones or another folder")
        found[name] = [Result.from_json(result) for result in row["results"]]
    return found


def _visible_gpus() -> list[str]:
    """The GPUs that this process may use, as ``CUDA_VISIBLE_DEVICES`` names them, without using one."""
    count = torch.cuda.device_count()
    named = os.environ.get(worker.VISIBLE_DEVICES)
    return [name.strip() for name in named.split(",")][:count] if named else [str(i) for i in range(count)]


def _outcomes(jobs: Sequence[Job], function: str, workers: int) -> Generator[tuple[Job, Attempt], None, None]:
    """Each job with its outcome, as they come in."""
    if workers == 0:
        for job in jobs:
            yield job, worker.attempt(function, {**job.payload, **job.places})
        return
    context = get_context("spawn")
    devices = None
    if gpus := _visible_gpus():
        devices = context.SimpleQueue()
        for _, gpu in zip(range(workers), itertools.cycle(gpus), strict=False):
            devices.put(gpu)
    with ProcessPoolExecutor(workers, context, worker.start, (os.getpid(), devices)) as pool:
        running: dict[Future[Attempt], Job] = {}
        left = iter(jobs)
        try:
            while True:
                # No more jobs are handed out than workers are free, so an interrupt leaves none in a queue.
                for job in itertools.islice(left, workers - len(running)):
                    running[pool.submit(worker.attempt, function, {**job.payload, **job.places})] = job
                if not running:
                    return
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    outcome = future.result()
                    yield running.pop(future), outcome
        except BrokenProcessPool as error:
            names = ", ".join(job.name for job in running.values())
            raise RuntimeError(
                f"a worker died, perhaps for lack of memory, while these jobs ran: {names}. What has ended is kept; "
                "the same command runs the others."
            ) from error
        except BaseException:
            for process in list(pool._processes.values()):
                process.terminate()
            raise
