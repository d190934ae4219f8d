"""Scores a model on a benchmark: its answers are sampled, or given, and each prompt gets the mean score of its own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from maestro_fast.data.dataset import PromptDataset
from maestro_fast.data.files import Row
from maestro_fast.evals.benchmarks.benchmark import Benchmark
from maestro_fast.evals.benchmarks.judged import JudgeScorer
from maestro_fast.evals.benchmarks.loading import as_rows
from maestro_fast.evals.statistics import Difference, mean_interval
from maestro_fast.generation import SamplingConfig
from maestro_fast.model import ModelConfig, load_policy
from maestro_fast.records import RewardBatch
from maestro_fast.training.prompt_weights import sample_responses


@dataclass(frozen=True)
class Evaluation:
    """What a model scored on the N prompts of a benchmark.

    Attributes:
        benchmark: The benchmark's name.
        scores_N: The mean score of the answers to each prompt, from 0 to 1; NaN where none of them has a score. Two
            models' scores on the same prompts can be compared prompt by prompt, see ``statistics.paired_test``.
        unscored: The number of answers without a score, because a judge has not answered.
        figures: Figures on all answers together, such as BLEU.
        replies: The answers to each prompt.
    """

    benchmark: str
    scores_N: list[float]
    unscored: int
    figures: dict[str, float]
    replies: list[list[str]] = field(repr=False)

    @property
    def mean(self) -> Difference:
        """The mean over the prompts that have a score, with its 95 % interval over them.

        Raises:
            ValueError: No prompt has a score.
        """
        known = [score for score in self.scores_N if not math.isnan(score)]
        if not known:
            raise ValueError(f"{self.benchmark}: no prompt has a score, because no answer of the judge was valid")
        return mean_interval(known)

    def as_json(self) -> dict[str, Any]:
        """The evaluation for a file of JSON, where null stands for NaN."""

        def known(value: float) -> float | None:
            return value if math.isfinite(value) else None

        return {
            "benchmark": self.benchmark,
            "mean": known(self.mean.mean),
            "half_width": known(self.mean.half_width),
            "prompts": self.mean.n,
            "unscored": self.unscored,
            "figures": {name: known(value) for name, value in self.figures.items()},
            "scores": [known(score) for score in self.scores_N],
            "replies": self.replies,
        }


def evaluate(benchmark: Benchmark, rows: Sequence[Row], replies: Sequence[Sequence[str]]) -> Evaluation:
    """Scores replies that somebody has sampled.

    Args:
        benchmark: The benchmark, with its judge if it needs one.
        rows: N rows, as ``load`` reads them.
        replies: For each row one or more replies, with all their thoughts and tags.

    Raises:
        ValueError: There is no row, or a row has no reply, or the benchmark needs a judge.
    """
    if not rows or len(replies) != len(rows) or not all(replies):
        raise ValueError(
            f"replies: {len(replies)} entries for {len(rows)} rows, expected one for each row, with a reply at least"
        )
    flat = [(row, reply) for row, own in zip(rows, replies, strict=True) for reply in own]
    answered, texts = [row for row, _ in flat], [reply for _, reply in flat]
    scores = benchmark.scorer.score([benchmark.prompt(row) for row in answered], texts, answered)
    remaining, scores_N = iter(scores), []
    for own in replies:
        known = [score for score in (next(remaining) for _ in own) if not math.isnan(score)]
        scores_N.append(sum(known) / len(known) if known else math.nan)
    unscored = sum(map(math.isnan, scores))
    figures = benchmark.scorer.figures(texts, answered)
    return Evaluation(benchmark.name, scores_N, unscored, figures, [list(own) for own in replies])


def evaluate_model(
    benchmark: Benchmark,
    rows: Sequence[Row],
    model: str | Path,
    sampling: SamplingConfig | None = None,
    *,
    samples: int = 1,
    seed: int = 1,
) -> Evaluation:
    """Samples a model's replies and scores them.

    Args:
        benchmark, rows: As ``evaluate`` takes them.
        model: A folder or a name that ``ModelConfig.path`` may have, with a chat template in its tokenizer.
        sampling: How replies are sampled; its ``group_size`` is not read. None takes the defaults, with room for 1024
            tokens.
        samples: The number of replies to each prompt.
        seed: The seed with which they are sampled.

    Raises:
        ValueError: As ``evaluate``, before the model is loaded if the judge is missing; or the model or its template
            cannot be used.
    """
    if not rows:
        raise ValueError("rows: none, expected at least one")
    if samples < 1:
        raise ValueError(f"samples: {samples}, expected at least 1")
    if isinstance(benchmark.scorer, JudgeScorer) and benchmark.scorer.judge is None:
        raise ValueError(f"benchmark: {benchmark.name} has no judge, expected with_judge(benchmark, ...)")
    dataset = PromptDataset(as_rows(benchmark, rows))
    network, tokenizer = load_policy(ModelConfig(str(model)))
    texts: list[str] = []
    for part in sample_responses(
        network.eval(), tokenizer, dataset, sampling or SamplingConfig(max_new_tokens=1024), samples, seed
    ):
        texts += RewardBatch.of(part, -1).replies  # What the template has of a reply, such as <think>, belongs to it.
    return evaluate(benchmark, rows, [texts[i : i + samples] for i in range(0, len(texts), samples)])
