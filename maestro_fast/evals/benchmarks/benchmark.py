"""What a benchmark is: where its data are, what a model is asked, and how its answers are scored."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from maestro_fast.data.files import Row
from maestro_fast.records import Message

Part = Literal["train", "held_out"]
ONE_SPLIT: Mapping[Part, str] = {"train": "train", "held_out": "train"}

_ANSWER = re.compile(r"<answer>(.*?)(?:</answer>|\Z)", re.DOTALL | re.IGNORECASE)
_FORM = "Think between <think> and </think> first. Then give {what} between <answer> and </answer>."


class Scorer(Protocol):
    """Gives answers their scores."""

    def score(self, prompts: Sequence[list[Message]], completions: Sequence[str], rows: Sequence[Row]) -> list[float]:
        """The scores of B answers, from 0 to 1.

        Args:
            prompts: B entries, what was asked.
            completions: B entries, the replies as a model wrote them, with their thoughts and tags.
            rows: B entries, the row of the data behind each prompt.

        Returns:
            B numbers; NaN where a score is not known, because a judge has not answered.
        """

    def figures(self, completions: Sequence[str], rows: Sequence[Row]) -> dict[str, float]:
        """Figures on all answers together that are no means of their scores, by name."""


@dataclass(frozen=True)
class Benchmark:
    """A public data set with the question that is made of each row, and the scoring of answers.

    Attributes:
        name: What it is called here, and the task family of its prompts.
        home: Where the data are published, for people.
        dataset: The name for ``datasets.load_dataset``; None if the data are on no hub and have to be files.
        configs: The configs of the data set that are read one after the other; None is its only one.
        splits: The split that each part is read from. Where both are one, ``load`` divides it.
        columns: The layouts of a row: it has to have all columns of one of them.
        prompt: Makes the messages that the model gets.
        reference: The right answer, or a good one, as text.
        scorer: Scores answers.
        unit: The text whose rows all fall into one part, such as a story about which there are several questions.
        keeps: Whether a row is used at all. Rows without a right answer, or in another language, are not.
    """

    name: str
    home: str
    dataset: str | None
    configs: tuple[str | None, ...]
    splits: Mapping[Part, str]
    columns: tuple[tuple[str, ...], ...]
    prompt: Callable[[Row], list[Message]]
    reference: Callable[[Row], str]
    scorer: Scorer
    unit: Callable[[Row], str]
    keeps: Callable[[Row], bool] = lambda row: True


def asked(question: str, what: str) -> list[Message]:
    """The message of a user: a question, and the form of the reply that the reward ``format`` asks for.

    Args:
        question: The question.
        what: What the answer is, such as "the letter of the right option".
    """
    return [{"role": "user", "content": f"{question.strip()}\n\n{_FORM.format(what=what)}"}]


def final_answer(reply: str) -> str:
    """The part of a reply that answers, without the thoughts before it.

    It is what stands in the last ``<answer>`` tag behind the last ``</think>``, or else all that stands there. A reply
    whose thoughts do not end has no answer, so nothing in them can be scored.
    """
    rest = reply.rpartition("</think>")[2]
    if "<think>" in rest:
        return ""
    tagged = _ANSWER.findall(rest)
    return str(tagged[-1] if tagged else rest).strip()
