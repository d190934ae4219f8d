"""The prompts of a run: rows of a data set, checked before a model is loaded, and made into what the policy reads."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from maestro_fast.data.files import Row, read_rows
from maestro_fast.model.chat import ChatConfig, Tool, check_template_kwargs, encode_prompt, prefilled, rendered
from maestro_fast.records import Message, Prompts, Text
from maestro_fast.rewards import RewardSet, masks, needed_columns
from maestro_fast.settings import SettingsError
from maestro_fast.weighting import WeightPolicy

__all__ = ["DataConfig", "PromptDataset", "Row", "load_prompts"]
KWARGS_COLUMN = "chat_template_kwargs"  # TRL's name

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DataConfig:
    """Where the prompts are.

    Attributes:
        path: a .jsonl, .json, .csv, .tsv or .parquet file (all but the last may have .gz behind that), a folder of
            ``Dataset.save_to_disk``, or a name or folder for ``datasets.load_dataset``.
        split: the split that datasets loads.
        prompt_column: the column with the prompts, each a string or a list of {"role", "content"} messages, to which
            the chat template is applied. A string that is the JSON of such a list counts as one.
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

    def __post_init__(self) -> None:
        for name in ("max_prompt_tokens", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: {value}, expected at least 1 or null")


class PromptDataset(Dataset[Row]):
    """A data set of rows with a column of prompts; the rewards may read every other column.

    Attributes:
        rows: the rows. A prompt is text, or a list of messages with the system prompt of ``chat``.
        prompt_column, chat: as they were given.
        family_column: the column of the task families.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        prompt_column: str = "prompt",
        family_column: str | None = None,
        chat: ChatConfig | None = None,
        *,
        field: str = "data",
    ) -> None:
        """
        Args:
            rows: one mapping for each prompt, by column.
            prompt_column, family_column: as in ``DataConfig``.
            chat: how conversations become what the policy reads; None takes the defaults.
            field: the name of the section of the config, for errors.

        Raises:
            ValueError: there are no rows or no such column; a prompt is neither text nor messages; tools or keyword
                arguments of the template are of another type; or a text is not Unicode. The row is named.
        """
        if not rows:
            raise ValueError(f"{field}.path: holds no rows, expected at least one prompt")
        self._field, self.chat = field, chat or ChatConfig()
        self.prompt_column, self.family_column = prompt_column, family_column or "family"
        columns = list(dict.fromkeys(name for row in rows for name in row))
        if family_column is not None and family_column not in columns:
            raise ValueError(f"{field}.family_column: no column {family_column!r}, columns are {', '.join(columns)}")
        self._columns = [name for name in columns if name != prompt_column]
        self.rows = [self._checked(row, i) for i, row in enumerate(rows)]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        return self.rows[index]

    def prompts(self, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase) -> Prompts:
        """Makes of some rows what the policy reads. A row that lacks a column has None in it.

        Raises:
            ValueError: the tokenizer or its template refuses a prompt.
        """
        texts: list[Text] = [row[self.prompt_column] for row in rows]
        options = [self._template_options(row) for row in rows]
        columns = {name: [row.get(name) for row in rows] for name in self._columns}
        headers: dict[str, str] = {}
        return Prompts(
            texts,
            [encode_prompt(tokenizer, text, *own) for text, own in zip(texts, options, strict=True)],
            columns,
            self._families(rows),
            [prefilled(tokenizer, text, *own, headers=headers) for text, own in zip(texts, options, strict=True)],
        )

    @property
    def columns(self) -> list[str]:
        """The names of the columns beside the prompts, which the rewards may read."""
        return [*self._columns]

    @property
    def families(self) -> list[str]:
        """The task family of every row, "" for a row that names none."""
        return self._families(self.rows)

    def _families(self, rows: Sequence[Row]) -> list[str]:
        named = [row.get(self.family_column) for row in rows]
        return ["" if name is None or name != name else str(name) for name in named]  # Tables hold NaN for nothing.

    def check_prompts(
        self, tokenizer: PreTrainedTokenizerBase, limit: int | None = None, vocabulary: int | None = None
    ) -> int:
        """Makes every prompt into what the policy reads, and checks it.

        Args:
            tokenizer: the policy's tokenizer.
            limit: the largest number of tokens; None means no limit.
            vocabulary: the number of tokens that the policy knows, the rows of its embedding; None checks no token.

        Returns:
            The number of tokens of the longest prompt.

        Raises:
            ValueError: a prompt has no tokens, too many, or one that the policy does not know; the tokenizer or its
                template refuses it; or the template reads no tools, or no keyword argument of a name that it gets.
        """
        self._check_template(tokenizer)
        longest = 0
        for i, row in enumerate(self.rows):
            try:
                ids = encode_prompt(tokenizer, row[self.prompt_column], *self._template_options(row))
            except ValueError as error:
                raise ValueError(f"{self._field}.prompt_column: the prompt of row {i}: {error}") from error
            if not ids:
                raise ValueError(f"{self._field}.path: the prompt of row {i} has no tokens")
            if limit is not None and len(ids) > limit:
                raise ValueError(
                    f"{self._field}.max_prompt_tokens: the prompt of row {i} has {len(ids)} tokens, expected at most "
                    f"{limit}"
                )
            if vocabulary is not None and max(ids) >= vocabulary:
                token = max(ids)
                raise ValueError(
                    f"{self._field}.prompt_column: the prompt of row {i} has the token {token} "
                    f"({tokenizer.convert_ids_to_tokens(token)!r}), but the model's embedding has {vocabulary} rows: "
                    "expected a model that was resized to its tokenizer"
                )
            longest = max(longest, len(ids))
        return longest

    def _check_template(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Checks that what the template is given beside the messages reaches the prompts."""
        tools_seen, warned = False, False
        names: set[str] = set()
        for i, row in enumerate(self.rows):
            text, (tools, kwargs) = row[self.prompt_column], self._template_options(row)
            if isinstance(text, str):
                if self.chat.template_kwargs:
                    raise ValueError(
                        f"chat.template_kwargs: {', '.join(self.chat.template_kwargs)}, but the prompt of row {i} in "
                        f"{self._field} is text, to which no template is applied: expected messages, or a "
                        "chat.system_prompt beside it"
                    )
                if tools and not warned:
                    warned = True
                    logger.warning(
                        "%s: row %d has tools, but its prompt is text, to which no chat template is applied: the "
                        "policy does not see them",
                        self._field,
                        i,
                    )
                continue
            if getattr(tokenizer, "chat_template", None) is None and "chat_template" not in kwargs:
                continue  # The prompt is refused when it is encoded.
            if not kwargs.keys() <= names:
                try:
                    check_template_kwargs(tokenizer, kwargs, tools)
                except ValueError as error:
                    where = "chat.template_kwargs" if self._own_kwargs(row) is None else f"{KWARGS_COLUMN} of row {i}"
                    raise ValueError(f"{where}: {error}") from error
                names |= kwargs.keys()
            if tools and not tools_seen:
                tools_seen = True
                self._check_tools(tokenizer, i)

    def _check_tools(self, tokenizer: PreTrainedTokenizerBase, i: int) -> None:
        text, (tools, kwargs) = self.rows[i][self.prompt_column], self._template_options(self.rows[i])
        try:
            shown = rendered(tokenizer, text, tools, kwargs) != rendered(tokenizer, text, None, kwargs)
        except ValueError as error:
            raise ValueError(f"{self._field}.prompt_column: the prompt of row {i} with its tools: {error}") from error
        if not shown:
            raise ValueError(
                f"chat.tools_column: the tools of row {i} leave no trace in its prompt, because the tokenizer's chat "
                "template takes none: expected another template, or chat.tools_column: null"
            )

    def _template_options(self, row: Row) -> tuple[list[Tool] | None, dict[str, Any]]:
        """The tools of a row, and the keyword arguments that the template gets for it."""
        tools = None if self.chat.tools_column is None else row.get(self.chat.tools_column)
        return _parsed(tools) or None, {**self.chat.template_kwargs, **(self._own_kwargs(row) or {})}

    def _own_kwargs(self, row: Row) -> dict[str, Any] | None:
        kwargs: Any = _parsed(row.get(KWARGS_COLUMN))
        # A null is an option that the row leaves alone: tables give every row all options that any row has.
        return (
            {name: value for name, value in kwargs.items() if value is not None}
            if isinstance(kwargs, Mapping)
            else kwargs
        )

    def _checked(self, row: Row, i: int) -> Row:
        """The row with its prompt as text or as a list of messages."""
        field, column = self._field, self.prompt_column
        if column not in row:
            raise ValueError(f"{field}.prompt_column: no column {column!r} in row {i}, columns are {', '.join(row)}")
        prompt = _conversation(row[column])
        for name, value in {**row, column: prompt}.items():
            if not _is_unicode(value):
                raise ValueError(
                    f"{field}.path: column {name!r} of row {i} holds half of a surrogate pair, such as '\\ud83d', "
                    "expected Unicode text"
                )
        tools = None if self.chat.tools_column is None else _parsed(row.get(self.chat.tools_column))
        is_list = isinstance(tools, list) and all(isinstance(tool, Mapping) or callable(tool) for tool in tools)
        if tools is not None and not is_list:
            raise ValueError(
                f"chat.tools_column: {self.chat.tools_column!r} of row {i} in {field} is {_shown(tools)}, expected a "
                "list of JSON schemas, or chat.tools_column: null"
            )
        kwargs = self._own_kwargs(row)
        if kwargs is not None and not isinstance(kwargs, Mapping):
            raise ValueError(f"{field}.path: {KWARGS_COLUMN} of row {i} is {_shown(kwargs)}, expected a mapping")
        problem = _problem(prompt)
        if problem is not None:
            raise ValueError(
                f"{field}.prompt_column: the prompt of row {i} is {_shown(prompt)}{problem}, expected a string or "
                'a list of {"role", "content"} messages'
            )
        system = self.chat.system_prompt
        if system is not None:
            prompt = with_system_prompt(prompt, system)
        return row if prompt is row[column] else {**row, column: prompt}


def check_conditions(
    rewards: RewardSet,
    anchor: RewardSet | None,
    weights: WeightPolicy,
    dataset: PromptDataset,
    evaluation: PromptDataset | None,
) -> None:
    """Checks what rewards and the weight policy expect of the columns of the data, which are known before the run.

    These are the columns that rewards need, in the training data and in the held-out ones; the conditions ``where`` of
    all rewards, whose values may stand in held-out prompts alone; and the columns that the weight policy reads.

    Raises:
        ValueError: the data have no such column or value, so that a reward would abstain for ever, or the policy would
            fail at some batch.
    """
    rows = _rows_of_columns(dataset)
    both = rows + ([] if evaluation is None else _rows_of_columns(evaluation))
    named = [(f"rewards[{i}]", reward) for i, reward in enumerate(rewards.rewards)]
    named += [("anchor", reward) for reward in (() if anchor is None else anchor.rewards)]
    for path, reward in named:
        for kind, data in (("training", dataset), ("held-out", evaluation)):
            missing = [] if data is None else sorted(needed_columns(reward, data.rows) - {*data.columns})
            if data is not None and missing:
                raise SettingsError(
                    f"{path}: {reward.name!r} reads the column {missing[0]!r}, the columns of the {kind} data are "
                    f"{', '.join(sorted(data.columns)) or 'none'}"
                )
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


def load_prompts(config: DataConfig, chat: ChatConfig | None = None, *, field: str = "data") -> PromptDataset:
    """Reads the prompts that a config names.

    Args:
        config: where they are.
        chat: how conversations become what the policy reads; None takes the defaults.
        field: the name of the section of the config, for errors.

    Raises:
        ValueError: the file is empty or broken (the line is named), or a column is missing, see ``PromptDataset``.
        FileNotFoundError: there is no such file.
        ImportError: what reads this kind of file is not installed.
    """
    chat = chat or ChatConfig()
    structured = [name for name in (config.prompt_column, chat.tools_column, KWARGS_COLUMN) if name is not None]
    rows = read_rows(config.path, config.split, field=field, structured=structured)
    if config.limit is not None:
        rows = rows[: config.limit]
    if not rows:
        raise ValueError(f"{field}.path: {config.path} holds no rows, expected at least one prompt")
    if config.prompt_column not in rows[0]:
        raise ValueError(
            f"{field}.prompt_column: no column {config.prompt_column!r} in {config.path}, columns are "
            f"{', '.join(rows[0])}"
        )
    return PromptDataset(rows, config.prompt_column, config.family_column, chat, field=field)


def with_system_prompt(prompt: Text, system_prompt: str) -> list[Message]:
    """The conversation with a system message first, unless it has one. A text becomes the user's message."""
    messages: list[Message] = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if any(message["role"] in ("system", "developer") for message in messages):
        return messages
    return [{"role": "system", "content": system_prompt}, *messages]


def _parsed(value: Any) -> Any:
    """``value``, or what it is the JSON of: a file of text alone, such as CSV, has lists and mappings so."""
    if isinstance(value, str):
        if not value.strip():
            return None
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value.tolist() if hasattr(value, "tolist") else value


def _conversation(prompt: Any) -> Any:
    """A prompt, which becomes a list of messages where it is an array of them or their JSON."""
    if isinstance(prompt, str):
        if not re.match(r"\s*\[\s*\{", prompt):
            return prompt
        parsed = _parsed(prompt)
        is_conversation = isinstance(parsed, list) and all(isinstance(m, dict) and "role" in m for m in parsed)
        return parsed if is_conversation else prompt
    if hasattr(prompt, "tolist"):  # Tables of NumPy and pandas have arrays of mappings.
        prompt = prompt.tolist()
    return list(prompt) if isinstance(prompt, tuple) else prompt


def _problem(prompt: Any) -> str | None:
    """What is wrong with a prompt, as the end of a sentence that has shown it; None if nothing is."""
    if isinstance(prompt, str):
        return None
    if not isinstance(prompt, list):
        return ""
    if not prompt:
        return " without messages"
    for i, message in enumerate(prompt):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            return f", whose message {i} has no role"
        content = message.get("content")
        if not isinstance(content, str | list | dict | None):
            return f", whose message {i} has the content {_shown(content)}"
        for part in content if isinstance(content, list) else ():
            if not isinstance(part, str) and not (isinstance(part, dict) and isinstance(part.get("text"), str)):
                kind = part.get("type") if isinstance(part, dict) else part
                return f", whose message {i} has a part of type {kind!r}, where only text can be served"
    if not any(message.get("content") or message.get("tool_calls") for message in prompt):
        return ", none of whose messages has a content"
    return None


def _is_unicode(value: Any) -> bool:
    """Whether all text in ``value``, at any depth, can be encoded."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            return False
        return True
    if isinstance(value, Mapping):
        return all(_is_unicode(name) and _is_unicode(item) for name, item in value.items())
    return all(map(_is_unicode, value)) if isinstance(value, list | tuple) else True


def _shown(value: Any) -> str:
    return f"{type(value).__name__} {str(value)[:60]!r}"
