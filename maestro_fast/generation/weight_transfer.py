"""How weights reach a vLLM server."""

from __future__ import annotations

import re
import shutil
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import save_file
from torch import Tensor

from maestro_fast.generation.http import HttpClient, ServerRefused

SHARD_BYTES = 4 * 2**30
OURS = re.compile(r"weights-[0-9a-f]{32}(\.partial)?")
WORKER = "maestro_fast.generation.vllm_worker.MaestroWorker"


class WeightTransfer(Protocol):
    """One way of sending weights.

    Attributes:
        server_options: what ``vllm serve`` has to be started with.
    """

    server_options: str

    def check(self) -> None:
        """Raises ValueError if the server cannot take weights in this way, as far as that shows before the first."""
        ...

    def send(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """All weights of the checkpoint, or an error; an error may leave the server without usable weights."""
        ...

    def close(self) -> None:
        """Frees what was needed for it. May be called twice."""
        ...


def serve_command(transfer: WeightTransfer) -> str:
    """How to start a server for ``transfer``, with the model's path left open."""
    return (
        f"VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --logprobs-mode processed_logprobs {transfer.server_options}".rstrip()
    )


class FolderTransfer:
    """Through a folder that trainer and server share: safetensors files, which the server is told to read.

    It works everywhere, with or without GPUs, at the speed of the file system.
    """

    server_options = f"--worker-extension-cls {WORKER}"

    def __init__(self, client: HttpClient, folder: Path, *, shard_bytes: int = SHARD_BYTES) -> None:
        """``folder``: of this run alone, by an absolute path that is the same for the server."""
        self.client, self.folder, self.shard_bytes = client, Path(folder).absolute(), shard_bytes

    def check(self) -> None:
        """See ``WeightTransfer.check``: the server reads what is in the folder."""
        self.folder.mkdir(parents=True, exist_ok=True)
        mark = self.folder / f"mark-{uuid.uuid4().hex}"
        mark.touch()
        try:
            answer = self.client.post("/collective_rpc", _rpc("maestro_reads", mark), repeat=False)
        except ServerRefused as refused:
            raise ValueError(
                f"{refused}\nIt cannot load weights from a folder; start it with maestro_fast installed and\n"
                f"{serve_command(self)}"
            ) from None
        finally:
            mark.unlink()
        if not all(worker["reads"] for worker in answer["results"]):
            raise ValueError(
                f"vLLM server {self.client.url}: does not find the files that are written to {self.folder}; expected a "
                f"folder that trainer and server share under one path"
            )

    def send(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """See ``WeightTransfer.send``. The server gets to know a folder only when all of it is there."""
        folder = self.folder / f"weights-{uuid.uuid4().hex}"
        partial = folder.with_suffix(".partial")
        partial.mkdir(parents=True)
        for number, shard in enumerate(_shards(weights, self.shard_bytes)):
            save_file(shard, partial / f"model-{number:05d}.safetensors")
        partial.rename(folder)
        self.client.post("/collective_rpc", _rpc("maestro_load", folder), repeat=True)
        self._remove(but=folder)

    def close(self) -> None:
        """See ``WeightTransfer.close``."""
        self._remove(but=None)

    def _remove(self, but: Path | None) -> None:
        """What earlier updates left, also those of a run that was killed."""
        for path in self.folder.glob("weights-*"):
            if path != but and OURS.fullmatch(path.name):
                shutil.rmtree(path, ignore_errors=True)


def _rpc(method: str, path: Path) -> dict[str, object]:
    return {"method": method, "args": [str(path)]}


def _shards(weights: Iterable[tuple[str, Tensor]], limit: int) -> Iterator[dict[str, Tensor]]:
    """Copies in host memory, so that no tensor shares its storage with another; at most ``limit`` bytes, or one
    tensor, at a time."""
    shard: dict[str, Tensor] = {}
    size = 0
    for name, tensor in weights:
        copy = tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        if shard and size + copy.nbytes > limit:
            yield shard
            shard, size = {}, 0
        shard[name] = copy
        size += copy.nbytes
    if shard:
        yield shard
