"""Benchmarks with open answers, which a judge scores: Natural Reasoning, WebInstruct, GeneralThoughts and SS-GEN.

The judge is the one of ``maestro_fast.rewards``. It compares an answer with the reference of the data, three times,
each time in both orders, since judges prefer what comes first (arXiv 2306.05685). ``with_judge`` names it.

Where the columns come from:

- facebook/natural_reasoning: its card says that 18 % of the questions have no reference answer; these are left out. The
  columns, and train as the only split, are what public training code reads (question, reference_answer, responses).
- TIGER-Lab/WebInstruct-verified: the columns and the splits train and test are what the code of LLM Reasoners and other
  public code reads (question, answer, answer_type, category, difficulty).
- GeneralReasoning/GeneralThought-430K: the columns are those of a published subset with a typed schema. There is a row
  for every answer of a model, so questions repeat; ``load`` keeps the first of each.
- SS-GEN: github.com/MIMIFY/SS-GEN, whose files were read: id, chapter, explanation, title, story_content.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from maestro_fast.data.files import Row
from maestro_fast.evals.benchmarks.benchmark import ONE_SPLIT, Benchmark, asked, final_answer
from maestro_fast.records import Message, RewardBatch, Text
from maestro_fast.rewards import JudgeConfig, RewardSet
from maestro_fast.settings import SettingsError, build

VOTES = 3
_SET_HERE = {"votes": VOTES, "against": "reference", "name": "judge"}

ANSWER_PROMPT = """\
Two answers to a question are compared with a reference answer, which is right. An answer is right if it comes to the \
same conclusion as the reference, whatever its wording, its length and its notation; otherwise it is wrong.

[Question]
{prompt}

[Reference answer]
{reference}

[Answer A]
{answer_a}
[End of answer A]

[Answer B]
{answer_b}
[End of answer B]

Say in one or two sentences whether each answer is right. Then end with one line: [[tie]] if both are right, [[A]] if \
only answer A is right, or [[B]] if only answer B is right."""

STORY_PROMPT = """\
Judge which of two Social Stories is better for an autistic child. A good one keeps to its title and its purpose, is \
told from the child's side or in the third person, describes and reassures more than it commands, is true, literal and \
positive, and has a beginning, a middle and an end. Neither the order nor the length of the stories is a merit.

[Task]
{prompt}

[Story A]
{answer_a}
[End of story A]

[Story B]
{answer_b}
[End of story B]

