"""Five cheap rewards that conflict, and the utility of six families, which checks an answer by rule.

Each reward is blind to what the prompt asks for, or nearly so, and each can be had without being useful. The utility is
none of them: it reads the column ``truth``, which says what the answer to this prompt has to be.
"""

import json
import re
from collections.abc import Iterable
from typing import Any

WORD = re.compile(r"[a-z0-9]+(?:'[a-z]+)?")
MARKER = re.compile(r"^\s*(?:\d+[.):]|[-*•])\s*")
WARM = {
    *("sorry", "apologize", "apologise", "apologies", "thank", "thanks", "please", "glad", "happy", "help", "hello"),
    *("dear", "hi", "welcome", "appreciate", "understand", "hope", "kind", "love", "wonderful", "delighted", "warm"),
}


# --- rewards ---


def brevity(completions: list[Any], **columns: Any) -> list[float]:
    """1 without a word, 0 from 40 words on, and a straight line between."""
    return [max(0.0, 1 - len(words(text)) / 40) for text in map(content, completions)]


def richness(completions: list[Any], **columns: Any) -> list[float]:
    """The number of different words with at least four letters, counted up to 20 and divided by 20."""
    return [min(len(long_words(text)), 20) / 20 for text in map(content, completions)]


def structure(completions: list[Any], **columns: Any) -> list[float]:
    """The number of list markers, keys of JSON and braces, counted up to 5 and divided by 5."""
    marks = [
        sum(bool(MARKER.match(line)) for line in text.splitlines()) + len(re.findall(r'"\s*:|[{}]', text))
        for text in map(content, completions)
    ]
    return [min(found, 5) / 5 for found in marks]


def warmth(completions: list[Any], **columns: Any) -> list[float]:
    """The number of different warm and polite words, counted up to 4 and divided by 4."""
    return [min(len(WARM.intersection(words(text))), 4) / 4 for text in map(content, completions)]


def overlap(completions: list[Any], prompts: list[Any], **columns: Any) -> list[float]:
    """The share of the prompt's different words of four letters or more, and of its numbers, that the answer has."""
    found = []
    for text, prompt in zip(map(content, completions), map(content, prompts), strict=True):
        asked = long_words(prompt)
        found.append(len(asked & long_words(text)) / max(1, len(asked)))
    return found


# --- the utility ---


def utility(completions: list[Any], family: list[str], truth: list[dict[str, Any]], **columns: Any) -> list[float]:
    """How good an answer is for its family, in [0, 1], as the function of the family says."""
    rows = zip(map(content, completions), family, truth, strict=True)
    return [FAMILIES[kind](text.strip(), wanted) for text, kind, wanted in rows]


def fact(text: str, truth: dict[str, Any]) -> float:
    """1 if the answer is there and no other answer of its sort, and 3 / n where it takes n words, more than three."""
    found = words(text)
    if not has(found, truth["answer"]) or any(has(found, rival) for rival in truth["rivals"]):
        return 0.0
    return min(1.0, 3 / len(found))


def support(text: str, truth: dict[str, Any]) -> float:
    """The share of greeting, apology and next step; less of it below 20 words and beyond 40, and by these faults.

    0.8 remains if it ends within a sentence, 0.2 if the item is not named, 0.3 with a promise that nobody can keep, and
    0.5 with a placeholder.
    """
    found, lower = words(text), text.lower()
    polite = (
        bool(re.match(r"(dear|hello|hi|good (morning|afternoon|day)|thank you|thanks)\b", lower)),
        bool(re.search(r"\b(sorry|apologi[sz]e|apologies)\b", lower)),
        bool(re.search(rf"\b(?:we|i)(?:'ll| will| can|'d| would)\b[^.?!]*\b(?:{STEPS})\b", lower)),
    )
    length = min(1.0, len(found) / 20, 40 / max(1, len(found)))
    sentence = 1.0 if ends(text) else 0.8
    named = 1.0 if has(found, truth["item"]) else 0.2
    promised = 0.3 if re.search(PROMISES, lower) else 1.0
    placeholder = 0.5 if re.search(r"\[[^\]]*\]?|<[^>]*>", text) else 1.0
    return sum(polite) / len(polite) * length * sentence * named * promised * placeholder


STEPS = "send|replace|replacement|refund|repair|fix|check|look into|arrange|help|assist|resolve|investigate|exchange"
PROMISES = r"\b(guarantee[ds]?|promise|immediately|right away|within \d+|never happen again|tomorrow|for free)\b"


