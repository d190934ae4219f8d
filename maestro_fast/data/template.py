"""What the chat template gets for a row beside its messages, and whether that reaches the prompt."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

from maestro_fast.data.conversation import parsed
from maestro_fast.data.files import Row
from maestro_fast.model.chat import ChatConfig, Tool, check_template_kwargs, rendered
from maestro_fast.records import Text

KWARGS_COLUMN = "chat_template_kwargs"  # TRL's name

logger = logging.getLogger(__name__)


def template_options(row: Row, chat: ChatConfig) -> tuple[list[Tool] | None, dict[str, Any]]:
    """The tools of a row, and the keyword arguments that the template gets for it."""
    tools = None if chat.tools_column is None else row.get(chat.tools_column)
    return parsed(tools) or None, {**chat.template_kwargs, **(own_kwargs(row) or {})}


def own_kwargs(row: Row) -> Any:
    """The keyword arguments of a row alone, a dict or None. What is no mapping comes back as it is."""
    kwargs = parsed(row.get(KWARGS_COLUMN))
    # A null is an option that the row leaves alone: tables give every row all options that any row has.
    if isinstance(kwargs, Mapping):
        return {name: value for name, value in kwargs.items() if value is not None}
    return kwargs


class TemplateCheck:
    """Checks, row after row, that what the template is given beside the messages reaches the prompts."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, chat: ChatConfig, field: str) -> None:
        """
        Args:
            tokenizer: the policy's tokenizer.
            chat: how conversations become what the policy reads.
            field: the name of the section of the config, for errors.
        """
        self.tokenizer, self._chat, self._field = tokenizer, chat, field
        self._tools_seen, self._warned = False, False
        self._names: set[str] = set()  # the keyword arguments that the template is known to read

    def see(self, text: Text, row: Row, i: int) -> None:
        """Checks the row with the number ``i``, whose prompt is ``text``.

        Raises:
            ValueError: the template reads no tools, or no keyword argument of a name that it gets.
        """
        tools, kwargs = template_options(row, self._chat)
        if isinstance(text, str):
            self._see_text(i, has_tools=bool(tools))
            return
        if getattr(self.tokenizer, "chat_template", None) is None and "chat_template" not in kwargs:
            return  # The prompt is refused when it is encoded.
        if not kwargs.keys() <= self._names:
            try:
                check_template_kwargs(self.tokenizer, kwargs, tools)
            except ValueError as error:
                where = "chat.template_kwargs" if own_kwargs(row) is None else f"{KWARGS_COLUMN} of row {i}"
                raise ValueError(f"{where}: {error}") from error
            self._names |= kwargs.keys()
        if tools and not self._tools_seen:
            self._tools_seen = True
            self._check_tools(text, tools, kwargs, i)

    def _see_text(self, i: int, *, has_tools: bool) -> None:
        if self._chat.template_kwargs:
            raise ValueError(
                f"chat.template_kwargs: {', '.join(self._chat.template_kwargs)}, but the prompt of row {i} in "
                f"{self._field} is text, to which no template is applied: expected messages, or a "
                "chat.system_prompt beside it"
            )
        if has_tools and not self._warned:
            self._warned = True
            logger.warning(
                "%s: row %d has tools, but its prompt is text, to which no chat template is applied: the policy does "
                "not see them",
                self._field,
                i,
            )

    def _check_tools(self, text: Text, tools: list[Tool], kwargs: dict[str, Any], i: int) -> None:
        assert not isinstance(text, str)
        try:
            shown = rendered(self.tokenizer, text, tools, kwargs) != rendered(self.tokenizer, text, None, kwargs)
        except ValueError as error:
            raise ValueError(f"{self._field}.prompt_column: the prompt of row {i} with its tools: {error}") from error
        if not shown:
            raise ValueError(
                f"chat.tools_column: the tools of row {i} leave no trace in its prompt, because the tokenizer's chat "
                "template takes none: expected another template, or chat.tools_column: null"
            )
