"""Weights by step: curricula such as format first, content later.

    constant   w = values of the last point whose step has been reached
    linear     between two points in proportion to the steps; constant before the first and after the last

Steps count generation batches, from 0. Asked for in https://github.com/huggingface/trl/issues/3036.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Literal

import torch

from maestro_fast.weighting.policy import Stateless, WeightContext, Weights
from maestro_fast.weighting.values import in_order


@dataclass(frozen=True)
class Point:
    """The weights from one generation batch on.

    Attributes:
        step: The generation batch, from 0, at which these weights begin.
        values: A weight for every reward, by name.
    """

    step: int
    values: dict[str, float]


@dataclass(frozen=True)
class ScheduleConfig:
    """Options of ``schedule``.

    Attributes:
        points: in ascending order of their steps, the first at step 0.
        between: "constant" or "linear".
    """

    points: list[Point]
    between: Literal["constant", "linear"] = "constant"

    def __post_init__(self) -> None:
        steps = [point.step for point in self.points]
        if not steps or steps[0] != 0:
            raise ValueError(f"points: start at step {steps[0] if steps else None}, expected 0")
        if any(b <= a for a, b in itertools.pairwise(steps)):
            raise ValueError(f"points: at steps {steps}, expected ascending ones")

    def build(self, reward_names: tuple[str, ...], context_size: int) -> Schedule:
        del context_size
        rows = [in_order(point.values, reward_names, f"points[{i}].values") for i, point in enumerate(self.points)]
        return Schedule([point.step for point in self.points], rows, self.between == "linear")


class Schedule(Stateless):
    """w_k(step), the same for all responses."""

    name = "schedule"

    def __init__(self, steps: list[int], rows: list[tuple[float, ...]], linear: bool) -> None:
        self.steps, self.rows, self.linear = steps, rows, linear

    def weights(self, context: WeightContext) -> Weights:
        row_K = context.rewards_BK.new_tensor(self.at(context.step))
        weights_BK = row_K.expand_as(context.rewards_BK)
        return Weights(weights_BK, weights_BK)

    def at(self, step: int) -> tuple[float, ...]:
        """The K weights of a step."""
        last = max(i for i, start in enumerate(self.steps) if start <= step)
        if not self.linear or last + 1 == len(self.steps):
            return self.rows[last]
        share = (step - self.steps[last]) / (self.steps[last + 1] - self.steps[last])
        pair = torch.tensor([self.rows[last], self.rows[last + 1]], dtype=torch.float64)
        return tuple(torch.lerp(pair[0], pair[1], share).tolist())
