"""vLLM itself, on the CPU: what it samples, and the log-probs that it returns."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from maestro_fast.generation import SamplingConfig, VllmEngine
from maestro_fast.records import Rollouts
from tests.generation.helpers import EOS, TOKENIZER, distributions, prompts, recomputed, same
from tests.generation.vllm_engine import engine, served_model

pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]
TEXTS = ("the", "Tell a story about the sea and the long night of the lazy dog.", "red")
CHAT = [{"role": "user", "content": "Name a colour."}]
LETTERS = ["a", "b", "c"]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmEngine]:
    """One engine serves all tests of this file. It has a stop string so that vLLM loads a tokenizer."""
    with engine(tmp_path_factory.mktemp("vllm"), served_model(), stop=["never sampled"]) as made:
        yield made


def sampled(
    shared: VllmEngine, asked: Any, *, seed: int = 0, stop_ids: list[int] | None = None, **own: Any
) -> Rollouts:
    """The options may differ from those that the engine was made with, since they belong to a request."""
    before = shared._sampling, shared._stop_ids
    shared._sampling = SamplingConfig(**{"max_new_tokens": 12, **own})
    shared._stop_ids = [EOS] if stop_ids is None else stop_ids
    try:
        return shared.sample(asked, seed=seed)
    finally:
        shared._sampling, shared._stop_ids = before


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.6},
        {"temperature": 1.7, "top_k": 20},
        {"top_p": 0.8},
        {"temperature": 1.3, "top_k": 50, "top_p": 0.7},
    ],
    ids=str,
)
def test_logprobs_are_those_of_the_distribution_that_was_sampled_from(
    shared: VllmEngine, options: dict[str, Any]
) -> None:
    """They equal those of a forward of each response alone, with transformers."""
    model = served_model()
    rollouts = sampled(shared, prompts(*TEXTS, times=6), **options)
    recorded = rollouts.sampling_logprobs_C
    assert recorded is not None and recorded.dtype == torch.float32
    assert recorded.shape == (rollouts.completion_lengths_B.sum(),)
    expected = recomputed(model, rollouts, **options)
    assert expected.isfinite().all() and expected.std() > 0.3
    torch.testing.assert_close(recorded, expected, rtol=0, atol=1e-4)


def test_frequencies_match_the_distribution(shared: VllmEngine) -> None:
    """A chi-square test over the first token, which also shows that requests of one batch are independent."""
    count, options = 1500, {"temperature": 1.3, "top_k": 20, "top_p": 0.9}
    asked = prompts("the", times=count)
    rollouts = sampled(shared, asked, max_new_tokens=1, seed=11, **options)
    p_V = distributions(served_model(), asked.token_ids[0], [0], **options).exp()[0]
    observed_V = torch.tensor(rollouts.completion_ids)[:, 0].bincount(minlength=len(p_V)).double()
    assert observed_V[p_V == 0].sum() == 0
    live_V = p_V * count >= 5
    expected = torch.cat([p_V[live_V], p_V[~live_V].sum()[None]]) * count
    observed = torch.cat([observed_V[live_V], observed_V[~live_V].sum()[None]])
    expected, observed = expected[expected > 1e-6], observed[expected > 1e-6]
    freedom = len(expected) - 1
    assert freedom >= 5
    assert ((observed - expected).square() / expected).sum().item() < freedom + 3 * (2 * freedom) ** 0.5


def test_the_seed_decides_and_no_generator_of_the_process_is_touched(shared: VllmEngine) -> None:
    asked = prompts(*TEXTS, times=3)
    torch.manual_seed(1)
    np.random.seed(1)
    before, numpy = torch.get_rng_state(), np.random.get_state()[1]
    first = sampled(shared, asked, seed=5)
    assert torch.equal(torch.get_rng_state(), before) and (np.random.get_state()[1] == numpy).all()
    torch.manual_seed(2)
    shared.reset_prefix_cache()
    assert same(sampled(shared, asked, seed=5), first)
    assert not same(sampled(shared, asked, seed=6), first)
    assert len({tuple(ids) for ids in first.completion_ids[:3]}) == 3


def test_every_stop_id_ends_a_response_and_is_part_of_it(shared: VllmEngine) -> None:
    stops = [EOS, *range(20, 60)]
    rollouts = sampled(shared, prompts(*TEXTS, times=16), stop_ids=stops, max_new_tokens=20)
    ended = [ids[-1] in stops for ids in rollouts.completion_ids]
    assert any(ended) and not all(ended)
    for ids, by_id, truncated in zip(rollouts.completion_ids, ended, rollouts.truncated_B.tolist(), strict=True):
        assert not set(stops) & set(ids[:-1])
        assert truncated is (not by_id)
        assert by_id or len(ids) == 20


def test_an_end_at_the_token_limit_is_not_truncated(shared: VllmEngine) -> None:
    by_id = sampled(shared, prompts("the", times=64), stop_ids=list(range(160)), max_new_tokens=1)
    assert by_id.truncated_B.tolist() == [ids[0] >= 160 for ids in by_id.completion_ids]
    assert 0 < by_id.truncated_B.sum() < 64
    letters = [chr(code) for code in range(33, 127)]
    by_string = sampled(shared, prompts("the", times=64), stop=letters, max_new_tokens=1)
    texts = [TOKENIZER.decode(ids) for ids in by_string.completion_ids]
    has = [any(letter in text for letter in letters) for text in texts]
    assert any(has) and not all(has)
    assert by_string.truncated_B.tolist() == [
        not (h or ids == [EOS]) for h, ids in zip(has, by_string.completion_ids, strict=True)
    ]


def test_a_response_ends_with_the_token_that_completes_a_stop_string(shared: VllmEngine) -> None:
    """The rule is that of generation with transformers, and the text keeps the string."""
    asked = prompts("the", "ab", CHAT, times=24)
    free = sampled(shared, asked, max_new_tokens=25, seed=3)
    rollouts = sampled(shared, asked, max_new_tokens=25, seed=3, stop=LETTERS)
    kinds = {"string": 0, "eos": 0, "limit": 0}
    for whole, ids, truncated in zip(
        free.completion_ids, rollouts.completion_ids, rollouts.truncated_B.tolist(), strict=True
    ):
        ends = [n for n in range(1, len(whole) + 1) if any(letter in TOKENIZER.decode(whole[:n]) for letter in LETTERS)]
        assert ids == whole[: min(ends, default=len(whole))]
        kind = "string" if ends else "eos" if whole[-1] == EOS else "limit"
        kinds[kind] += 1
        assert truncated is (kind == "limit")
    assert kinds["string"] > 10 and kinds["limit"] > 0
    texts = [text if isinstance(text, str) else text[0]["content"] for text in rollouts.completions]
    assert texts == [TOKENIZER.decode(ids, skip_special_tokens=True) for ids in rollouts.completion_ids]
    assert rollouts.completions[-1] == [{"role": "assistant", "content": texts[-1]}]


def test_the_end_of_the_prompt_is_no_part_of_a_stop_string(shared: VllmEngine) -> None:
    stop = ["b" + TOKENIZER.decode([token]) for token in range(40, 120)]
    rollouts = sampled(shared, prompts("the ab", times=48), stop=stop)
    firsts = [ids[0] for ids in rollouts.completion_ids]
    assert sum(40 <= token < 120 for token in firsts) >= 3
    for ids in rollouts.completion_ids:
        assert len(ids) == 12 or ids[-1] == EOS or any(string in TOKENIZER.decode(ids) for string in stop)


def test_prompt_logprobs_use_the_prefix_cache_and_are_complete(shared: VllmEngine) -> None:
    """vLLM gives no log-probs for cached blocks, but those of later tokens depend on the blocks."""
    model, draws = served_model(), torch.Generator().manual_seed(4)
    sequences = [torch.randint(2, 320, (n,), generator=draws).tolist() for n in (200, 2, 150)]
    expected = [
        distributions(model, ids[:1], ids[1:]).gather(1, torch.tensor(ids[1:])[:, None])[:, 0].float()
        for ids in sequences
    ]
    for _ in range(2):
        found = shared.prompt_logprobs(sequences)
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    assert [cached for _, cached in shared._prompt_scores(sequences, read_cache=True)] == [128, 0, 128]
    assert shared.cache_block == 128 and shared.max_tokens == 256 and shared.dtype == torch.float32


def test_the_threads_of_torch_can_still_be_set(shared: VllmEngine) -> None:
    own = torch.get_num_threads()
    torch.set_num_threads(own + 1)
    try:
        assert torch.get_num_threads() == own + 1
    finally:
        torch.set_num_threads(own)
