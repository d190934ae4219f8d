"""Which option an answer chooses, in the many ways in which models write it, and the order of options."""

from __future__ import annotations

from collections import Counter

import pytest

from maestro_fast.evals.benchmarks import Question, chosen, final_answer, shuffled

COLOURS = Question(("red", "green", "a dark blue", "green and red"), right=1)
PAIR = [
    Question(("joy", "fear", "anger"), 1, ("Emotion", "情绪")),
    Question(("a dog", "a bill", "the rain"), 2, ("Cause", "原因")),
]


@pytest.mark.parametrize(
    "reply",
    [
        "B",
        "b",
        "(B)",
        "**B**",
        "B.",
        "B. green",
        "Green.",
        "Answer: B",
        "Answer: (B) green",
        "The answer is B.",
        "The correct answer is: **B**",
        "The answer to the question is [B], because A is red.",
        "Final answer: option B",
        r"So it is $\boxed{B}$.",
        r"\boxed{\text{B}}",
        "I would go with B here.",
        "I choose option B.",
        "The best option is B.",
        "Option B is correct.",
        "(A) is red, and so is (D). The answer is (B)",
        "It cannot be otherwise: B",
        "It is not A. It is B",
        "答案是B。",
        "答案：B",  # noqa: RUF001
        "我选择（B）。",  # noqa: RUF001
        "<answer>B</answer>",
        "<think>A? No, the answer is C.</think>\n<answer> B. green </answer>",
        "<think>The answer is A.</think> The answer is B",
        "I first thought <answer>A</answer>, but now <answer>B</answer>",
        "<answer>B",
        "Answer: A. No, wait. Answer: B",
    ],
)
def test_forms_of_one_choice(reply: str) -> None:
    assert chosen(reply, [COLOURS]) == [1]


@pytest.mark.parametrize(
    "reply",
    [
        "",
        "I do not know.",
        "A friend of mine would know.",
        "The answer is a matter of taste.",
        "The answer is A friend.",
        "A or B",
        "The answer is A or B.",
        "Answer: (A) and (B)",
        "(A), (B), (C) and (D) are all fine.",
        "The answer is E.",
        "E",
        "B was considered, but the answer is F",
        "The answer is not B.",
        "<think>The answer is B",
        "<answer></answer>",
        "Blue",
        "greenish",
    ],
)
def test_what_chooses_nothing(reply: str) -> None:
    assert chosen(reply, [COLOURS]) == [None]


@pytest.mark.parametrize(
    ("reply", "place"),
    [
        ("A", 0),
        ("The answer is A because it is.", 0),
        ("The answer is A", 0),
        ("a dark blue", 2),
        ("C) a dark blue", 2),
        ("D. green and red", 3),
        ("The answer is D and B is wrong.", 3),
    ],
)
def test_an_article_is_no_option_and_option_a_is_no_article(reply: str, place: int) -> None:
    assert chosen(reply, [COLOURS]) == [place]


@pytest.mark.parametrize(
    ("reply", "places"),
    [
        ("Emotion: B, Cause: C", [1, 2]),
        ("<answer>Cause: C; Emotion: B</answer>", [1, 2]),
        ("The emotion is (B), and the cause is (C).", [1, 2]),
        ('{"emotion": "B", "cause": "C"}', [1, 2]),
        ("**Emotion:** B. fear\n**Cause:** C. the rain", [1, 2]),
        ("情绪：B，原因：C", [1, 2]),  # noqa: RUF001
        ("B, C", [1, 2]),
        ("1. B\n2. C", [1, 2]),
        ("Emotion: B", [1, None]),
        ("Emotion: A or B, Cause: C", [None, 2]),
        ("B", [None, None]),
        ("A, B, C", [None, None]),
        ("Emotion: fear", [None, None]),
        ("Emotion: D, Cause: C", [None, 2]),
    ],
)
def test_two_questions_of_one_prompt(reply: str, places: list[int | None]) -> None:
    assert chosen(reply, PAIR) == places


def test_the_final_answer_leaves_thoughts_out() -> None:
    assert final_answer("<think>one</think> two") == "two"
    assert final_answer("one</think><answer>two\nlines</answer> three") == "two\nlines"
    assert final_answer("<think>one <answer>two</answer>") == "", "these thoughts never end"
    assert final_answer("two") == "two"


def test_the_order_of_options_is_fixed_and_no_letter_is_favoured() -> None:
    options = ("one", "two", "three", "four")
    asked = [shuffled(options, 0, f"question {i}") for i in range(2000)]

    assert asked == [shuffled(options, 0, f"question {i}") for i in range(2000)]
    assert all(question.options[question.right] == "one" and {*question.options} == {*options} for question in asked)
    shares = Counter(question.right for question in asked)
    # The standard deviation of each count is 19; a model that always says the same letter gets a quarter.
    assert all(abs(shares[place] - 500) < 4 * 19.4 for place in range(4))
    assert asked[0].listed().splitlines()[asked[0].right] == asked[0].answer() and "one" in asked[0].answer()


def test_options_that_make_no_question() -> None:
    with pytest.raises(ValueError, match=r"^options: 1 of them, expected 2 to 8"):
        shuffled(["one"], 0, "")
    with pytest.raises(ValueError, match=r"^right: -1, expected the place of one of 2 options"):
        shuffled(["one", "two"], -1, "")
