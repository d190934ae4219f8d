"""The seven public benchmarks on which MAESTRO was reported: data, prompts, references and scoring."""

from collections.abc import Callable

from maestro_fast.evals.benchmarks.benchmark import Benchmark, Part, Scorer, final_answer
from maestro_fast.evals.benchmarks.choices import ChoiceScorer, Question, chosen, shuffled
from maestro_fast.evals.benchmarks.evaluate import Evaluation, evaluate, evaluate_model
from maestro_fast.evals.benchmarks.judged import (
    JudgeScorer,
    general_thoughts,
    natural_reasoning,
    ss_gen,
    web_instruct,
    with_judge,
)
from maestro_fast.evals.benchmarks.loading import as_rows, load, write_rows
from maestro_fast.evals.benchmarks.social import emobench, tombench
from maestro_fast.evals.benchmarks.translation import TranslationScorer, opus_books

# In the order of the paper's table. Some of these take options, such as a language.
BENCHMARKS: dict[str, Callable[[], Benchmark]] = {
    "natural_reasoning": natural_reasoning,
    "ss_gen": ss_gen,
    "web_instruct": web_instruct,
    "tombench": tombench,
    "general_thoughts": general_thoughts,
    "opus_books": opus_books,
    "emobench": emobench,
}

__all__ = [
    "BENCHMARKS",
    "Benchmark",
    "ChoiceScorer",
    "Evaluation",
    "JudgeScorer",
    "Part",
    "Question",
    "Scorer",
    "TranslationScorer",
    "as_rows",
    "chosen",
    "emobench",
    "evaluate",
    "evaluate_model",
    "final_answer",
    "general_thoughts",
    "load",
    "natural_reasoning",
    "opus_books",
    "shuffled",
    "ss_gen",
    "tombench",
    "web_instruct",
    "with_judge",
    "write_rows",
]
