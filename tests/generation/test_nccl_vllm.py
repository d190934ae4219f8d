"""Weights by NCCL with vLLM's own transfer engine, of whichever version is installed. Only NCCL itself is replaced."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from maestro_fast.generation.http import HttpClient
from maestro_fast.generation.nccl_transfer import NcclTransfer
from tests.generation.http_server import Answer, Calls, http_server

pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]
WEIGHTS = [("a", torch.ones(4)), ("b", torch.zeros(2, 3)), ("c", torch.ones(1)), ("d", torch.full((2,), 3.0))]


class Group:
    """Stands for the communicator, whose packed broadcast notes what was sent."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, torch.Tensor]] = []

    def destroy(self) -> None: ...


class Stream:
    def synchronize(self) -> None: ...


def answer(route: str, body: Any) -> Answer:
    return 200, {"world_size": 2} if route == "/get_world_size" else {"message": "done"}


@pytest.fixture
def calls() -> Iterator[Calls]:
    with http_server(answer) as calls:
        yield calls


@pytest.mark.parametrize("chunk_bytes", [20, 1000], ids=["chunks", "one chunk"])
def test_vllms_engine_sends_every_weight_of_every_update(
    calls: Calls, monkeypatch: pytest.MonkeyPatch, chunk_bytes: int
) -> None:
    from vllm.distributed.weight_transfer import nccl_engine

    group = Group()

    def broadcast(*, iterator: Any, group: Group, post_iter_func: Any, **others: Any) -> None:
        group.sent += [(item[0], post_iter_func(item)) for item in iterator]

    monkeypatch.setattr(nccl_engine, "open_trainer_endpoint", lambda info: group)
    monkeypatch.setattr(nccl_engine, "packed_nccl_broadcast_producer", broadcast)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    transfer = NcclTransfer(HttpClient(calls.url, timeout=10, retries=0), "127.0.0.1", 0, chunk_bytes=chunk_bytes)
    for times in (1, 2):
        transfer.send(iter(WEIGHTS))
        assert [name for name, _ in group.sent] == ["a", "b", "c", "d"] * times
    assert all(torch.equal(tensor, dict(WEIGHTS)[name]) for name, tensor in group.sent)
    transfer.close()
    updates = [body["update_info"] for route, body in calls.seen if route == "/update_weights"]
    chunks = [["a"], ["b"], ["c", "d"]] if chunk_bytes == 20 else [["a", "b", "c", "d"]]
    told = [update["names"] for update in updates]
    # An empty list means the names of the call before, to vLLM 0.33 and newer.
    assert told in (chunks * 2, chunks + [[]] * len(chunks))
    assert len(told) == 2 * len(chunks) and updates[-1]["dtype_names"] in (["float32"] * len(chunks[-1]), [])
