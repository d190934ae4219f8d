"""The GPU benchmarks, which no CPU can time, still run: every contender once, in Triton's interpreter."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench.gpu_head import Shape

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted((ROOT / "bench").glob("bench_gpu_*.py"))
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="with a CUDA device there is make gpu")


def python(*arguments: str, **variables: str) -> str:
    # a child is no worker of this session: pytest-benchmark would refuse to time in one
    own = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=own | variables, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    return done.stdout


def benchmarks(*options: str, **variables: str) -> str:
    plain = ["-q", "-m", "gpu", "-p", "no:cacheprovider", "--benchmark-quiet"]
    return python("-m", "pytest", *plain, *map(str, FILES), *options, **variables)


def test_without_a_device_they_are_skipped() -> None:
    assert re.search(r"^\d+ skipped in", benchmarks(TRITON_INTERPRET="0", BENCH_DRY="0"), re.MULTILINE)


def test_a_dry_run_passes_every_gate_and_prints_every_table() -> None:
    printed = benchmarks("--head=24x50x6", TRITON_INTERPRET="1", BENCH_DRY="1")

    for path in FILES:
        op = path.stem.removeprefix("bench_gpu_")
        assert f"{op} by Triton (dry run" in printed
    assert printed.count("d = 24, V = 50, T = 6") == 7  # all of the head pass, at the shape that was asked for
    assert "left out" not in printed  # no peer failed
    assert " met" not in printed  # no target is judged


@pytest.mark.parametrize("text", ["", "4096", "4096x151936", "4096x0x2048", "4096x151936x2048x1", "d4096x8x8"])
def test_a_shape_of_a_head_that_is_none_is_refused(text: str) -> None:
    assert Shape.parse("4096x151936x2048") == (4096, 151936, 2048)

    with pytest.raises(ValueError, match=rf"shape of a head: '{text}', expected dxVxT"):
        Shape.parse(text)


def test_what_compute_sanitizer_runs_is_finite() -> None:
    printed = python("bench/sanitize.py", TRITON_INTERPRET="1")

    for path in FILES:
        assert path.stem.removeprefix("bench_gpu_") in printed
