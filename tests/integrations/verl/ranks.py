"""Runs a program in processes that form a group of torch.distributed on gloo, and ends them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]


def results(program: str, processes: int, folder: Path, *arguments: str) -> list[dict[str, Any]]:
    """What each process has saved as ``folder/RANK.pt``. None of them outlives this function.

    Args:
        program: the name of a file in this folder; its last argument is ``folder``.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "HF_HUB_OFFLINE": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(processes),
        "LOCAL_RANK": "0",
        "VERL_PLATFORM": "cpu",
        "VERL_USE_EXTERNAL_MODULES": "tests.integrations.verl.cpu_platform",
    }
    command = [sys.executable, str(HERE / program), *arguments, str(folder)]
    logs = [folder / f"{rank}.log" for rank in range(processes)]
    started = []
    try:
        for rank, path in enumerate(logs):
            own = environment | {"RANK": str(rank)}
            with path.open("wb") as log:
                started.append(subprocess.Popen(command, cwd=ROOT, env=own, stdout=log, stderr=subprocess.STDOUT))
        codes = [process.wait(timeout=240) for process in started]
    finally:
        for process in started:
            process.kill()
            process.wait()
    assert codes == [0] * processes, "\n".join(path.read_text()[-3000:] for path in logs)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(processes)]


def error_of(call: Callable[[], object]) -> str:
    """The error that a call raises, in words that a process can save."""
    try:
        call()
    except (RuntimeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"
