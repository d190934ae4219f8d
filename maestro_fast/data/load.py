"""Reads the prompts that a config names: one data set, several, or a stream."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

from maestro_fast.data.config import Data, DataConfig, named_sets
from maestro_fast.data.dataset import PromptDataset
from maestro_fast.data.files import Row, open_rows, read_rows
from maestro_fast.data.mixture import MixedPrompts
from maestro_fast.data.streaming import StreamPrompts
from maestro_fast.data.template import KWARGS_COLUMN
from maestro_fast.model.chat import ChatConfig

_PROMPT_COLUMNS = ("prompt", "messages")  # where the config names none


def load_prompts(config: Data, chat: ChatConfig | None = None, *, field: str = "data") -> PromptDataset:
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
    parts = [_load(each, chat, name) for name, each in named_sets(config, field)]
    if isinstance(config, DataConfig):
        return parts[0]
    shares = [each.share for each in config if each.share is not None]
    return MixedPrompts(parts, shares or None, chat)


def _load(config: DataConfig, chat: ChatConfig, field: str) -> PromptDataset:
    columns = _PROMPT_COLUMNS if config.prompt_column is None else (config.prompt_column,)
    structured = [name for name in (*columns, chat.tools_column, KWARGS_COLUMN) if name is not None]
    if config.system_prompt is not None:
        chat = replace(chat, system_prompt=config.system_prompt)
    options: dict[str, Any] = {
        "family_column": config.family_column,
        "chat": chat,
        "field": field,
        "family": config.family,
        "max_prompt_tokens": config.max_prompt_tokens,
        "too_long": config.too_long,
    }
    if config.streaming:
        source = open_rows(config.path, config.split, field=field, structured=structured)
        first = list(islice(source(), 1))
        column = _prompt_column(first, columns, config.path, field)
        return StreamPrompts(
            lambda: islice(source(), config.limit), config.shuffle_buffer, prompt_column=column, **options
        )
    rows = read_rows(config.path, config.split, field=field, structured=structured)[: config.limit]
    return PromptDataset(rows, _prompt_column(rows, columns, config.path, field), **options)


def _prompt_column(rows: Sequence[Row], columns: Sequence[str], path: str, field: str) -> str:
    """The first of ``columns`` that the data have."""
    if not rows:
        raise ValueError(f"{field}.path: {path} holds no rows, expected at least one prompt")
    for name in columns:
        if name in rows[0]:
            return name
    named = " or ".join(map(repr, columns))
    raise ValueError(f"{field}.prompt_column: no column {named} in {path}, columns are {', '.join(rows[0])}")
