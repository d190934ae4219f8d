"""The options of sampling."""

from __future__ import annotations

import math
import re
from types import SimpleNamespace
from typing import Any

import pytest

from maestro_fast.generation import ColocateConfig, SamplingConfig, VllmEngine
from maestro_fast.generation.sampling import completion_texts
from maestro_fast.records import Prompts
from tests.chat_templates import chat_tokenizer
from tests.generation.helpers import EOS, PAD, generate, peaked_model, prompts


def test_defaults_sample_from_the_policy_itself() -> None:
    config = SamplingConfig()
    assert (config.temperature, config.top_p, config.top_k, config.stop) == (1.0, 1.0, 0, [])
    assert config.group_size >= 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"group_size": 1}, "group_size: 1, expected at least 2"),
        ({"group_size": 0}, "group_size: 0, expected at least 2"),
        ({"max_new_tokens": 0}, "max_new_tokens: 0, expected at least 1"),
        ({"temperature": 0.0}, "temperature: 0.0, expected a finite positive number"),
        ({"temperature": math.nan}, "temperature: nan, expected a finite positive number"),
        ({"temperature": math.inf}, "temperature: inf, expected a finite positive number"),
        ({"max_new_tokens": 2**70}, f"max_new_tokens: {2**70}, expected at most 2147483647"),
        ({"group_size": 2**31}, "group_size: 2147483648, expected at most 2147483647"),
        ({"top_p": 0.0}, "top_p: 0.0, expected 0 < top_p <= 1"),
        ({"top_p": 1.1}, "top_p: 1.1, expected 0 < top_p <= 1"),
        ({"top_p": math.nan}, "top_p: nan, expected 0 < top_p <= 1"),
        ({"top_k": -1}, "top_k: -1, expected at least 0"),
        ({"stop": ["x", ""]}, "stop: holds an empty string"),
    ],
)
def test_errors_name_the_option(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match="^" + re.escape(words)):
        SamplingConfig(**options)


def test_special_tokens_stay_in_the_text_where_they_are_wanted_but_not_those_at_its_end() -> None:
    tokenizer = chat_tokenizer(None, "<think>", "</think>", "<stop>")
    think, closing, stop = range(320, 323)
    word = tokenizer("red")["input_ids"]
    body = [think, *word, closing]
    rows = [
        body,
        [*body, EOS],
        [*body, stop],
        [*body, EOS, PAD, PAD],
        [*body, EOS, *word],
        [EOS],
        [],
        [*body, stop, EOS],
    ]
    asked = Prompts(["a"] * (len(rows) - 1) + [[{"role": "user", "content": "a"}]], [[5]] * len(rows))

    texts = completion_texts(tokenizer, asked, rows, skip_special_tokens=False, stop_ids=[stop])
    whole = "<think>red</think>"
    assert texts == [whole] * 4 + [f"{whole}<|end|>red", "", "", [{"role": "assistant", "content": whole}]]
    assert completion_texts(tokenizer, asked, rows, stop_ids=[stop])[:6] == ["red"] * 4 + ["redred", ""]


def test_a_generator_keeps_special_tokens_where_they_are_wanted() -> None:
    """A token that the tiny model samples is made a special one afterwards."""
    tokenizer = chat_tokenizer(None)
    model = peaked_model()
    plain = generate(model, prompts("red", times=4), tokenizer=tokenizer)
    most_common = max({token for ids in plain.completion_ids for token in ids[:-1]})
    tokenizer.add_tokens([tokenizer.convert_ids_to_tokens(most_common)], special_tokens=True)
    kept = generate(model, prompts("red", times=4), tokenizer=tokenizer, skip_special_tokens=False)
    skipped = generate(model, prompts("red", times=4), tokenizer=tokenizer)

    assert kept.completion_ids == skipped.completion_ids == plain.completion_ids
    assert sum(map(len, kept.completions)) > sum(map(len, skipped.completions))


def test_padding_is_a_token_that_the_model_knows() -> None:
    tokenizer = chat_tokenizer(None, "<new pad>")
    own = generate(peaked_model(), prompts("red", "a longer text"), tokenizer=chat_tokenizer(None))
    tokenizer.pad_token = "<new pad>"

    assert generate(peaked_model(), prompts("red", "a longer text"), tokenizer=tokenizer).completions == own.completions


def test_vllm_in_the_process_keeps_special_tokens_where_they_are_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM itself is not needed: its answer stands here."""
    engine = object.__new__(VllmEngine)
    engine._tokenizer, engine._stop_ids, engine._asleep = chat_tokenizer(None, "<think>", "<stop>"), [321], set()
    engine._config, engine._params = ColocateConfig(), dict
    ids = [320, *engine._tokenizer("red")["input_ids"], 321]
    answer = SimpleNamespace(
        token_ids=ids, logprobs=[{i: SimpleNamespace(logprob=0.0)} for i in ids], finish_reason="stop"
    )
    monkeypatch.setattr(engine, "_generate", lambda *_: [SimpleNamespace(outputs=[answer])])
    for skip, text in ((False, "<think>red"), (True, "red")):
        engine._sampling = SamplingConfig(skip_special_tokens=skip)
        assert engine.sample(prompts("a"), seed=0).completions == [text]
