"""Settings that all benchmarks share, and what their JSON says about where they ran."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata, util
from typing import Any

import pytest

# Set before torch is imported: the figures are per thread, and a second one would time the machine's other work.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--head", metavar="dxVxT,...", help="shapes for the benchmarks of the head pass")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """``shape`` is a ``bench.gpu_head.Shape``, from --head or the default ones."""
    if "shape" not in metafunc.fixturenames:
        return
    from bench.gpu_head import SHAPES, Shape

    given = metafunc.config.getoption("--head")
    try:
        shapes = [Shape.parse(text) for text in given.split(",")] if given else SHAPES
    except ValueError as error:
        raise pytest.UsageError(f"--head: {error}") from None
    metafunc.parametrize("shape", shapes, ids=str)


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    import torch

    machine_info["packages"] = {
        name: metadata.version(name) if util.find_spec(name) else None
        for name in ("torch", "triton", "transformers", "trl", "numpy")
    }
    machine_info["threads"] = {"torch": torch.get_num_threads(), "cores": os.cpu_count(), "libc": platform.libc_ver()}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        machine_info["gpu"] = {
            "name": properties.name,
            "architecture": f"sm_{properties.major}{properties.minor}",
            "memory_bytes": properties.total_memory,
            "cuda": torch.version.cuda,
            "driver": _driver(),
        }


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_commit_info(config: pytest.Config, commit_info: dict[str, Any]) -> None:
    """A copy of the tree without its history cannot tell: then ``make ... COMMIT=...`` does."""
    if given := os.environ.get("COMMIT"):
        commit_info["id"] = given


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.split("\n")[0]
    except (OSError, subprocess.CalledProcessError) as error:
        return f"unknown: {error}"
