"""NOVER's reward for reasoning: ranks of the perplexity, and a term that rewards reasoning for being short and good.

Let V rows of a group have the format, P_j be the perplexity of the reference after the reasoning of row j, and l_j the
length of that reasoning in tokens:

    R_r(j) = (V - rank_j) / V,   rank_j = number of the V rows with a lower P (ties share the mean of their ranks)
    R_e(j) = number of the V rows with l > l_j and P > P_j, over V - 1;   0 where V = 1

The reward is w_r R_r + w_e R_e, and 0 for a row without the format. This is the code that NOVER's authors released
(github.com/thinkwee/NOVER, reasoning_reward and efficiency_reward) with two differences: that code breaks ties by
position, and it counts reasoning tokens exactly, where this one takes their share of the characters (see
``perplexity``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import ClassVar

from maestro_fast.records import RewardBatch
from maestro_fast.rewards.first_batches import Look
from maestro_fast.rewards.format import why_without_form
from maestro_fast.rewards.perplexity import Formula, Judged, PerplexityReward


@dataclass(frozen=True)
class NoverReward:
    """NOVER's reward for reasoning: w_r R_r + w_e R_e where the completion has the format, and 0 elsewhere.

    NOVER's whole reward (arXiv 2505.16022) is w_f R_f + 1[R_f = 1] (w_r R_r + w_e R_e). To have it, set this reward
    beside a ``format`` reward and sum the two without normalising them first (profile ``dr_grpo``), as
    ``examples/recipes/nover.yaml`` does. One scoring of the batch serves both terms. A row abstains where its reference
    is None or blank.

    Attributes:
        tags: the names of the tags; the last one holds the answer, and those before it the reasoning.
        reference: the column of reference answers (strings or numbers).
        formula: the formula of the perplexity, see ``perplexity``; "released" is what NOVER's code computes.
        reasoning_weight: w_r, the weight of the ranks, at least 0.
        efficiency_weight: w_e, the weight of short and good reasoning, at least 0.
        name: the reward's name.

    Raises:
        ValueError: a weight is negative or not finite, or ``PerplexityReward`` raised it.
        TypeError: a weight is no number, or ``PerplexityReward`` raised it.
    """

    tags: Sequence[str] = ("think", "answer")
    reference: str = "reference"
    formula: Formula = "released"
    reasoning_weight: float = 1.0
    efficiency_weight: float = 1.0
    name: str = "nover"

    needs_entropy: ClassVar[bool] = False
    needs_policy: ClassVar[bool] = True
    reads_only: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for option in ("reasoning_weight", "efficiency_weight"):
            weight = getattr(self, option)
            if isinstance(weight, bool) or not isinstance(weight, (int, float)):
                raise TypeError(f"{option}: {weight!r}, expected a number")
            if not (math.isfinite(weight) and weight >= 0):
                raise ValueError(f"{option}: {weight!r}, expected a finite number, at least 0")
        self._perplexity()

    def __call__(self, batch: RewardBatch) -> list[float | None]:
        perplexity = self._perplexity()
        references = perplexity.references(batch)
        judged = perplexity.judge(batch, references)
        values: list[float | None] = []
        for _, group in groupby(range(len(batch)), key=lambda row: (batch.prompts[row], references[row])):
            members = list(group)
            valid = [judgement for row in members if (judgement := judged[row]) is not None]
            for row in members:
                values.append(self._value(judged[row], valid) if references[row] else None)
        return values

    @property
    def needs_columns(self) -> tuple[str, ...]:
        """The columns that the data have to have."""
        return (self.reference,)

    def why_silent(self, look: Look) -> str:
        """The likely reason why it gave nothing, see ``first_batches``."""
        if look.abstained:
            return f"the column {self.reference!r} is empty"
        return why_without_form(self.tags, look) if look.value == 0.0 else ""

    def _value(self, judgement: Judged | None, valid: list[Judged]) -> float:
        if judgement is None:
            return 0.0
        return self.reasoning_weight * rank_reward(judgement, valid) + self.efficiency_weight * efficiency_reward(
            judgement, valid
        )

    def _perplexity(self) -> PerplexityReward:
        return PerplexityReward(tags=self.tags, reference=self.reference, formula=self.formula, name=self.name)


def rank_reward(row: Judged, valid: list[Judged]) -> float:
    """R_r of the module: from 1 for the lowest perplexity of the group down to 1 / V. ``valid`` holds ``row``."""
    better = sum(other.neg_log_perplexity > row.neg_log_perplexity for other in valid)
    equal = sum(other.neg_log_perplexity == row.neg_log_perplexity for other in valid) - 1
    return (len(valid) - better - equal / 2) / len(valid)


def efficiency_reward(row: Judged, valid: list[Judged]) -> float:
    """R_e of the module: the share of the others whose reasoning is longer and leaves the reference less likely."""
    beaten = sum(
        other.reasoning_tokens > row.reasoning_tokens and other.neg_log_perplexity < row.neg_log_perplexity
        for other in valid
    )
    return beaten / max(1, len(valid) - 1)
