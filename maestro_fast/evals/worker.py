"""What happens in a worker of ``run_jobs``: one thread, one GPU, one job after another, an end when its parent ends.

The module imports nothing that takes time. A worker loads it before anything else, so it can limit the threads and the
GPUs of the libraries that the job's function needs.
"""

from __future__ import annotations

import os
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.queues import SimpleQueue
from typing import Any

from maestro_fast.evals.results import Result
from maestro_fast.functions import load_function

VISIBLE_DEVICES = "CUDA_VISIBLE_DEVICES"
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@dataclass(frozen=True)
class Attempt:
    """How a job ended: with results or with an error.

    An error is kept as text, because an exception may hold what cannot be sent to another process, or fail when it is
    rebuilt there; either would end all other jobs.

    Attributes:
        results: what the function returned; None if it failed.
        seconds: how long the function ran.
        error: the kind of the error and its message; None if there was none.
        trace: the traceback of the error, as text.
    """

    results: list[Result] | None
    seconds: float
    error: str | None = None
    trace: str = ""


def attempt(function: str, payload: Mapping[str, Any]) -> Attempt:
    """Calls the function that ``function`` names, and returns its results or its error."""
    began = time.monotonic()
    try:
        found = load_function(function)(payload)
        if not isinstance(found, list) or not all(isinstance(one, Result) for one in found):
            raise TypeError(f"{function}: returned {type(found).__name__}, expected a list of Result")
        return Attempt(found, time.monotonic() - began)
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        return Attempt(None, time.monotonic() - began, text, traceback.format_exc())


def start(parent: int, devices: SimpleQueue[str] | None) -> None:
    """Gives this process one thread and one GPU, and lets it end soon after its parent, however that ended.

    Args:
        parent: the number of the process whose end ends this one.
        devices: one GPU for each worker that has not started yet, as ``CUDA_VISIBLE_DEVICES`` names them. This process
            takes the first one and sees no other. None where there are no GPUs.
    """
    for name in _THREADS:
        os.environ[name] = "1"
    if devices is not None:
        os.environ[VISIBLE_DEVICES] = devices.get()
    if "torch" in sys.modules:  # The parent's main module may import it, and then it has read the variables before.
        sys.modules["torch"].set_num_threads(1)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
