"""Any function with the signature of TRL's reward functions as a reward, synchronous or asynchronous.

    def richness(prompts, completions, reference, **kwargs) -> list[float | None]

The signature is that of ``reward_funcs`` of TRL's GRPOTrainer (``_calculate_rewards`` in trl 1.16), without
what only that trainer has: ``trainer_state``, ``log_extra``, ``log_metric`` and ``environments`` are not
passed.
"""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable, Mapping
from inspect import Parameter, signature
from typing import Any

from maestro_fast.functions import load_function
from maestro_fast.records import RewardBatch
from maestro_fast.rewards.reward import RewardValues

__all__ = ["FunctionReward", "callable_name", "load_function"]
STANDARD_ARGUMENTS = ("prompts", "completions", "completion_ids")


class FunctionReward:
    """Calls a function with prompts, completions, completion_ids and every data column, B entries each.

    All are keyword arguments. A function without ``**kwargs`` gets only the arguments that it names. An
    ``async def`` function, or an object whose ``__call__`` is one, works as well: the awaitable that it
    returns is awaited by the ``RewardSet``.

    Args:
        function: returns B values, None where it abstains.
        name: the reward's name; by default the function's, as TRL names it.
        options: constant keyword arguments; they go before data columns of the same name.

    Raises:
        TypeError: not callable, or with positional-only arguments.
        ValueError: an option that is a standard argument or that the function does not take. When called: an
            argument without default that is neither standard nor an option nor a column.
    """

    needs_entropy = False
    needs_policy = False

    def __init__(
        self, function: Callable[..., Any], name: str | None = None, options: Mapping[str, Any] | None = None
    ) -> None:
        if not callable(function):
            raise TypeError(f"function: got {type(function).__name__}, expected a callable")
        self.function = function
        self.name = name or callable_name(function)
        self.options = dict(options or {})
        self._accepted, self._required = _arguments(self.name, function)
        for option in self.options:
            if option in STANDARD_ARGUMENTS:
                raise ValueError(f"reward {self.name!r}: the option {option!r} has the name of a standard argument")
            if self._accepted is not None and option not in self._accepted:
                raise ValueError(
                    f"reward {self.name!r}: {callable_name(function)} takes no {option!r}, it takes "
                    f"{', '.join(self._accepted) or 'nothing'}"
                )

    def __call__(self, batch: RewardBatch) -> RewardValues | Awaitable[RewardValues]:
        standard = {
            "prompts": batch.prompts,
            "completions": batch.completions,
            "completion_ids": batch.completion_ids,
        }
        given = {**batch.columns, **standard, **self.options}
        for argument in self._required:
            if argument not in given:
                raise ValueError(
                    f"reward {self.name!r}: the argument {argument!r} is neither one of "
                    f"{', '.join(STANDARD_ARGUMENTS)} nor a column of the data; the columns are "
                    f"{', '.join(sorted(batch.columns)) or 'none'}"
                )
        if self._accepted is not None:
            given = {argument: given[argument] for argument in self._accepted if argument in given}
        result: RewardValues | Awaitable[RewardValues] = self.function(**given)
        return result


def callable_name(function: Callable[..., Any]) -> str:
    """``__name__`` of a function, of a partial that of its function, of an object that of its class."""
    while isinstance(function, functools.partial):
        function = function.func
    return str(getattr(function, "__name__", type(function).__name__))


def _arguments(name: str, function: Callable[..., Any]) -> tuple[list[str] | None, list[str]]:
    """Arguments that may be passed by keyword (None: any), and those without default."""
    try:
        parameters = signature(function).parameters.values()
    except ValueError:  # some callables written in C have none
        return None, []
    if any(p.kind is Parameter.POSITIONAL_ONLY for p in parameters):
        raise TypeError(f"reward {name!r}: positional-only arguments, expected arguments that take keywords")
    named = [p for p in parameters if p.kind in (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)]
    required = [p.name for p in named if p.default is Parameter.empty]
    if any(p.kind is Parameter.VAR_KEYWORD for p in parameters):
        return None, required
    return [p.name for p in named], required
