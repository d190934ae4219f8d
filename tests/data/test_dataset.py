"""Prompts from files, and what is said when a file is wrong."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from maestro_fast.data.config import DataConfig
from maestro_fast.data.dataset import PromptDataset
from maestro_fast.data.load import load_prompts
from maestro_fast.model.chat import ChatConfig, encode_prompt
from tests.chat_templates import QWEN3, STRICT, chat_tokenizer
from tests.tiny import tiny_tokenizer

CHAT = [{"role": "user", "content": "Name a colour."}]


def write(path: Path, *lines: str) -> DataConfig:
    path.write_text("\n".join(lines), encoding="utf-8")
    return DataConfig(str(path))


def test_jsonl_rows_keep_their_columns_and_families(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "family": "fact", "reference": "x"}, {"prompt": CHAT, "family": None, "reference": None}]

    dataset = load_prompts(write(tmp_path / "p.jsonl", json.dumps(rows[0]), "", json.dumps(rows[1])))
    prompts = dataset.prompts([dataset[0], dataset[1]], tiny_tokenizer())

    assert prompts.texts == ["a", CHAT]
    assert prompts.families == ["fact", ""]
    assert prompts.columns["reference"] == ["x", None]


def test_messages_go_through_the_chat_template() -> None:
    tokenizer = tiny_tokenizer()

    assert tokenizer.decode(encode_prompt(tokenizer, CHAT)) == "<|user|>Name a colour.<|end|><|assistant|>"
    assert encode_prompt(tokenizer, "red") == tokenizer("red")["input_ids"]


def test_repeated_prompts_stand_side_by_side() -> None:
    dataset = PromptDataset([{"prompt": "a", "n": 1}, {"prompt": "b", "n": 2}])

    prompts = dataset.prompts(dataset.rows, tiny_tokenizer()).repeat(2)

    assert (prompts.texts, prompts.columns["n"], len(prompts.token_ids)) == (["a", "a", "b", "b"], [1, 1, 2, 2], 4)


@pytest.mark.parametrize(
    ("lines", "complaint"),
    [
        (['{"prompt": "a"}', "", '{"prompt": '], r"data\.path: .*p\.jsonl, line 3 is not JSON"),
        (['{"prompt": "a"}', "[1]"], r"data\.path: .*line 2 holds a list, expected an object"),
        ([], r"data\.path: .*p\.jsonl holds no rows"),
        (['{"question": "a"}'], r"data\.prompt_column: no column 'prompt' or 'messages' in .*, columns are question"),
        (['{"prompt": "a"}', '{"question": "b"}'], r"data\.prompt_column: no column 'prompt' in row 1"),
        (['{"prompt": 3}'], r"data\.prompt_column: the prompt of row 0 is int '3', expected a string or a list"),
        (
            ['{"prompt": [{"role": "user"}]}'],
            r"data\.prompt_column: the prompt of row 0 is list.*, none of whose messages",
        ),
        (['{"prompt": []}'], r"the prompt of row 0 is list '\[\]' without messages, expected a string or a list"),
        (['{"prompt": null}'], r"the prompt of row 0 is NoneType 'None', expected a string or a list"),
        (['{"prompt": [{"from": "human", "value": "a"}]}'], r"row 0 is list .*, whose message 0 has no role, expected"),
        (['{"prompt": [{"role": "user", "content": 3}]}'], r"whose message 0 has the content int '3', expected"),
        (
            ['{"prompt": [{"role": "user", "content": [{"type": "image"}]}]}'],
            r"whose message 0 has a part of type 'image', where only text can be served",
        ),
        (
            ['{"prompt": "a"}', '{"prompt": "\\ud83d"}'],
            r"data\.path: column 'prompt' of row 1 holds half of a surrogate",
        ),
        (['{"prompt": "a", "x": {"y": ["\\ud83d"]}}'], r"data\.path: column 'x' of row 0 holds half of a surrogate"),
        (
            ['{"prompt": "a", "tools": "hammer"}'],
            r"chat\.tools_column: 'tools' of row 0 in data is str 'hammer', expected",
        ),
        (['{"prompt": "a", "tools": ["hammer"]}'], r"expected a list of JSON schemas, or chat\.tools_column: null"),
        (
            ['{"prompt": "a", "chat_template_kwargs": 3}'],
            r"chat_template_kwargs of row 0 is int '3', expected a mapping",
        ),
    ],
)
def test_a_broken_file_is_described(tmp_path: Path, lines: list[str], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        load_prompts(write(tmp_path / "p.jsonl", *lines))


def test_a_named_family_column_has_to_exist() -> None:
    with pytest.raises(ValueError, match=r"data\.family_column: no column 'topic', columns are prompt"):
        PromptDataset([{"prompt": "a"}], family_column="topic")


def test_prompt_lengths_are_checked() -> None:
    dataset = PromptDataset([{"prompt": "red"}, {"prompt": "the quick brown fox"}])

    assert dataset.check_prompts(tiny_tokenizer()) == max(
        len(encode_prompt(tiny_tokenizer(), row["prompt"])) for row in dataset.rows
    )
    dataset = PromptDataset([{"prompt": "red"}, {"prompt": "the quick brown fox"}], max_prompt_tokens=3)
    with pytest.raises(ValueError, match=r"data\.max_prompt_tokens: the prompt of row 1 has \d+ tokens"):
        dataset.check_prompts(tiny_tokenizer())
    with pytest.raises(ValueError, match=r"data\.path: the prompt of row 0 has no tokens"):
        PromptDataset([{"prompt": ""}]).check_prompts(tiny_tokenizer())


def test_a_column_that_some_rows_leave_out_is_none_there() -> None:
    rows = [{"prompt": "a"}, {"prompt": "b", "reference": "x"}, {"prompt": "c", "note": "n"}]
    dataset = PromptDataset(rows)

    assert dataset.prompts(rows, tiny_tokenizer()).columns == {
        "reference": [None, "x", None],
        "note": [None, None, "n"],
    }
    assert dataset.prompts(rows[:1], tiny_tokenizer()).columns == {"reference": [None], "note": [None]}
    assert PromptDataset([*rows, {"prompt": "d", "kind": "fact"}], family_column="kind").families == [
        "",
        "",
        "",
        "fact",
    ]


def test_families_keep_their_names_whatever_their_type() -> None:
    values = [0, 0.0, False, 3, "fact", None, "", float("nan")]
    dataset = PromptDataset([{"prompt": "a", "family": value} for value in values])

    assert dataset.families == ["0", "0.0", "False", "3", "fact", "", "", ""]


WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}


def read(dataset: PromptDataset, tokenizer: Any) -> list[str]:
    dataset.check_prompts(tokenizer)
    return [tokenizer.decode(ids) for ids in dataset.prompts(dataset.rows, tokenizer).token_ids]


def test_tools_and_template_options_of_the_run_and_of_the_row_reach_the_prompt() -> None:
    rows = [
        {"prompt": CHAT, "tools": [WEATHER]},
        {"prompt": CHAT, "tools": json.dumps([WEATHER]), "chat_template_kwargs": {"enable_thinking": True}},
        {"prompt": CHAT, "tools": None, "chat_template_kwargs": None},
        {"prompt": CHAT, "tools": []},
        {"prompt": CHAT, "chat_template_kwargs": {"enable_thinking": None}},  # as a table that has it in other rows
    ]
    tokenizer = chat_tokenizer(QWEN3)
    dataset = PromptDataset(rows, chat=ChatConfig(template_kwargs={"enable_thinking": False}))
    tooled, thinking, bare, empty, null = read(dataset, tokenizer)

    assert json.dumps(WEATHER) in tooled and tooled.endswith("</think>\n\n")
    assert json.dumps(WEATHER) in thinking and thinking.endswith("<|im_start|>assistant\n")
    assert (
        bare
        == empty
        == null
        == "<|im_start|>user\nName a colour.<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    )
    prompts = dataset.prompts(rows, tokenizer)
    assert (
        prompts.repeat(2).prefills[::2]
        == prompts.prefills
        == ["<think>\n\n</think>\n\n", "", *prompts.prefills[:1] * 3]
    )
    assert [part.prefills for part in prompts.split(5)] == [[prefill] for prefill in prompts.prefills]
    assert prompts.columns["tools"] == [row.get("tools") for row in rows]  # The rewards read them as they were.
    unseen = read(PromptDataset(rows[:1], chat=ChatConfig(tools_column=None)), tokenizer)
    assert "weather" not in unseen[0]


def test_a_system_prompt_stands_first_where_there_is_none() -> None:
    own = [{"role": "system", "content": "Be long."}, *CHAT]
    rows = [{"prompt": CHAT}, {"prompt": own}, {"prompt": "Name a colour."}]
    dataset = PromptDataset(rows, chat=ChatConfig(system_prompt="Be brief."))
    added, kept, text = read(dataset, tiny_tokenizer())

    assert added == text == "<|system|>Be brief.<|end|><|user|>Name a colour.<|end|><|assistant|>"
    assert kept == "<|system|>Be long.<|end|><|user|>Name a colour.<|end|><|assistant|>"
    assert dataset.prompts(dataset.rows, tiny_tokenizer()).texts[0] == [
        {"role": "system", "content": "Be brief."},
        *CHAT,
    ]
    assert rows[0]["prompt"] == CHAT, "The rows that were given have changed."


def test_text_stays_as_it_is_unless_it_is_the_json_of_messages() -> None:
    texts = ["Name a colour.", '[{"x": 1}]', '[{"role": "user"', json.dumps(CHAT), f" {json.dumps(CHAT, indent=1)}"]
    dataset = PromptDataset([{"prompt": text} for text in texts])

    assert [row["prompt"] for row in dataset.rows] == [*texts[:3], CHAT, CHAT]
    assert PromptDataset([{"prompt": np.array(CHAT, dtype=object)}]).rows == [{"prompt": CHAT}]


@pytest.mark.parametrize(
    ("rows", "chat", "template", "complaint"),
    [
        (
            [{"prompt": CHAT}, {"prompt": [{"role": "system", "content": "Sing."}, *CHAT]}],
            {},
            STRICT,
            r"data\.prompt_column: the prompt of row 1: the chat template refuses it: System role not supported$",
        ),
        (
            [{"prompt": CHAT}],
            {},
            None,
            r"the prompt of row 0: it is a conversation, and the tokenizer has no chat template",
        ),
        (
            [{"prompt": CHAT}, {"prompt": CHAT, "tools": [WEATHER]}],
            {},
            STRICT,
            r"chat\.tools_column: the tools of row 1 leave no trace in its prompt",
        ),
        (
            [{"prompt": CHAT}],
            {"template_kwargs": {"enable_thinkin": False}},
            QWEN3,
            r"chat\.template_kwargs: enable_thinkin is nothing that the tokenizer's chat template reads",
        ),
        (
            [{"prompt": CHAT, "chat_template_kwargs": {"enable_thinkin": False}}],
            {},
            QWEN3,
            r"chat_template_kwargs of row 0: enable_thinkin is nothing",
        ),
        (
            [{"prompt": CHAT}, {"prompt": "a"}],
            {"template_kwargs": {"enable_thinking": False}},
            QWEN3,
            r"chat\.template_kwargs: enable_thinking, but the prompt of row 1 in data is text",
        ),
    ],
)
def test_what_the_template_cannot_serve_is_said(
    rows: list[dict[str, Any]], chat: dict[str, Any], template: str | None, complaint: str
) -> None:
    with pytest.raises(ValueError, match=complaint):
        PromptDataset(rows, chat=ChatConfig(**chat)).check_prompts(chat_tokenizer(template))


def test_tools_beside_a_text_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    PromptDataset([{"prompt": "a", "tools": [WEATHER]}]).check_prompts(tiny_tokenizer())

    assert "data: row 0 has tools, but its prompt is text" in caplog.text


def test_a_token_that_the_model_does_not_know_is_named() -> None:
    dataset = PromptDataset([{"prompt": "red"}, {"prompt": "red <new>"}], field="evaluation.data")
    tokenizer = chat_tokenizer(None, "<new>")

    assert dataset.check_prompts(tokenizer, vocabulary=len(tokenizer)) > 0
    with pytest.raises(
        ValueError,
        match=r"^evaluation\.data\.prompt_column: the prompt of row 1 has the token 320 \('<new>'\), but the model's "
        r"embedding has 320 rows",
    ):
        dataset.check_prompts(tokenizer, vocabulary=320)


REPLY = {"role": "assistant", "content": "Red."}


def test_a_conversation_for_supervised_training_is_a_prompt_without_its_reply(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"messages": [*CHAT, REPLY]},
        {"messages": [*CHAT, REPLY, *CHAT, {"role": "assistant", "content": [{"type": "text", "text": "Blue."}]}]},
        {"messages": CHAT},
        {"messages": [*CHAT, REPLY], "reference": "mine"},
        {"messages": [*CHAT, {"role": "assistant", "tool_calls": [WEATHER]}]},
        {"messages": json.dumps([*CHAT, REPLY])},
        {"messages": "Name a colour."},
    ]
    data = load_prompts(write(tmp_path / "p.jsonl", *map(json.dumps, rows)))
    prompts = data.prompts(data.rows, tiny_tokenizer())

    assert prompts.texts == [CHAT, [*CHAT, REPLY, *CHAT], CHAT, CHAT, CHAT, CHAT, "Name a colour."]
    assert prompts.columns == {"reference": ["Red.", "Blue.", None, "mine", None, "Red.", None]}
    assert data.describe() == [
        "data: 7 prompts; 5 conversations have lost the reply that they end in, which is the column 'reference' where "
        "there was none"
    ]


def test_a_column_called_prompt_comes_first_and_keeps_what_it_ends_in(tmp_path: Path) -> None:
    """Such a conversation goes to the template as it is, so another reply follows that of the prompt."""
    row = {"messages": [*CHAT, REPLY], "prompt": [*CHAT, REPLY]}
    data = load_prompts(write(tmp_path / "p.jsonl", json.dumps(row)))

    assert data.rows == [row] and data.columns == ["messages"]
    assert read(data, tiny_tokenizer()) == [
        "<|user|>Name a colour.<|end|><|assistant|>Red.<|end|><|assistant|>",
    ]
    with pytest.raises(ValueError, match=r"data\.prompt_column: the prompt of row 0 is list .*, a reply alone"):
        PromptDataset([{"messages": [REPLY]}], "messages")


def test_a_family_and_a_system_prompt_of_the_data_set_serve_rows_without_one(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "family": "fact"}, {"prompt": "b", "family": None}, {"prompt": CHAT}]
    config = write(tmp_path / "p.jsonl", *map(json.dumps, rows))
    data = load_prompts(replace(config, family="poem", system_prompt="Sing."), ChatConfig(system_prompt="Be brief."))

    assert data.families == ["fact", "poem", "poem"]
    assert [row["prompt"][0]["content"] for row in data.rows] == ["Sing."] * 3
    named = load_prompts(replace(config, family="poem", family_column="family"))
    assert named.families == data.families
