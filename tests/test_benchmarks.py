"""What runs on a GPU machine is rehearsed here: the same commands on tiny sizes, in Triton's interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import gpu_race, table
from bench.gpu_head import Shape
from bench.gpu_race import Contender, Figures

ROOT = Path(__file__).resolve().parent.parent
OPS = [path.stem.removeprefix("bench_gpu_") for path in sorted((ROOT / "bench").glob("bench_gpu_*.py"))]
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="with a CUDA device there is make gpu")


def gpu_sh(*arguments: str, out: Path, python: str | Path = sys.executable, compiling: bool = True) -> tuple[int, str]:
    """Exit status and output of a rehearsal."""
    # a child is no worker of this session, and the Python is this one's
    own = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST") and k != "VIRTUAL_ENV"}
    variables = {"BENCH_DRY": "1", "OUT": str(out), "PYTHON": str(python), "COMMIT": "of the rehearsal"}
    variables |= {} if compiling else {"BENCH_COMPILE": "0"}
    command = ["bash", "bench/gpu.sh", *arguments]
    done = subprocess.run(
        command, cwd=ROOT, env=own | variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=600
    )
    return done.returncode, done.stdout


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.rehearsal
def test_first(tmp_path: Path) -> None:
    status, printed = gpu_sh("first", out=tmp_path)

    assert status == 0, printed[-6000:]
    found = (tmp_path / "first.xml").read_text()
    assert 'errors="0" failures="0" skipped="0" tests="7"' in found
    assert found.count('name="test_results_are_finite') == 5  # what compute-sanitizer runs
    assert (tmp_path / "first.log").read_text() == printed
    assert "first: 0 of 1 steps failed" in printed


def test_compute_sanitizer_gets_every_op() -> None:
    program = (ROOT / "bench" / "sanitize.py").read_text()

    for op in OPS:
        assert f"ops.{op}(" in program


@pytest.mark.rehearsal
def test_second(tmp_path: Path) -> None:
    status, printed = gpu_sh("second", out=tmp_path)

    assert status == 0, printed[-6000:]
    first, *cases = records(tmp_path / "second.jsonl")
    assert first["machine"]["commit"] == "of the rehearsal"
    found = [case["op"] for case in cases]
    assert found == [
        "ceilings", *["group_advantages"] * 2, *["maestro_advantages"] * 2, "policy_loss", "pool_hidden",
        *["token_logprobs"] * 2, *["linear_policy_loss"] * 2, *["token_logprobs"] * 2, "maestro_advantages",
        "policy_loss",
    ]  # fmt: skip
    compiled = ["torch.compile of it" in case["figures"] for case in cases]
    assert compiled == [False] * 13 + [True] * 2
    assert "left out" not in printed  # no contender failed
    assert " met" not in printed and "MISSED" not in printed  # no target is judged
    assert "d = 24, V = 50, T = 6" in printed and "d = 20, V = 60, T = 7" in printed
    assert {path.name for path in tmp_path.iterdir()} == {"second.jsonl", "second.log"}


@pytest.mark.rehearsal
def test_third(tmp_path: Path) -> None:
    status, printed = gpu_sh("third", out=tmp_path)

    assert status == 0, printed[-6000:]
    _, *blocks, summary, shared = records(tmp_path / "third.jsonl")
    assert len(blocks) == summary["blocks"] == 2
    conductor, equal = summary["stages"]
    assert {name for name in conductor if not equal.get(name)} == {"pooling", "adaptive step", "Conductor's update"}
    assert summary["added_ms"] == pytest.approx(
        sum(conductor[x] for x in ("pooling", "adaptive step", "Conductor's update")) - equal["advantages"]
    )
    assert shared["op"] == "shared_prefix"
    assert shared["tokens"] == {"shared": 20 + 4 * 3, "packed": 4 * 23, "padded": 4 * 23}
    assert all(len(ms) == 2 for ms in shared["ms"].values())
    assert not shared["faults"]


@pytest.mark.rehearsal
def test_cases_that_are_no_headline(tmp_path: Path) -> None:
    """Those with code of their own; and TRL, where it is installed."""
    rest = ["conductor_weights", "counterfactual_advantages", "linear_policy_loss:24x50x6"]
    status, printed = gpu_sh("bench", *rest, out=tmp_path, compiling=False)

    assert status == 0, printed[-6000:]
    assert {case["op"] for case in records(tmp_path / "bench.jsonl")[1:]} == {x.split(":")[0] for x in rest}
    assert "left out" not in printed


def test_a_step_that_fails_stops_nothing(tmp_path: Path) -> None:
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\nexit 7\n")
    broken.chmod(0o755)

    status, printed = gpu_sh("second", out=tmp_path / "out", python=broken)

    assert status == 1
    assert "second: 9 of 9 steps failed" in printed
    assert printed.count("failed, exit status 7") == 9


def fail() -> None:
    raise RuntimeError("broken")


def test_a_contender_that_fails_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_race, "faults", faults := [])
    contenders = [Contender("ours", int, False), Contender("ours, too", fail, False), Contender("a peer", fail)]

    figures, notes = gpu_race.race([*contenders, Contender("another", int)])

    assert set(figures) == {"ours", "another", "five torch.empty"}
    assert notes == ["a peer: left out, RuntimeError: broken"]
    assert faults == ["ours, too: left out, RuntimeError: broken"]
    with pytest.raises(RuntimeError, match="broken"):
        gpu_race.race(contenders[1:])


def test_what_is_wrong_is_reported_with_the_figures_and_not_judged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    graph = table.Target("graph", "<=", 1, "us", "graph")
    monkeypatch.setattr(table, "ROWS", [table.Row("op", "case", "an op", "triton", (graph,))])
    monkeypatch.setattr(gpu_race, "faults", [])
    monkeypatch.setenv("BENCH_JSON", str(path := tmp_path / "figures.jsonl"))
    raced = {"triton": Figures(3.0, host=2.0, graph=1.5)}, []

    gpu_race.report(capsys, "op", "case", raced, 3_000_000)
    gpu_race.faults.append("element 3")
    with pytest.raises(AssertionError, match="element 3"):
        gpu_race.report(capsys, "op", "case", raced, 3_000_000)

    _, right, wrong = records(path)
    assert right["targets"] == ["target: graph <= 1 us: 1.5, MISSED"]
    assert right["notes"] == []
    assert wrong["figures"]["triton"]["wall"] == 3.0
    assert wrong["notes"] == ["WRONG: element 3"]
    assert wrong["targets"] == ["target: graph <= 1 us: not measured"]


@pytest.mark.parametrize("text", ["", "4096", "4096x151936", "4096x0x2048", "4096x151936x2048x1", "d4096x8x8"])
def test_a_shape_of_a_head_that_is_none_is_refused(text: str) -> None:
    assert Shape.parse("4096x151936x2048") == (4096, 151936, 2048)

    with pytest.raises(ValueError, match=rf"shape of a head: '{text}', expected dxVxT"):
        Shape.parse(text)
