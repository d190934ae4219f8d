"""Benchmarks of what people feel and know, by multiple choice: ToMBench and EmoBench, each in English and in Chinese.

Both are data for tests, and the authors of ToMBench ask that nobody train on it. ``load`` gives a part to train on all
the same, for those who repeat the paper; a figure of such a model has to say so.

Where the columns come from: the files in the authors' repositories were read, github.com/zhchen18/ToMBench (a file for
each of its tasks) and github.com/Sahandfer/EmoBench (EU.jsonl and EA.jsonl, which are also the configs of the data set
SahandSab/EmoBench). The scoring of EmoBench is that of its authors: in emotional understanding, emotion and cause both
have to be right.
"""

from __future__ import annotations

import re
from typing import Literal

from maestro_fast.data.files import Row
from maestro_fast.evals.benchmarks.benchmark import ONE_SPLIT, Benchmark, asked
from maestro_fast.evals.benchmarks.choices import LETTERS, ChoiceScorer, Question, shuffled
from maestro_fast.records import Message

Language = Literal["en", "zh"]

_ANSWER = "答案\nANSWER"
_TOM_COLUMNS = {"en": ("STORY", "QUESTION", "OPTION-"), "zh": ("故事", "问题", "选项")}
_EU = ("scenario", "subject", "language", "emotion_choices", "emotion_label", "cause_choices", "cause_label")
_EA = ("scenario", "subject", "language", "question type", "choices", "label")
_LETTER = {"en": "only the letter of the right option", "zh": "only the letter of the right option (只写字母)"}


def tombench(language: Language = "en") -> Benchmark:
    """ToMBench (arXiv 2402.15052): stories with questions on what people in them know, want, feel or mean.

    A row has the story, the question and two or four options in both languages. One answer in the data reads "A. " in
    place of "A"; the first letter counts.

    Args:
        language: The language of stories and questions.

    Raises:
        ValueError: The language is neither.
    """
    _check(language)
    story, query, option = _TOM_COLUMNS[language]

    def questions(row: Row) -> list[Question]:
        options: list[str] = []
        for letter in "ABCD":  # Questions with two options have null for the others.
            value = str(row.get(f"{option}{letter}") or "").strip()
            if not value:
                break
            options.append(re.sub(rf"^{letter}\s*[.:、\uff0e\uff1a]\s*", "", value))
        right = LETTERS.find(str(row[_ANSWER]).strip()[:1].upper() or "?")
        return [shuffled(options, right, f"{row[story]}\n{row[query]}")]

    def prompt(row: Row) -> list[Message]:
        (question,) = questions(row)
        return asked(f"{row[story]}\n\n{row[query]}\n\n{question.listed()}", _LETTER[language])

    return Benchmark(
        name="tombench",
        home="github.com/zhchen18/ToMBench, folder data",
        dataset=None,
        configs=(None,),
        splits=ONE_SPLIT,
        columns=((story, query, f"{option}A", f"{option}B", _ANSWER),),
        prompt=prompt,
        reference=lambda row: questions(row)[0].answer(),
        scorer=ChoiceScorer(questions),
        unit=lambda row: str(row[story]).strip(),
    )


def emobench(language: Language = "en") -> Benchmark:
    """EmoBench (arXiv 2402.12071): what somebody feels and why, and what best to say or do.

    Rows of emotional understanding ask two questions, for the emotion and for its cause; those of emotional application
    ask one. Rows in the other language are left out.

    Args:
        language: The language of scenarios and questions.

    Raises:
        ValueError: The language is neither.
    """
    _check(language)
    emotion, cause = (("Emotion",), ("Cause",)) if language == "en" else (("情绪", "Emotion"), ("原因", "Cause"))

    def questions(row: Row) -> list[Question]:
        about = f"{row['scenario']}\n{row['subject']}"
        if "choices" in row and row["choices"] is not None:
            return [_labelled(row, "choices", "label", about)]
        return [
            _labelled(row, "emotion_choices", "emotion_label", about, emotion),
            _labelled(row, "cause_choices", "cause_label", about, cause),
        ]

    def prompt(row: Row) -> list[Message]:
        asks = questions(row)
        if len(asks) == 1:
            return asked(f"{_situation(row, language)}\n\n{asks[0].listed()}", _LETTER[language])
        lists = "\n\n".join(f"{question.names[0]}:\n{question.listed()}" for question in asks)
        form = f'two letters, in the form "{emotion[0]}: X, {cause[0]}: X"'
        return asked(f"{_situation(row, language)}\n\n{lists}", form)

    return Benchmark(
        name="emobench",
        home="huggingface.co/datasets/SahandSab/EmoBench",
        dataset="SahandSab/EmoBench",
        configs=("emotional_understanding", "emotional_application"),
        splits=ONE_SPLIT,
        columns=(_EU, _EA),
        prompt=prompt,
        reference=lambda row: ", ".join(question.answer() for question in questions(row)),
        scorer=ChoiceScorer(questions),
        unit=lambda row: str(row["scenario"]).strip(),
        keeps=lambda row: row["language"] == language,
    )


def _situation(row: Row, language: Language) -> str:
    """The scenario and the question on it."""
    scenario, subject = str(row["scenario"]).strip(), str(row["subject"]).strip()
    if "question type" not in row or row["question type"] is None:
        if language == "zh":
            return f"{scenario}\n\n在这个情境中，{subject}最终会有什么情绪？为什么？"  # noqa: RUF001
        return f"{scenario}\n\nWhich emotion does {subject} end up feeling here, and what is its cause?"
    kind = str(row["question type"]).strip().lower()
    if language == "zh":
        kind = {"response": "回应", "action": "行动"}.get(kind, kind)
        return f"{scenario}\n\n在这个情境中，对{subject}来说，最有效的{kind}是什么？"  # noqa: RUF001
    return f"{scenario}\n\nWhat is the most effective {kind} for {subject} here?"


def _labelled(row: Row, choices: str, label: str, about: str, names: tuple[str, ...] = ()) -> Question:
    """A question whose right option is named by its text."""
    options, right = [str(option) for option in row[choices]], str(row[label])
    if right not in options:
        raise ValueError(f"emobench: the column {label!r} is {right!r}, which is none of the options in {choices!r}")
    return shuffled(options, options.index(right), about, names)


def _check(language: str) -> None:
    if language not in ("en", "zh"):
        raise ValueError(f"language: {language!r}, expected 'en' or 'zh'")
