"""How weights reach a vLLM server: the protocol of all ways, and the way through a shared folder."""

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
        server_options: The options with which ``vllm serve`` has to be started.
    """

    server_options: str

    def check(self) -> None:
        """Checks as much as can be checked before the first weights are sent.

        Raises:
            ValueError: The server cannot take weights in this way.
        """
        ...

    def send(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Sends all weights of the checkpoint. An error may leave the server without usable weights."""
        ...

    def close(self) -> None:
        """Frees what the transfer holds. It may be called twice."""
        ...


def serve_command(transfer: WeightTransfer) -> str:
    """The command that starts a server for ``transfer``.

    MODEL stands for the path of the checkpoint, HOST for the one address that the server listens on. Without it vLLM
    would listen on all of them, and its development routes ask nobody who he is.
    """
    options = f"--host HOST --logprobs-mode processed_logprobs {transfer.server_options}"
    return f"VLLM_SERVER_DEV_MODE=1 vllm serve MODEL {options}".rstrip()


class FolderTransfer:
    """Writes safetensors files to a folder that trainer and server share, and tells the server to read them.

    It works everywhere, with or without GPUs, at the speed of the file system.
    """

    server_options = f"--worker-extension-cls {WORKER}"

    def __init__(self, client: HttpClient, folder: Path, *, shard_bytes: int = SHARD_BYTES) -> None:
        """
        Args:
            client: The client that calls the server.
            folder: The folder, which the server finds under the same absolute path and which no other run uses.
            shard_bytes: The largest size of a file. A larger tensor has a file of its own.
        """
        self.client, self.folder, self.shard_bytes = client, Path(folder).absolute(), shard_bytes

    def check(self) -> None:
        """See ``WeightTransfer.check``. Every worker of the server is asked to find a file that is written here."""
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
        """See ``WeightTransfer.send``. The server is told of a folder only after all of it has been written."""
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
        """Removes the folders of earlier updates, also those that a killed run left behind."""
        for path in self.folder.glob("weights-*"):
            if path != but and OURS.fullmatch(path.name):
                shutil.rmtree(path, ignore_errors=True)


def _rpc(method: str, path: Path) -> dict[str, object]:
    return {"method": method, "args": [str(path)]}


def _shards(weights: Iterable[tuple[str, Tensor]], limit: int) -> Iterator[dict[str, Tensor]]:
    """Yields copies of the weights in host memory, at most ``limit`` bytes or one tensor at a time.

    They are copies because safetensors refuses tensors that share their storage.
    """
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
