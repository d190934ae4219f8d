"""Prints and records what benchmarks measure: a table per op, and a line for each case as soon as it is measured."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib import metadata, util
from pathlib import Path
from typing import Any

_begun: list[str] = []  # titles of the tables of this session; lines are being added to the last one


def emit(capsys: Any, title: str, lines: Iterable[str], header: Iterable[str] = ()) -> None:
    """Prints lines of a table. Its title and header come first, unless the last lines belonged to the same table."""
    with capsys.disabled():
        if _begun[-1:] != [title]:
            _begun.append(title)
            print("\n\n" + "\n".join([title, *header]), end="")
        for line in lines:
            print("\n  " + line, end="")
        print(flush=True, end="")


def record(values: dict[str, Any]) -> None:
    """Appends a line of JSON to the file that BENCH_JSON names. A run that is stopped later keeps the lines so far.

    The first line of the file describes the machine.
    """
    if not (path := os.environ.get("BENCH_JSON")):
        return
    with Path(path).open("a") as file:
        for line in [values] if file.tell() else [{"machine": machine()}, values]:
            file.write(json.dumps(line) + "\n")


def machine() -> dict[str, Any]:
    """The date in UTC, the commit, versions, the numbers of threads, and the CUDA device if there is one."""
    import torch

    names = ("torch", "triton", "transformers", "trl", "numpy")
    facts: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": os.environ.get("COMMIT") or _output("git", "rev-parse", "HEAD"),
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) if util.find_spec(name) else None for name in names},
        "threads": {"torch": torch.get_num_threads(), "cores": os.cpu_count(), "libc": platform.libc_ver()},
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        facts["gpu"] = {
            "name": properties.name,
            "architecture": f"sm_{properties.major}{properties.minor}",
            "memory_bytes": properties.total_memory,
            "cuda": torch.version.cuda,
            "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        }
    return facts


def _output(*command: str) -> str:
    """The first line that a command prints, or why there is none."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")[0]
    except (OSError, subprocess.CalledProcessError) as error:
        return f"unknown: {error}"
