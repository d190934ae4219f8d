"""Settings that all tests share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.util import find_spec
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


@pytest.fixture(scope="session")
def vllm_serving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """A running vLLM server; it takes a minute or two to start, so all tests share one."""
    from tests.vllm_serving import Serving

    with Serving(tmp_path_factory.mktemp("serving")) as serving:
        yield serving
