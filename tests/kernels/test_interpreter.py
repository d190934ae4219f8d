"""Runs the tests of the kernels in Triton's interpreter, on the CPU, in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.kernels.conftest import HERE, HOST_ONLY
from tests.kernels.helpers import INTERPRETED

FILES = sorted(path.name for path in HERE.glob("test_*.py") if path.name not in HOST_ONLY)


pytestmark = [
    pytest.mark.skipif(INTERPRETED, reason="this process is one of those that the tests start"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="with a CUDA device the kernels run on it: -m gpu"),
]


# Each half starts one process. pytest-xdist gives the tests of a class to one worker, so two workers share the files.
class TestFirstHalf:
    def test_in_the_interpreter(self) -> None:
        run_in_the_interpreter(FILES[::2])


class TestSecondHalf:
    def test_in_the_interpreter(self) -> None:
        run_in_the_interpreter(FILES[1::2])


def run_in_the_interpreter(names: list[str]) -> None:
    files = [str(HERE / name) for name in names]
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", *files]
    env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, timeout=2400)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
