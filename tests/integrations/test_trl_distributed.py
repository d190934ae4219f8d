"""Two processes give the weights and advantages that one gives on the same responses."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("trl")

ROOT = Path(__file__).resolve().parents[2]


def launch(processes: int, checkpoint: Path, out: Path, *arguments: str) -> None:
    out.mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", f"--nproc_per_node={processes}"]
        command += ["--master_addr=127.0.0.1", f"--master_port={port}"]
    command += [str(Path(__file__).with_name("trl_two_processes.py")), str(checkpoint), str(out), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize(
    ("iterations", "profile", "loss"),
    [("1", "gdpo", "maestro_fast"), ("2", "maestro", "trl")],
)
def test_two_processes_equal_one(tmp_path: Path, checkpoint: Path, iterations: str, profile: str, loss: str) -> None:
    """One process trains with TRL's loss, two train with the loss that the case names."""
    for processes, used in ((1, "trl"), (2, loss)):
        launch(processes, checkpoint, tmp_path / str(processes), iterations, profile, used)
    one = torch.load(tmp_path / "1" / "rank0.pt", weights_only=True)
    ranks = [torch.load(tmp_path / "2" / f"rank{rank}.pt", weights_only=True) for rank in range(2)]

    for rank in ranks:  # With our loss, responses share their prompts.
        assert rank["regroups"] is (loss == "maestro_fast") is bool(rank["tokens"])
        assert all(computed < of_sequences for computed, of_sequences in rank["tokens"])
    assert len(one["records"]) == 4 // int(iterations)
    for whole, *parts in zip(one["records"], *(rank["records"] for rank in ranks), strict=True):
        for part in parts:
            torch.testing.assert_close(part["rewards"], whole["rewards"], rtol=0, atol=0, equal_nan=True)
            torch.testing.assert_close(part["weights"], whole["weights"], rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(part["advantages"], whole["advantages"], rtol=1e-4, atol=1e-5)
    assert (one["records"][-1]["weights"] - one["records"][-1]["weights"][0]).abs().max() > 0.1
    for name, value in one["policy"].items():
        torch.testing.assert_close(ranks[0]["policy"][name], value, rtol=1e-4, atol=1e-5, msg=name)
    for name, value in ranks[0]["conductor"].items():
        assert torch.equal(value, ranks[1]["conductor"][name]), name
        torch.testing.assert_close(value, one["conductor"][name], rtol=1e-4, atol=1e-5, msg=name)
