"""Prompts from files, and what is said when a file is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from maestro_fast.model.text_scorer import encode_prompt
from maestro_fast.training.data import DataConfig, PromptDataset, load_prompts
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


def test_parquet_and_datasets_give_the_same_rows_as_jsonl(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = [{"prompt": f"prompt {i}", "reference": str(i)} for i in range(5)]
    jsonl = load_prompts(write(tmp_path / "p.jsonl", *map(json.dumps, rows)))
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "p.parquet"))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "train.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")

    assert load_prompts(DataConfig(str(tmp_path / "p.parquet"))).rows == jsonl.rows == rows
    assert load_prompts(DataConfig(str(tmp_path / "folder"))).rows == rows


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
        (['{"question": "a"}'], r"data\.prompt_column: no column 'prompt' in .*, columns are question"),
        (['{"prompt": "a"}', '{"question": "b"}'], r"data\.prompt_column: no column 'prompt' in row 1"),
        (['{"prompt": 3}'], r"data\.prompt_column: the prompt of row 0 is int '3', expected a string or a list"),
        (['{"prompt": [{"role": "user"}]}'], r"data\.prompt_column: the prompt of row 0 is list"),
    ],
)
def test_a_broken_file_is_described(tmp_path: Path, lines: list[str], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        load_prompts(write(tmp_path / "p.jsonl", *lines))


def test_a_missing_file_is_described(tmp_path: Path) -> None:
    for name in ("none.jsonl", "none.parquet"):
        with pytest.raises(FileNotFoundError, match=r"data\.path: no file .*none"):
            load_prompts(DataConfig(str(tmp_path / name)))


def test_a_named_family_column_has_to_exist() -> None:
    with pytest.raises(ValueError, match=r"data\.family_column: no column 'topic', columns are prompt"):
        PromptDataset([{"prompt": "a"}], family_column="topic")


def test_prompt_lengths_are_checked() -> None:
    dataset = PromptDataset([{"prompt": "red"}, {"prompt": "the quick brown fox"}])

    assert dataset.check_prompts(tiny_tokenizer()) == max(
        len(encode_prompt(tiny_tokenizer(), row["prompt"])) for row in dataset.rows
    )
    with pytest.raises(ValueError, match=r"data\.max_prompt_tokens: the prompt of row 1 has \d+ tokens"):
        dataset.check_prompts(tiny_tokenizer(), 3)
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
