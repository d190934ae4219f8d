"""Weight policies that learn nothing: equal, static, random, schedule, router, and a function of the user's own.

equal      w_k = 1 / K: the default, and the baseline that adaptive weights have to beat
static     w_k = values[k], the same for every prompt and step: what most runs use today
random     weights drawn for every response, uniformly from the simplex: the paper's baseline without learning
schedule   w_k(step), the same for every prompt: curricula such as format first, content later
router     w_k = routes[column of the prompt][k]: what an oracle that knows the kind of each prompt would do
function   whatever the user's function returns
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from maestro_fast.functions import load_function
from maestro_fast.ops.philox import uniform
from maestro_fast.weighting.policy import Stateless, WeightContext, Weights, in_reward_order, same_weights

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EqualConfig:
    """Every reward gets the weight 1 / K, the baseline that adaptive weights have to beat; there are no options."""

    def build(self, reward_names: tuple[str, ...], context_size: int) -> Equal:
        """The policy for these rewards."""
        del reward_names, context_size
        return Equal()


class Equal(Stateless):
    """Every reward counts 1 / K."""

    name = "equal"

    def weights(self, context: WeightContext) -> Weights:
        """1 / K for every reward of every response."""
        K = len(context.reward_names)
        return same_weights(context.rewards_BK.new_full((K,), 1.0 / K), context)


@dataclass(frozen=True)
class StaticConfig:
    """One weight per reward, the same for every response and step.

    Attributes:
        values: A weight for every reward, by name. Weights are used as they are, not rescaled, and may be negative.
    """

    values: dict[str, float]

    def build(self, reward_names: tuple[str, ...], context_size: int) -> Static:
        """The policy for these rewards. A ValueError names a reward that is unknown or has no finite weight."""
        del context_size
        return Static(in_reward_order(self.values, reward_names, "values"))


class Static(Stateless):
    """Weights that never change, given in the order of the rewards."""

    name = "static"

    def __init__(self, values: tuple[float, ...]) -> None:
        self.values = values

    def weights(self, context: WeightContext) -> Weights:
        """The K values, for every response."""
        return same_weights(context.rewards_BK.new_tensor(self.values), context)


@dataclass(frozen=True)
class RandomConfig:
    """Weights are drawn anew for every response, uniformly from the simplex: the paper's baseline without learning.

    Attributes:
        seed: The seed of the draws. Weights depend on it, on the step and on the response's place in the batch.
    """

    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed: {self.seed}, expected 0 <= seed < 2**64")

    def build(self, reward_names: tuple[str, ...], context_size: int) -> Random:
        """The policy for these rewards."""
        del reward_names, context_size
        return Random(self.seed)


class Random(Stateless):
    """Weights from Dirichlet(1, ..., 1), drawn anew for every response.

    w = e / sum(e) with e_k = -log(1 - u_k) and u_k uniform: normalised exponentials have that distribution.
    """

    name = "random"

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def weights(self, context: WeightContext) -> Weights:
        """The draws of this step; their expectation is 1 / K."""
        rewards_BK = context.rewards_BK
        u = uniform(self.seed, context.step, 0, rewards_BK.numel(), rewards_BK.device).view(rewards_BK.shape)
        # The small constant keeps the sum above 0 if u is 0 for all K.
        exponential_BK = -torch.log1p(-u) + 2.0**-30
        weights_BK = exponential_BK / exponential_BK.sum(-1, keepdim=True)
        return Weights(weights_BK, torch.full_like(weights_BK, 1.0 / weights_BK.shape[1]))


@dataclass(frozen=True)
class Point:
    """One point of a schedule.

    Attributes:
        step: The generation batch, from 0, at which ``values`` are reached.
        values: A weight for every reward, by name.
    """

    step: int
    values: dict[str, float]


@dataclass(frozen=True)
class ScheduleConfig:
    """Weights change with the step alone, for curricula such as format first and content later.

    Attributes:
        points: Weights at some steps, in ascending order of the steps. The first one is at step 0.
        between: "constant" keeps the weights of the last point reached. "linear" interpolates between two points.
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
        """The policy for these rewards. A ValueError names a reward that is unknown or has no finite weight."""
        del context_size
        rows = [
            in_reward_order(point.values, reward_names, f"points[{i}].values") for i, point in enumerate(self.points)
        ]
        return Schedule([point.step for point in self.points], rows, self.between == "linear")


class Schedule(Stateless):
    """Weights by step. They were asked for in https://github.com/huggingface/trl/issues/3036."""

    name = "schedule"

    def __init__(self, steps: list[int], rows: list[tuple[float, ...]], linear: bool) -> None:
        self.steps, self.rows, self.linear = steps, rows, linear

    def weights(self, context: WeightContext) -> Weights:
        """The K weights of this step, for every response."""
        return same_weights(context.rewards_BK.new_tensor(self.at(context.step)), context)

    def at(self, step: int) -> tuple[float, ...]:
        """The K weights of a step. After the last point they stay as they are."""
        last = max(i for i, start in enumerate(self.steps) if start <= step)
        if not self.linear or last + 1 == len(self.steps):
            return self.rows[last]
        share = (step - self.steps[last]) / (self.steps[last + 1] - self.steps[last])
        pair = torch.tensor([self.rows[last], self.rows[last + 1]], dtype=torch.float64)
        return tuple(torch.lerp(pair[0], pair[1], share).tolist())


