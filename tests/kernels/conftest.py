"""The kernels run natively under ``-m gpu``, and in Triton's interpreter where TRITON_INTERPRET=1 is set from the
start.

The interpreter cannot be switched on in a running process (Triton decides when it is imported), so
``test_interpreter.py`` starts processes for the other files, and this one marks their tests as ``gpu``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.kernels.helpers import DEVICE, INTERPRETED

# Without it, cuBLAS raises under deterministic algorithms. It is read when a process first uses cuBLAS.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
HERE = Path(__file__).resolve().parent
HOST_ONLY = {"test_interpreter.py", "test_aot.py", "test_bound_launch.py"}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent == HERE and not INTERPRETED and item.path.name not in HOST_ONLY:
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """torch.empty gives NaN, or the largest integer, so that an element that no kernel wrote shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(1).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
    if DEVICE == "cuda" and torch.cuda.memory_reserved() > 2**30:
        torch.cuda.empty_cache()  # other processes test on the same device
