"""Settings that all tests share."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.vllm_serving import Serving

# The tensors here are tiny: a second thread costs more than it computes, and far more on a busy machine. Set before
# torch is imported, and inherited by the programs that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A machine that only runs the GPU tests need not have hypothesis.
if find_spec("hypothesis"):
    from hypothesis import settings

    # The same examples in every run, and no time limit per example: a busy machine is not a failure.
    settings.register_profile("maestro_fast", derandomize=True, deadline=None)
    settings.load_profile("maestro_fast")


# `make test` gives whole files to its processes in this order. The longest come first, so that none is left alone at
# the end, when the other processes have nothing to do.
LONGEST = [
    "kernels/test_interpreter.py",
    "kernels/test_aot.py",
    "quickstart/test_quickstart.py",
    "test_benchmarks.py",
    "training/test_sharded.py",
    "training/test_invariance.py",
    "training/test_distributed.py",
    "integrations/test_trl_sharded.py",
    "faults/test_disks.py",
    "training/test_checkpoint.py",
    "integrations/test_trl_distributed.py",
    "packaging/test_build.py",
    "test_cli.py",
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    folder = Path(__file__).parent
    rank = {folder / name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path, len(rank)))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """At the first test of a file, takes what is alive out of the collection of garbage.

    The modules that are imported by now live as long as the process, and looking through them takes 0.4 s of a CPU.
    transformers does so at the end of every training run, which is as long as a tiny run itself takes. What the tests
    make is collected as ever; what is alive between two files is not, unless it is freed by its last reference.
    """
    if item.path != _frozen_for[-1]:
        _frozen_for[:] = [item.path]
        gc.collect()
        gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # Otherwise nanobind, by which Triton is bound, takes what is left for leaks and lists it.


_frozen_for: list[Path | None] = [None]


@pytest.fixture(scope="session")
def vllm_serving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """A running vLLM server; it takes a minute or two to start, so all tests share one."""
    from tests.vllm_serving import Serving

    with Serving(tmp_path_factory.mktemp("serving")) as serving:
        yield serving
