"""Settings that all benchmarks share, and what their JSON says about where they ran."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest

# Set before torch is imported: the figures are per thread, and a second one would time the machine's other work.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--head", metavar="dxVxT,...", help="shapes for the benchmarks of the head pass")
    parser.addoption("--no-compile", action="store_true", help="no torch.compile, which takes longer than all else")
    parser.addoption(
        "--no-peers", action="store_true", help="none of the head pass's peers, however many are installed"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "headline: a case whose figures DESIGN.md sets targets for")
    for what in ("compile", "peers"):  # read by bench.gpu_race, which no benchmark has imported yet
        if config.getoption(f"--no-{what}"):
            os.environ[f"BENCH_{what.upper()}"] = "0"


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


@pytest.fixture(autouse=True)
def no_faults() -> Iterator[None]:
    """Those of a case that ended before its report are not the next one's."""
    from bench.gpu_race import faults

    faults.clear()
    yield


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    from bench.tables import machine

    machine_info |= machine()


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_commit_info(config: pytest.Config, commit_info: dict[str, Any]) -> None:
    """A copy of the tree without its history cannot tell: then the variable COMMIT does."""
    if given := os.environ.get("COMMIT"):
        commit_info["id"] = given
