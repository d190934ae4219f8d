"""Numbers by reward name, as configs give them, in the order of the rewards."""

from __future__ import annotations

import math
from collections.abc import Mapping


def in_order(
    values: Mapping[str, float], reward_names: tuple[str, ...], path: str, default: float | None = None
) -> tuple[float, ...]:
    """One number per reward; ``default`` where there is none, if it may be missing.

    Raises:
        ValueError: a name that is no reward's, a number that is not finite, or a missing one.
    """
    for name, value in values.items():
        if name not in reward_names:
            raise ValueError(f"{path}.{name}: there is no such reward, expected one of {', '.join(reward_names)}")
        if not math.isfinite(value):
            raise ValueError(f"{path}.{name}: {value}, expected a finite number")
    found = [values.get(name, default) for name in reward_names]
    for name, number in zip(reward_names, found, strict=True):
        if number is None:
            raise ValueError(f"{path}.{name}: missing, every reward needs a weight")
    return tuple(number for number in found if number is not None)


def positive_in_order(values: Mapping[str, float], reward_names: tuple[str, ...], path: str) -> tuple[float, ...]:
    """As ``in_order`` with 1 where nothing is given, and above 0 throughout."""
    found = in_order(values, reward_names, path, 1.0)
    for name, number in zip(reward_names, found, strict=True):
        if not number > 0:
            raise ValueError(f"{path}.{name}: {number}, expected a number above 0")
    return found
