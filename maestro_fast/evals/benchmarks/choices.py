"""Multiple choice: options in a fixed random order, and the letter that an answer chooses.

The order of the options is drawn from a hash of the question. It is the same in every run, and a model that always
names the same letter gets no more than chance.

Models write the letter in many ways, so forms are tried one after the other, the strictest first. An answer that names
several letters and settles on none chooses nothing, and what chooses nothing is wrong: a guess on the model's behalf
would reward hedging.
"""

from __future__ import annotations

import hashlib
import random
import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from maestro_fast.data.files import Row
from maestro_fast.evals.benchmarks.benchmark import final_answer
from maestro_fast.records import Message

LETTERS = "ABCDEFGH"

# An A before a word such as "friend" is the article, unless the word goes on with a sentence about option A.
_GOES_ON = r"because|since|as|is|for|and|or|which|with|rather|instead"
_LETTER = rf"[(\[]?\s*([{LETTERS}])(?![A-Za-z0-9'\u2019])(?!(?<=A)\s+(?!(?:{_GOES_ON})\b)[a-z])"
_MORE = re.compile(rf"\s*[)\].]?\s*(?:\bor\b|\band\b|[/&或和])\s*{_LETTER}(?!\s+(?:is|was|are|does|would|has|can)\b)")
_STATED = (
    re.compile(rf"\\?boxed\{{\s*{_LETTER}"),
    re.compile(
        rf"(?i:\banswers?(?:\s+(?:to|for)\b[^.\n:]{{0,60}}?)?(?:\s+(?:is|would be|should be|must be))?)\s*[:=]?\s*"
        rf"(?i:(?:option|choice)\s+)?{_LETTER}"
    ),
    re.compile(rf"(?:答案|选)\s*[是为择选项]{{0,3}}\s*:?\s*{_LETTER}"),
    re.compile(
        rf"(?i:\b(?:choose|pick|select|go with|(?:option|choice)\s+is)\s*:?\s*(?:(?:option|choice)\s+)?){_LETTER}"
    ),
    re.compile(rf"{_LETTER}[)\].]?\s+(?i:is\s+(?:the\s+)?(?:correct|right|best)\b)"),
)
_DENIED = re.compile(rf"(?i:\b(?:not|nor|neither|than)\s+(?:(?:option|choice)\s+)?){_LETTER}[)\].]?")
_BRACKETED = re.compile(rf"(?:[(\[]\s*([{LETTERS}])\s*[)\]]|(?<![A-Za-z0-9])([{LETTERS}])\s*[).:、])")
_BARE = re.compile(rf"(?<![A-Za-z0-9]){_LETTER}")
_ALONE = re.compile(r"[\W_]*([A-Za-z])[\W_]*")
_SEVERAL_ALONE = re.compile(r"[\W\d_]*([A-Za-z])(?:[\W\d_]+([A-Za-z]))*[\W\d_]*")
_MARKS = re.compile(r"[*_`#$]|\\(?:text(?:bf)?|mathrm|mathbf)\{")


@dataclass(frozen=True)
class Question:
    """A question with its options in the order in which they are asked.

    Attributes:
        options: The options, of which the first is A.
        right: The place of the right one, from 0.
        names: What the question is called in the answer, if there are several; the first name stands in the prompt.
    """

    options: tuple[str, ...]
    right: int
    names: tuple[str, ...] = ()

    def listed(self) -> str:
        """The options, one per line, each behind its letter."""
        return "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, self.options, strict=False))

    def answer(self) -> str:
        """The right answer: letter, option, and the question's name if it has one."""
        option = f"{LETTERS[self.right]}. {self.options[self.right]}"
        return f"{self.names[0]}: {option}" if self.names else option


