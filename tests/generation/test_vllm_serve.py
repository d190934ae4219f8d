"""The engine behind HTTP with a real vLLM server: tokens and log-probs are exact, and new weights take effect."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from maestro_fast.generation import ProbeConfig, SamplingConfig, VllmServer
from maestro_fast.generation.http import HttpClient
from maestro_fast.generation.weight_transfer import FolderTransfer
from maestro_fast.training.weight_sync import StaleWeightsError, build_probe, checkpoint_weights
from tests.generation.helpers import EOS, TOKENIZER, distributions, prompts, recomputed, same
from tests.vllm_serving import Serving

pytestmark = [pytest.mark.vllm]
LETTERS = ["a", "b", "c"]
TEXTS = ("the", "Tell a story about the sea and the long night of the lazy dog.", "red")


@pytest.fixture
def connect(vllm_serving: Serving, tmp_path: Path) -> Callable[..., VllmServer]:
    def make(stop_ids: Any = (EOS,), **sampling: Any) -> VllmServer:
        client = HttpClient(vllm_serving.url, timeout=120, retries=1)
        config = SamplingConfig(**{"max_new_tokens": 12, **sampling})
        return VllmServer(client, FolderTransfer(client, tmp_path / "shared"), TOKENIZER, config, stop_ids)

    return make


def changed(serving: Serving, seed: int, *, scale: float = 12.0) -> PreTrainedModel:
    """The served model with other weights, and with its logits spread wide."""
    model = AutoModelForCausalLM.from_pretrained(serving.model).eval()
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
        model.get_input_embeddings().weight.mul_(scale)
    return model


def load(engine: VllmServer, model: PreTrainedModel) -> None:
    engine.load_weights(checkpoint_weights(model, engine.dtype))
    engine.reset_prefix_cache()


@pytest.mark.parametrize(
    "sampling",
    [{}, {"temperature": 0.6}, {"temperature": 1.7, "top_k": 20}, {"temperature": 1.3, "top_p": 0.7}],
    ids=str,
)
def test_logprobs_are_those_of_the_distribution_that_is_sampled_from(
    vllm_serving: Serving, connect: Callable[..., VllmServer], sampling: dict[str, Any]
) -> None:
    """The weights were loaded later. vLLM on the CPU would keep the old ones of a tied head."""
    engine, model = connect(**sampling), changed(vllm_serving, seed=1)
    load(engine, model)
    rollouts = engine.sample(prompts(*TEXTS, times=8), seed=1)
    assert rollouts.sampling_logprobs_C is not None
    expected = recomputed(model, rollouts, **sampling)
    assert expected.isfinite().all() and expected.std() > 0.3
    torch.testing.assert_close(rollouts.sampling_logprobs_C, expected, rtol=0, atol=1e-3)


def test_any_token_ids_come_back_as_they_are(vllm_serving: Serving, connect: Callable[..., VllmServer]) -> None:
    """Even token ids that no text is tokenised to arrive unchanged, in prompts and in responses."""
    engine, model = connect(max_new_tokens=30), changed(vllm_serving, seed=1, scale=1.0)
    load(engine, model)
    asked = prompts("the", times=8)
    for i, ids in enumerate(asked.token_ids):
        ids[:] = [200 + i, 150, 120 + i, 1]
    rollouts = engine.sample(asked, seed=1)
    assert rollouts.prompts is asked
    assert rollouts.sampling_logprobs_C is not None
    torch.testing.assert_close(rollouts.sampling_logprobs_C, recomputed(model, rollouts), rtol=0, atol=1e-3)
    texts = [TOKENIZER.decode(ids, skip_special_tokens=True) for ids in rollouts.completion_ids]
    assert rollouts.completions == texts
    assert any(TOKENIZER(text)["input_ids"] != ids for text, ids in zip(texts, rollouts.completion_ids, strict=True))


def test_the_seed_decides(connect: Callable[..., VllmServer]) -> None:
    engine = connect()
    asked = prompts("the", "red", "the", times=4)
    first = engine.sample(asked, seed=5)
    assert same(engine.sample(asked, seed=5), first)
    assert not same(engine.sample(asked, seed=6), first)
    assert len({tuple(ids) for ids in first.completion_ids}) == 12  # Two groups of the same prompt differ too.


def test_frequencies_match_the_distribution(vllm_serving: Serving, connect: Callable[..., VllmServer]) -> None:
    """A chi-square test over the first token; tokens that are expected fewer than 5 times form one class."""
    count, model = 1000, changed(vllm_serving, seed=2, scale=4.0)
    engine = connect(max_new_tokens=1, temperature=1.5, top_k=30)
    load(engine, model)
    asked = prompts("the", times=count)
    observed_V = torch.tensor(engine.sample(asked, seed=3).completion_ids)[:, 0].bincount(minlength=320).double()
    p_V = distributions(model, asked.token_ids[0], [0], temperature=1.5, top_k=30).exp()[0]
    assert observed_V[p_V == 0].sum() == 0
    often_V = p_V * count >= 5
    expected = torch.cat([p_V[often_V], p_V[~often_V].sum()[None]]) * count
    observed = torch.cat([observed_V[often_V], observed_V[~often_V].sum()[None]])
    kept = expected > 0
    freedom = int(kept.sum()) - 1
    assert freedom >= 5
    assert ((observed - expected).square() / expected)[kept].sum() < freedom + 3 * (2 * freedom) ** 0.5


def test_a_response_ends_where_a_stop_string_is_complete(
    vllm_serving: Serving, connect: Callable[..., VllmServer]
) -> None:
    engine = connect(max_new_tokens=25, stop=LETTERS)
    load(engine, changed(vllm_serving, seed=1, scale=1.0))
    rollouts = engine.sample(prompts("the ab", times=32), seed=1)
    kinds = {"string": 0, "eos": 0, "limit": 0}
    for ids, truncated in zip(rollouts.completion_ids, rollouts.truncated_B.tolist(), strict=True):
        text = TOKENIZER.decode(ids)  # <|pad|> holds such a letter too.
        assert not any(letter in TOKENIZER.decode(ids[:-1]) for letter in LETTERS)
        assert EOS not in ids[:-1]
        if any(letter in text for letter in LETTERS):
            kinds["string"] += 1
            assert not truncated
        elif ids[-1] == EOS:
            kinds["eos"] += 1
            assert not truncated
        else:
            kinds["limit"] += 1
            assert truncated and len(ids) == 25
    assert kinds["string"] > 10 and kinds["eos"] + kinds["limit"] > 0


def test_the_end_of_the_prompt_is_no_part_of_a_stop_string(
    vllm_serving: Serving, connect: Callable[..., VllmServer]
) -> None:
    """If the prompt's last letter counted, the first token would complete each of these strings."""
    model, asked = changed(vllm_serving, seed=1, scale=4.0), prompts("the ab", times=64)
    likely = distributions(model, asked.token_ids[0], [0])[0, 40:90].topk(4).indices + 40
    stop = ["b" + TOKENIZER.decode([token]) for token in likely.tolist()]
    engine = connect(stop=stop)
    load(engine, model)
    rollouts = engine.sample(asked, seed=1)
    assert sum(ids[0] in likely.tolist() for ids in rollouts.completion_ids) >= 3
    for ids in rollouts.completion_ids:
        assert len(ids) == 12 or ids[-1] == EOS or any(string in TOKENIZER.decode(ids) for string in stop)