Compare them in one or two sentences. Then end with one line: [[A]] if story A is better, [[B]] if story B is better, \
or [[tie]] if they are equally good."""


@dataclass(frozen=True)
class JudgeScorer:
    """Has a judge compare each answer with the reference, in both orders, ``VOTES`` times.

    Attributes:
        reference: The answer that it is compared with.
        prompt: What the judge is asked, with the places of ``JudgeConfig.prompt``.
        right_or_wrong: Whether a score is 1 where the answer does not lose against the reference and 0 where it does,
            which suits questions with a right answer; otherwise it is the share of comparisons won, where a tie is half
            a win, so that 0.5 means as good as the reference.
        judge: The judge; None where it has not been named.
    """

    reference: Callable[[Row], str]
    prompt: str
    right_or_wrong: bool
    judge: JudgeConfig | None = None

    def score(self, prompts: Sequence[list[Message]], completions: Sequence[str], rows: Sequence[Row]) -> list[float]:
        """The scores. A reply without an answer gets 0, and the judge is not asked about it.

        Raises:
            ValueError: No judge has been named.
            SettingsError: The judge cannot be set up, see ``JudgeConfig.build``.
            ConnectionError: The judge has answered none of the questions.
        """
        if self.judge is None:
            raise ValueError("judge: none, but this benchmark is scored by one, expected with_judge(benchmark, ...)")
        answers = [final_answer(reply) for reply in completions]
        judged = [i for i, answer in enumerate(answers) if answer]
        scores = [0.0] * len(answers)
        if not judged:
            return scores
        texts: list[Text] = [list(prompts[i]) for i in judged]
        batch = RewardBatch(
            texts,
            [answers[i] for i in judged],
            [[] for _ in judged],
            {"reference": [self.reference(rows[i]) for i in judged]},
        )
        wins = RewardSet([self.judge.build("judge", ".")])(batch)[:, 0].tolist()
        for i, win in zip(judged, wins, strict=True):
            scores[i] = float(win >= 0.5) if self.right_or_wrong and not math.isnan(win) else win
        return scores

    def figures(self, completions: Sequence[str], rows: Sequence[Row]) -> dict[str, float]:
        """``answered``: the share of replies that have an answer."""
        return {"answered": sum(bool(final_answer(reply)) for reply in completions) / len(completions)}


def with_judge(benchmark: Benchmark, judge: Mapping[str, Any]) -> Benchmark:
    """The benchmark with the judge that scores it.

    Args:
        benchmark: One that is scored by a judge.
        judge: Options of ``JudgeConfig``: url and model at least, and perhaps api_key_env, cache or concurrency. The
            prompt, the comparison and the number of votes are the benchmark's. The temperature is 0.7 unless it is
            given, because votes at temperature 0 are alike.

    Raises:
        SettingsError: An option is unknown, out of range, or the benchmark's own.
        ValueError: The benchmark is scored without a judge.
    """
    scorer = benchmark.scorer
    if not isinstance(scorer, JudgeScorer):
        raise ValueError(f"benchmark: {benchmark.name} is scored without a judge, expected one with open answers")
    if taken := sorted(judge.keys() & {*_SET_HERE, "prompt"}):
        raise SettingsError(f"judge.{taken[0]}: is set by the benchmark {benchmark.name}, expected no such option")
    options = {"temperature": 0.7, **judge, **_SET_HERE, "prompt": scorer.prompt}
    return replace(benchmark, scorer=replace(scorer, judge=build(JudgeConfig, options, "judge")))


@dataclass(frozen=True)
class _Questions:
    """How a data set of questions with right answers is read.

    Attributes:
        question, answer: The columns of the question and of the right answer.
        before: The column of the messages that came before the question, which may be missing or null.
    """

    question: str
    answer: str
    before: str | None = field(default=None)

    def prompt(self, row: Row) -> list[Message]:
        earlier = (row.get(self.before) or []) if self.before else []
        return [*earlier, *asked(str(row[self.question]), "only the final answer")]

    def reference(self, row: Row) -> str:
        return str(row[self.answer]).strip()

    def unit(self, row: Row) -> str:
        return str(row[self.question]).strip()

    def keeps(self, row: Row) -> bool:
        return all(str(row[name] or "").strip() for name in (self.question, self.answer))


def _questions(name: str, dataset: str, columns: _Questions, test: str | None = None) -> Benchmark:
    return Benchmark(
        name=name,
        home=f"huggingface.co/datasets/{dataset}",
        dataset=dataset,
        configs=(None,),
        splits=ONE_SPLIT if test is None else {"train": "train", "held_out": test},
        columns=((columns.question, columns.answer),),
        prompt=columns.prompt,
        reference=columns.reference,
        scorer=JudgeScorer(columns.reference, ANSWER_PROMPT, right_or_wrong=True),
        unit=columns.unit,
        keeps=columns.keeps,
    )


def natural_reasoning() -> Benchmark:
    """Natural Reasoning (arXiv 2502.13124): questions from web pages, most with a reference answer."""
    return _questions("natural_reasoning", "facebook/natural_reasoning", _Questions("question", "reference_answer"))


def web_instruct() -> Benchmark:
    """WebInstruct-verified (arXiv 2505.14652): questions from the web whose short answers were checked."""
    return _questions("web_instruct", "TIGER-Lab/WebInstruct-verified", _Questions("question", "answer"), test="test")


def general_thoughts() -> Benchmark:
    """GeneralThought-430K: questions of many kinds with reference answers, and answers of several models."""
    columns = _Questions("question", "reference_answer", before="prev_messages")
    return _questions("general_thoughts", "GeneralReasoning/GeneralThought-430K", columns)


def ss_gen() -> Benchmark:
    """SS-GEN (arXiv 2406.15695): Social Stories for autistic children, to be written for a title.

    The data are files in a repository of code: ..._dev.jsonl and ..._test.jsonl. Each file is read whole.
    """

    def prompt(row: Row) -> list[Message]:
        question = (
            f'Write a Social Story with the title "{row["title"]}". Its chapter is "{row["chapter"]}", with the '
            f"purpose: {str(row['explanation']).strip()} The story is for an autistic child, so tell it in "
            "short, literal, friendly sentences from the child's side."
        )
        return asked(question, "only the story")

    def reference(row: Row) -> str:
        return str(row["story_content"]).strip()

    return Benchmark(
        name="ss_gen",
        home='github.com/MIMIFY/SS-GEN, folder "SS-GEN Dataset"',
        dataset=None,
        configs=(None,),
        splits={"train": "dev", "held_out": "test"},
        columns=(("chapter", "explanation", "title", "story_content"),),
        prompt=prompt,
        reference=reference,
        scorer=JudgeScorer(reference, STORY_PROMPT, right_or_wrong=False),
        unit=lambda row: str(row["title"]),
    )
