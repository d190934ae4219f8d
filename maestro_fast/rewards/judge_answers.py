"""What a judge is asked and what its answer means: prompts with places, and the number or the verdict in a text.

A place is the name of a text or of a column in braces, as in ``{completion}``. All places are filled at once, so braces
in what is put in stay as they are. Braces around anything that is no name, as in JSON, are no place, and ``{{name}}``
gives ``{name}``.

A judge answers in prose, so its number or verdict has to be found. The default patterns are tried one after the other,
the strictest first, and of each the last match counts, because judges explain themselves before they decide. An answer
in which nothing is found is malformed: it counts for nothing, rather than for a guess.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from maestro_fast.records import Text, content_text, plain_text

SCORE_PROMPT = """\
Judge how well the response answers the request: whether it is correct, helpful and clear, and does what was asked.

[Request]
{prompt}

[Response]
{completion}
[End of the response]

Explain your judgement in one or two sentences. Then end with one line of the form "Score: N", where N is a number \
from LOW (useless) to HIGH (could not be better)."""

COMPARISON_PROMPT = """\
Judge which of two responses answers the request better: which one is more correct, more helpful and clearer. Neither \
the order nor the length of the responses is a merit.

[Request]
{prompt}

[Response A]
{answer_a}
[End of response A]

[Response B]
{answer_b}
[End of response B]

Compare them in one or two sentences. Then end with one line: [[A]] if response A is better, [[B]] if response B is \
better, or [[tie]] if they are equally good."""

_PLACE = re.compile(r"\{\{([A-Za-z_][\w.-]*)\}\}|\{([A-Za-z_][\w.-]*)\}")

# Between "score" and its number stand marks of Markdown or JSON, and perhaps the scale in brackets.
_NUMBER = r"-?\d+(?:\.\d+)?"
_MARKS = r"[\"'`*_\s]*"
_NAMED = rf"{_MARKS}(?:\([^()\n]*\){_MARKS})?(?:[:=]|\bis\b){_MARKS}"
_SCORES = (
    re.compile(rf"\[\[\s*({_NUMBER})\s*(?:/\s*\d+\s*)?\]\]"),
    re.compile(rf"\b(?:score|rating|grade){_NAMED}({_NUMBER})(?![A-Za-z0-9]|\.\d)", re.IGNORECASE),
    # The last number of the answer, where "7/10" and "7 out of 10" mean 7.
    re.compile(rf"(?<![A-Za-z0-9.])({_NUMBER})(?:\s*(?:/|out of)\s*\d+(?:\.\d+)?)?(?![A-Za-z0-9]|\.\d)"),
)
_VERDICTS = (
    re.compile(r"\[\[\s*(A|B|C|tie)\s*\]\]", re.IGNORECASE),
    re.compile(
        rf"\b(?:verdict|winner|better|best|choice|preference)(?:\s+(?:response|answer))?{_NAMED}"
        rf"(?:response|answer|assistant)?{_MARKS}\(?(A|B|tie)(?![A-Za-z0-9])",
        re.IGNORECASE,
    ),
)
# Words of an answer without any of these forms. An A before a word such as "clear" is the article.
_LETTER = re.compile(
    r"(?<![A-Za-z0-9])(A(?!\s+(?!is\b|was\b|wins\b)[a-z])|B|[Tt]ie|TIE)(?![A-Za-z0-9])",
)
_MEANINGS = {"A": 1.0, "B": 0.0, "TIE": 0.5, "C": 0.5, "DRAW": 0.5, "EQUAL": 0.5}


def places(template: str) -> set[str]:
    """The names in braces of a template."""
    return {found[2] for found in _PLACE.finditer(template) if found[2]}


def fill(template: str, texts: Mapping[str, str]) -> str:
    """Puts ``texts`` into the places of a template, all at once."""
    filled = _PLACE.sub(lambda found: f"{{{found[1]}}}" if found[1] else texts[found[2]], template)
    return filled.encode("utf-8", "replace").decode()  # Half a surrogate pair, which JSON data may hold, is no UTF-8.


def transcript(prompt: Text) -> str:
    """A prompt as a judge reads it: its text, and of several messages each behind its role."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1:
        return plain_text(prompt)
    return "\n\n".join(f"{message.get('role', '')}: {content_text(message)}" for message in prompt)


def as_text(value: Any) -> str:
    """The text of a column's value: a conversation as a transcript, and what is neither that nor a text as JSON."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value and all(isinstance(item, dict) and "content" in item for item in value):
        return transcript(value)
    return json.dumps(value, ensure_ascii=False, default=str)


def read_score(answer: str, scale: Sequence[float], pattern: re.Pattern[str] | None) -> float | None:
    """The number that a judge gave, as a share of the scale from 0 to 1.

    Args:
        answer: the judge's text. If it thinks before it answers, what precedes ``</think>`` is left out.
        scale: the lowest and the highest number.
        pattern: finds the number, in its first group if it has one; None stands for the default patterns.

    Returns:
        None if there is no number in the answer, or if it lies outside the scale.
    """
    found = _last(answer, _SCORES if pattern is None else (pattern,))
    try:
        number = math.nan if found is None else float(found)
    except ValueError:  # A pattern of the user's own has matched something else.
        return None
    low, high = scale
    return (number - low) / (high - low) if low <= number <= high else None  # False for NaN


def read_verdict(answer: str, pattern: re.Pattern[str] | None) -> float | None:
    """The share of the win that the first of two responses got: 1, 0.5 or 0; None if the answer has no verdict.

    Args:
        answer: the judge's text, as in ``read_score``.
        pattern: finds A, B or tie (also C, draw or equal), in its first group if it has one.
    """
    found = _last(answer, _VERDICTS if pattern is None else (pattern,))
    if found is None and pattern is None:
        letters = {letter.upper() for letter in _LETTER.findall(_decided(answer))}
        found = letters.pop() if len(letters) == 1 else None
    return None if found is None else _MEANINGS.get(found.strip().upper())


def _last(answer: str, patterns: Sequence[re.Pattern[str]]) -> str | None:
    """What the first of the patterns that matches anything has found last."""
    for pattern in patterns:
        matches = list(pattern.finditer(_decided(answer)))
        if matches:
            return matches[-1][1 if pattern.groups else 0]
    return None


def _decided(answer: str) -> str:
    """What a judge says after its thoughts: nothing where these were cut off."""
    decided = answer.rpartition("</think>")[2]
    return "" if "<think>" in decided else decided