def as_json(text: str, truth: dict[str, Any]) -> float:
    """The share of keys with the right value among all keys, wanted or there; 0.6 of it if there is other text."""
    whole, inner = parsed(text), parsed(text[text.find("{") : text.rfind("}") + 1])
    found, form = (whole, 1.0) if isinstance(whole, dict) else (inner, 0.6)
    if not isinstance(found, dict):
        return 0.0
    wanted = truth["values"]
    right = sum(str(found.get(key)).strip().lower() == str(value).lower() for key, value in wanted.items())
    return form * right / len(wanted.keys() | found.keys())


def rewrite(text: str, truth: dict[str, Any]) -> float:
    """The share of required words, less beyond the word limit, 0.3 with an avoided word, 0.5 if it is no sentence.

    It is multiplied by the share of the source's words among the answer's longer words, so nothing can be made up.
    """
    found = words(text)
    limit: int = truth["words"]
    kept = sum(has(found, word) for word in truth["keep"]) / len(truth["keep"])
    short = max(0.0, min(1.0, 2 - len(found) / limit))
    own = long_words(text)
    faithful = len(own & long_words(truth["source"])) / max(1, len(own))
    avoided = 0.3 if any(has(found, word) for word in truth["avoid"]) else 1.0
    sentence = 1.0 if ends(text) and len(found) > len(truth["keep"]) else 0.5
    return kept * short * faithful * avoided * sentence


def item_list(text: str, truth: dict[str, Any]) -> float:
    """The share of items that are members of the kind, halved for each item too many or too few and for other text.

    A member counts once, an item has one of them, and only items of at most three words count.
    """
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    marked = [MARKER.sub("", line) for line in lines if MARKER.match(line)]
    items = [item for item in marked or lines if item]
    members: set[str] = set()
    for found in map(words, items):
        new = (name for name in truth["members"] if name not in members and len(found) <= 3 and has(found, name))
        members.update([*new][:1])
    count: int = truth["count"]
    off = abs(len(items) - count) + (len(items) < len(lines))
    return min(1.0, len(members) / max(len(items), count)) * 0.5**off


def opening(text: str, truth: dict[str, Any]) -> float:
    """The share of hero and trade that are named; less of it below 25 words and beyond 40, and by these faults.

    0.8 remains if it ends within a sentence, and 0.3 in a list or JSON. Less remains if fewer than 0.75 of the words
    are different ones that the prompt does not have.
    """
    found = words(text)
    named = sum(has(found, name.lower()) for name in truth["names"]) / len(truth["names"])
    length = min(1.0, len(found) / 25, 40 / max(1, len(found)))
    echoed = {*ASKED, *(name.lower() for name in truth["names"])}
    fresh = min(1.0, len({*found} - echoed) / max(1, len(found)) / 0.75)
    sentence = 1.0 if ends(text) else 0.8
    form = 0.3 if any(mark in text for mark in "{}[]") or MARKER.search(text) else 1.0
    return named * length * fresh * sentence * form


ASKED = ("begin", "a", "story", "about", "with", "two", "sentences")
FAMILIES = {
    "fact": fact,
    "support": support,
    "json": as_json,
    "rewrite": rewrite,
    "list": item_list,
    "opening": opening,
}


# --- words ---


def content(text: Any) -> str:
    """The text of a prompt or completion, or what the last message says if it is a conversation."""
    return text if isinstance(text, str) else str(text[-1]["content"])


def words(text: str) -> list[str]:
    """The words and numbers of a text, in lower case."""
    return WORD.findall(text.lower())


def long_words(text: str) -> set[str]:
    """The different words of four letters or more, and the numbers."""
    return {word for word in words(text) if len(word) >= 4 or word.isdigit()}


def has(found: Iterable[str], word: str) -> bool:
    """Whether the word, its plural or its genitive is among those found."""
    forms = {word.lower() + end for end in ("", "s", "es", "'s")} | {word.lower()[:-1] + "ies"}
    return not forms.isdisjoint(found)


def ends(text: str) -> bool:
    """Whether the text ends where a sentence does."""
    return bool(re.search(r"[.!?][\"')]?$", text.strip()))


def parsed(text: str) -> Any:
    """The text as JSON, or None if it is none."""
    try:
        return json.loads(text)
    except ValueError:
        return None
