"""Reads prompts from JSONL, Parquet or ``datasets.load_dataset``, and checks them before a model is loaded."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from maestro_fast.model.text_scorer import encode_prompt
from maestro_fast.records import Prompts, Text
from maestro_fast.rewards import RewardSet, masks
from maestro_fast.weighting import WeightPolicy

Row = dict[str, Any]


@dataclass(frozen=True)
class DataConfig:
    """Where the prompts are.

    Attributes:
        path: a .jsonl or .parquet file, or a name or directory for ``datasets.load_dataset``.
        split: the split that ``datasets.load_dataset`` loads.
        prompt_column: the column with the prompts, each a string or a list of {"role", "content"} messages, to which
            the chat template is applied.
        family_column: the column with the task family of each prompt, for logs and reports; null means "family" where
            there is such a column.
        max_prompt_tokens: the limit above which a prompt is an error; null means no limit.
        limit: how many of the first rows are used; null means all.
    """

    path: str
    split: str = "train"
    prompt_column: str = "prompt"
    family_column: str | None = None
    max_prompt_tokens: int | None = None
    limit: int | None = None


class PromptDataset(Dataset[Row]):
    """A data set of rows with a column of prompts; the rewards may read every other column."""

    def __init__(self, rows: Sequence[Row], prompt_column: str = "prompt", family_column: str | None = None) -> None:
        """
        Args:
            rows: one mapping for each prompt, by column.
            prompt_column, family_column: as in ``DataConfig``.

        Raises:
            ValueError: there are no rows or no such column, or a prompt is neither text nor messages. Its row is named.
        """
        if not rows:
            raise ValueError("data.path: holds no rows, expected at least one prompt")
        columns = list(dict.fromkeys(name for row in rows for name in row))
        if family_column is not None and family_column not in columns:
            raise ValueError(f"data.family_column: no column {family_column!r}, columns are {', '.join(columns)}")
        for i, row in enumerate(rows):
            if prompt_column not in row:
                raise ValueError(
                    f"data.prompt_column: no column {prompt_column!r} in row {i}, columns are {', '.join(row)}"
                )
            _check_prompt(row[prompt_column], i)
        self.rows = list(rows)
        self._columns = [name for name in columns if name != prompt_column]
        self.prompt_column = prompt_column
        self.family_column = family_column or "family"

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        return self.rows[index]

    def prompts(self, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase) -> Prompts:
        """Tokenises the prompts of some rows. A row that lacks a column has None in it."""
        texts: list[Text] = [row[self.prompt_column] for row in rows]
        columns = {name: [row.get(name) for row in rows] for name in self._columns}
        return Prompts(texts, [encode_prompt(tokenizer, text) for text in texts], columns, self._families(rows))

    @property
    def families(self) -> list[str]:
        """The task family of every row, "" for a row that names none."""
        return self._families(self.rows)

    def _families(self, rows: Sequence[Row]) -> list[str]:
        return [str(row.get(self.family_column) or "") for row in rows]

    def check_lengths(self, tokenizer: PreTrainedTokenizerBase, limit: int | None) -> int:
        """Checks that every prompt has tokens, and no more than ``limit`` of them.

        Returns:
            The number of tokens of the longest prompt.

        Raises:
            ValueError: a prompt has no tokens, or too many.
        """
        longest = 0
        for i, row in enumerate(self.rows):
            tokens = len(encode_prompt(tokenizer, row[self.prompt_column]))
            if tokens == 0:
                raise ValueError(f"data.path: the prompt of row {i} has no tokens")
            if limit is not None and tokens > limit:
                raise ValueError(
                    f"data.max_prompt_tokens: the prompt of row {i} has {tokens} tokens, expected at most {limit}"
                )
            longest = max(longest, tokens)
        return longest


def check_conditions(
    rewards: RewardSet,
    anchor: RewardSet | None,
    weights: WeightPolicy,
    dataset: PromptDataset,
    evaluation: PromptDataset | None,
) -> None:
    """Checks what rewards and the weight policy expect of the columns of the data, which are known before the run.

    These are the conditions ``where`` of all rewards, whose values may stand in held-out prompts alone, and the columns
    that the weight policy reads.

    Raises:
        ValueError: the data have no such column or value, so that a reward would abstain for ever, or the policy would
            fail at some batch.
    """
    rows = _rows_of_columns(dataset)
    both = rows + ([] if evaluation is None else _rows_of_columns(evaluation))
    named = [(f"rewards[{i}]", reward) for i, reward in enumerate(rewards.rewards)]
    named += [("anchor", reward) for reward in (() if anchor is None else anchor.rewards)]
    for path, reward in named:
        for where, mask in masks(reward, path):
            mask.check_rows(both, where)
    columns = sorted({name for row in rows for name in row})
    for name in weights.needs_columns:
        if name not in columns:
            listed = ", ".join(columns) or "none"
            raise ValueError(f"weights: policy {weights.name!r} reads the column {name!r}, the data has {listed}")
    check = getattr(weights, "check_rows", None)
    if check is not None:
        check(rows)


def _rows_of_columns(dataset: PromptDataset) -> list[Row]:
    """The rows of a data set without their prompts, which are no column for a reward."""
    return [{name: value for name, value in row.items() if name != dataset.prompt_column} for row in dataset.rows]


def load_prompts(config: DataConfig) -> PromptDataset:
    """Reads the prompts that a config names.

    Raises:
        ValueError: the file is empty or broken (the line is named), or a column is missing.
        FileNotFoundError: there is no such file.
    """
    path = Path(config.path)
    if path.suffix == ".jsonl":
        rows = _read_jsonl(path)
    elif path.suffix == ".parquet":
        rows = _read_parquet(path)
    else:
        rows = _read_dataset(config)
    if config.limit is not None:
        rows = rows[: config.limit]
    if not rows:
        raise ValueError(f"data.path: {config.path} holds no rows, expected at least one prompt")
    if config.prompt_column not in rows[0]:
        raise ValueError(
            f"data.prompt_column: no column {config.prompt_column!r} in {config.path}, columns are {', '.join(rows[0])}"
        )
    return PromptDataset(rows, config.prompt_column, config.family_column)


def _read_jsonl(path: Path) -> list[Row]:
    if not path.is_file():
        raise FileNotFoundError(f"data.path: no file {path}")
    rows: list[Row] = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"data.path: {path}, line {number} is not JSON: {error}") from error
            if not isinstance(row, dict):
                raise ValueError(f"data.path: {path}, line {number} holds a {type(row).__name__}, expected an object")
            rows.append(row)
    return rows


def _read_parquet(path: Path) -> list[Row]:
    if not path.is_file():
        raise FileNotFoundError(f"data.path: no file {path}")
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise ImportError('data.path: Parquet needs pyarrow, pip install "maestro-fast[data]"') from error
    rows: list[Row] = parquet.read_table(path).to_pylist()
    return rows


def _read_dataset(config: DataConfig) -> list[Row]:
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            f'data.path: {config.path} is no .jsonl or .parquet file; for other data pip install "maestro-fast[data]"'
        ) from error
    return [dict(row) for row in datasets.load_dataset(config.path, split=config.split)]


def _check_prompt(prompt: Any, row: int) -> None:
    if isinstance(prompt, str):
        return
    if (
        isinstance(prompt, list)
        and prompt
        and all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in prompt)
    ):
        return
    raise ValueError(
        f"data.prompt_column: the prompt of row {row} is {type(prompt).__name__} {str(prompt)[:60]!r}, expected a "
        'string or a list of {"role", "content"} messages'
    )
