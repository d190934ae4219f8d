"""Options as text. Operators that torch.compile calls take no dataclass, so options pass through them as JSON."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from functools import lru_cache
from typing import Any, TypeVar

import torch

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])


def constant_in_graphs(function: F) -> F:
    """Makes ``torch.compile`` call the function while it traces, and keep the result as a constant of the graph.

    ``torch.compiler.assume_constant_result`` does the same, but it imports half of torch's compiler.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def as_text(spec: Any) -> str:
    """The fields of a frozen dataclass of options in JSON, which ``from_text`` reads.

    The fields are numbers, strings or None. They become constants of a compiled graph, so each other value compiles one
    more graph. A number that changes from call to call, such as a seed, should be an argument of its own.
    """
    if not torch.compiler.is_compiling():
        return _text_of(spec)
    values = [getattr(spec, name) for name in spec.__dataclass_fields__]
    for i, value in enumerate(values):
        if value is not None and not isinstance(value, str):  # the number may be a symbol of the graph by now
            values[i] = torch.fx.experimental.symbolic_shapes.guard_scalar(value)
    return _json(list(spec.__dataclass_fields__), *values)


def from_text(cls: type[T], text: str) -> T:
    """The opposite of ``as_text``: the options of class ``cls`` that the text was made from."""
    found: T = _options_of(cls, text)  # type: ignore[arg-type]  # classes are hashable
    return found


@lru_cache(maxsize=256)
def _text_of(spec: Any) -> str:
    return json.dumps(asdict(spec))


@lru_cache(maxsize=256)
def _options_of(cls: Any, text: str) -> Any:
    return cls(**json.loads(text))


@constant_in_graphs
def _json(names: list[str], *values: Any) -> str:
    return json.dumps(dict(zip(names, values, strict=True)))
