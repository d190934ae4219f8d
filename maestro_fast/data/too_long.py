"""Shortens prompts that have too many tokens, so that what is left is still a prompt.

A text loses its beginning, as with ``truncation: left`` of verl and ``truncation_strategy: left`` of ms-swift: what is
asked mostly stands at the end. They cut the token ids, and so cut through the template of a conversation, whose system
message is the first to go. Here a conversation loses its oldest messages first, but never the system's. It begins anew
at a message of the user, because many templates refuse another. Where the last turn alone is too long, the text of the
user's message in it loses its beginning.
"""

from __future__ import annotations

from collections.abc import Callable

from maestro_fast.data.conversation import SYSTEM_ROLES
from maestro_fast.records import Message, Text, content_text


def shortened(prompt: Text, limit: int, tokens: Callable[[Text], int]) -> Text | None:
    """The longest prompt by the rule of this page that fits.

    Args:
        prompt: a text, or messages.
        limit: the largest number of tokens.
        tokens: counts the tokens of a prompt; a ValueError means that its template refuses it.

    Returns:
        A prompt that has at most ``limit`` tokens; None if there is none.
    """

    def fits(candidate: Text) -> bool:
        try:
            return tokens(candidate) <= limit
        except ValueError:
            return False

    if isinstance(prompt, str):
        return _ending(prompt, fits)
    first = next((i for i, message in enumerate(prompt) if message["role"] not in SYSTEM_ROLES), len(prompt))
    system, rest = prompt[:first], prompt[first:]
    turns = [i for i, message in enumerate(rest) if message["role"] == "user"]
    for start in turns:
        if fits([*system, *rest[start:]]):
            return [*system, *rest[start:]]
    if not turns:
        return None
    asked, answers = rest[turns[-1]], rest[turns[-1] + 1 :]

    def last_turn(text: str) -> list[Message]:
        return [*system, {**asked, "content": text}, *answers]

    text = _ending(content_text(asked), lambda text: fits(last_turn(str(text))))
    return None if text is None else last_turn(text)


def _ending(text: str, fits: Callable[[Text], bool]) -> str | None:
    """The longest end of a text that fits, by bisection; None if not even the last character does."""
    fitting, beyond = 0, len(text) + 1
    while beyond - fitting > 1:
        length = (fitting + beyond) // 2
        if fits(text[len(text) - length :]):
            fitting = length
        else:
            beyond = length
    return text[len(text) - fitting :] if fitting else None
