"""Generation with transformers: the recorded log-probs are those of the distribution that was sampled from."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.generation.helpers import (
    EOS,
    PAD,
    TOKENIZER,
    distributions,
    generate,
    peaked_model,
    prompts,
    recomputed,
    same,
)
from tests.tiny import tiny_model, tiny_tokenizer

TEXTS = ("the", "Tell a story about the sea and the long night of the lazy dog.", "red")
CHAT = [{"role": "user", "content": "Name a colour."}]
SAMPLINGS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.6},
    {"temperature": 1.7, "top_k": 20},
    {"top_p": 0.8},
    {"temperature": 1.3, "top_k": 50, "top_p": 0.7},
]


@pytest.mark.parametrize("family", ["qwen3", "llama"])
@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_recorded_logprobs_are_those_of_a_forward_of_each_response_alone(family: str, sampling: dict[str, Any]) -> None:
    """The prompts differ in length, so this also shows that padding on the left does not matter."""
    model = peaked_model(family)
    rollouts = generate(model, prompts(*TEXTS, times=3), **sampling)
    recorded = rollouts.sampling_logprobs_C
    assert recorded is not None
    assert recorded.dtype == torch.float32 and not recorded.requires_grad
    assert recorded.shape == (rollouts.completion_lengths_B.sum(),)
    expected = recomputed(model, rollouts, **sampling)
    assert expected.isfinite().all() and expected.std() > 0.3
    torch.testing.assert_close(recorded, expected, rtol=0, atol=1e-5)


def test_a_prompt_alone_or_beside_longer_ones() -> None:
    """The most probable response is compared, since random draws would differ."""
    model = peaked_model()
    alone = generate(model, prompts("red"), top_k=1)
    beside = generate(model, prompts("red", *TEXTS), top_k=1)
    assert beside.completion_ids[0] == alone.completion_ids[0]
    assert len({tuple(ids) for ids in beside.completion_ids}) > 1


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_frequencies_match_the_distribution(sampling: dict[str, Any]) -> None:
    """A chi-square test over the first token; tokens that are expected fewer than 5 times form one class."""
    model, count = peaked_model(), 4000
    asked = prompts("the", times=count)
    rollouts = generate(model, asked, max_new_tokens=1, seed=11, **sampling)
    p_V = distributions(model, asked.token_ids[0], [0], **sampling).exp()[0]
    observed_V = torch.tensor(rollouts.completion_ids)[:, 0].bincount(minlength=len(p_V)).double()
    assert observed_V[p_V == 0].sum() == 0
    often_V = p_V * count >= 5
    expected = torch.cat([p_V[often_V], p_V[~often_V].sum()[None]]) * count
    observed = torch.cat([observed_V[often_V], observed_V[~often_V].sum()[None]])
    expected, observed = expected[expected > 0], observed[expected > 0]
    freedom = len(expected) - 1
    assert freedom >= 5
    chi_square = ((observed - expected).square() / expected).sum().item()
    assert chi_square < freedom + 3 * (2 * freedom) ** 0.5


def test_responses_of_a_group_differ() -> None:
    rollouts = generate(tiny_model(), prompts("the", times=8))
    assert len({tuple(ids) for ids in rollouts.completion_ids}) == 8


def test_the_seed_decides_and_the_global_generator_is_left_alone() -> None:
    model, asked = tiny_model(), prompts(*TEXTS, times=2)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = generate(model, asked, seed=5)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    torch.rand(17)
    assert same(generate(model, asked, seed=5), first)
    assert not same(generate(model, asked, seed=6), first)


@pytest.mark.parametrize(
    "own",
    [
        {"repetition_penalty": 2.0, "top_k": 1},
        {"temperature": 0.1, "top_p": 0.1, "do_sample": False},
        {"min_p": 0.05},
        {"typical_p": 0.3},
        {"epsilon_cutoff": 0.005, "eta_cutoff": 0.005},
        {"no_repeat_ngram_size": 1, "min_new_tokens": 5},
        {"bad_words_ids": [[5], [6]], "suppress_tokens": list(range(7, 150))},
        {"sequence_bias": [[[7], 50.0]], "renormalize_logits": True},
        {"num_beams": 3, "num_return_sequences": 2},
        {"guidance_scale": 1.5, "forced_eos_token_id": 0},
        {"max_time": 0.0, "max_length": 3, "stop_strings": ["e"], "return_dict_in_generate": True},
    ],
    ids=str,
)
def test_the_models_own_generation_config_does_not_shape_the_distribution(own: dict[str, Any]) -> None:
    model, asked = tiny_model(), prompts(*TEXTS)
    expected = generate(model, asked, temperature=0.7)
    config = model.generation_config
    for name, value in own.items():
        setattr(config, name, value)
    before = config.to_dict()
    assert same(generate(model, asked, temperature=0.7), expected)
    assert model.generation_config is config and config.to_dict() == before


@pytest.mark.parametrize("listed", [[EOS, *range(20, 60)], 33, None])
def test_every_eos_ends_a_response_and_is_part_of_it(listed: list[int] | int | None) -> None:
    """They are the tokenizer's, and those of the model's generation config."""
    model = tiny_model()
    model.generation_config.eos_token_id = listed
    stops = {EOS} | set(listed if isinstance(listed, list) else [listed])
    rollouts = generate(model, prompts(*TEXTS, times=16), max_new_tokens=60)
    ended = [ids[-1] in stops for ids in rollouts.completion_ids]
    assert any(ended) and (isinstance(listed, list) or not all(ended))
    for ids, by_eos, truncated in zip(rollouts.completion_ids, ended, rollouts.truncated_B.tolist(), strict=True):
        assert not stops & set(ids[:-1])
        assert truncated is (not by_eos)
        assert len(ids) == 60 or by_eos
    assert model.generation_config.eos_token_id == listed


def test_nothing_is_computed_after_the_last_response_has_ended() -> None:
    model, steps = tiny_model(), []
    model.generation_config.eos_token_id = list(range(model.config.vocab_size))
    model.register_forward_hook(lambda *_: steps.append(1))
    rollouts = generate(model, prompts("the", times=4), max_new_tokens=20)
    assert len(steps) == 1 and [len(ids) for ids in rollouts.completion_ids] == [1] * 4


def test_an_eos_at_the_token_limit_is_not_truncated() -> None:
    model = tiny_model()
    model.generation_config.eos_token_id = list(range(160))
    rollouts = generate(model, prompts("the", times=64), max_new_tokens=1)
    assert rollouts.truncated_B.dtype == torch.bool
    assert rollouts.truncated_B.tolist() == [ids[0] >= 160 for ids in rollouts.completion_ids]
    assert 10 < rollouts.truncated_B.sum() < 54


def test_without_any_eos() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    tokenizer.eos_token = None
    # The model's generation config has a stop id.
    assert generate(model, prompts("the"), tokenizer=tokenizer).completion_ids
    model.generation_config.eos_token_id = None
    with pytest.raises(ValueError, match=r"^tokenizer: has no eos_token_id, and neither has the model's"):
        generate(model, prompts("the"), tokenizer=tokenizer)


def test_without_a_pad_token() -> None:
    model, tokenizer = peaked_model(), tiny_tokenizer()
    tokenizer.pad_token = None
    model.generation_config.eos_token_id = list(range(60))
    rollouts = generate(model, prompts(*TEXTS, times=4), tokenizer=tokenizer)
    assert len({len(ids) for ids in rollouts.completion_ids}) > 1
    assert rollouts.sampling_logprobs_C is not None
    torch.testing.assert_close(rollouts.sampling_logprobs_C, recomputed(model, rollouts), rtol=0, atol=1e-5)


def test_text_is_decoded_without_special_tokens_and_chats_get_messages() -> None:
    rollouts = generate(tiny_model(), prompts("the", CHAT, times=16), max_new_tokens=60)
    assert any(EOS in ids for ids in rollouts.completion_ids) and any(PAD in ids for ids in rollouts.completion_ids)
    texts = [TOKENIZER.decode(ids, skip_special_tokens=True) for ids in rollouts.completion_ids]
    assert rollouts.completions[:16] == texts[:16]
    assert rollouts.completions[16:] == [[{"role": "assistant", "content": text}] for text in texts[16:]]
    assert not any("<|end|>" in text or "<|pad|>" in text for text in texts)
    assert rollouts.prompts.texts == ["the"] * 16 + [CHAT] * 16


@pytest.mark.parametrize("training", [True, False])
def test_samples_in_evaluation_mode_and_restores_every_module(training: bool) -> None:
    model = tiny_model()
    model.train(training)
    frozen = model.get_input_embeddings()
    frozen.train(not training)
    modes = {name: module.training for name, module in model.named_modules()}
    seen: list[bool] = []
    handle = model.get_output_embeddings().register_forward_hook(lambda module, *_: seen.append(module.training))
    generate(model, prompts("the"))
    handle.remove()
    assert seen and not any(seen)
    assert {name: module.training for name, module in model.named_modules()} == modes


def test_restores_the_model_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model().train()
    config, state = model.generation_config, torch.get_rng_state()

    def fail(*args: Any, **kwargs: Any) -> None:
        torch.rand(3)
        raise RuntimeError("out of memory")

    monkeypatch.setattr(model, "generate", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        generate(model, prompts("the"))
    assert model.training and model.generation_config is config
    assert torch.equal(torch.get_rng_state(), state)
