"""Makes a reward of any function that has the signature of TRL's reward functions, synchronous or asynchronous.

    def richness(prompts, completions, reference, **kwargs) -> list[float | None]

The signature is that of ``reward_funcs`` of TRL's GRPOTrainer (``_calculate_rewards`` in trl 1.16). The arguments that
only that trainer has are not passed: ``trainer_state``, ``log_extra``, ``log_metric`` and ``environments``.
"""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from inspect import Parameter, signature
from pathlib import Path
from typing import Annotated, Any

from maestro_fast.functions import load_function
from maestro_fast.records import RewardBatch, own_copy
from maestro_fast.rewards.first_batches import Look
from maestro_fast.rewards.reward import RewardValues
from maestro_fast.settings import REST

__all__ = ["FunctionReward", "FunctionRewardConfig", "callable_name", "load_function"]
STANDARD_ARGUMENTS = ("prompts", "completions", "completion_ids")


@dataclass(frozen=True)
class FunctionRewardConfig:
    """A reward function of the user's own.

    Attributes:
        function: the function, as "package.module:name" or "path/to/file.py:name".
        name: the reward's name; null takes the function's.
        options: all other settings of the entry, which the function gets as constant keyword arguments.
    """

    function: str
    name: str | None = None
    options: Annotated[dict[str, Any], REST] = field(default_factory=dict)

    def build(self, path: str, base_dir: str | Path) -> FunctionReward:
        """Loads the function. ``path`` is the dotted name of the entry; relative file paths start at ``base_dir``."""
        function = load_function(self.function, field=f"{path}.function", base_dir=base_dir)
        name = self.function.rpartition(":")[2] if self.name is None else self.name
        try:
            return FunctionReward(function, name, self.options)
        except (ValueError, TypeError) as error:
            raise type(error)(f"{path}: {error}") from error


class FunctionReward:
    """Calls a function with prompts, completions, completion_ids and every data column, B entries each.

    A function that names ``prefills`` gets the part of each reply that stands in the prompt already, such as
    ``<think>``, or "", unless the data have a column of that name.

    All are keyword arguments. A function without ``**kwargs`` gets only the arguments that it names. Each call gets
    lists and dicts of its own, so the function may change them; TRL hands the same ones to all functions. An
    ``async def`` function, or an object whose ``__call__`` is one, works as well: ``RewardSet`` awaits the awaitable
    that it returns.

    Args:
        function: the function, which returns B values, with None where it abstains.
        name: the reward's name; by default it is the function's, as in TRL.
        options: constant keyword arguments. They take precedence over data columns of the same name.

    Raises:
        TypeError: the function is not callable, or has positional-only arguments.
        ValueError: an option has the name of a standard argument, or the function does not take it. When called: an
            argument without a default is neither standard nor an option nor a column.
    """

    needs_entropy = False
    needs_policy = False
    reads_only = True  # what the function gets are copies

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
        if self._takes_prefills:
            given.setdefault("prefills", batch.prefills or [""] * len(batch))
        for argument in self._required:
            if argument not in given:
                raise ValueError(
                    f"reward {self.name!r}: the argument {argument!r} is neither one of "
                    f"{', '.join(STANDARD_ARGUMENTS)} nor a column of the data; the columns are "
                    f"{', '.join(sorted(batch.columns)) or 'none'}"
                )
        if self._accepted is not None:
            given = {argument: given[argument] for argument in self._accepted if argument in given}
        copies = {argument: value if argument in self.options else own_copy(value) for argument, value in given.items()}
        result: RewardValues | Awaitable[RewardValues] = self.function(**copies)
        return result

    def metrics(self) -> dict[str, float]:
        """The figures of a function that is an object with a method ``metrics`` of its own."""
        pop = getattr(self.function, "metrics", None)
        return pop() if callable(pop) else {}

    @property
    def needs_columns(self) -> tuple[str, ...]:
        """The columns that the data have to have: the arguments without a default that are none of the others."""
        given = {*STANDARD_ARGUMENTS, "prefills", *self.options}
        return tuple(argument for argument in self._required if argument not in given)

    def names(self, argument: str) -> bool:
        """Whether the function has an argument of this name, beside ``**kwargs``."""
        try:
            found = signature(self.function).parameters.get(argument)
        except ValueError:  # as in ``_arguments``
            return False
        return found is not None and found.kind is not Parameter.VAR_KEYWORD

    @property
    def _takes_prefills(self) -> bool:
        return "prefills" in (*self._required, *(self._accepted or ()))

    def why_silent(self, look: Look) -> str:
        """Says where to look, see ``first_batches``."""
        name = callable_name(self.function)
        if look.abstained:
            return f"does {name} find what it needs, in the text and in the columns?"
        if not self._takes_prefills and look.prompt_end.rstrip().endswith(">"):
            return f"the prompt may open the reply; {name} gets that part if it names the argument prefills"
        if look.value is None:
            return ""
        return f"{name} returned the same number every time; does it find in the text what it looks for?"


def callable_name(function: Callable[..., Any]) -> str:
    """The ``__name__`` of a function, of the function in a partial, or of the class of any other object."""
    while isinstance(function, functools.partial):
        function = function.func
    return str(getattr(function, "__name__", type(function).__name__))


def _arguments(name: str, function: Callable[..., Any]) -> tuple[list[str] | None, list[str]]:
    """The arguments that may be passed by keyword (None stands for any), and those without a default."""
    try:
        parameters = signature(function).parameters.values()
    except ValueError:  # some callables written in C have no signature
        return None, []
    if any(p.kind is Parameter.POSITIONAL_ONLY for p in parameters):
        raise TypeError(f"reward {name!r}: positional-only arguments, expected arguments that take keywords")
    named = [p for p in parameters if p.kind in (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)]
    required = [p.name for p in named if p.default is Parameter.empty]
    if any(p.kind is Parameter.VAR_KEYWORD for p in parameters):
        return None, required
    return [p.name for p in named], required
