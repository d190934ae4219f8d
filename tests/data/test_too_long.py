"""Prompts with too many tokens are an error, left out or cut, and what is left is still a prompt."""

from __future__ import annotations

from typing import Any

import pytest

from maestro_fast.data.dataset import PromptDataset
from maestro_fast.data.too_long import shortened
from maestro_fast.model.chat import encode_prompt
from tests.chat_templates import STRICT, chat_tokenizer
from tests.tiny import tiny_tokenizer

SYSTEM = {"role": "system", "content": "Be brief."}
TURNS = [
    {"role": "user", "content": "the first question of all"},
    {"role": "assistant", "content": "the first answer"},
    {"role": "user", "content": "the second question of all"},
    {"role": "assistant", "content": None, "tool_calls": [{"type": "function"}]},
    {"role": "tool", "content": "it is wet"},
]


def words(prompt: Any) -> int:
    """Counts the words of a text, or of messages with one more for each message."""
    return len(prompt.split()) if isinstance(prompt, str) else sum(1 + words(m["content"] or "") for m in prompt)


@pytest.mark.parametrize("limit", range(1, 40))
def test_a_text_keeps_as_much_of_its_end_as_fits(limit: int) -> None:
    text, tokenizer = "Tell a story about the sea. The sea was wide, the night was long.", tiny_tokenizer()
    ids = encode_prompt(tokenizer, text)
    found = shortened(text, limit, lambda part: len(encode_prompt(tokenizer, part)))

    assert isinstance(found, str) and text.endswith(found)
    kept = encode_prompt(tokenizer, found)
    assert len(kept) == min(limit, len(ids))  # verl's truncation "left" keeps as many, the last ones
    assert tokenizer.decode(ids[-limit:]).endswith(found) or len(found) >= len(tokenizer.decode(ids[-limit:]))


@pytest.mark.parametrize(
    ("limit", "kept"),
    [
        (99, [SYSTEM, *TURNS]),
        (24, [SYSTEM, *TURNS]),
        (23, [SYSTEM, *TURNS[2:]]),
        (14, [SYSTEM, *TURNS[2:]]),
        (13, [SYSTEM, {"role": "user", "content": " second question of all"}, *TURNS[3:]]),
        (11, [SYSTEM, {"role": "user", "content": " of all"}, *TURNS[3:]]),
        (10, [SYSTEM, {"role": "user", "content": " all"}, *TURNS[3:]]),
        (8, None),
    ],
)
def test_a_conversation_loses_its_oldest_turns_first_and_never_the_system(limit: int, kept: Any) -> None:
    """Counted: system 3, turns 6 + 4, 6 + 1 + 4; a turn begins at a message of the user."""
    found = shortened([SYSTEM, *TURNS], limit, words)

    assert words([SYSTEM, *TURNS]) == 24
    assert found == kept


def test_what_a_template_refuses_does_not_fit() -> None:
    """A template that wants the roles to alternate gets a conversation that begins with the user."""
    tokenizer = chat_tokenizer(STRICT)
    talk = [*TURNS[:2], TURNS[2]]
    whole, last = (len(encode_prompt(tokenizer, messages)) for messages in (talk, talk[2:]))
    count = lambda part: len(encode_prompt(tokenizer, part))  # noqa: E731

    assert shortened(talk, whole - 1, count) == talk[2:]
    cut = shortened(talk, last - 4, count)
    assert cut is not None and count(cut) <= last - 4 and str(talk[2]["content"]).endswith(cut[0]["content"])  # type: ignore[index]
    assert shortened([SYSTEM, TURNS[0]], 99, count) is None  # This template knows no system message.


def test_rows_are_left_out_or_cut_and_counted() -> None:
    rows = [{"prompt": text} for text in ("red", "the quick brown fox jumps over", "Sea", "the lazy dog jumps over")]
    lengths = [len(encode_prompt(tiny_tokenizer(), row["prompt"])) for row in rows]
    limit = max(lengths[0], lengths[2])
    dropped, cut = (PromptDataset(rows, max_prompt_tokens=limit, too_long=rule) for rule in ("drop", "cut"))  # type: ignore[arg-type]

    assert dropped.check_prompts(tiny_tokenizer()) == cut.check_prompts(tiny_tokenizer()) == limit
    assert [row["prompt"] for row in dropped.rows] == ["red", "Sea"]  # verl keeps what has at most the limit
    assert [dropped.name_of(i) for i in range(2)] == ["row 0", "row 2"]
    assert dropped.describe() == [f"data: 2 prompts; 2 of more than {limit} tokens were left out"]
    assert cut.describe() == [f"data: 4 prompts; 2 of more than {limit} tokens were cut"]
    assert all(short["prompt"] in row["prompt"] for short, row in zip(cut.rows, rows, strict=True))
    assert cut.check_prompts(tiny_tokenizer()) == limit and cut.changes.cut == 2, "A second check changes nothing."


@pytest.mark.parametrize(
    ("rule", "prompt", "complaint"),
    [
        (
            "error",
            "the quick brown fox",
            r"the prompt of row 1 has \d+ tokens, expected at most 2; too_long: drop",
        ),
        ("cut", [SYSTEM, TURNS[0]], r"data\.too_long: cut leaves nothing of the prompt of row 1: what may not be cut"),
    ],
)
def test_what_cannot_be_shortened_is_named(rule: Any, prompt: Any, complaint: str) -> None:
    data = PromptDataset([{"prompt": "a"}, {"prompt": prompt}], max_prompt_tokens=2, too_long=rule)
    with pytest.raises(ValueError, match=complaint):
        data.check_prompts(tiny_tokenizer())


def test_a_limit_that_leaves_no_prompt_is_named() -> None:
    data = PromptDataset([{"prompt": "the quick brown fox"}] * 2, max_prompt_tokens=2, too_long="drop")
    with pytest.raises(ValueError, match=r"^data\.max_prompt_tokens: 2, but all 2 prompts have more tokens"):
        data.check_prompts(tiny_tokenizer())
