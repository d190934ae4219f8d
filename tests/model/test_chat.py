"""How prompts become what the policy reads, by templates in the style of well-known models."""

from __future__ import annotations

from typing import Any

import pytest

from maestro_fast.model.chat import ChatConfig, check_template_kwargs, encode_prompt, prefilled, rendered
from maestro_fast.records import plain_text
from tests.chat_templates import CHATML, GLM, ONE_TURN, QWEN3, R1, STRICT, TWO_HEADERS, chat_tokenizer

ASK = [{"role": "user", "content": "Name a colour."}]
WEATHER = {
    "type": "function",
    "function": {"name": "weather", "description": "The weather.", "parameters": {"type": "object", "properties": {}}},
}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Bern"}}}
EMPTY = "<think>\n\n</think>\n\n"


def weather(city: str) -> str:
    """
    The weather.

    Args:
        city: Where.
    """
    return city


@pytest.mark.parametrize(
    ("template", "kwargs", "expected"),
    [
        (R1, {}, "<think>\n"),
        (QWEN3, {}, ""),
        (QWEN3, {"enable_thinking": True}, ""),
        (QWEN3, {"enable_thinking": False}, EMPTY),
        (GLM, {}, ""),
        (GLM, {"enable_thinking": False}, "<think></think>"),
        (CHATML, {}, ""),
        (STRICT, {}, ""),
        (ONE_TURN, {}, "<think> "),
        (TWO_HEADERS, {}, "<think>\n"),
    ],
)
@pytest.mark.parametrize("turns", [1, 3])
def test_what_the_template_writes_of_the_reply_is_found(
    template: str, kwargs: dict[str, Any], expected: str, turns: int
) -> None:
    messages = ASK if turns == 1 or template == ONE_TURN else [*ASK, {"role": "assistant", "content": "Red."}, *ASK]

    assert prefilled(chat_tokenizer(template), messages, None, kwargs) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Assistant: Let me think.\n<think>", "<think>"),
        ("Assistant: <think>\n", "<think>\n"),
        ("Assistant: <think>so</think>", ""),
        ("Is 1 < 2 or 2 > 1", ""),
        ("<|im_start|>assistant\n", ""),
        ("Put the result into <answer>", ""),
        ("Reason in <think>, answer in\n  <answer>", "<answer>"),
        ("<|Assistant|><think>\n", "<think>\n"),
        ("", ""),
    ],
)
def test_a_text_that_ends_in_an_opening_tag_has_begun_the_reply(text: str, expected: str) -> None:
    assert prefilled(chat_tokenizer(CHATML), text) == expected


@pytest.mark.parametrize("kwargs", [{}, {"enable_thinking": False}])
@pytest.mark.parametrize("tools", [None, [], [WEATHER], [weather]])
def test_messages_tools_and_kwargs_reach_the_template_as_in_trl(kwargs: dict[str, Any], tools: Any) -> None:
    data_utils = pytest.importorskip("trl.data_utils")
    tokenizer = chat_tokenizer(QWEN3)
    theirs = data_utils.apply_chat_template({"prompt": ASK, "chat_template_kwargs": kwargs}, tokenizer, tools)

    assert rendered(tokenizer, ASK, tools, kwargs) == theirs["prompt"]
    assert encode_prompt(tokenizer, ASK, tools, kwargs) == tokenizer(theirs["prompt"])["input_ids"]
    assert ("weather" in theirs["prompt"]) == bool(tools)


@pytest.mark.parametrize("template", [CHATML, QWEN3])
def test_messages_without_content_and_with_parts_are_served(template: str) -> None:
    tokenizer = chat_tokenizer(template)
    parts = [{"type": "text", "text": "How is "}, {"type": "text", "text": "Bern?"}]

    def conversation(question: Any, nothing: dict[str, Any]) -> list[dict[str, Any]]:
        calling = {"role": "assistant", "tool_calls": [CALL], **nothing}
        return [{"role": "user", "content": question}, calling, {"role": "tool", "content": "Wet.", "name": None}]

    shown = [
        rendered(tokenizer, conversation(question, nothing))
        for question in (parts, "How is Bern?")
        for nothing in ({}, {"content": None}, {"content": ""})
    ]

    assert len(set(shown)) == 1
    assert "How is Bern?<|im_end|>" in shown[0] and "None" not in shown[0]
    assert plain_text(conversation(parts, {"content": None})).splitlines() == [
        "How is Bern?",
        '{"type": "function", "function": {"name": "weather", "arguments": {"city": "Bern"}}}',
        "Wet.",
    ]


@pytest.mark.parametrize(
    ("template", "prompt", "words"),
    [
        (
            STRICT,
            [{"role": "system", "content": "Be brief."}],
            "the chat template refuses it: System role not supported",
        ),
        (ONE_TURN, [*ASK, *ASK], r"the chat template refuses it: One message$"),
        (CHATML, [{"role": None, "content": "a"}], "the chat template refuses it: "),
        (None, ASK, "it is a conversation, and the tokenizer has no chat template, expected text"),
        (CHATML, "half \ud83d", "the tokenizer refuses the text"),
    ],
)
def test_refusals_are_one_sentence(template: str | None, prompt: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        encode_prompt(chat_tokenizer(template), prompt)
    assert "\n" not in str(caught.value)


def test_keyword_arguments_that_the_template_never_reads_are_refused() -> None:
    tokenizer = chat_tokenizer(QWEN3)
    check_template_kwargs(tokenizer, {"enable_thinking": False, "chat_template": QWEN3})
    with pytest.raises(ValueError, match=r"^enable_thinkin is nothing that the tokenizer's chat template reads"):
        check_template_kwargs(tokenizer, {"enable_thinkin": False})
    with pytest.raises(ValueError, match=r"template_kwargs: tokenize is set by the run"):
        ChatConfig(template_kwargs={"tokenize": False})
