"""Two processes give what one gives on the same responses, and resume as one does."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]


def launch(
    processes: int, checkpoint: Path, out: Path, *more: object, script: str = "two_processes.py", timeout: float = 180
) -> None:
    """Runs a script of this folder in processes that exchange tensors, with two folders and ``more`` as arguments."""
    out.mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", f"--nproc_per_node={processes}"]
        command += ["--master_addr=127.0.0.1", f"--master_port={port}"]
    command.append(str(Path(__file__).with_name(script)))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(
        [*command, *map(str, (checkpoint, out, *more))],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("micro_batches", [1, 2], ids=["judged in the training forward", "scored before"])
def test_two_processes_equal_one(tmp_path: Path, checkpoint: Callable[..., Path], micro_batches: int) -> None:
    for processes in (1, 2):
        launch(processes, checkpoint(), tmp_path / str(processes), micro_batches)
    one, two = (torch.load(tmp_path / n / "records.pt", weights_only=True) for n in "12")
    whole = torch.load(tmp_path / "1" / "rank0.pt", weights_only=True)
    ranks = [torch.load(tmp_path / "2" / f"rank{rank}.pt", weights_only=True) for rank in range(2)]

    assert whole["logs"][0].keys() == ranks[0]["logs"][0].keys() >= {"entropy", "sampling/logprob_gap_max", "kl"}
    for ours, theirs in zip(ranks[0]["logs"], whole["logs"], strict=True):
        for name, value in theirs.items():
            assert ours[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
    assert ranks[0]["logs"] == ranks[1]["logs"]
    for ours, theirs in zip(one, two, strict=True):
        assert torch.equal(ours["rewards_BK"], theirs["rewards_BK"])
        assert torch.equal(ours["lengths_B"], theirs["lengths_B"])
        torch.testing.assert_close(ours["weights_BK"], theirs["weights_BK"], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(ours["advantages_B"], theirs["advantages_B"], rtol=1e-4, atol=1e-5)
    for name, value in whole["policy"].items():
        torch.testing.assert_close(ranks[0]["policy"][name], value, rtol=1e-4, atol=1e-6, msg=name)
    for name, value in ranks[0]["conductor"].items():
        assert torch.equal(value, ranks[1]["conductor"][name]), name
        torch.testing.assert_close(value, whole["conductor"][name], rtol=1e-4, atol=1e-5, msg=name)


def test_two_processes_resume_in_their_second_epoch_and_load_the_best(
    tmp_path: Path, checkpoint: Callable[..., Path]
) -> None:
    launch(2, checkpoint(), tmp_path / "out", 2, "resume")
    ranks = [torch.load(tmp_path / "out" / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
    best = ranks[0]["whole"]["best"]

    for epoch in (slice(0, 4), slice(4, 8)):
        seen = {prompt for rank in ranks for batch in rank["whole"]["prompts"][epoch] for prompt in batch}
        assert len(seen) == 16
    for rank in ranks:
        whole, resumed = rank["whole"], rank["resumed"]
        assert whole["prompts"][:4] != whole["prompts"][4:], "both epochs have one order: this shows nothing"
        assert resumed["prompts"] == whole["prompts"][5:]
        assert Path(whole["best"]).name == "checkpoint-1" and whole["best"] == best and Path(best).is_dir()
        means = resumed["means"]
        assert len(means) == 8 and means == ranks[0]["resumed"]["means"] and means.count(max(means)) == 1
        assert Path(resumed["best"]).name == f"checkpoint-{1 + means.index(max(means))}"
        assert Path(resumed["best"]).is_dir()
        for name, value in load_file(Path(best) / "model.safetensors").items():
            assert torch.equal(whole["policy"][name], value), name
        for name, value in ranks[0]["whole"]["last"].items():
            assert torch.equal(resumed["last"][name], value), name


def test_the_best_policy_and_other_prompts_reach_every_process(tmp_path: Path, checkpoint: Callable[..., Path]) -> None:
    launch(2, checkpoint(), tmp_path / "out", 1, "best")
    main, other = (torch.load(tmp_path / "out" / f"rank{rank}.pt", weights_only=True) for rank in range(2))
    assert main["best"] == {"held": 2, "step": 1, "values": [[1.0], [1.0]]}
    assert other["best"] == main["best"] | {"held": 0}

    refills = main["refill"], other["refill"]
    assert refills[0]["logs"] == refills[1]["logs"]
    assert any(line["dynamic_sampling/refills"] > 0 for line in refills[0]["logs"])
    for refilled in refills:
        for name, value in refilled["policy"].items():
            assert torch.equal(value, refills[0]["policy"][name]), name
    assert len(refills[0]["seen"]) == 2
    for silent, prompts in refills[0]["seen"]:
        assert not silent.any()
        assert len(set(prompts)) == 4  # No prompt stands twice, on whichever process.
