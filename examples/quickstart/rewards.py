"""Rewards and a utility of one's own. Any function with the signature of TRL's reward functions can be either."""

import re
from collections import Counter


def richness(completions: list[str], **columns: object) -> list[float]:
    """The number of different words with at least four letters in the answer, counted up to 8 and divided by 8."""
    return [min(len(_long_words(_answer(text))), 8) / 8 for text in completions]


def faithful(completions: list[str], prompts: list[str], **columns: object) -> list[float]:
    """The share of the prompt's words that the answer uses, of words with at least four letters behind any colon."""
    asked = [_long_words(prompt.rpartition(":")[2]) for prompt in prompts]
    return [
        len(own & _long_words(_answer(text))) / max(1, len(own)) for own, text in zip(asked, completions, strict=True)
    ]


def utility(completions: list[str], family: list[str], reference: list[str], **columns: object) -> list[float]:
    """How good an answer is for its family, checked by rule, in [0, 1]. Tags and reasoning do not count.

    fact      the mean of the F1 of the answer's words with those of the reference, and of brevity, which is 1 up to
              three words and falls as the answer gets longer
    opening   1 for 15 to 25 words and less the further the length is from that, times the share of different words;
              half of it unless the answer is one sentence
    format    the mean of that F1 and of 1 if the answer has the structure of the reference, else 0
    rewrite   the mean of that F1 and of plainness: if the answer is one sentence, the share of words with at most seven
              letters, and less the further the length is from 5 to 12 words

    A rule such as this, a judge or a person stands for what a task really wants. Rewards are what can be had cheaply.
    """
    return [
        _useful(_answer(text), kind, ideal) for text, kind, ideal in zip(completions, family, reference, strict=True)
    ]


def _useful(answer: str, family: str, reference: str) -> float:
    words = re.findall(r"[a-z0-9']+", answer.lower())
    if not words:
        return 0.0
    f1, is_sentence = _f1(answer, reference), re.fullmatch(r"\s*[A-Z][^.!?]*[.!?]\s*", answer) is not None
    if family == "opening":
        return _within(len(words), 15, 25) * len(set(words)) / len(words) * (1.0 if is_sentence else 0.5)
    if family == "fact":
        return (f1 + min(1.0, 3 / len(words))) / 2
    if family == "format":
        return (f1 + (_structure(answer) == _structure(reference))) / 2
    short = sum(len(word) <= 7 for word in words) / len(words)
    return (f1 + is_sentence * short * _within(len(words), 5, 12)) / 2


def _within(count: int, least: int, most: int) -> float:
    """1 from ``least`` to ``most``, and less in proportion outside."""
    return min(1.0, count / least, most / count)


def _long_words(text: str) -> set[str]:
    return set(re.findall(r"[a-z]{4,}", text.lower()))


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
