"""Static weights per kind of prompt, by a column of the data: what an oracle of the task families would do.

w = routes[column of the prompt]. The baseline that a Conductor has to come near without being told the column.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from maestro_fast.weighting.policy import Stateless, WeightContext, Weights
from maestro_fast.weighting.values import in_order


@dataclass(frozen=True)
class RouterConfig:
    """Options of ``router``.

    Attributes:
        column: of the data set; its values are compared as text.
        routes: weights by reward name, by value of the column.
        default: weights of every other value; empty: such a prompt is an error.
    """

    column: str
    routes: dict[str, dict[str, float]]
    default: dict[str, float] = field(default_factory=dict)

    def build(self, reward_names: tuple[str, ...], context_size: int) -> Router:
        del context_size
        routes = {key: in_order(row, reward_names, f"routes.{key}") for key, row in self.routes.items()}
        default = in_order(self.default, reward_names, "default") if self.default else None
        return Router(self.column, routes, default)


class Router(Stateless):
    """
    Raises:
        ValueError: when called, a value of the column that has no route, without a default.
    """

    name = "router"

    def __init__(
        self, column: str, routes: dict[str, tuple[float, ...]], default: tuple[float, ...] | None = None
    ) -> None:
        self.column, self.routes, self.default = column, routes, default
        self.needs_columns = (column,)

    def weights(self, context: WeightContext) -> Weights:
        rows = [self._route(str(value)) for value in context.columns[self.column]]
        weights_BK = context.rewards_BK.new_tensor(rows).view(context.rewards_BK.shape)
        return Weights(weights_BK, weights_BK)

    def _route(self, value: str) -> tuple[float, ...]:
        row = self.routes.get(value, self.default)
        if row is None:
            raise ValueError(
                f"weights.routes: none for {self.column} {value!r}, expected one of {', '.join(self.routes)}, "
                "or weights.default"
            )
        return row
