"""TRL's class under FSDP2, in two processes of a CPU, trains what it trains under DDP; runs resume to the bit."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("trl", minversion="1.0")
pytest.importorskip("peft")

ROOT = Path(__file__).resolve().parents[2]
CASES = ("trl", "ours", "reference", "lora", "lora_reference")


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> Path:
    """The folder with what the two processes found."""
    folder = tmp_path_factory.mktemp("sharded")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_addr=127.0.0.1"]
    command += [f"--master_port={port}", str(Path(__file__).with_name("trl_sharded_processes.py"))]
    command += [str(checkpoint), str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def ranks(out: Path) -> list[dict[str, Any]]:
    return [torch.load(out / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("case", CASES)
def test_fsdp2_trains_what_ddp_trains(ranks: list[dict[str, Any]], case: str) -> None:
    for rank in ranks:
        ddp, fsdp = rank[f"{case}/ddp"], rank[f"{case}/fsdp"]
        assert fsdp["sharded"] and not ddp["sharded"]
        # Our loss reads the head under FSDP2, too: on-policy batches without a reference take it in one sweep.
        assert fsdp["one_sweep"] is ddp["one_sweep"] is (case in ("ours", "lora"))
        assert len(fsdp["records"]) == len(ddp["records"]) > 1
        for found, expected in zip(fsdp["records"], ddp["records"], strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5, equal_nan=True)
        assert fsdp["policy"].keys() == {name.removeprefix("module.") for name in ddp["policy"]}
        torch.testing.assert_close(fsdp["policy"], ddp["policy"], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(fsdp["conductor"], ddp["conductor"], rtol=1e-4, atol=1e-4)
        assert fsdp["kl"] == pytest.approx(ddp["kl"], abs=1e-6)
        assert (max(fsdp["kl"], default=0.0) > 1e-5) is ("reference" in case)  # The reference is not the policy.
    first, second = (rank[f"{case}/fsdp"] for rank in ranks)
    torch.testing.assert_close(first["policy"], second["policy"], rtol=0, atol=0)


@pytest.mark.parametrize("states", ["FULL_STATE_DICT", "SHARDED_STATE_DICT"])
def test_a_resumed_run_ends_with_the_same_bits(ranks: list[dict[str, Any]], states: str) -> None:
    for rank in ranks:
        expected, found = rank[f"{states}/uninterrupted"], rank[f"{states}/resumed"]
        assert len(found["records"]) == len(expected["records"]) - 2 == 2
        for name in ("policy", "conductor"):
            torch.testing.assert_close(found[name], expected[name], rtol=0, atol=0)
        torch.testing.assert_close(found["records"], expected["records"][2:], rtol=0, atol=0, equal_nan=True)


def test_the_saved_model_is_the_trained_one(out: Path, ranks: list[dict[str, Any]]) -> None:
    saved = load_file(out / "ours" / "fsdp" / "saved" / "model.safetensors")
    assert saved.keys() == ranks[0]["ours/fsdp"]["policy"].keys()
    torch.testing.assert_close(saved, ranks[0]["ours/fsdp"]["policy"], rtol=0, atol=0)
    trained = {
        name.replace(".default", ""): value
        for name, value in ranks[0]["lora/fsdp"]["policy"].items()
        if "lora_" in name
    }
    adapter = load_file(out / "lora" / "fsdp" / "saved" / "adapter_model.safetensors")
    torch.testing.assert_close(adapter, trained, rtol=0, atol=0)


def test_a_head_that_is_a_unit_of_its_own_is_refused(ranks: list[dict[str, Any]]) -> None:
    """TRL would train it with the gradient of one process."""
    for rank in ranks:
        assert "transformer_layer_cls_to_wrap" in rank["head"] and "reduced" in rank["head"]
