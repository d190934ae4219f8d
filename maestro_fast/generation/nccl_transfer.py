"""Sends weights into a vLLM server by NCCL, from GPU to GPU, with vLLM's own weight transfer engine."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from functools import cached_property
from threading import Thread
from typing import Any

import torch
from torch import Tensor

from maestro_fast.generation.http import HttpClient, ServerGone, ServerRefused

CHUNK_BYTES = 2**30


class NcclTransfer:
    """Broadcasts the weights from the trainer, which is rank 0 of a group with all workers of the server.

    vLLM must also be installed beside the trainer, and the trainer needs a CUDA device that no worker of the server
    uses.
    """

    server_options = """--weight-transfer-config '{"backend": "nccl"}'"""

    def __init__(self, client: HttpClient, address: str, port: int, *, chunk_bytes: int = CHUNK_BYTES) -> None:
        """
        Args:
            client: The client that calls the server.
            address: The address at which the server's workers reach this machine to form the group.
            port: The port of that address.
            chunk_bytes: The largest number of bytes of weights that are held at a time, beside the model itself.
        """
        self.client, self.address, self.port, self.chunk_bytes = client, address, port, chunk_bytes
        self._engine: Any = None
        self._session = _Session(client)

    def check(self) -> None:
        """See ``WeightTransfer.check``."""
        if not torch.cuda.is_available():
            raise ValueError("NCCL moves weights between CUDA devices and torch finds none here; expected a folder")
        _vllm()

    def send(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """See ``WeightTransfer.send``. An error makes the group unusable, so the next update forms a new one."""
        try:
            self._send(weights)
        except BaseException:
            self._leave_group()
            raise

    def _send(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        if self._engine is None:
            self._engine = self._form_group()
        source = _source_class()
        for chunk in _chunks(weights, self.chunk_bytes):
            # vLLM packs the tensors on CUDA streams of its own, which do not wait for the stream on which they were
            # gathered and cast.
            torch.cuda.current_stream().synchronize()
            self._engine.source = source(chunk)
            _watched(self._engine.send_weights, self._session.failed)
        self._engine.source = source([])  # Otherwise the last chunk would stay in memory until the next update.
        self._session.finish()

    def _form_group(self) -> Any:
        vllm = _vllm()
        _check_address(self.address, self.port)
        source = _source_class()([])
        workers = self.client.get("/get_world_size")["world_size"]
        info = vllm.NCCLTrainerInitInfo(
            rank=0, master_address=self.address, master_port=self.port, world_size=workers + 1
        )
        session = self._session
        return _watched(
            lambda: vllm.NCCLTrainerWeightTransferEngine.trainer_init(info, client=session, source=source),
            session.failed,
        )

    def close(self) -> None:
        """See ``WeightTransfer.close``. It is no error if the server has already gone."""
        if self._engine is not None:
            with contextlib.suppress(ServerGone, ServerRefused):
                self.client.post("/shutdown_weight_transfer_engine", repeat=False)
            self._leave_group()

    def _leave_group(self) -> None:
        engine, self._engine = self._engine, None
        self._session = _Session(self.client)
        if engine is not None:
            engine.shutdown()


def _check_address(address: str, port: int) -> None:
    """Checks that the group can be formed at this address, since vLLM reports that only when the workers give up.

    Raises:
        ValueError: This machine cannot listen there.
    """
    try:
        family, *_, place = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]  # IPv4 or IPv6
        with socket.socket(family) as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            trial.bind(place)
    except OSError as error:
        raise ValueError(
            f"generation.address: {address} and generation.port: {port}, this machine cannot listen there "
            f"({error}), expected an address of it at which the server's workers reach it, and a free port"
        ) from error


def _watched(call: Callable[[], Any], failed: Future[None]) -> Any:
    """Returns or raises what ``call`` does, unless a request to the server fails first.

    The call waits in NCCL, or in the store where a group is formed, for workers that may have failed before they got
    there. The request that asked them is then answered with an error, or not at all within the client's time-out. This
    error is raised at once. The thread that waits is left behind; it ends when the group is shut down, or with the
    process.
    """
    result: Future[Any] = Future()
    device = torch.cuda.current_device()

    def run() -> None:
        torch.cuda.set_device(device)  # The current device is a setting of each thread.
        try:
            result.set_result(call())
        except BaseException as error:
            result.set_exception(error)

    Thread(target=run, name="weights by NCCL", daemon=True).start()
    wait([result, failed], return_when=FIRST_COMPLETED)
    if failed.done():  # The server's own message says more than the error of NCCL that follows from it.
        failed.result()
    return result.result()


class _Session:
    """What vLLM's transfer engine calls to talk to the server; the method names are vLLM's.

    The engine starts and finishes an update with every chunk. This session lets one update span all chunks, so that an
    update needs the memory of one chunk. No call is retried, because only a whole update can be repeated.

    Attributes:
        failed: Gets the error of the first request that failed.
    """

    def __init__(self, client: HttpClient) -> None:
        self._client = client
        self._open = False
        self.failed: Future[None] = Future()

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Asks the server's workers to join the group."""
        self._post("/init_weight_transfer_engine", {"init_info": init_info})

    def start_weight_update(self) -> None:
        """Starts an update, unless one is open already.

        A server refuses to start one if an earlier update was cut off, perhaps by the death of another trainer. That
        one is then finished first. The weights that it left are overwritten by those that follow.
        """
        if self._open:
            return
        try:
            self._client.post("/start_weight_update", repeat=False)
        except ServerRefused:
            with contextlib.suppress(ServerRefused):  # If no update was open, the second start says what is wrong.
                self._client.post("/finish_weight_update", repeat=False)
            self._post("/start_weight_update")
        except BaseException as error:
            self._fail(error)
            raise
        self._open = True

    def update_weights(self, update_info: Any) -> None:
        """Tells the workers which weights are about to be broadcast."""
        self._post("/update_weights", {"update_info": update_info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Does nothing. The engine calls it after every chunk, but only ``finish`` ends the update."""
        del weight_version

    def finish(self) -> None:
        """Ends the update after all chunks."""
        self._post("/finish_weight_update")
        self._open = False

    def _post(self, route: str, body: dict[str, Any] | None = None) -> None:
        try:
            self._client.post(route, body, repeat=False)
        except BaseException as error:
            self._fail(error)
            raise

    def _fail(self, error: BaseException) -> None:
        if not self.failed.done():
            self.failed.set_exception(error)


def _vllm() -> Any:
    try:
        from vllm.distributed.weight_transfer import nccl_engine
    except ImportError as error:
        raise ImportError('weights by NCCL: needs vLLM beside the trainer, pip install "maestro-fast[vllm]"') from error
    return nccl_engine


def _source_class() -> Any:
    """Makes a subclass of vLLM's ``WeightSource`` for pairs of names and tensors.

    It is made here because vLLM may not be installed. vLLM 0.32 calls ``metadata`` and iterates over the source. From
    0.33 on it reads ``metadata`` as a cached property, and iterates over ``iter_full()``.
    """
    from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource

    class Pairs(WeightSource):  # type: ignore[misc]
        def __init__(self, pairs: list[tuple[str, Tensor]]) -> None:
            self.pairs = pairs

        def _metadata(self) -> list[Any]:
            return [ParamMeta(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in self.pairs]

    if hasattr(WeightSource, "iter_full"):

        class Source(Pairs):
            @cached_property
            def metadata(self) -> list[Any]:
                return self._metadata()

            def iter_full(self) -> Iterator[tuple[str, Tensor]]:
                return iter(self.pairs)

        return Source

    class IteratedSource(Pairs):
        def metadata(self) -> list[Any]:
            return self._metadata()

        def __iter__(self) -> Iterator[tuple[str, Tensor]]:
            return iter(self.pairs)

    return IteratedSource


def _chunks(weights: Iterable[tuple[str, Tensor]], limit: int) -> Iterator[list[tuple[str, Tensor]]]:
    """Yields lists of weights of at most ``limit`` bytes each; a larger tensor stands alone in its list."""
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
