"""The prompts of a run: rows of a data set, checked before a model is loaded, and made into what the policy reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from maestro_fast.data.config import TooLong
from maestro_fast.data.conversation import (
    conversation,
    is_unicode,
    parsed,
    problem,
    shown,
    with_system_prompt,
)
from maestro_fast.data.files import Row
from maestro_fast.data.order import PromptOrder, ShuffledOrder
from maestro_fast.data.template import KWARGS_COLUMN, TemplateCheck, own_kwargs, template_options
from maestro_fast.data.too_long import shortened
from maestro_fast.model.chat import ChatConfig, encode_prompt, prefilled
from maestro_fast.records import Message, Prompts, Text, content_text

__all__ = ["PromptDataset", "Row"]
REPLY_COLUMN = "reference"


@dataclass
class Changes:
    """How many rows of a data set were changed before they became prompts.

    Attributes:
        replies: conversations that have lost a last message of the assistant.
        dropped: rows that were left out because their prompts have too many tokens.
        cut: prompts that were shortened.
    """

    replies: int = 0
    dropped: int = 0
    cut: int = 0

    @staticmethod
    def of(parts: Sequence[Changes]) -> Changes:
        """The sums over several data sets."""
        return Changes(*(sum(getattr(part, name) for part in parts) for name in ("replies", "dropped", "cut")))


class PromptDataset(Dataset[Row]):
    """A data set of rows with a column of prompts; the rewards may read every other column.

    Attributes:
        rows: the rows. A prompt is text, or a list of messages with the system prompt of ``chat``.
        prompt_column, chat, field: as they were given.
        family_column: the column of the task families.
        changes: what has become of the rows that were given.
        streaming: whether ``rows`` are only the first of many.
    """

    streaming = False

    def __init__(
        self,
        rows: Sequence[Row],
        prompt_column: str = "prompt",
        family_column: str | None = None,
        chat: ChatConfig | None = None,
        *,
        field: str = "data",
        family: str | None = None,
        max_prompt_tokens: int | None = None,
        too_long: TooLong = "error",
    ) -> None:
        """
        Args:
            rows: one mapping for each prompt, by column.
            prompt_column, family_column, family, max_prompt_tokens, too_long: as in ``DataConfig``.
            chat: how conversations become what the policy reads; None takes the defaults.
            field: the name of the section of the config, for errors.

        Raises:
            ValueError: there are no rows or no such column; a prompt is neither text nor messages; tools or keyword
                arguments of the template are of another type; or a text is not Unicode. The row is named.
        """
        if not rows:
            raise ValueError(f"{field}.path: holds no rows, expected at least one prompt")
        self.field, self.chat = field, chat or ChatConfig()
        self.prompt_column, self.family_column = prompt_column, family_column or "family"
        self._family, self._limit, self._too_long = family, max_prompt_tokens, too_long
        self._keeps_replies = prompt_column == "prompt"
        self.changes = Changes()
        columns = list(dict.fromkeys(name for row in rows for name in row))
        if family_column is not None and family_column not in columns:
            raise ValueError(f"{field}.family_column: no column {family_column!r}, columns are {', '.join(columns)}")
        self.rows = [self._checked(row, i) for i, row in enumerate(rows)]
        self._numbers: Sequence[int] = range(len(rows))  # what errors call each row
        self._columns = list(dict.fromkeys(name for row in self.rows for name in row if name != prompt_column))

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
        options = [template_options(row, self.chat) for row in rows]
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
        return ["" if _is_nothing(name) else str(name) for name in named]

    def name_of(self, index: int) -> str:
        """What errors call the row at ``index``: its number in the file, such as "row 7"."""
        return f"row {self._numbers[index]}"

    def order(self, block: int, seed: int, batches: int) -> PromptOrder:
        """The order of the prompts in a run.

        Args:
            block: the number of prompts of a generation batch, over all processes.
            seed: the seed of the run.
            batches: the number of generation batches of the run, which only a stream reads.

        Raises:
            ValueError: the data cannot fill a batch.
        """
        del batches
        self.check_enough(block)
        return ShuffledOrder(len(self), block, seed)

    def check_enough(self, block: int) -> None:
        """Raises ValueError if the data hold too few prompts for one generation batch of ``block`` prompts."""
        if len(self) < block:
            raise ValueError(f"batch.prompts_per_batch: {block}, but the data holds {len(self)} prompts")

    def keep(self, indices: Sequence[int]) -> None:
        """Leaves out all rows but those at ``indices``, which ascend."""
        self.rows = [self.rows[i] for i in indices]
        self._numbers = [self._numbers[i] for i in indices]

    def describe(self) -> list[str]:
        """Sentences on the data set: how many prompts there are, and what has become of the others."""
        parts = [f"{self.field}: {self._size()}"]
        if self.changes.replies:
            parts.append(
                f"{self.changes.replies} conversations have lost the reply that they end in, which is the column "
                f"{REPLY_COLUMN!r} where there was none"
            )
        if self.changes.dropped:
            parts.append(f"{self.changes.dropped} of more than {self._limit} tokens were left out")
        if self.changes.cut:
            parts.append(f"{self.changes.cut} of more than {self._limit} tokens were cut")
        return ["; ".join(parts)]

    def _size(self) -> str:
        return f"{len(self)} prompts"

    def rename_columns(self, prompt: str, family: str) -> None:
        """Calls the columns of the prompts and the families by other names.

        Raises:
            ValueError: there is another column of such a name.
        """
        for setting, old, new in (
            ("prompt_column", self.prompt_column, prompt),
            ("family_column", self.family_column, family),
        ):
            if old != new and new in (*self._columns, self.prompt_column):
                raise ValueError(
                    f"{self.field}.{setting}: {old!r}, but there is another column {new!r}, which the {setting[:6]}s "
                    "of a list of data sets have: expected the same name in all of them, or no such column"
                )
        new_names = {self.prompt_column: prompt, self.family_column: family}
        self.rows = [{new_names.get(name, name): value for name, value in row.items()} for row in self.rows]
        self._columns = [new_names.get(name, name) for name in self._columns]
        self.prompt_column, self.family_column = prompt, family

    def check_prompts(self, tokenizer: PreTrainedTokenizerBase, vocabulary: int | None = None) -> int:
        """Makes every prompt into what the policy reads, and checks it. Those that are too long are dropped or cut.

        Args:
            tokenizer: the policy's tokenizer.
            vocabulary: the number of tokens that the policy knows, the rows of its embedding; None checks no token.

        Returns:
            The number of tokens of the longest prompt.

        Raises:
            ValueError: a prompt has no tokens, too many, or one that the policy does not know; the tokenizer or its
                template refuses it; the template reads no tools, or no keyword argument of a name that it gets; or no
                prompt is short enough.
        """
        check = TemplateCheck(tokenizer, self.chat, self.field)
        found = [self._fitted(row, i, check, vocabulary) for row, i in zip(self.rows, self._numbers, strict=True)]
        kept = [(*each, i) for each, i in zip(found, self._numbers, strict=True) if each is not None]
        if not kept:
            raise ValueError(
                f"{self.field}.max_prompt_tokens: {self._limit}, but all {len(found)} prompts have more tokens, "
                "expected a larger limit, or too_long: cut"
            )
        self.rows, self._numbers = [row for row, _, _ in kept], [i for _, _, i in kept]
        return max(tokens for _, tokens, _ in kept)

    def _fitted(self, row: Row, i: int, check: TemplateCheck, vocabulary: int | None) -> tuple[Row, int] | None:
        """The row with a prompt that is short enough, and its number of tokens; None if it is dropped."""
        tokenizer, text, options = check.tokenizer, row[self.prompt_column], template_options(row, self.chat)
        check.see(text, row, i)
        try:
            ids = encode_prompt(tokenizer, text, *options)
        except ValueError as error:
            raise ValueError(f"{self.field}.prompt_column: the prompt of row {i}: {error}") from error
        if not ids:
            raise ValueError(f"{self.field}.path: the prompt of row {i} has no tokens")
        if self._limit is not None and len(ids) > self._limit:
            if self._too_long == "drop":
                self.changes.dropped += 1
                return None
            text = self._cut(text, i, len(ids), lambda part: len(encode_prompt(tokenizer, part, *options)))
            row, ids = {**row, self.prompt_column: text}, encode_prompt(tokenizer, text, *options)
        if vocabulary is not None and max(ids) >= vocabulary:
            token = max(ids)
            raise ValueError(
                f"{self.field}.prompt_column: the prompt of row {i} has the token {token} "
                f"({tokenizer.convert_ids_to_tokens(token)!r}), but the model's embedding has {vocabulary} rows: "
                "expected a model that was resized to its tokenizer"
            )
        return row, len(ids)

    def _cut(self, text: Text, i: int, tokens: int, count: Callable[[Text], int]) -> Text:
        """The prompt of row ``i``, which has too many ``tokens``, without its beginning."""
        assert self._limit is not None
        if self._too_long == "error":
            raise ValueError(
                f"{self.field}.max_prompt_tokens: the prompt of row {i} has {tokens} tokens, expected at most "
                f"{self._limit}; too_long: drop leaves such rows out, and cut shortens them"
            )
        found = shortened(text, self._limit, count)
        if found is None:
            raise ValueError(
                f"{self.field}.too_long: cut leaves nothing of the prompt of row {i}: what may not be cut in it, such "
                f"as the system's message, has more than {self._limit} tokens by itself; expected a larger "
                "max_prompt_tokens, or too_long: drop"
            )
        self.changes.cut += 1
        return found

    def _checked(self, row: Row, i: int) -> Row:
        """The row with its prompt as text or as a list of messages, its family, and the reply that was taught."""
        field, column = self.field, self.prompt_column
        if column not in row:
            raise ValueError(f"{field}.prompt_column: no column {column!r} in row {i}, columns are {', '.join(row)}")
        prompt = conversation(row[column])
        for name, value in {**row, column: prompt}.items():
            if not is_unicode(value):
                raise ValueError(
                    f"{field}.path: column {name!r} of row {i} holds half of a surrogate pair, such as '\\ud83d', "
                    "expected Unicode text"
                )
        tools = None if self.chat.tools_column is None else parsed(row.get(self.chat.tools_column))
        is_list = isinstance(tools, list) and all(isinstance(tool, Mapping) or callable(tool) for tool in tools)
        if tools is not None and not is_list:
            raise ValueError(
                f"chat.tools_column: {self.chat.tools_column!r} of row {i} in {field} is {shown(tools)}, expected a "
                "list of JSON schemas, or chat.tools_column: null"
            )
        kwargs = own_kwargs(row)
        if kwargs is not None and not isinstance(kwargs, Mapping):
            raise ValueError(f"{field}.path: {KWARGS_COLUMN} of row {i} is {shown(kwargs)}, expected a mapping")
        complaint = problem(prompt)
        if complaint is not None:
            raise ValueError(
                f"{field}.prompt_column: the prompt of row {i} is {shown(prompt)}{complaint}, expected a string or "
                'a list of {"role", "content"} messages'
            )
        own: Row = {}
        if not self._keeps_replies and not isinstance(prompt, str) and prompt[-1]["role"] == "assistant":
            prompt = self._without_reply(row, prompt, i, own)
        if self.chat.system_prompt is not None:
            prompt = with_system_prompt(prompt, self.chat.system_prompt)
        if self._family is not None and _is_nothing(row.get(self.family_column)):
            own[self.family_column] = self._family
        return row if prompt is row[column] and not own else {**row, column: prompt, **own}

    def _without_reply(self, row: Row, prompt: list[Message], i: int, own: Row) -> list[Message]:
        """The conversation without the assistant's last message, which becomes a column in ``own``.

        Data for supervised training end in the reply that they teach.
        """
        if len(prompt) == 1:
            raise ValueError(
                f"{self.field}.prompt_column: the prompt of row {i} is {shown(prompt)}, a reply alone, expected what "
                "it replies to in front of it"
            )
        if REPLY_COLUMN not in row:
            own[REPLY_COLUMN] = content_text(prompt[-1]) or None  # A message may call tools and say nothing.
        self.changes.replies += 1
        return prompt[:-1]


def _is_nothing(value: object) -> bool:
    """Whether a row names no family. Tables hold NaN for nothing."""
    return value is None or value != value or value == ""
