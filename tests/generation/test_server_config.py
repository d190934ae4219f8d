"""``generation: {type: vllm_server, ...}``: what is refused, and what is built from it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from maestro_fast.generation import (
    SamplingConfig,
    Served,
    ServerConfig,
    VllmServer,
    build_engine,
    check_generation,
    generation_config,
)
from maestro_fast.generation.nccl_transfer import NcclTransfer
from maestro_fast.generation.weight_transfer import FolderTransfer
from maestro_fast.settings import SettingsError
from tests.generation.helpers import TOKENIZER, prompts
from tests.generation.http_server import Calls, http_server
from tests.generation.test_vllm_server import FakeVllm

SERVER = {"type": "vllm_server", "url": "http://127.0.0.1:8000"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": "folder"}, r"^generation.folder: None with weights: folder, expected one for folder alone"),
        ({"folder": "/shared"}, r"^generation.folder: '/shared' with weights: nccl, expected one for folder alone"),
        ({"weights": "disk"}, r"^generation.weights: .*nccl, folder"),
        ({"timeout": 0}, r"^generation.timeout: 0.0, expected a positive number of seconds"),
        ({"retries": -1}, r"^generation.retries: -1, expected at least 0"),
        ({"start_timeout": -1}, r"^generation.start_timeout: -1.0, expected at least 0 seconds"),
        ({"gpu_memory_share": 0.4}, r"^generation.gpu_memory_share: unknown setting"),
    ],
)
def test_what_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        generation_config({**SERVER, **options})


def test_the_url_is_needed() -> None:
    with pytest.raises(SettingsError, match=r"^generation.url: missing"):
        generation_config({"type": "vllm_server"})


def test_nccl_moves_weights_between_gpus_only() -> None:
    config = generation_config(SERVER)
    check_generation(config, torch.device("cuda"), 1)
    with pytest.raises(SettingsError, match=r"^generation.weights: nccl, but the policy is on cpu, expected folder"):
        check_generation(config, torch.device("cpu"), 1)
    check_generation(generation_config({**SERVER, "weights": "folder", "folder": "f"}), torch.device("cpu"), 1)


@pytest.fixture
def calls() -> Iterator[Calls]:
    with http_server(FakeVllm()) as calls:
        yield calls


def build(calls: Calls, processes: int = 1, **options: Any) -> VllmServer:
    config = ServerConfig(calls.url, start_timeout=0, **options)
    sampling, device = SamplingConfig(max_new_tokens=12), torch.device("cpu")
    engine = build_engine(
        config, Served("path", TOKENIZER, sampling, frozenset({0}), torch.float32, device, processes=processes)
    )
    assert isinstance(engine, VllmServer)
    return engine


def test_an_engine_for_each_way_of_the_weights(calls: Calls, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = build(calls, weights="folder", folder=str(tmp_path / "f"))
    assert isinstance(engine.transfer, FolderTransfer) and engine.transfer.folder == tmp_path / "f"
    assert (engine.concurrent_parts, engine.ahead) == (1, 0)
    monkeypatch.setattr(NcclTransfer, "check", lambda self: None)
    engine = build(calls, address="10.0.0.1", port=5, ahead=1)
    assert engine.ahead == 1
    assert isinstance(engine.transfer, NcclTransfer)
    assert (engine.transfer.address, engine.transfer.port) == ("10.0.0.1", 5)


@pytest.mark.parametrize("rank", [0, 1])
def test_of_several_processes_the_first_sends(
    calls: Calls, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int
) -> None:
    """The other processes help to gather the weights, wait, and learn which weights the server has."""
    met: list[str] = []

    def broadcast(held: list[Any], src: int) -> None:
        met.append(f"before {len(calls.seen)}")
        if rank == 1 and len(met) == 2:
            held[0] = "default"  # the version that the fake server reports

    monkeypatch.setattr(torch.distributed, "get_rank", lambda: rank)
    monkeypatch.setattr(torch.distributed, "broadcast_object_list", broadcast)
    monkeypatch.setattr(torch.distributed, "barrier", lambda: None)
    engine = build(calls, processes=2, weights="folder", folder=str(tmp_path / "f"))
    calls.seen.clear()
    gathered: list[str] = []
    engine.load_weights((gathered.append(name) or name, torch.ones(2)) for name in "abc")
    engine.reset_prefix_cache()
    sent = ["/collective_rpc", "/update_weight_version", "/reset_prefix_cache"]
    assert calls.routes() == (sent if rank == 0 else [])
    assert gathered == ["a", "b", "c"]
    assert met == (["before 0", "before 2", "before 3"] if rank == 0 else ["before 0"] * 3)
    engine.sample(prompts("the"), seed=1)
    assert calls.routes()[-1] == "/weight_info"
    engine.close()
    assert not list((tmp_path / "f").iterdir())
