"""Turns a prompt into the token ids that the policy reads: plain text as it is, a conversation by the chat template.

Everything that reads a prompt, in training, in an evaluation or in a reward, reads the ids that are made here. What the
template gets is what TRL gives it: the messages, the tools of the row, and the keyword arguments of the run and of the
row.

Some templates begin the assistant's reply themselves. That of DeepSeek-R1 ends a prompt with ``<think>``, and that of
Qwen3 with an empty ``<think>`` block if ``enable_thinking`` is false. The policy does not write this part, so it is in
no completion; ``prefilled`` finds it, and a reward on the form of a reply counts it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

from transformers import PreTrainedTokenizerBase

from maestro_fast.records import Message, Text, content_text

Tool = dict[str, Any] | Callable[..., Any]

# The arguments of apply_chat_template that are set here. A template cannot get them.
_OWN_ARGUMENTS = (
    "add_generation_prompt",
    "continue_final_message",
    "conversation",
    "max_length",
    "messages",
    "padding",
    "return_assistant_tokens_mask",
    "return_dict",
    "return_tensors",
    "tokenize",
    "tools",
    "truncation",
)
_READ_BY_TRANSFORMERS = ("chat_template", "documents")
# A tag inside a sentence ("put the result into <answer>") is part of the question. One that opens the reply begins a
# line, or follows the name of the speaker ("Assistant: <think>") or another tag or token ("<|Assistant|><think>").
_OPEN_TAG = re.compile(r"(?:\A|[\n:>])[ \t]*(<[A-Za-z][\w.:-]*>\s*)\Z")
_BLOCK = re.compile(r"<([A-Za-z][\w.:-]*)>.*?</\1>", re.DOTALL)
_REPLY = "Reply-7f3a"  # a text that no template holds


@dataclass(frozen=True)
class ChatConfig:
    """How a conversation becomes the text that the policy reads, in training and in evaluations.

    Attributes:
        system_prompt: the system message of every conversation that has none. A prompt that is text becomes its user
            message; without this setting text goes to the policy as it is, and no template is applied to it.
        template_kwargs: what the chat template gets for every prompt beside the messages, for example
            {enable_thinking: false}. A column ``chat_template_kwargs`` of the data, if there is one, adds to this for
            its row, and overrides it.
        tools_column: the column with the tools of each prompt, a list of JSON schemas, which the chat template gets;
            where there is no such column, or null in a row, there are no tools. Null leaves such a column to the
            rewards alone.
    """

    system_prompt: str | None = None
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    tools_column: str | None = "tools"

    def __post_init__(self) -> None:
        for name in self.template_kwargs:
            if name in _OWN_ARGUMENTS:
                raise ValueError(f"template_kwargs: {name} is set by the run, expected what only the template reads")


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase,
    text: Text,
    tools: Sequence[Tool] | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
) -> list[int]:
    """The token ids that the policy reads.

    Args:
        tokenizer: the policy's tokenizer.
        text: a string, which is encoded as it is, or messages, which go through the chat template. ``tools`` and
            ``template_kwargs`` serve messages alone.
        tools: the tools that the template shows, as JSON schemas or functions.
        template_kwargs: what else the template reads.

    Raises:
        ValueError: the tokenizer or its template refuses the prompt, or there is no template for messages.
    """
    if not isinstance(text, str):
        return list(_apply(tokenizer, text, tools, template_kwargs, tokenize=True))
    try:
        return list(tokenizer(text)["input_ids"])
    except Exception as error:  # Tokenizers raise many kinds of errors.
        raise ValueError(f"the tokenizer refuses the text {text[:60]!r}: {_first_line(error)}") from error


def rendered(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    tools: Sequence[Tool] | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
    *,
    opened: bool = True,
) -> str:
    """The text that the chat template makes of messages; ``opened``: with the beginning of the assistant's reply.

    Raises:
        ValueError: there is no template, or it refuses the messages.
    """
    return str(_apply(tokenizer, messages, tools, template_kwargs, add_generation_prompt=opened))


def prefilled(
    tokenizer: PreTrainedTokenizerBase,
    text: Text,
    tools: Sequence[Tool] | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
    *,
    headers: dict[str, str] | None = None,
) -> str:
    """The part of the reply that stands in the prompt already, or "".

    For messages it is what the template puts behind the header of the assistant's message. The header is what stands
    before the assistant's words in an earlier turn. A text has no header; there it is an opening tag at its end, such
    as ``<think>``, with the whitespace behind it. The same holds for messages if the template refuses the two turns
    from which the header is read, or writes the header in another way there than at the end of a prompt.

    Args:
        tokenizer, text, tools, template_kwargs: as ``encode_prompt`` takes them.
        headers: keeps the headers, so that calls for many prompts with one tokenizer read each off the template once.
    """
    if isinstance(text, str):
        return _trailing_tag(text)
    opened = rendered(tokenizer, text, tools, template_kwargs)
    known, key = {} if headers is None else headers, repr(template_kwargs)
    try:
        opening = _beyond(opened, rendered(tokenizer, text, tools, template_kwargs, opened=False))
        if key not in known:
            known[key] = _assistant_header(tokenizer, template_kwargs)
    except ValueError:
        return _trailing_tag(opened)
    header = known[key]
    if not (opening.startswith(header) or header.startswith(opening)):
        return _trailing_tag(opened)
    return opening[len(header) :]


def check_template_kwargs(
    tokenizer: PreTrainedTokenizerBase, template_kwargs: Mapping[str, Any], tools: Sequence[Tool] | None = None
) -> None:
    """Refuses keyword arguments that the chat template never reads.

    Raises:
        ValueError: the template reads no variable of such a name.
    """
    given = template_kwargs.get("chat_template")
    template = tokenizer.get_chat_template(given, list(tools) if tools else None)  # type: ignore[arg-type]
    for name in template_kwargs:
        if name in _OWN_ARGUMENTS:
            raise ValueError(f"{name} is set by the run, expected what only the template reads")
        if name not in _READ_BY_TRANSFORMERS and not re.search(rf"\b{re.escape(name)}\b", template):
            raise ValueError(f"{name} is nothing that the tokenizer's chat template reads, so it would have no effect")


def _apply(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    tools: Sequence[Tool] | None,
    template_kwargs: Mapping[str, Any] | None,
    *,
    add_generation_prompt: bool = True,
    tokenize: bool = False,
) -> Any:
    """What ``apply_chat_template`` returns.

    Messages without content are left to the template, which may have a form for them. Some templates fail on them,
    because they join the content with other text. They get an empty text in its place.
    """
    kwargs = dict(template_kwargs or {})
    if getattr(tokenizer, "chat_template", None) is None and "chat_template" not in kwargs:
        raise ValueError(
            "it is a conversation, and the tokenizer has no chat template, expected text without chat.system_prompt"
        )

    def apply(conversation: list[Message]) -> Any:
        return tokenizer.apply_chat_template(
            conversation,
            tools=list(tools) if tools else None,  # Some templates write a preamble for tools that is then empty.
            add_generation_prompt=add_generation_prompt,
            tokenize=tokenize,
            return_dict=False,
            **kwargs,
        )

    conversation = [_template_message(message) for message in messages]
    try:
        try:
            return apply(conversation)
        except Exception:
            if all("content" in message for message in conversation):
                raise
            return apply([{"content": "", **message} for message in conversation])
    except Exception as error:  # A template is a program of its own, which may fail in any way.
        raise ValueError(f"the chat template refuses it: {_first_line(error)}") from error


def _template_message(message: Message) -> Message:
    """The message without fields that are None, and with parts of text joined."""
    given = {name: value for name, value in message.items() if value is not None}
    parts = given.get("content")
    if not isinstance(parts, list) or not all(isinstance(part, dict) and "text" in part for part in parts):
        return given
    return given | {"content": content_text(message)}


def _assistant_header(tokenizer: PreTrainedTokenizerBase, template_kwargs: Mapping[str, Any] | None) -> str:
    """What the template writes between the end of the user's message and the assistant's words.

    It is read off an earlier turn, since in the last one some templates add a block of reasoning. Where a template adds
    such a block, such as ``<think></think>``, to earlier turns too, the header ends before it.
    """
    user: Message = {"role": "user", "content": "a"}
    asked = rendered(tokenizer, [user], None, template_kwargs, opened=False)
    answered = rendered(
        tokenizer, [user, {"role": "assistant", "content": _REPLY}, user], None, template_kwargs, opened=False
    )
    before, found, _ = answered.partition(_REPLY)
    if not found:
        raise ValueError("the chat template leaves out what an assistant said")
    header = _beyond(before, asked)
    block = _BLOCK.search(header)
    return header if block is None else header[: block.start()]


def _beyond(text: str, start: str) -> str:
    """``text`` without the prefix that it has in common with ``start``."""
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(text, start, strict=False)))
    return text[same:]


def _trailing_tag(text: str) -> str:
    found = _OPEN_TAG.search(text)
    return found[1] if found else ""


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
