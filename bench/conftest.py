"""Holds the settings that all benchmarks share, and tells their JSON where they ran."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest

# This is set before torch is imported. The figures are for one thread; a second one would compete with other work.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds the options of the GPU benchmarks, of bench_shared_prefix.py and of bench_trl.py."""
    parser.addoption("--head", metavar="dxVxT,...", help="shapes for the benchmarks of the head pass")
    parser.addoption("--no-compile", action="store_true", help="leave out torch.compile, which takes longest")
    parser.addoption("--no-peers", action="store_true", help="leave out the head pass's peers, even if installed")
    parser.addoption("--model", metavar="FOLDER", help="checkpoint for the steps of a model, else a random one")
    parser.addoption(
        "--groups", metavar="PxRxG,...", help="tokens of prompt and response, responses, for bench_shared_prefix.py"
    )
    parser.addoption("--rounds", type=int, metavar="N", help="rounds of the steps of a model")


def pytest_configure(config: pytest.Config) -> None:
    """Declares the marker, and hands the options on as environment variables."""
    config.addinivalue_line("markers", "headline: a case whose figures have targets")
    for what in ("compile", "peers"):  # bench.gpu_race reads the variables when a benchmark imports it, after this
        if config.getoption(f"--no-{what}"):
            os.environ[f"BENCH_{what.upper()}"] = "0"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Runs a benchmark that asks for ``shape`` with every ``bench.gpu_head.Shape`` of --head, or else of ``SHAPES``."""
    if "shape" not in metafunc.fixturenames:
        return
    from bench.gpu_head import SHAPES, Shape

    given = metafunc.config.getoption("--head")
    try:
        shapes = [Shape.parse(text) for text in given.split(",")] if given else SHAPES
    except ValueError as error:
        raise pytest.UsageError(f"--head: {error}") from None
    metafunc.parametrize("shape", shapes, ids=str)


@pytest.fixture(autouse=True)
def no_faults() -> Iterator[None]:
    """Clears the faults of a case that ended before its report, so that the next case does not report them."""
    from bench.gpu_race import faults

    faults.clear()
    yield


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """Adds versions, threads and the GPU to the JSON."""
    from bench.tables import machine

    machine_info |= machine()


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_commit_info(config: pytest.Config, commit_info: dict[str, Any]) -> None:
    """Takes the commit from the variable COMMIT, where the tree is a copy without its git history."""
    if given := os.environ.get("COMMIT"):
        commit_info["id"] = given
