"""test_shared_wrappers.py runs this in two processes: each computes gradients of its responses, in DDP and in FSDP2."""

from __future__ import annotations

import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing import start_processes
from torch.nn.parallel import DistributedDataParallel

from maestro_fast.model.rows import Sequences
from tests.model.shared_cases import SHARED, batch, found, model_of

CASES = [("ddp", "qwen3"), ("ddp", "llama, tied"), ("fsdp2", "qwen3, mixed"), ("fsdp2", "llama, tied")]


def part(rank: int) -> Sequences:
    """The responses of a process; a group of one and an empty response are among them, and the rows differ."""
    return batch().select([0, 3, 5, 9, 2] if rank == 0 else [1, 8, 4, 6, 7])


def wrapped(name: str, model: Any) -> Any:
    if name == "ddp":
        return DistributedDataParallel(model)
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def main(rank: int, out: Path) -> None:
    store = f"file://{out.resolve()}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    for wrapper, name in CASES:
        values = found(wrapped(wrapper, model_of(name)), part(rank), SHARED)
        whole = {
            key.replace("module.", ""): value.full_tensor() if hasattr(value, "full_tensor") else value
            for key, value in values.items()
        }
        torch.save(whole, out / f"{wrapper} {name} {rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    start_processes(main, (Path(sys.argv[1]),), nprocs=2, start_method="fork")  # What is imported serves both.
