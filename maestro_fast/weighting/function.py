"""Weights from a function of the user's own.

    def weights(context: WeightContext) -> Tensor      # [K], or [B, K]

It sees the whole batch: rewards, step, the columns that it asked for, utilities if there is an anchor. It must be a
pure function of these: every process calls it, and a resumed run calls it again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from maestro_fast.functions import load_function
from maestro_fast.weighting.policy import Stateless, WeightContext, Weights


@dataclass(frozen=True)
class CallableConfig:
    """Options of ``callable``.

    Attributes:
        function: the function, or its name: "package.module:function" or "file.py:function".
        columns: data set columns that it reads from ``context.columns``.
    """

    function: Any
    columns: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.function, str) and not callable(self.function):
            raise ValueError(f"function: {self.function!r}, expected a function or its name")

    def build(self, reward_names: tuple[str, ...], context_size: int) -> FunctionPolicy:
        del reward_names, context_size
        function = load_function(self.function) if isinstance(self.function, str) else self.function
        return FunctionPolicy(function, self.columns)


class FunctionPolicy(Stateless):
    """Calls the function once a batch.

    Raises:
        ValueError: when called, weights of another shape, or not finite.
    """

    name = "callable"

    def __init__(self, function: Callable[[WeightContext], Tensor], columns: tuple[str, ...] = ()) -> None:
        self.function, self.needs_columns = function, columns

    def weights(self, context: WeightContext) -> Weights:
        found, shape = self.function(context), context.rewards_BK.shape
        if not isinstance(found, Tensor) or found.shape not in (shape, shape[1:]):
            got = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(f"weights.function: returned {got}, expected a tensor {tuple(shape)} or ({shape[1]},)")
        weights_BK = found.detach().to(context.rewards_BK).expand(shape)
        if not weights_BK.isfinite().all():
            raise ValueError("weights.function: returned weights that are not finite")
        return Weights(weights_BK, weights_BK)
