"""Weights by NCCL: the calls that vLLM's routes expect, and what happens where a worker fails.

Stand-ins replace vLLM's own transfer engine. They ask the trainer's source and the server for the same things, in the
same order and in the same threads, as the engines of vLLM 0.32 and 0.33 do. ``test_nccl_vllm.py`` runs vLLM's own.
"""

from __future__ import annotations

import socket
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from types import ModuleType
from typing import Any

import pytest
import torch

from maestro_fast.generation import nccl_transfer
from maestro_fast.generation.http import HttpClient, ServerRefused
from maestro_fast.generation.nccl_transfer import NcclTransfer
from tests.generation.http_server import Answer, Calls, http_server


@dataclass
class InitInfo:
    rank: int
    master_address: str
    master_port: int
    world_size: int


@dataclass
class ParamMeta:
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


class Source32:
    """The base class of sources in vLLM 0.32."""


class Source33:
    """The base class of sources in vLLM 0.33, which refuses a ``metadata`` that is not cached."""

    def __init_subclass__(cls) -> None:
        metadata = cls.__dict__.get("metadata")
        if metadata is not None and not isinstance(metadata, cached_property):
            raise TypeError(f"{cls.__name__}.metadata must be a functools.cached_property")

    def iter_full(self) -> Iterator[tuple[str, torch.Tensor]]:
        raise NotImplementedError


@dataclass
class Log:
    """What the engines did, in order: tensors that were made, streams that were waited for, tensors that were read.

    Attributes:
        events: pairs of what was done and with what.
        hangs: whether workers do not come, so that what waits for them goes on only when the test has ended.
        ended: set when the test has ended.
    """

    events: list[tuple[str, Any]] = field(default_factory=list)
    hangs: bool = False
    ended: threading.Event = field(default_factory=threading.Event)
    senders: list[Any] = field(default_factory=list)

    def meet_workers(self) -> None:
        if self.hangs and not self.ended.wait(3.0):
            raise RuntimeError("NCCL error: the workers did not come")


LOG = Log()


class Sender32:
    """Uses client and source as ``NCCLTrainerWeightTransferEngine`` of vLLM 0.32 does."""

    def __init__(self, info: InitInfo, client: Any, source: Any) -> None:
        self.info, self.client, self.source = info, client, source
        self.sent: list[tuple[str, torch.Tensor]] = []
        self.told: list[str] = []
        self.is_shut = False
        LOG.senders.append(self)

    @classmethod
    def trainer_init(cls, info: InitInfo, *, client: Any, source: Any) -> Any:
        made = cls(info, client, source)
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(client.init_weight_transfer_engine, {"world_size": info.world_size, "rank_offset": 1})
            LOG.meet_workers()
            asked.result()
        return made

    def metadata(self) -> list[Any]:
        return list(self.source.metadata())

    def pairs(self) -> list[tuple[str, torch.Tensor]]:
        return list(self.source)

    def send_weights(self) -> None:
        meta = self.metadata()
        self.client.start_weight_update()
        pool = ThreadPoolExecutor(1)
        asked = pool.submit(self.client.update_weights, {"names": [item.name for item in meta]})
        try:
            LOG.meet_workers()
            pairs = self.pairs()
            LOG.events.append(("read", [name for name, _ in pairs]))
            assert [(name, value.dtype, value.shape) for name, value in pairs] == [
                (item.name, item.dtype, item.shape) for item in meta
            ]
            self.sent += pairs
            asked.result()
        finally:
            pool.shutdown(wait=False)
        self.client.finish_weight_update()

    def shutdown(self) -> None:
        self.is_shut = True


class Sender33(Sender32):
    """Uses client and source as ``NCCLTrainerWeightTransferEngine`` of vLLM 0.33 does."""

    @classmethod
    def trainer_init(cls, info: InitInfo, *, client: Any, source: Any) -> Any:
        assert type(source).iter_full is not Source33.iter_full
        assert source.metadata == []  # It is read before the first weights are there.
        return super().trainer_init(info, client=client, source=source)

    def metadata(self) -> list[Any]:
        return list(self.source.metadata)

    def pairs(self) -> list[tuple[str, torch.Tensor]]:
        return list(self.source.iter_full())


class Stream:
    def synchronize(self) -> None:
        LOG.events.append(("synchronised", threading.current_thread() is threading.main_thread()))


