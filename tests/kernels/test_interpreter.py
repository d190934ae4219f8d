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


@pytest.mark.skipif(INTERPRETED, reason="this process is one of those that the test starts")
@pytest.mark.skipif(torch.cuda.is_available(), reason="with a CUDA device the kernels run on it: -m gpu")
@pytest.mark.parametrize("name", FILES)
def test_in_the_interpreter(name: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", str(HERE / name)]
    env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
