"""What stands in the prompt column of a row: a text, or a conversation, which is checked and brought into one form."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from maestro_fast.records import Message, Text

SYSTEM_ROLES = ("system", "developer")


def parsed(value: Any) -> Any:
    """``value``, or what it is the JSON of: a file of text alone, such as CSV, has lists and mappings so."""
    if isinstance(value, str):
        if not value.strip():
            return None
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value.tolist() if hasattr(value, "tolist") else value


def conversation(prompt: Any) -> Any:
    """A prompt, which becomes a list of messages where it is an array of them or their JSON."""
    if isinstance(prompt, str):
        if not re.match(r"\s*\[\s*\{", prompt):
            return prompt
        found = parsed(prompt)
        is_conversation = isinstance(found, list) and all(isinstance(m, dict) and "role" in m for m in found)
        return found if is_conversation else prompt
    if hasattr(prompt, "tolist"):  # Tables of NumPy and pandas have arrays of mappings.
        prompt = prompt.tolist()
    return list(prompt) if isinstance(prompt, tuple) else prompt


def problem(prompt: Any) -> str | None:
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
            return f", whose message {i} has the content {shown(content)}"
        for part in content if isinstance(content, list) else ():
            if not isinstance(part, str) and not (isinstance(part, dict) and isinstance(part.get("text"), str)):
                kind = part.get("type") if isinstance(part, dict) else part
                return f", whose message {i} has a part of type {kind!r}, where only text can be served"
    if not any(message.get("content") or message.get("tool_calls") for message in prompt):
        return ", none of whose messages has a content"
    return None


def with_system_prompt(prompt: Text, system_prompt: str) -> list[Message]:
    """The conversation with a system message first, unless it has one. A text becomes the user's message."""
    messages: list[Message] = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if any(message["role"] in SYSTEM_ROLES for message in messages):
        return messages
    return [{"role": "system", "content": system_prompt}, *messages]


def is_unicode(value: Any) -> bool:
    """Whether all text in ``value``, at any depth, can be encoded."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            return False
        return True
    if isinstance(value, Mapping):
        return all(is_unicode(name) and is_unicode(item) for name, item in value.items())
    return all(map(is_unicode, value)) if isinstance(value, list | tuple) else True


def shown(value: Any) -> str:
    """The type and the beginning of a value, for errors."""
    return f"{type(value).__name__} {str(value)[:60]!r}"