@pytest.fixture(autouse=True, params=[(Source32, Sender32), (Source33, Sender33)], ids=["0.32", "0.33"])
def stand_in(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    base_class, sender = request.param
    LOG.__init__()  # type: ignore[misc]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: LOG.events.append(("device", device)))
    engine, base = ModuleType("nccl_engine"), ModuleType("base")
    engine.__dict__.update(NCCLTrainerInitInfo=InitInfo, NCCLTrainerWeightTransferEngine=sender)
    base.__dict__.update(ParamMeta=ParamMeta, WeightSource=base_class)
    package = ModuleType("vllm.distributed.weight_transfer")
    package.__dict__.update(nccl_engine=engine, base=base)
    for name, module in {
        "vllm": ModuleType("vllm"),
        "vllm.distributed": ModuleType("vllm.distributed"),
        "vllm.distributed.weight_transfer": package,
        "vllm.distributed.weight_transfer.base": base,
    }.items():
        monkeypatch.setitem(sys.modules, name, module)
    yield
    LOG.ended.set()


WRONG: dict[str, list[Answer]] = {}


def answer(route: str, body: Any) -> Answer:
    if WRONG.get(route):
        return WRONG[route].pop(0)
    return 200, {"world_size": 4} if route == "/get_world_size" else {"message": "done"}


def refused(message: str) -> Answer:
    return 500, {"error": {"message": message}}


@pytest.fixture
def calls() -> Iterator[Calls]:
    WRONG.clear()
    with http_server(answer) as calls:
        yield calls


def transfer(calls: Calls, chunk_bytes: int = 20, port: int = 0) -> NcclTransfer:
    client = HttpClient(calls.url, timeout=10, retries=2, pause=0.01)
    return NcclTransfer(client, "127.0.0.1", port, chunk_bytes=chunk_bytes)


WEIGHTS = [("a", torch.ones(4)), ("b", torch.zeros(2, 3)), ("c", torch.ones(1)), ("d", torch.ones(2))]
UPDATE = ["/start_weight_update", "/update_weights", "/update_weights", "/update_weights", "/finish_weight_update"]
FORMED = ["/get_world_size", "/init_weight_transfer_engine"]


def made() -> Iterator[tuple[str, torch.Tensor]]:
    """The weights, which are noted when the trainer has queued the making of each."""
    for name, tensor in WEIGHTS:
        LOG.events.append(("made", name))
        yield name, tensor


def test_one_update_spans_all_chunks_and_the_group_is_formed_once(calls: Calls) -> None:
    """Chunks have at most 20 bytes: a has 16, b has 24 and stands alone, c and d have 4 + 8."""
    sends = transfer(calls)
    sends.check()
    sends.send(iter(WEIGHTS))
    sends.send(iter(WEIGHTS))
    assert calls.routes() == [*FORMED, *UPDATE, *UPDATE]
    (sender,) = LOG.senders
    assert sender.info == InitInfo(rank=0, master_address="127.0.0.1", master_port=0, world_size=5)
    assert calls.seen[1][1] == {"init_info": {"world_size": 5, "rank_offset": 1}}
    names = [body["update_info"]["names"] for route, body in calls.seen if route == "/update_weights"]
    assert names == [["a"], ["b"], ["c", "d"]] * 2
    assert [name for name, _ in sender.sent] == ["a", "b", "c", "d"] * 2
    assert all(value is dict(WEIGHTS)[name] or torch.equal(value, dict(WEIGHTS)[name]) for name, value in sender.sent)


def test_a_chunk_is_read_after_the_stream_that_made_it(calls: Calls) -> None:
    """vLLM reads on streams of its own, which wait for nobody. The trainer's own stream is the main thread's."""
    transfer(calls).send(made())
    events = [event for event in LOG.events if event[0] != "device"]
    for i, (what, names) in enumerate(events):
        if what == "read":
            waited = max(j for j in range(i) if events[j] == ("synchronised", True))
            assert all(("made", name) in events[:waited] for name in names)
    assert [names for what, names in events if what == "read"] == [["a"], ["b"], ["c", "d"]]
    assert {event for event in LOG.events if event[0] == "device"} <= {("device", 3)}


def test_no_chunk_stays_in_memory(calls: Calls) -> None:
    sends = transfer(calls)
    sends.send(iter(WEIGHTS))
    (sender,) = LOG.senders
    assert sender.pairs() == []


@pytest.mark.parametrize("route", ["/update_weights", "/finish_weight_update"])
def test_an_update_that_failed_is_made_whole_in_a_new_group(calls: Calls, route: str) -> None:
    """No call of an update is retried, since the workers wait in the middle of a broadcast."""
    sends = transfer(calls)
    WRONG[route] = [refused("worker failed")]
    with pytest.raises(ServerRefused, match="worker failed"):
        sends.send(iter(WEIGHTS))
    assert calls.routes().count(route) == 1 and LOG.senders[0].is_shut
    calls.seen.clear()
    sends.send(iter(WEIGHTS))
    assert calls.routes() == [*FORMED, *UPDATE]


@pytest.mark.parametrize(
    ("route", "send"),
    [("/init_weight_transfer_engine", 0), ("/update_weights", 1)],
    ids=["before the group is formed", "before it receives"],
)
def test_a_worker_that_fails_does_not_leave_the_trainer_waiting(calls: Calls, route: str, send: int) -> None:
    """The trainer waits for workers that never come. The server's own message ends that, and not a time-out of NCCL."""
    sends = transfer(calls)
    for _ in range(send):
        sends.send(iter(WEIGHTS))
    LOG.hangs = True
    WRONG[route] = [refused("CUDA out of memory")]
    with pytest.raises(ServerRefused, match="CUDA out of memory"):
        sends.send(iter(WEIGHTS))
    LOG.ended.set()
    calls.seen.clear()
    sends.send(iter(WEIGHTS))
    assert calls.routes() == [*FORMED, *UPDATE]


def test_an_update_that_was_cut_off_is_finished_first(calls: Calls) -> None:
    """A trainer died between two chunks, or failed to gather a weight. The server then still has that update open."""
    sends = transfer(calls)
    WRONG["/start_weight_update"] = [refused("a weight update is already active. Call finish_weight_update first")]
    sends.send(iter(WEIGHTS))
    start = ["/start_weight_update", "/finish_weight_update", "/start_weight_update"]
    assert calls.routes() == [*FORMED, *start, *UPDATE[1:]]


def test_a_server_that_takes_no_weights_says_why(calls: Calls) -> None:
    WRONG["/start_weight_update"] = [refused("weight transfer not configured")] * 2
    WRONG["/finish_weight_update"] = [refused("no matching start_weight_update")]
    with pytest.raises(ServerRefused, match="weight transfer not configured"):
        transfer(calls).send(iter(WEIGHTS))


def test_a_port_that_is_taken_is_named_before_the_workers_are_asked(calls: Calls) -> None:
    """The workers would wait for it, and vLLM would wait for the workers."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        words = rf"^generation\.address: 127\.0\.0\.1 and generation\.port: {port}, this machine cannot listen there"
        with pytest.raises(ValueError, match=words):
            transfer(calls, port=port).send(iter(WEIGHTS))
    assert "/init_weight_transfer_engine" not in calls.routes()


@pytest.mark.parametrize("address", ["::1", "127.0.0.1", "localhost"])
def test_an_address_may_be_a_name_or_of_either_version_of_ip(address: str) -> None:
    try:
        with socket.create_server((address, 0), family=socket.AF_INET6 if ":" in address else socket.AF_INET) as other:
            port = other.getsockname()[1]
    except OSError:
        pytest.skip(f"this machine has no {address}")
    nccl_transfer._check_address(address, port)


def test_closing_lets_the_server_go(calls: Calls) -> None:
    sends = transfer(calls)
    sends.close()
    assert not calls.seen
    sends.send(iter(WEIGHTS))
    WRONG["/shutdown_weight_transfer_engine"] = [(500, "")]  # The server may be gone already.
    sends.close()
    sends.close()
    assert calls.routes().count("/shutdown_weight_transfer_engine") == 1 and LOG.senders[0].is_shut


def test_without_a_gpu_or_without_vllm(calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm.distributed.weight_transfer", None)
    with pytest.raises(ImportError, match=r"needs vLLM beside the trainer, pip install \"maestro-fast\[vllm\]\""):
        transfer(calls).check()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="NCCL moves weights between CUDA devices and torch finds none"):
        transfer(calls).check()
