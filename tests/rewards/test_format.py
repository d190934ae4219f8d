"""FormatReward and split_tags."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from maestro_fast.records import RewardBatch
from maestro_fast.rewards import FormatReward, Gate, NoverReward, PerplexityReward, Where, split_tags
from maestro_fast.rewards.format import check_tags_are_seen
from tests.chat_templates import chat_tokenizer

MakeBatch = Callable[..., RewardBatch]

# completion, credit without and with partial
CASES = [
    ("<think> why </think> <answer> Red. </answer>", 1.0, 1.0),
    ("\n<think>\nwhy\n\nso\n</think><answer>Red.</answer>\n ", 1.0, 1.0),
    ("<think></think><answer></answer>", 1.0, 1.0),
    ("<think>1 < 2 <b>x</b></think><answer>2</answer>", 1.0, 1.0),
    ("Well: <think>why</think><answer>Red.</answer>", 0.0, 0.5),
    ("<think>why</think> so <answer>Red.</answer>", 0.0, 0.5),
    ("<think>why</think><answer>Red.</answer> Bye.", 0.0, 0.5),
    ("<answer>Red.</answer><think>why</think>", 0.0, 0.5),
    ("<think>why<answer>Red.</answer></think>", 0.0, 0.5),
    ("<think>why</think> Red.", 0.0, 0.25),
    ("<think>why</think><answer>Red.", 0.0, 0.25),
    ("<think>why<answer>Red.</answer>", 0.0, 0.25),
    ("<think>why</think><answer>Red.</answer><answer>Blue.</answer>", 0.0, 0.25),
    ("<think>a</think><think>b</think><answer>Red.</answer>", 0.0, 0.25),
    ("<think>why<think></think><answer>Red.</answer>", 0.0, 0.25),
    ("</think>why<think><answer>Red.</answer>", 0.0, 0.25),
    ("<Think>why</Think><ANSWER>Red.</ANSWER>", 0.0, 0.0),
    ("Red.", 0.0, 0.0),
    ("", 0.0, 0.0),
]


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("partial", [False, True])
def test_values(partial: bool, chat: bool, make_batch: MakeBatch) -> None:
    batch = make_batch([text for text, _, _ in CASES], chat=chat)
    scores = FormatReward(partial=partial)(batch)
    wrong = [(text, score) for (text, *credit), score in zip(CASES, scores, strict=True) if score != credit[partial]]
    assert not wrong


def test_other_tags(make_batch: MakeBatch) -> None:
    texts = ["<a>1</a><b.c>2</b.c><d>3</d>", "<a>1</a><bxc>2</bxc><d>3</d>", "<a>1</a>", "<d>3</d><a>1</a>"]
    reward = FormatReward(tags=["a", "b.c", "d"], partial=True)
    assert reward(make_batch(texts)) == [1.0, 0.5 * 2 / 3, 0.5 / 3, 0.5 * 2 / 3]
    assert FormatReward(tags=("a",))(make_batch(["<a>1</a>"])) == [1.0]
    assert FormatReward(tags=("|a|",))(make_batch(["<|a|>1</|a|>"])) == [1.0]


def test_pattern_matches_the_whole_completion(make_batch: MakeBatch) -> None:
    reward = FormatReward(pattern=r"\d\. .*")
    assert reward(make_batch(["1. tea", "1. tea\n2. salt", " 1. tea", "so 1. tea", "1."])) == [1, 1, 0, 0, 0]
    assert FormatReward(pattern="a|ab")(make_batch(["ab", "abc"])) == [1.0, 0.0]


def test_needs_nothing() -> None:
    reward = FormatReward()
    assert (reward.name, reward.needs_entropy, reward.needs_policy) == ("format", False, False)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tags": []}, r"tags: \[\], expected a list of names"),
        ({"tags": "think"}, "tags: 'think', expected a list"),
        ({"tags": 5}, "tags: 5, expected a list"),
        ({"tags": ["a", "a"]}, "tags: .* expected distinct names"),
        ({"tags": ["<a>"]}, "tags: '<a>', expected a name without brackets"),
        ({"tags": ["a", 3]}, "tags: 3, expected a name"),
        ({"pattern": "("}, "pattern: '\\(' is not a regular expression"),
        ({"pattern": 3}, "pattern: 3 is not a regular expression"),
        ({"pattern": "a", "partial": True}, "partial: True beside a pattern"),
    ],
)
def test_bad_options(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        FormatReward(**options)


def test_split_tags() -> None:
    assert split_tags("<think> why\nso </think> <answer>\nRed.</answer>") == {"think": "why\nso", "answer": "Red."}
    assert split_tags("<x>1</x>", ["x"]) == {"x": "1"}
    assert split_tags("<think>why</think> Red.") is None


content = st.text(st.sampled_from("a <>/\n"), max_size=8)
blank = st.text(st.sampled_from(" \n\t"), max_size=2)


@given(content, content, blank, blank, blank)
def test_split_tags_inverts_the_form(think: str, answer: str, before: str, between: str, after: str) -> None:
    text = f"{before}<think>{think}</think>{between}<answer>{answer}</answer>{after}"
    assert split_tags(text) == {"think": think.strip(), "answer": answer.strip()}


def test_the_part_of_the_reply_that_stands_in_the_prompt_counts(make_batch: MakeBatch) -> None:
    completions = [
        "why</think><answer>Red.</answer>",
        "<answer>Red.</answer>",
        "<think>why</think><answer>Red.</answer>",
    ]
    prefills = ["<think>\n", "<think>\n\n</think>\n\n", "<think>\n"]
    for chat in (False, True):
        batch = make_batch(completions, chat=chat, prefills=prefills)
        assert FormatReward()(batch) == [1.0, 1.0, 0.0]  # The last one opens its reasoning twice.
        assert FormatReward()(batch.select([1])) == [1.0]
        assert FormatReward(pattern=r"<think>\n.*</answer>")(batch) == [1.0, 1.0, 1.0]
        assert FormatReward()(make_batch(completions, chat=chat)) == [0.0, 0.0, 1.0]


def test_tags_that_no_completion_can_have_are_found(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = chat_tokenizer(None, "</think>", "<|answer|>")
    hidden = FormatReward()
    check_tags_are_seen([hidden], tokenizer, skip_special_tokens=False)
    check_tags_are_seen([FormatReward(tags=["a"]), PerplexityReward(tags=["a", "b"])], tokenizer, True)
    for rewards in ([hidden], [Where(hidden, "x")], [Gate(FormatReward(tags=["a"]), on=hidden, threshold=1)]):
        with pytest.raises(
            ValueError,
            match=r"^rewards: 'format' looks for </think>, a special token of the tokenizer, .*, expected "
            r"sampling\.skip_special_tokens: false$",
        ):
            check_tags_are_seen(rewards, tokenizer, skip_special_tokens=True)
    with pytest.raises(ValueError, match="'nover' looks for </think>"):
        check_tags_are_seen([NoverReward()], tokenizer, skip_special_tokens=True)
    assert not caplog.records
    check_tags_are_seen([FormatReward(pattern=r".*<\|answer\|>.*", name="own")], tokenizer, skip_special_tokens=True)
    assert "the pattern of 'own' names <|answer|>, a special token" in caplog.text
