"""The policy's own uncertainty as a reward: the entropy of what it writes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from maestro_fast.records import RewardBatch

Direction = Literal["minimise", "maximise"]
Estimate = Literal["exact", "sampled"]
Reduction = Literal["mean", "sum"]


@dataclass(frozen=True)
class EntropyReward:
    """-H or +H, where H is the entropy of the policy over the tokens of the response, in nats.

        exact:    H = mean_t H(pi(. | y_<t)), the entropy of each token's distribution
        sampled:  H = mean_t -log pi(y_t | y_<t), its estimate from the tokens that were sampled

    or the sum over t. EM-GRPO, as the MAESTRO paper (arXiv 2601.07208) names its baseline, minimises the mean; creative
    tasks may want more of it. The sums are those of EM-RL (arXiv 2505.15134): "exact" its EM-RL-token, "sampled", the
    log-probability of the whole response, its EM-RL-sequence. A completion without tokens abstains.

    Attributes:
        direction: "minimise" gives -H, "maximise" +H.
        estimate, reduction: see above.
        name: the reward's name.

    Raises:
        ValueError: an unknown direction, estimate or reduction. When called: a batch without mean_entropies_B [B], or
            for "sampled" without mean_logprobs_B [B].
    """

    direction: Direction = "minimise"
    estimate: Estimate = "exact"
    reduction: Reduction = "mean"
    name: str = "entropy"

    needs_entropy: ClassVar[bool] = True
    needs_policy: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for option, allowed in (("direction", Direction), ("estimate", Estimate), ("reduction", Reduction)):
            if getattr(self, option) not in get_args(allowed):
                raise ValueError(f"{option}: {getattr(self, option)!r}, expected one of {get_args(allowed)}")

    def __call__(self, batch: RewardBatch) -> list[float | None]:
        sign = -1.0 if self.direction == "minimise" else 1.0
        return [
            sign * entropy * (len(ids) if self.reduction == "sum" else 1) if ids else None
            for entropy, ids in zip(self._mean_entropies(batch), batch.completion_ids, strict=True)
        ]

    def _mean_entropies(self, batch: RewardBatch) -> list[float]:
        field = "mean_entropies_B" if self.estimate == "exact" else "mean_logprobs_B"
        means_B = getattr(batch, field)
        if means_B is None or means_B.shape != (len(batch),):
            got = "missing" if means_B is None else f"of shape {tuple(means_B.shape)}"
            raise ValueError(f"reward {self.name!r}: {field} is {got}, expected ({len(batch)},)")
        values: list[float] = (means_B if self.estimate == "exact" else -means_B).tolist()
        return values
