"""What a vLLM on a CUDA device does to its process and its prefix cache, played by a stand-in for vLLM."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from dataclasses import replace
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from maestro_fast.generation import ColocateConfig, SamplingConfig, Served, VllmEngine, build_engine
from maestro_fast.generation.shared_process import TorchSettings
from tests.generation.helpers import prompts
from tests.tiny import tiny_tokenizer

BLOCK, CPU = 16, torch.device("cpu")


class Params(SimpleNamespace):
    skip_reading_prefix_cache = False


class Llm:
    """Changes what vLLM changes in a process. Its log-prob of a token is minus a tenth of its position.

    Attributes:
        returns_cached_rows: whether a request for prompt log-probs has rows for tokens in cached blocks, too.
        calls: what was called, with torch's settings during the call.
    """

    returns_cached_rows = False

    def __init__(self, **arguments: Any) -> None:
        self.arguments, self.calls, self.cache = arguments, [], set()
        cache = SimpleNamespace(block_size=BLOCK, enable_prefix_caching=True)
        config = SimpleNamespace(model_config=SimpleNamespace(max_model_len=64), cache_config=cache)
        self.llm_engine = SimpleNamespace(
            vllm_config=config, engine_core=SimpleNamespace(shutdown=lambda: self._note("shutdown"))
        )
        torch.set_num_threads(1)
        torch.set_float32_matmul_precision("highest")
        self._note("made")

    def _note(self, what: str) -> None:
        for seed in (random.seed, np.random.seed, torch.manual_seed):
            seed(0)
        self.calls.append((what, torch.get_num_threads(), torch.backends.cuda.matmul.fp32_precision))

    def generate(self, requests: list[Any], params: list[Any], use_tqdm: bool) -> list[Any]:
        self._note("generate")
        return [self._output(request["prompt_token_ids"], own) for request, own in zip(requests, params, strict=True)]

    def _output(self, ids: list[int], params: Any) -> Any:
        blocks = 0 if params.skip_reading_prefix_cache or tuple(ids) not in self.cache else (len(ids) - 1) // BLOCK
        cached = blocks * BLOCK
        self.cache.add(tuple(ids))
        rows = [{ids[i]: SimpleNamespace(logprob=-i / 10)} for i in range(1 + cached, len(ids))]
        meaningless = [{} for _ in range(cached)] if self.returns_cached_rows else []
        response = SimpleNamespace(token_ids=[5], logprobs=[{5: SimpleNamespace(logprob=-1.0)}], finish_reason="length")
        return SimpleNamespace(
            num_cached_tokens=cached, prompt_logprobs=[None, *meaningless, *rows], outputs=[response]
        )

    def collective_rpc(self, method: str, kwargs: dict[str, Any]) -> None:
        self._note(method)
        assert dict(kwargs["weights_iterator"])

    def reset_prefix_cache(self) -> bool:
        self._note("reset_prefix_cache")
        return True

    def sleep(self, level: int) -> None:
        self._note(f"sleep {level}")

    def wake_up(self, tags: list[str]) -> None:
        self._note(f"wake {' '.join(tags)}")

    def apply_model(self, function: Any) -> None:
        self._note("apply_model")


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """vLLM is played by ``Llm``; torch's settings are afterwards as they were."""
    before = TorchSettings.now()
    module = ModuleType("vllm")
    module.__dict__.update(LLM=Llm, SamplingParams=Params)
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setattr("maestro_fast.generation.vllm.check_colocate", lambda *args: None)
    yield
    before.apply()


def engine(**options: Any) -> tuple[VllmEngine, Llm]:
    made = VllmEngine(
        "nowhere",
        tiny_tokenizer(),
        SamplingConfig(max_new_tokens=1),
        ColocateConfig(**options),
        stop_ids=[0],
        dtype=torch.float32,
        device=CPU,
    )
    return made, made._llm


def test_vllm_is_asked_for_no_more_room_than_the_run_needs() -> None:
    """The model's own number of positions would be vLLM's default."""
    served = Served("m", tiny_tokenizer(), SamplingConfig(max_new_tokens=700), frozenset([0]), torch.float32, CPU)
    made = build_engine(ColocateConfig(), replace(served, longest_prompt=50, positions=131_072))
    assert isinstance(made, VllmEngine) and made._llm.arguments["max_model_len"] == 750


@pytest.mark.parametrize("returns_cached_rows", [False, True], ids=["model runner V2", "model runner V1"])
def test_prompt_logprobs_are_whole_whichever_rows_vllm_returns(
    monkeypatch: pytest.MonkeyPatch, returns_cached_rows: bool
) -> None:
    """The second time, whole blocks come from the prefix cache. The second sequence fills its blocks exactly."""
    monkeypatch.setattr(Llm, "returns_cached_rows", returns_cached_rows)
    made, _ = engine()
    sequences = [list(range(40)), list(range(33)), [3, 4]]
    for _ in range(2):
        found = made.prompt_logprobs(sequences)
        for ids, logprobs in zip(sequences, found, strict=True):
            torch.testing.assert_close(logprobs, -torch.arange(1, len(ids)) / 10)


def trainers() -> tuple[Any, ...]:
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    return (TorchSettings.now(), *states)


@pytest.mark.parametrize("tf32", ["torch.set_float32_matmul_precision", "torch.backends.fp32_precision"])
def test_trainer_and_vllm_find_their_own_settings(tf32: str) -> None:
    """The trainer keeps its threads, its TF32 and its random state. Every call of vLLM has 1 thread and no TF32."""
    torch.set_num_threads(3)
    if tf32 == "torch.set_float32_matmul_precision":
        torch.set_float32_matmul_precision("high")
    else:  # as ``TrainingArguments(tf32=True)`` does it
        torch.backends.cuda.matmul.fp32_precision = "none"
        torch.backends.fp32_precision = "tf32"
    try:
        before = trainers()
        assert before[0].threads == 3 and before[0].cuda == "tf32"
        made, llm = engine()
        assert trainers() == before
        made.load_weights([("a", torch.ones(1))])
        made.reset_prefix_cache()
        made.sample(prompts("the"), seed=1)
        made.prompt_logprobs([[3, 4]])
        assert trainers() == before
        assert len(llm.calls) == 6 and {(threads, cuda) for _, threads, cuda in llm.calls} == {(1, "ieee")}
    finally:
        torch.backends.fp32_precision = "none"


@pytest.mark.parametrize("level", [1, 2])
def test_it_sleeps_from_the_start_and_wakes_for_what_is_needed(level: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    made, llm = engine(sleep=level)
    assert [what for what, *_ in llm.calls] == ["made", f"sleep {level}"]
    assert made.sleep() is (level == 1)
    made.load_weights([("a", torch.ones(1))])
    made.reset_prefix_cache()
    made.sample(prompts("the"), seed=1)
    assert made.sleep() is (level == 1)
    assert [what for what, *_ in llm.calls[2:] if what != "apply_model"] == [
        "wake weights",
        "reload_weights",
        "wake kv_cache",
        "reset_prefix_cache",
        "generate",
        f"sleep {level}",
    ]


def test_weights_that_were_dropped_are_not_sampled_from(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise an engine that was never sent weights would sample from whatever the memory holds."""
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    made, _ = engine(sleep=2)
    for compute in (lambda: made.sample(prompts("the"), seed=1), lambda: made.prompt_logprobs([[3, 4]])):
        with pytest.raises(RuntimeError, match="dropped its weights in its sleep, expected load_weights before"):
            compute()
    made.load_weights([("a", torch.ones(1))])
    assert len(made.sample(prompts("the"), seed=1).completion_ids) == 1
