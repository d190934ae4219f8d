"""A reward of one's own, and a utility: any function with the signature of TRL's reward functions."""

import re
from collections import Counter


def richness(completions: list[str], **columns: object) -> list[float]:
    """Different words of four letters or more in a completion, up to 12, over 12."""
    words = [set(re.findall(r"[a-z]{4,}", text.lower())) for text in completions]
    return [min(len(found), 12) / 12 for found in words]


def utility(completions: list[str], family: list[str], reference: list[str], **columns: object) -> list[float]:
    """How good an answer is for its family, checked by rule, in [0, 1]; tags and reasoning do not count.

    rewrite: F1 of its words with those of the reference. fact: half of that, and half for a word or phrase, up to three
    words, the less the longer. format: half of that, and half for the reference's structure. opening: 20 to 25 words,
    the less the further from it, times the share of different ones.
    A rule such as this, a judge or a person stands for what a task really wants; rewards are what can be had cheaply.
    """
    return [
        _useful(_answer(text), kind, ideal) for text, kind, ideal in zip(completions, family, reference, strict=True)
    ]


def _useful(answer: str, family: str, reference: str) -> float:
    words = re.findall(r"[a-z0-9']+", answer.lower())
    if family == "opening":
        return min(1.0, len(words) / 20, 25 / max(1, len(words))) * len(set(words)) / max(1, len(words))
    if family == "fact":
        return (_f1(answer, reference) + (min(1.0, 3 / len(words)) if words else 0.0)) / 2
    if family == "format":
        return (_f1(answer, reference) + (_structure(answer) == _structure(reference))) / 2
    return _f1(answer, reference)


def _answer(text: str) -> str:
    """What stands in the answer tags, or the text without its reasoning where there are none."""
    text = re.sub(r"<think>.*?(</think>|(?=<answer>)|$)", "", text, flags=re.DOTALL)
    return text.partition("<answer>")[2].partition("</answer>")[0] or text.replace("</answer>", "")


def _structure(text: str) -> str:
    """Its numbers, keys and punctuation, other words left out: "1. * 2. * 3. *", "name: *; colour: *; size: *"."""
    text = re.sub(r"(?<=because )[^.]+", "*", text.strip().lower())  # a reason may have any number of words
    text = re.sub(r"^(yes|no)(?=, because)", "*", text)
    return re.sub(r"\b(?!name:|colour:|size:|because\b)[a-z']+(?: (?!name:)[a-z']+)*", "*", text)


def _f1(answer: str, reference: str) -> float:
    ours, ideal = (Counter(re.findall(r"[a-z0-9']+", text.lower())) for text in (answer, reference))
    return 2 * (ours & ideal).total() / max(1, ours.total() + ideal.total())
