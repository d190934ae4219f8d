"""Weights into a vLLM server by NCCL, from GPU to GPU, through vLLM's own weight transfer engine."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from maestro_fast.generation.http import HttpClient, ServerGone, ServerRefused

CHUNK_BYTES = 2**30


class NcclTransfer:
    """The trainer is rank 0 of a group in which every worker of the server has a rank; it broadcasts the weights.

    Needs vLLM beside the trainer, and a CUDA device there that no worker of the server uses.
    """

    server_options = """--weight-transfer-config '{"backend": "nccl"}'"""

    def __init__(self, client: HttpClient, address: str, port: int, *, chunk_bytes: int = CHUNK_BYTES) -> None:
        """
        Args:
            client: of the server.
            address, port: where the server's workers reach this machine to form the group.
            chunk_bytes: weights that are held at a time, beside the model.
        """
        self.client, self.address, self.port, self.chunk_bytes = client, address, port, chunk_bytes
        self._engine: Any = None
        self._session = _Session(client)
        self._source: Any = None

    def check(self) -> None:
        """See ``WeightTransfer.check``."""
        if not torch.cuda.is_available():
            raise ValueError("NCCL moves weights between CUDA devices and torch finds none here; expected a folder")
        _vllm()

    def send(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """See ``WeightTransfer.send``. After an error the group is unusable: it is formed again for the next update."""
        try:
            self._send(weights)
        except BaseException:
            self._leave_group()
            raise

    def _send(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        if self._engine is None:
            self._engine = self._form_group()
        for chunk in _chunks(weights, self.chunk_bytes):
            self._source.pairs = chunk
            self._engine.send_weights()
        self._session.finish()

    def _form_group(self) -> Any:
        vllm = _vllm()
        self._source = _source_class()()
        workers = self.client.get("/get_world_size")["world_size"]
        info = vllm.NCCLTrainerInitInfo(
            rank=0, master_address=self.address, master_port=self.port, world_size=workers + 1
        )
        return vllm.NCCLTrainerWeightTransferEngine.trainer_init(info, client=self._session, source=self._source)

    def close(self) -> None:
        """See ``WeightTransfer.close``. The server may be gone by now."""
        if self._engine is not None:
            with contextlib.suppress(ServerGone, ServerRefused):
                self.client.post("/shutdown_weight_transfer_engine", repeat=False)
            self._leave_group()

    def _leave_group(self) -> None:
        engine, self._engine = self._engine, None
        self._session = _Session(self.client)
        if engine is not None:
            engine.shutdown()


class _Session:
    """vLLM's client protocol. Its engine begins and ends an update with every chunk; here one update spans them all,
    so that the memory for an update is that of a chunk. No call is repeated: only the whole update can be."""

    def __init__(self, client: HttpClient) -> None:
        self._client = client
        self._open = False

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self._client.post("/init_weight_transfer_engine", {"init_info": init_info}, repeat=False)

    def start_weight_update(self) -> None:
        if not self._open:
            self._client.post("/start_weight_update", repeat=False)
            self._open = True

    def update_weights(self, update_info: Any) -> None:
        self._client.post("/update_weights", {"update_info": update_info}, repeat=False)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        del weight_version  # of a chunk; ``finish`` ends the update

    def finish(self) -> None:
        self._client.post("/finish_weight_update", repeat=False)
        self._open = False


def _vllm() -> Any:
    try:
        from vllm.distributed.weight_transfer import nccl_engine
    except ImportError as error:
        raise ImportError('weights by NCCL: needs vLLM beside the trainer, pip install "maestro-fast[vllm]"') from error
    return nccl_engine


def _source_class() -> Any:
    """Of vLLM's ``WeightSource``, which cannot be named where vLLM is not installed."""
    from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource

    class Chunk(WeightSource):  # type: ignore[misc]
        pairs: list[tuple[str, Tensor]]

        def metadata(self) -> list[Any]:
            return [ParamMeta(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in self.pairs]

        def __iter__(self) -> Iterator[tuple[str, Tensor]]:
            return iter(self.pairs)

    return Chunk


def _chunks(weights: Iterable[tuple[str, Tensor]], limit: int) -> Iterator[list[tuple[str, Tensor]]]:
    """At most ``limit`` bytes, or one tensor, at a time."""
    chunk: list[tuple[str, Tensor]] = []
    size = 0
    for name, tensor in weights:
        if chunk and size + tensor.nbytes > limit:
            yield chunk
            chunk, size = [], 0
        chunk.append((name, tensor.detach()))
        size += tensor.nbytes
    if chunk:
        yield chunk
