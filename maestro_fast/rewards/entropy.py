"""The policy's own uncertainty as a reward: its mean token entropy on the response."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from maestro_fast.records import RewardBatch

Direction = Literal["minimise", "maximise"]


@dataclass(frozen=True)
class EntropyReward:
    """-H or +H, where H is the mean token entropy of the policy on the response, in nats.

    EM-GRPO, as the MAESTRO paper (arXiv 2601.07208) names its baseline, minimises it; creative tasks may want
    more of it. A completion without tokens abstains.

    Attributes:
        direction: "minimise" gives -H, "maximise" +H.
        name: the reward's name.

    Raises:
        ValueError: an unknown direction. When called: a batch without mean_entropies_B [B].
    """

    direction: Direction = "minimise"
    name: str = "entropy"

    needs_entropy: ClassVar[bool] = True
    needs_policy: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.direction not in get_args(Direction):
            raise ValueError(f"direction: {self.direction!r}, expected one of {get_args(Direction)}")

    def __call__(self, batch: RewardBatch) -> list[float | None]:
        entropies_B = batch.mean_entropies_B
        if entropies_B is None or entropies_B.shape != (len(batch),):
            got = "missing" if entropies_B is None else f"of shape {tuple(entropies_B.shape)}"
            raise ValueError(f"reward {self.name!r}: mean_entropies_B is {got}, expected ({len(batch)},)")
        sign = -1.0 if self.direction == "minimise" else 1.0
        return [
            sign * entropy if ids else None
            for entropy, ids in zip(entropies_B.tolist(), batch.completion_ids, strict=True)
        ]
