"""A reward and a utility of one's own. Any function with the signature of TRL's reward functions can be either."""

import re
from collections import Counter


def richness(completions: list[str], **columns: object) -> list[float]:
    """The number of different words with at least four letters, counted up to 12 and divided by 12."""
    words = [set(re.findall(r"[a-z]{4,}", text.lower())) for text in completions]
    return [min(len(found), 12) / 12 for found in words]


def utility(completions: list[str], family: list[str], reference: list[str], **columns: object) -> list[float]:
    """How good an answer is for its family, checked by rule, in [0, 1]. Tags and reasoning do not count.

    rewrite   F1 of the answer's words with those of the reference
    fact      the mean of that F1 and of brevity, which is 1 up to three words and falls as the answer gets longer
    format    the mean of that F1 and of 1 if the answer has the structure of the reference, else 0
    opening   1 for 20 to 25 words and less the further the length is from that, times the share of different words

    A rule such as this, a judge or a person stands for what a task really wants. Rewards are what can be had cheaply.
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
    """The text in the answer tags, or if there are none the whole text without its reasoning."""
    text = re.sub(r"<think>.*?(</think>|(?=<answer>)|$)", "", text, flags=re.DOTALL)
    return text.partition("<answer>")[2].partition("</answer>")[0] or text.replace("</answer>", "")


def _structure(text: str) -> str:
    """The text's numbers, keys and punctuation with * for other words: "1. * 2. * 3. *" or "name: *; size: *"."""
    text = re.sub(r"(?<=because )[^.]+", "*", text.strip().lower())  # a reason may have any number of words
    text = re.sub(r"^(yes|no)(?=, because)", "*", text)
    return re.sub(r"\b(?!name:|colour:|size:|because\b)[a-z']+(?: (?!name:)[a-z']+)*", "*", text)


def _f1(answer: str, reference: str) -> float:
    """The F1 of the answer's words with those of the reference, where a word counts as often as it occurs."""
    ours, ideal = (Counter(re.findall(r"[a-z0-9']+", text.lower())) for text in (answer, reference))
    return 2 * (ours & ideal).total() / max(1, ours.total() + ideal.total())