@dataclass(frozen=True)
class RouterConfig:
    """A column of the data chooses the weights, as an oracle that knows the kind of each prompt would.

    Attributes:
        column: The data set column that tells the kind of a prompt. Its values are compared as text.
        routes: For each value of the column, a weight for every reward, by name.
        default: The weights of all other values, by reward name. If it is empty, such a prompt is an error.
    """

    column: str
    routes: dict[str, dict[str, float]]
    default: dict[str, float] = field(default_factory=dict)

    def build(self, reward_names: tuple[str, ...], context_size: int) -> Router:
        """The policy for these rewards. A ValueError names a reward that is unknown or has no finite weight."""
        del context_size
        routes = {key: in_reward_order(row, reward_names, f"routes.{key}") for key, row in self.routes.items()}
        default = in_reward_order(self.default, reward_names, "default") if self.default else None
        return Router(self.column, routes, default)


class Router(Stateless):
    """Static weights for each kind of prompt: the baseline that a Conductor has to match without seeing the column."""

    name = "router"

    def __init__(
        self, column: str, routes: dict[str, tuple[float, ...]], default: tuple[float, ...] | None = None
    ) -> None:
        self.column, self.routes, self.default = column, routes, default
        self.needs_columns = (column,)

    def weights(self, context: WeightContext) -> Weights:
        """The weights that the column selects.

        Raises:
            ValueError: A value of the column has no route and there is no default.
        """
        rows = [self._route(str(value)) for value in context.columns[self.column]]
        weights_BK = context.rewards_BK.new_tensor(rows).view(context.rewards_BK.shape)
        return Weights(weights_BK, weights_BK)

    def check_rows(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Checks that every row of the training data has a route, and names routes that none of them takes.

        Raises:
            ValueError: a value of the column has no route and there is no default.
        """
        values = dict.fromkeys(str(row.get(self.column)) for row in rows)
        for value in values:
            self._route(value)
        unused = [route for route in self.routes if route not in values]
        if unused:
            logger.warning(
                "weights.routes: no prompt takes %s, the column %r holds %s",
                ", ".join(map(repr, unused)),
                self.column,
                ", ".join(map(repr, list(values)[:12])) + (", ..." if len(values) > 12 else ""),
            )

    def _route(self, value: str) -> tuple[float, ...]:
        row = self.routes.get(value, self.default)
        if row is None:
            raise ValueError(
                f"weights.routes: none for {self.column} {value!r}, expected one of {', '.join(self.routes)}, "
                "or weights.default"
            )
        return row


@dataclass(frozen=True)
class FunctionPolicyConfig:
    """A function of the user's own gives the weights.

    Attributes:
        function: The function, or its name as "package.module:function" or "file.py:function".
        columns: The data set columns that the function reads from ``context.columns``.
    """

    function: Any
    columns: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.function, str) and not callable(self.function):
            raise ValueError(f"function: {self.function!r}, expected a function or its name")

    def build(self, reward_names: tuple[str, ...], context_size: int) -> FunctionPolicy:
        """The policy for these rewards. ``load_function`` says what is wrong with a name that leads nowhere."""
        del reward_names, context_size
        function = load_function(self.function) if isinstance(self.function, str) else self.function
        return FunctionPolicy(function, self.columns)


class FunctionPolicy(Stateless):
    """Calls a function of the user's own, once per batch.

        def weights(context: WeightContext) -> Tensor      # [K], or [B, K]

    The function sees the whole batch: the rewards, the step, its columns, and the utilities if there is an anchor. It
    must depend on nothing else, since every process calls it and a resumed run calls it again.
    """

    name = "callable"  # Checkpoints hold this name, which the type ``function`` had in release 0.1.

    def __init__(self, function: Callable[[WeightContext], Tensor], columns: tuple[str, ...] = ()) -> None:
        self.function, self.needs_columns = function, columns

    def weights(self, context: WeightContext) -> Weights:
        """What the function returns, for every response.

        Raises:
            ValueError: The function returned something of another shape, or weights that are not finite.
        """
        found, shape = self.function(context), context.rewards_BK.shape
        if not isinstance(found, Tensor) or found.shape not in (shape, shape[1:]):
            got = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(f"weights.function: returned {got}, expected a tensor {tuple(shape)} or ({shape[1]},)")
        weights_BK = found.detach().to(context.rewards_BK).expand(shape)
        if not weights_BK.isfinite().all():
            raise ValueError("weights.function: returned weights that are not finite")
        return Weights(weights_BK, weights_BK)