def shuffled(options: Sequence[str], right: int, about: str, names: tuple[str, ...] = ()) -> Question:
    """A question whose options stand in an order that depends on their texts and on what they are about.

    Args:
        options: The options in the order of the data, from 2 to 8 texts.
        right: The place of the right one in that order.
        about: The question itself, so that equal options of other questions have another order.
        names: As in ``Question``.

    Raises:
        ValueError: There are too few or too many options, or there is none at ``right``.
    """
    if not 2 <= len(options) <= len(LETTERS):
        raise ValueError(f"options: {len(options)} of them, expected 2 to {len(LETTERS)}")
    if not 0 <= right < len(options):
        raise ValueError(f"right: {right}, expected the place of one of {len(options)} options")
    seed = hashlib.sha256("\n".join([about, *names, *options]).encode()).digest()
    order = list(range(len(options)))
    random.Random(int.from_bytes(seed, "big")).shuffle(order)
    return Question(tuple(options[i] for i in order), order.index(right), names)


def chosen(reply: str, questions: Sequence[Question]) -> list[int | None]:
    """The option that a reply chooses for each of its questions; None where it chooses none, or several."""
    text = unicodedata.normalize("NFKC", final_answer(reply))  # Chinese brackets and colons become ASCII.
    text = _MARKS.sub("", text).strip()
    if len(questions) == 1:
        return [_one(text, questions[0])]
    found = [_named(text, question) for question in questions]
    if all(place is None for place in found) and _SEVERAL_ALONE.fullmatch(text):
        letters = re.findall(r"[A-Za-z]", text)
        if len(letters) == len(questions):
            return [_place(letter, question) for letter, question in zip(letters, questions, strict=True)]
    return found


@dataclass(frozen=True)
class ChoiceScorer:
    """Gives 1 to an answer that chooses the right option of every question in its prompt, and 0 to any other.

    Attributes:
        questions: The questions that a row asks.
    """

    questions: Callable[[Row], list[Question]]

    def score(self, prompts: Sequence[list[Message]], completions: Sequence[str], rows: Sequence[Row]) -> list[float]:
        return [
            float(chosen(reply, asked) == [question.right for question in asked])
            for reply, asked in zip(completions, map(self.questions, rows), strict=True)
        ]

    def figures(self, completions: Sequence[str], rows: Sequence[Row]) -> dict[str, float]:
        """``chose``: the share of answers that choose an option for every question, right or wrong."""
        found = [None not in chosen(reply, self.questions(row)) for reply, row in zip(completions, rows, strict=True)]
        return {"chose": sum(found) / len(found)}


def _one(text: str, question: Question) -> int | None:
    if alone := _ALONE.fullmatch(text):
        return _place(alone[1], question)
    same = [i for i, option in enumerate(question.options) if _words(option) == _words(_without_letter(text))]
    if len(same) == 1:
        return same[0]
    for pattern in _STATED:
        if matches := list(pattern.finditer(text)):
            last = matches[-1]
            return None if _MORE.match(text, last.end()) else _place(last[1], question)
    text = _DENIED.sub("", text)
    for pattern in (_BRACKETED, _BARE):
        letters = {letter for found in pattern.finditer(text) for letter in found.groups() if letter}
        places = {place for letter in letters if (place := _place(letter, question)) is not None}
        if places:
            return places.pop() if len(places) == 1 else None
    return None


def _named(text: str, question: Question) -> int | None:
    """The option that stands behind the question's name."""
    names = "|".join(map(re.escape, question.names))
    behind = rf"(?i:{names})[\W_]{{0,6}}?(?i:(?:answer|is|option|choice|是|选)[\W_]{{0,4}})*{_LETTER}"
    matches = list(re.finditer(behind, text))
    if not matches or _MORE.match(text, matches[-1].end()):
        return None
    return _place(matches[-1][1], question)


def _place(letter: str, question: Question) -> int | None:
    place = LETTERS.find(letter.upper())
    return place if 0 <= place < len(question.options) else None


def _without_letter(text: str) -> str:
    return re.sub(rf"^[(\[]?[{LETTERS}]\s*[)\].:、]\s*", "", text)


def _words(text: str) -> str:
    return " ".join(re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold()))
