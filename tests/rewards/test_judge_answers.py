"""What is read in a judge's answer: its number, or the better of two."""

from __future__ import annotations

import re

import pytest

from maestro_fast.rewards.judge_answers import places, read_score, read_verdict


@pytest.mark.parametrize(
    ("answer", "number"),
    [
        ("7", 7),
        ("Score: 7", 7),
        ("**Score:** 7/10", 7),
        ("**Score: 7.5**", 7.5),
        ("Score (1-10): 8", 8),
        ('{"score": 8, "lines": 3}', 8),
        ("Rating: [[6]]. It has 2 errors.", 6),
        ("My rating is 4, since 3 of 5 claims hold.", 4),
        ("I would say 8 out of 10", 8),
        ("First a 3, then\nScore: 9", 9),
        ("1. It is clear. 2. It is right. I give it a 6.", 6),
        ("<think>Score: 2? No.</think>5", 5),
        ("<think>Score: 2? No, it", None),  # cut off in its thoughts
        ("Score: 7.5x", None),
        ("Score: 11", None),
        ("Score: 0", None),
        ("Score: -3", None),
        ("Score: 1e9", None),
        ("Good work", None),
        ("version v2 or 3b", None),
        ("", None),
    ],
)
def test_the_number(answer: str, number: float | None) -> None:
    assert read_score(answer, (1, 10), None) == (None if number is None else (number - 1) / 9)


def test_a_pattern_of_ones_own() -> None:
    assert read_score("grade=2 of 9, grade=4 of 9", (0, 4), re.compile(r"grade=(\d)")) == 1.0
    assert read_score("3 and 4", (0, 4), re.compile(r"\d")) == 1.0
    assert read_score("grade=two", (0, 4), re.compile(r"grade=(\w+)")) is None
    assert read_score("nan", (0, 4), re.compile("nan")) is None
    assert read_score("Score: 4", (0, 4), re.compile("grade=(.)")) is None
    assert read_score("-1 of -2 to 2", (-2, 2), re.compile(r"^-?\d")) == 0.25
    assert read_verdict("best=b", re.compile("best=(.)")) == 0.0
    assert read_verdict("best=x [[A]]", re.compile("best=(.)")) is None


@pytest.mark.parametrize(
    ("answer", "share"),
    [
        ("[[A]]", 1.0),
        ("[[B]] would be wrong, so [[A]]", 1.0),
        ("[[tie]]", 0.5),
        ("[[C]]", 0.5),
        ("B", 0.0),
        ("**A**", 1.0),
        ("Tie.", 0.5),
        ("Response B is better.", 0.0),
        ("Verdict: A. B is too long.", 1.0),
        ('{"winner": "B", "loser": "A"}', 0.0),
        ("The better answer is Response B, while A rambles.", 0.0),
        ("A clear win for B", 0.0),
        ("A is better than B", None),
        ("<think>[[A]]</think> [[B]]", 0.0),
        ("<think>[[A]] at first sight", None),
        ("Both are good.", None),
        ("", None),
    ],
)
def test_the_verdict(answer: str, share: float | None) -> None:
    assert read_verdict(answer, None) == share


def test_places_are_names_in_braces() -> None:
    assert places('{prompt} {my-column} {{not_this}} {"json": {"a": 1}} {1} { x } {}') == {"prompt", "my-column"}