def test_an_end_at_the_token_limit_is_not_truncated(vllm_serving: Serving, connect: Callable[..., VllmServer]) -> None:
    """The ids that we send count, and not the server's, whose model has only the id 0."""
    engine = connect(range(160, 320), max_new_tokens=1, stop=["e"])
    load(engine, changed(vllm_serving, seed=1, scale=1.0))
    rollouts = engine.sample(prompts("the", times=64), seed=1)
    ended = [ids[0] >= 160 or "e" in TOKENIZER.decode(ids) for ids in rollouts.completion_ids]
    assert rollouts.truncated_B.tolist() == [not end for end in ended]
    assert 10 < sum(ended) < 60 and all(len(ids) == 1 for ids in rollouts.completion_ids)


def test_new_weights_answer_and_stale_ones_are_found(vllm_serving: Serving, connect: Callable[..., VllmServer]) -> None:
    engine = connect()
    assert (engine.dtype, engine.max_tokens, engine.cache_block) == (torch.float32, 256, 32)
    old, new = changed(vllm_serving, seed=1), changed(vllm_serving, seed=2)
    load(engine, old)

    def policy(model: Any, sequences: list[list[int]]) -> list[torch.Tensor]:
        return [
            distributions(model, ids[:1], ids[1:]).gather(1, torch.tensor(ids[1:])[:, None])[:, 0] for ids in sequences
        ]

    probe = build_probe(ProbeConfig(), engine, prompts(*TEXTS).token_ids, policy)
    assert probe.check(engine, old)["sync/probe_max"] < 1e-4
    with pytest.raises(StaleWeightsError, match="the engine has other weights, or a prefix cache of earlier ones"):
        probe.check(engine, new)  # The weights were not synchronised.
    probe.warm(engine)
    engine.load_weights(checkpoint_weights(new, engine.dtype))
    with pytest.raises(StaleWeightsError):
        probe.check(engine, new)  # The prefix cache was not reset.
    engine.reset_prefix_cache()
    assert probe.check(engine, new)["sync/probe_max"] < 1e-4
