"""Static weights, by reward name: what most runs use today, w_k fixed for every prompt."""

from __future__ import annotations

import math
from dataclasses import dataclass

from maestro_fast.weighting.policy import Stateless, WeightContext, Weights


@dataclass(frozen=True)
class StaticConfig:
    """Options of ``static``.

    Attributes:
        values: a weight for every reward, by name; used as they are, not rescaled. Negative ones are allowed.
    """

    values: dict[str, float]

    def __post_init__(self) -> None:
        for name, value in self.values.items():
            if not math.isfinite(value):
                raise ValueError(f"values.{name}: {value}, expected a finite number")

    def build(self, reward_names: tuple[str, ...], context_size: int) -> Static:
        del context_size
        for name in self.values:
            if name not in reward_names:
                raise ValueError(f"values.{name}: there is no such reward, expected one of {', '.join(reward_names)}")
        for name in reward_names:
            if name not in self.values:
                raise ValueError(f"values.{name}: missing, every reward needs a weight")
        return Static(tuple(self.values[name] for name in reward_names))


class Static(Stateless):
    """w_k = values[k], in the order of the rewards."""

    name = "static"

    def __init__(self, values: tuple[float, ...]) -> None:
        self.values = values

    def weights(self, context: WeightContext) -> Weights:
        row_K = context.rewards_BK.new_tensor(self.values)
        weights_BK = row_K.expand_as(context.rewards_BK)
        return Weights(weights_BK, weights_BK)
