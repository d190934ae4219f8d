"""The engine behind HTTP against a server of the test's own: what it asks for, and what it does when that goes wrong.

The same engine against a real vLLM server: ``test_vllm_serve.py``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from maestro_fast.generation import SamplingConfig, VllmServer
from maestro_fast.generation.http import HttpClient, ServerGone, ServerRefused
from maestro_fast.generation.weight_transfer import FolderTransfer
from maestro_fast.records import Prompts
from tests.generation.helpers import TOKENIZER, prompts
from tests.generation.http_server import Answer, Calls, http_server

EOS = 0


class FakeVllm:
    """Answers as vLLM 0.32 does. ``wrong`` maps routes to other answers, which are given first, in turn."""

    def __init__(self) -> None:
        self.wrong: dict[str, list[Answer]] = {}
        self.version = "default"
        self.logprob = 0.0  # the log-prob of the only token that a request allows
        self.reads = True
        self.loaded: list[dict[str, torch.Tensor]] = []
        self.finish: list[str] = []  # why the next responses end

    def __call__(self, route: str, body: Any) -> Answer:
        if self.wrong.get(route):
            return self.wrong[route].pop(0)
        name = route.split("?")[0].strip("/").replace("/", "_")
        return 200, copy.deepcopy(getattr(self, name)(body))

    def health(self, body: Any) -> Any:
        return ""

    def v1_models(self, body: Any) -> Any:
        return {"data": [{"id": "the/model"}]}

    def server_info(self, body: Any) -> Any:
        model = {"dtype": "torch.bfloat16", "max_model_len": 40}
        return {
            "vllm_config": {"model_config": model, "cache_config": {"block_size": 4, "enable_prefix_caching": True}}
        }

    def v1_completions(self, body: Any) -> Any:
        (prompt,) = body["prompt"]
        choices = [self.choice(body, prompt, index) for index in range(body.get("n", 1))]
        return {"choices": choices[::-1]}  # The order of the choices is not the order of their indices.

    def choice(self, body: Any, prompt: list[int], index: int) -> Any:
        ids = body.get("allowed_token_ids") or [len(prompt), 50 + index]
        asked = body.get("logprob_token_ids", [])
        return {
            "index": index,
            "finish_reason": self.finish.pop(0) if self.finish else "length" if index % 2 else "stop",
            "token_ids": ids,
            "logprobs": {
                "token_logprobs": [self.logprob if body.get("allowed_token_ids") else -i / 8 for i in ids],
                "top_logprobs": [{f"token_id:{token}": -token - len(prompt) / 100 for token in asked}],
            },
            "prompt_logprobs": [None, *({str(token): {"logprob": -float(token)}} for token in prompt[1:])],
        }

    def collective_rpc(self, body: Any) -> Any:
        (path,) = map(Path, body["args"])
        if body["method"] == "maestro_reads":
            return {"results": [{"reads": path.is_file()}, {"reads": self.reads}]}
        files = sorted(path.glob("*.safetensors"))
        self.loaded.append({name: value for file in files for name, value in load_file(file).items()})
        return {"results": [None]}

    def reset_prefix_cache(self, body: Any) -> Any:
        return {"success": True}

    def update_weight_version(self, body: Any) -> Any:
        self.version = body["new_version"]
        return {"success": True}

    def weight_info(self, body: Any) -> Any:
        return {"weight_version": self.version}


@pytest.fixture
def vllm() -> FakeVllm:
    return FakeVllm()


@pytest.fixture
def calls(vllm: FakeVllm) -> Iterator[Calls]:
    with http_server(vllm) as calls:
        yield calls


@pytest.fixture
def connect(calls: Calls, tmp_path: Path) -> Callable[..., VllmServer]:
    def make(*, start_timeout: float = 0.0, shard_bytes: int = 2**20, **sampling: Any) -> VllmServer:
        client = HttpClient(calls.url, timeout=10, retries=2, pause=0.01)
        transfer = FolderTransfer(client, tmp_path / "shared", shard_bytes=shard_bytes)
        config = SamplingConfig(**{"max_new_tokens": 12, **sampling})
        return VllmServer(client, transfer, TOKENIZER, config, {7, EOS}, start_timeout=start_timeout)

    return make


def completions(calls: Calls) -> list[Any]:
    return [body for route, body in calls.seen if route == "/v1/completions"]


def test_what_the_engine_tells_of_itself(connect: Callable[..., VllmServer]) -> None:
    engine = connect()
    assert (engine.dtype, engine.max_tokens, engine.cache_block) == (torch.bfloat16, 40, 4)
    assert engine.sleep()


def test_a_group_is_one_request_that_leaves_nothing_to_the_server(
    connect: Callable[..., VllmServer], calls: Calls
) -> None:
    engine = connect(temperature=0.7, top_p=0.9, top_k=5, stop=["zz"])
    calls.seen.clear()
    engine.sample(prompts("the", "red", times=3), seed=1)
    bodies = sorted(completions(calls), key=lambda body: body["prompt"])
    assert [body["n"] for body in bodies] == [3, 3]
    assert sorted(body["prompt"] for body in bodies) == sorted([[ids] for ids in prompts("the", "red").token_ids])
    assert {name: value for name, value in bodies[0].items() if name not in ("prompt", "seed")} == {
        "model": "the/model",
        "n": 3,
        "max_tokens": 12,
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 5,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "stop": ["zz"],
        "stop_token_ids": [EOS, 7],
        "ignore_eos": True,
        "skip_special_tokens": False,
        "logprobs": 0,
        "return_token_ids": True,
    }


def test_responses_come_in_the_order_of_the_prompts(connect: Callable[..., VllmServer]) -> None:
    chat = [{"role": "user", "content": "Name a colour."}]
    asked = Prompts(["a", "a", chat, "b", "a"], [[9], [9], [9, 9], [9, 9, 9], [9]])
    rollouts = connect().sample(asked, seed=1)
    assert rollouts.prompts is asked
    assert rollouts.completion_ids == [[1, 50], [1, 51], [2, 50], [3, 50], [1, 50]]
    assert rollouts.truncated_B.tolist() == [False, True, False, False, False]
    logprobs = rollouts.sampling_logprobs_C
    assert logprobs is not None and logprobs.dtype == torch.float32
    assert logprobs.tolist() == [-token / 8 for ids in rollouts.completion_ids for token in ids]
    assert rollouts.completions[0] == TOKENIZER.decode([1, 50], skip_special_tokens=True) == TOKENIZER.decode([50])
    assert rollouts.completions[2] == [{"role": "assistant", "content": TOKENIZER.decode([2, 50])}]
    kept = connect(skip_special_tokens=False).sample(asked, seed=1)
    assert kept.completions[0] == TOKENIZER.decode([1, 50]) != rollouts.completions[0]


def test_seeds_differ_between_groups_and_calls_and_are_repeated(
    connect: Callable[..., VllmServer], calls: Calls
) -> None:
    engine = connect()

    def seeds(seed: int) -> list[int]:
        calls.seen.clear()
        engine.sample(Prompts(["a"] * 6, [[1], [1], [2], [2], [1], [1]]), seed=seed)
        return sorted(body["seed"] for body in completions(calls))

    assert seeds(3) == seeds(3)
    drawn = seeds(3) + seeds(4) + seeds(2**63 - 1)
    assert len(set(drawn)) == 9 and all(0 <= seed < 2**63 for seed in drawn)
    assert min(abs(a - b) for i, a in enumerate(drawn) for b in drawn[:i]) > 10**6  # vLLM adds the response's number.


def test_a_server_that_shuts_down_is_asked_again(connect: Callable[..., VllmServer], vllm: FakeVllm) -> None:
    engine = connect()
    vllm.finish = ["abort"]
    assert len(engine.sample(prompts("the", times=2), seed=1)) == 2
    vllm.finish = ["abort", "stop"] * 3
    with pytest.raises(ServerGone, match=r"tried POST /v1/completions 3 times .* a response ended by abort"):
        engine.sample(prompts("the", times=2), seed=1)


@pytest.mark.parametrize("wrong", [{"token_ids": None}, {"logprobs": None}, {"logprobs": {"token_logprobs": [-1.0]}}])
def test_a_server_that_gives_no_token_ids_or_logprobs(
    connect: Callable[..., VllmServer], vllm: FakeVllm, monkeypatch: pytest.MonkeyPatch, wrong: dict[str, Any]
) -> None:
    engine, whole = connect(), vllm.choice
    monkeypatch.setattr(vllm, "choice", lambda *args: whole(*args) | wrong)
    with pytest.raises(ValueError, match=r"a response with . token ids and . log-probs, expected one of each"):
        engine.sample(prompts("the", times=2), seed=1)


def test_a_prompt_that_leaves_no_room_for_its_response(connect: Callable[..., VllmServer], calls: Calls) -> None:
    """vLLM would shorten the response without an error."""
    engine = connect()
    calls.seen.clear()
    assert len(engine.sample(Prompts(["a"], [[1] * 28]), seed=1)) == 1
    with pytest.raises(ValueError, match=r"^sampling.max_new_tokens: 12 behind a prompt of 29 tokens, .*len 40$"):
        engine.sample(Prompts(["b", "a"], [[1], [1] * 29]), seed=1)
    assert len(completions(calls)) == 1


def test_prompt_logprobs_read_the_prefix_cache_behind_its_blocks(
    connect: Callable[..., VllmServer], calls: Calls
) -> None:
    """Blocks have 4 tokens, and a request always computes its last one: of 5 tokens none is read, of 10 two blocks."""
    engine = connect()
    calls.seen.clear()
    long, edge, short = list(range(20, 31)), list(range(20, 29)), [3, 4, 5, 6, 7]
    read_long, read_edge, read_short = engine.prompt_logprobs([long, edge, short])
    whole = [-float(token) for token in long[1:]]
    torch.testing.assert_close(read_long, torch.tensor([*whole[:8], -29.09, -30.10]))
    torch.testing.assert_close(read_edge, torch.tensor([*whole[:4], -25.05, -26.06, -27.07, -28.08]))
    torch.testing.assert_close(read_short, torch.tensor([-4.0, -5.0, -6.0, -7.0]))
    assert sorted(len(body["prompt"][0]) for body in completions(calls)) == [5, 5, 6, 7, 8, 9, 9, 10, 11]
    assert all((body["temperature"], body["top_p"], body["top_k"]) == (1, 1, 0) for body in completions(calls))


def test_more_stop_strings_than_the_server_takes(connect: Callable[..., VllmServer], calls: Calls) -> None:
    with pytest.raises(ValueError, match=r"^sampling.stop: 5 strings, a vLLM server takes 4 at most"):
        connect(stop=["a", "b", "c", "d", "e"])
    assert not calls.seen
    connect(stop=["a", "b", "c", "d"])


def test_raw_logprobs_are_refused(connect: Callable[..., VllmServer], vllm: FakeVllm) -> None:
    vllm.logprob = -0.01
    with pytest.raises(ValueError, match=r"(?s)not those of .*\nVLLM_SERVER_DEV_MODE=1 vllm serve MODEL --host HOST "):
        connect()


def test_without_the_development_routes(connect: Callable[..., VllmServer], vllm: FakeVllm) -> None:
    vllm.wrong["/server_info?config_format=json"] = [(404, {"detail": "Not Found"})]
    with pytest.raises(ValueError, match=r"(?s)status 404: Not Found\nStart it with VLLM_SERVER_DEV_MODE=1 in its env"):
        connect()


def test_without_the_worker_extension(connect: Callable[..., VllmServer], vllm: FakeVllm) -> None:
    vllm.wrong["/collective_rpc"] = [(500, {"error": {"message": "'Worker' object has no attribute 'maestro_reads'"}})]
    with pytest.raises(
        ValueError, match=r"(?s)no attribute.*\n.*--worker-extension-cls maestro_fast.generation.vllm_w"
    ):
        connect()


def test_a_folder_that_one_worker_does_not_see(
    connect: Callable[..., VllmServer], vllm: FakeVllm, tmp_path: Path
) -> None:
    vllm.reads = False
    with pytest.raises(ValueError, match=rf"does not find the files that are written to {tmp_path}/shared; expected"):
        connect()
    assert not list((tmp_path / "shared").iterdir())


def test_waits_for_a_server_that_starts(connect: Callable[..., VllmServer], vllm: FakeVllm) -> None:
    vllm.wrong["/health"] = [(503, ""), None]
    connect(start_timeout=30.0)
    vllm.wrong["/health"] = [(503, "loading")] * 9
    with pytest.raises(ServerGone, match=r"GET /health once, .*status 503: loading; waited 0 s for it to start"):
        connect(start_timeout=0.2)


def test_weights_go_through_the_folder_in_shards(
    connect: Callable[..., VllmServer], vllm: FakeVllm, tmp_path: Path, calls: Calls
) -> None:
    """Views of one tensor and a tensor larger than a shard arrive too, and the folder of the last update is removed."""
    engine = connect(shard_bytes=200)
    base = torch.arange(100, dtype=torch.float32).reshape(10, 10)
    weights = {"a": base[:3], "b": base.T[:2], "c": base, "d": torch.ones(2, dtype=torch.bfloat16)}
    for factor in (1, 2):
        engine.load_weights((name, value * factor) for name, value in weights.items())
        assert vllm.loaded[-1].keys() == weights.keys()
        for name, value in weights.items():
            torch.testing.assert_close(vllm.loaded[-1][name], value * factor, rtol=0, atol=0)
        (folder,) = (tmp_path / "shared").iterdir()
        assert folder.suffix == "" and len(list(folder.iterdir())) == 3
    assert not any(route == "/v1/completions" for route, _ in calls.seen[-2:])
    engine.close()
    engine.close()
    assert not list((tmp_path / "shared").iterdir())


def test_an_update_that_fails_half_way_is_not_shown_to_the_server(
    connect: Callable[..., VllmServer], vllm: FakeVllm
) -> None:
    engine = connect(shard_bytes=1)

    def weights() -> Iterator[tuple[str, torch.Tensor]]:
        yield "a", torch.ones(3)
        yield "b", torch.ones(3)
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        engine.load_weights(weights())
    assert not vllm.loaded
    engine.load_weights([("a", torch.ones(3))])
    assert vllm.loaded[0].keys() == {"a"}


def test_a_lost_update_is_told_again_and_a_failed_one_is_not(
    connect: Callable[..., VllmServer], vllm: FakeVllm
) -> None:
    engine = connect()
    vllm.wrong["/collective_rpc"] = [None, (503, "")]
    engine.load_weights([("a", torch.ones(3))])
    assert len(vllm.loaded) == 1
    vllm.wrong["/collective_rpc"] = [(500, {"error": {"message": "no space"}})]
    with pytest.raises(ServerRefused, match="no space"):
        engine.load_weights([("a", torch.ones(3))])
    assert len(vllm.loaded) == 1


def test_a_server_that_was_restarted_is_found_out(connect: Callable[..., VllmServer], vllm: FakeVllm) -> None:
    """A restarted server answers as before, but with the weights that it was started with."""
    engine = connect()
    engine.sample(prompts("the"), seed=1)  # Nothing was loaded yet, so any weights will do.
    engine.load_weights([("a", torch.ones(3))])
    engine.sample(prompts("the"), seed=1)
    vllm.version = "default"
    with pytest.raises(ServerGone, match=r"holds the weights 'default', expected 'maestro_fast-.*it was restarted, or"):
        engine.sample(prompts("the"), seed=1)


def test_the_prefix_cache_is_reset_even_if_it_is_still_in_use(
    connect: Callable[..., VllmServer], vllm: FakeVllm, calls: Calls
) -> None:
    engine = connect()
    vllm.wrong["/reset_prefix_cache"] = [(200, {"success": False})]
    engine.reset_prefix_cache()
    assert calls.routes().count("/reset_prefix_cache") == 2
    vllm.wrong["/reset_prefix_cache"] = [(200, {"success": False})] * 3
    with pytest.raises(ServerGone, match="the prefix cache is in use"):
        engine.reset_prefix_cache()


def test_of_a_shared_folder_only_what_updates_leave_is_removed(tmp_path: Path) -> None:
    for name in ("weights-best", f"weights-{'0a' * 16}", f"weights-{'1b' * 16}.partial"):
        (tmp_path / name).mkdir()
    FolderTransfer(HttpClient("http://127.0.0.1:1", timeout=1, retries=0), tmp_path).close()
    assert [path.name for path in tmp_path.iterdir()] == ["weights-best"]
