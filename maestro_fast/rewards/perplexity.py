"""How well the policy predicts the reference answer after its own reasoning (NOVER, arXiv 2505.16022).

    P = exp(-(sum_i log pi(g_i | prompt, reasoning, g_<i)) / (len(g) * n(t))),   n(t) = max(1, 1 + log len(t))

g is the reference and t the reasoning. The logarithms are natural, and n(t) = 1 where the reasoning is empty. n(t)
favours longer reasoning, so set a length reward against it. The code that NOVER's authors released
(github.com/thinkwee/NOVER, calculate_perplexity) takes log10 in n(t) and counts the answer's tags as part of g. That is
the formula "released".

len(g) is the number of tokens that were scored. len(t) is in tokens too: the share of the completion's characters that
are reasoning, times the completion's tokens. An exact count would need the text tokenised once more, and 10 % more or
fewer tokens move n(t) by about 0.1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import ClassVar, Literal, NamedTuple, get_args

from torch import Tensor

from maestro_fast.records import Prompt, RewardBatch
from maestro_fast.rewards.first_batches import Look
from maestro_fast.rewards.format import check_tags, match_tags, why_without_form

Transform = Literal["neg_log", "rank"]
Formula = Literal["paper", "released"]


class _Query(NamedTuple):
    """The text to score for one row: the reference, behind what the policy wrote before its answer."""

    row: int
    prefix: str
    continuation: str
    reasoning_tokens: float


class Judged(NamedTuple):
    """The -log P of one row, and its len(t) in tokens."""

    neg_log_perplexity: float
    reasoning_tokens: float


@dataclass(frozen=True)
class PerplexityReward:
    """-log P, where P is the perplexity of the reference answer after the completion's reasoning, or its rank.

    The policy scores the reference in the place of its own answer: after the prompt, and after its reply up to the
    opening tag of the answer and the whitespace behind that tag. Spaces at the end of that text move
    to the front of the reference, because tokenisers join a space with the word that follows. All rows go through
    ``batch.score_texts`` in exactly one call, even if there are none, because it may be a collective.

    A row abstains where its reference is None or blank, and where the completion lacks the format of ``tags``. With
    ``require_format=False`` all of such a completion counts as reasoning, and the reference follows behind
    ``separator``. A group is a run of rows with equal prompt and reference.

    Attributes:
        tags: the names of the tags; the last one holds the answer, and those before it the reasoning.
        reference: the column of reference answers (strings or numbers).
        require_format: whether a completion without the tags abstains; false takes all of it as reasoning.
        separator: the text between such a completion and the reference.
        transform: "neg_log" gives -log P, which is 0 at best, and "rank" the rank in the group: (l + e / 2) / (n - 1)
            where l of its n scored rows are worse and e others equal, and 0.5 for a row that is alone.
        formula: "paper", or "released", which takes log10 in n(t) and scores the reference together with the tags
            around it, so that it needs ``require_format``.
        name: the reward's name.

    Raises:
        ValueError: there are fewer than two tags, or the transform or formula is unknown. When called: the batch has no
            score_texts or no column of that name, or score_texts did not return tokens for every text.
        TypeError: a reference is neither a string nor a number.
    """

    tags: Sequence[str] = ("think", "answer")
    reference: str = "reference"
    require_format: bool = True
    separator: str = "\n"
    transform: Transform = "neg_log"
    formula: Formula = "paper"
    name: str = "perplexity"

    needs_entropy: ClassVar[bool] = False
    needs_policy: ClassVar[bool] = True
    reads_only: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_tags(self.tags)
        if len(self.tags) < 2:
            raise ValueError(f"tags: {self.tags!r}, expected one for the reasoning and one for the answer")
        if self.transform not in get_args(Transform):
            raise ValueError(f"transform: {self.transform!r}, expected one of {get_args(Transform)}")
        if self.formula not in get_args(Formula):
            raise ValueError(f"formula: {self.formula!r}, expected one of {get_args(Formula)}")
        if self.formula == "released" and not self.require_format:
            raise ValueError("formula: 'released' scores the answer's tags, expected require_format: True beside it")

    def __call__(self, batch: RewardBatch) -> list[float | None]:
        references = self.references(batch)
        judged = self.judge(batch, references)
        values = [None if row is None else row.neg_log_perplexity for row in judged]
        if self.transform == "neg_log":
            return values
        groups = groupby(range(len(batch)), key=lambda row: (batch.prompts[row], references[row]))
        return [rank for _, group in groups for rank in _ranks([values[row] for row in group])]

    @property
    def needs_columns(self) -> tuple[str, ...]:
        """The columns that the data have to have."""
        return (self.reference,)

    def why_silent(self, look: Look) -> str:
        """The likely reason why it always abstained, see ``first_batches``."""
        if not look.abstained or not self.require_format:
            return ""
        return f"the column {self.reference!r} is empty, or {why_without_form(self.tags, look)}"

    def judge(self, batch: RewardBatch, references: list[str]) -> list[Judged | None]:
        """-log P and len(t) of each row, or None where the reward abstains."""
        rows = range(len(batch))
        queries = [q for q in (self._query(batch, row, references[row]) for row in rows) if q is not None]
        judged: list[Judged | None] = [None] * len(batch)
        for query, logprobs in zip(queries, self._score(batch, queries), strict=True):
            value = neg_log_perplexity(logprobs, query.reasoning_tokens, self.formula)
            judged[query.row] = Judged(value, query.reasoning_tokens)
        return judged

    def references(self, batch: RewardBatch) -> list[str]:
        """The B references, with "" where there is none."""
        if self.reference not in batch.columns:
            raise ValueError(
                f"reward {self.name!r}: the data have no column {self.reference!r}; the columns are "
                f"{', '.join(sorted(batch.columns)) or 'none'}"
            )
        column = batch.columns[self.reference]
        for row, value in enumerate(column):
            if not isinstance(value, (str, int, float, type(None))):
                raise TypeError(
                    f"reward {self.name!r}: row {row} of the column {self.reference!r} is a "
                    f"{type(value).__name__}, expected a string, a number or None"
                )
        return ["" if value is None else str(value).strip() for value in column]

    def _query(self, batch: RewardBatch, row: int, reference: str) -> _Query | None:
        reply, prefill = batch.replies[row], batch.prefills[row] if batch.prefills else ""
        match = match_tags(reply, self.tags)
        if not reference or (match is None and self.require_format):
            return None
        written = max(1, len(reply) - len(prefill))  # characters of the completion
        continuation = reference
        if match is None:
            prefix, characters = reply + self.separator, written
        else:
            answer, start = match[len(self.tags)], match.start(len(self.tags))
            blank = len(answer) - len(answer.lstrip())
            prefix = reply[: start + blank]
            characters = sum(len(part.strip()) for part in match.groups()[:-1])
            if self.formula == "released":
                opening, closing = f"<{self.tags[-1]}>", f"</{self.tags[-1]}>"
                prefix = reply[: start - len(opening)]
                behind = answer[len(answer.rstrip()) :] if answer.strip() else ""
                continuation = opening + answer[:blank] + reference + behind + closing
        # The prompt ends with the prefilled part of the reply, which may even reach into the answer.
        continuation = continuation.removeprefix(prefill[len(prefix) :])
        prefix = prefix[len(prefill) :]
        tokens = len(batch.completion_ids[row]) * min(1.0, characters / written)
        spaces = len(prefix) - len(prefix.rstrip(" "))
        return _Query(row, prefix[: len(prefix) - spaces], " " * spaces + continuation, tokens)

    def _score(self, batch: RewardBatch, queries: list[_Query]) -> list[Tensor]:
        """The log-probs of each continuation's tokens."""
        if batch.score_texts is None:
            raise ValueError(
                f"reward {self.name!r}: score_texts is missing: only a training step has the policy for it"
            )
        prompts: Sequence[Prompt] = batch.prompt_ids or batch.prompts
        scored = batch.score_texts(
            [prompts[query.row] for query in queries],
            [query.prefix for query in queries],
            [query.continuation for query in queries],
        )
        if len(scored) != len(queries):
            raise ValueError(f"reward {self.name!r}: score_texts returned {len(scored)} of {len(queries)} texts")
        for query, logprobs in zip(queries, scored, strict=True):
            if logprobs.ndim != 1 or not logprobs.numel():
                raise ValueError(
                    f"reward {self.name!r}: score_texts returned shape {tuple(logprobs.shape)} for row "
                    f"{query.row}, expected one log-prob per token of the reference"
                )
        return scored


def neg_log_perplexity(logprobs: Tensor, reasoning_tokens: float, formula: Formula = "paper") -> float:
    """-log P of the module's formula.

    Args:
        logprobs: [len(g)] in nats, not empty.
        reasoning_tokens: len(t) in tokens, 0 for empty reasoning.
        formula: "paper" has the natural logarithm in n(t), "released" log10.
    """
    log = math.log10 if formula == "released" else math.log
    norm = 1.0 if reasoning_tokens <= 0 else max(1.0, 1.0 + log(reasoning_tokens))
    return float(logprobs.double().mean()) / norm


def _ranks(values: list[float | None]) -> list[float | None]:
    """Ranks in [0, 1] of one group, 1 for the highest value. Ties share the mean of their ranks."""
    live = [value for value in values if value is not None]

    def rank(value: float) -> float:
        worse, equal = sum(other < value for other in live), live.count(value) - 1
        return 0.5 if len(live) == 1 else (worse + equal / 2) / (len(live) - 1)

    return [None if value is None else rank(value) for value in values]
