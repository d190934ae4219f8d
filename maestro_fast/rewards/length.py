"""A penalty on length beyond a target."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from maestro_fast.records import RewardBatch, plain_text

LengthUnit = Literal["tokens", "words"]


@dataclass(frozen=True)
class LengthReward:
    """0 up to the target, beyond it a straight line down to a floor.

        r(n) = 0 for n <= target,  max(floor, -(n - target) / scale) beyond

    Of the kind of DAPO's soft overlong punishment (arXiv 2503.14476, equation 13), which is
    ``LengthReward(target=max - cache, scale=cache)`` up to the maximum.

    Attributes:
        target: the length up to which nothing is lost, in ``unit``.
        unit: "tokens" counts completion_ids, the end-of-sequence token among them; "words" what whitespace
            separates.
        scale: how many units beyond the target cost 1; by default the target.
        floor: the lowest reward, at most 0; -inf for none.
        name: the reward's name.

    Raises:
        ValueError: a number out of its range, or an unknown unit.
    """

    target: float
    unit: LengthUnit = "tokens"
    scale: float | None = None
    floor: float = -1.0
    name: str = "length"

    needs_entropy: ClassVar[bool] = False
    needs_policy: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not (_is_number(self.target) and self.target >= 0):
            raise ValueError(f"target: {self.target!r}, expected a number of {self.unit}, at least 0")
        if self.unit not in get_args(LengthUnit):
            raise ValueError(f"unit: {self.unit!r}, expected one of {get_args(LengthUnit)}")
        if not (_is_number(self._scale) and self._scale > 0):
            raise ValueError(f"scale: {self._scale!r}, expected a positive number (it is the target by default)")
        if not (_is_number(self.floor) and self.floor <= 0):
            raise ValueError(f"floor: {self.floor!r}, expected a number, at most 0")

    def __call__(self, batch: RewardBatch) -> list[float]:
        if self.unit == "tokens":
            lengths = [len(ids) for ids in batch.completion_ids]
        else:
            lengths = [len(plain_text(completion).split()) for completion in batch.completions]
        return [max(self.floor, -max(0.0, n - self.target) / self._scale) for n in lengths]

    @property
    def _scale(self) -> float:
        return self.target if self.scale is None else self.scale


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
