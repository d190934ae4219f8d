"""Weights by NCCL: the calls that vLLM's routes expect. A stand-in replaces vLLM's own transfer engine."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest
import torch

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


class Sender:
    """Uses client and source as the ``NCCLTrainerWeightTransferEngine`` of vLLM 0.32 does."""

    made: list[Sender] = []  # noqa: RUF012 - emptied by the fixture

    def __init__(self, info: InitInfo, client: Any, source: Any) -> None:
        self.info, self.client, self.source = info, client, source
        self.sent: list[tuple[str, torch.Tensor]] = []
        self.is_shut = False
        Sender.made.append(self)

    @classmethod
    def trainer_init(cls, info: InitInfo, *, client: Any, source: Any) -> Sender:
        client.init_weight_transfer_engine({"world_size": info.world_size, "rank_offset": 1})
        return cls(info, client, source)

    def send_weights(self) -> None:
        meta = self.source.metadata()
        self.client.start_weight_update()
        self.client.update_weights({"names": [item.name for item in meta]})
        self.sent += list(self.source)
        assert [(name, value.dtype, value.shape) for name, value in self.source] == [
            (item.name, item.dtype, item.shape) for item in meta
        ]
        self.client.finish_weight_update()

    def shutdown(self) -> None:
        self.is_shut = True


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    Sender.made = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    engine, base = ModuleType("nccl_engine"), ModuleType("base")
    engine.__dict__.update(NCCLTrainerInitInfo=InitInfo, NCCLTrainerWeightTransferEngine=Sender)
    base.__dict__.update(ParamMeta=ParamMeta, WeightSource=object)
    package = ModuleType("vllm.distributed.weight_transfer")
    package.__dict__.update(nccl_engine=engine, base=base)
    for name, module in {
        "vllm": ModuleType("vllm"),
        "vllm.distributed": ModuleType("vllm.distributed"),
        "vllm.distributed.weight_transfer": package,
        "vllm.distributed.weight_transfer.base": base,
    }.items():
        monkeypatch.setitem(sys.modules, name, module)


WRONG: dict[str, Answer] = {}


def answer(route: str, body: Any) -> Answer:
    return WRONG.pop(route, (200, {"world_size": 4} if route == "/get_world_size" else {"message": "done"}))


@pytest.fixture
def calls() -> Iterator[Calls]:
    WRONG.clear()
    with http_server(answer) as calls:
        yield calls


def transfer(calls: Calls, chunk_bytes: int = 20) -> NcclTransfer:
    client = HttpClient(calls.url, timeout=10, retries=2, pause=0.01)
    return NcclTransfer(client, "10.0.0.1", 29600, chunk_bytes=chunk_bytes)


WEIGHTS = [("a", torch.ones(4)), ("b", torch.zeros(2, 3)), ("c", torch.ones(1)), ("d", torch.ones(2))]
UPDATE = ["/start_weight_update", "/update_weights", "/update_weights", "/update_weights", "/finish_weight_update"]


def test_one_update_spans_all_chunks_and_the_group_is_formed_once(calls: Calls) -> None:
    """Chunks have at most 20 bytes: a has 16, b has 24 and stands alone, c and d have 4 + 8."""
    sends = transfer(calls)
    sends.check()
    sends.send(iter(WEIGHTS))
    sends.send(iter(WEIGHTS))
    assert calls.routes() == ["/get_world_size", "/init_weight_transfer_engine", *UPDATE, *UPDATE]
    (sender,) = Sender.made
    assert sender.info == InitInfo(rank=0, master_address="10.0.0.1", master_port=29600, world_size=5)
    assert calls.seen[1][1] == {"init_info": {"world_size": 5, "rank_offset": 1}}
    names = [body["update_info"]["names"] for route, body in calls.seen if route == "/update_weights"]
    assert names == [["a"], ["b"], ["c", "d"]] * 2
    assert [name for name, _ in sender.sent] == ["a", "b", "c", "d"] * 2
    assert all(value is dict(WEIGHTS)[name] or torch.equal(value, dict(WEIGHTS)[name]) for name, value in sender.sent)


@pytest.mark.parametrize("route", ["/update_weights", "/finish_weight_update"])
def test_an_update_that_failed_is_made_whole_in_a_new_group(calls: Calls, route: str) -> None:
    """No call of an update is retried, since the workers wait in the middle of a broadcast."""
    sends = transfer(calls)
    WRONG[route] = (500, {"error": {"message": "worker failed"}})
    with pytest.raises(ServerRefused, match="worker failed"):
        sends.send(iter(WEIGHTS))
    assert calls.routes().count(route) == 1 and Sender.made[0].is_shut
    calls.seen.clear()
    sends.send(iter(WEIGHTS))
    assert calls.routes() == ["/get_world_size", "/init_weight_transfer_engine", *UPDATE]


def test_closing_lets_the_server_go(calls: Calls) -> None:
    sends = transfer(calls)
    sends.close()
    assert not calls.seen
    sends.send(iter(WEIGHTS))
    WRONG["/shutdown_weight_transfer_engine"] = (500, "")  # The server may be gone already.
    sends.close()
    sends.close()
    assert calls.routes().count("/shutdown_weight_transfer_engine") == 1 and Sender.made[0].is_shut


def test_without_a_gpu_or_without_vllm(calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm.distributed.weight_transfer", None)
    with pytest.raises(ImportError, match=r"needs vLLM beside the trainer, pip install \"maestro-fast\[vllm\]\""):
        transfer(calls).check()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="NCCL moves weights between CUDA devices and torch finds none"):
        transfer(calls).check()
