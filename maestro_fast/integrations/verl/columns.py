"""Reads the columns of a batch in verl's queue: K named rewards, utilities, and what a weight policy asks for.

A reward is found by its name in ``reward_extra_info``, the dict that compute_score returned for the row; else in the
row's other extra fields, where an agent loop may put one; else in a column of the queue, where a colocated reward model
puts it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

_INFO = "reward_extra_info"


def as_list(column: Any) -> list[Any]:
    """A column of the queue as a list, whether it came as a tensor, an array, a stack or a list of tensordict."""
    return list(column.tolist() if hasattr(column, "tolist") else column)


def named_values(
    names: Sequence[str], extra_fields: Sequence[Any], columns: Mapping[str, Any], padding: Sequence[bool]
) -> Tensor:
    """The values of K names for each of B rows.

    Args:
        names: K names.
        extra_fields: the column of this name, a mapping for each row.
        columns: those columns of the queue that have one of the names.
        padding: whether a row is nobody's response; such rows are not read.

    Returns:
        float32 [B, K], NaN where the value is None or the row has none, and in padding.

    Raises:
        ValueError: no row has the name, or a value is NaN or infinite. None says that a reward abstains.
        TypeError: a value is not a number.
    """
    fields = [row if isinstance(row, Mapping) else {} for row in extra_fields]
    infos = [row.get(_INFO) or {} for row in fields]
    wanted = [name for name in names if name in columns]
    lists = {name: as_list(columns[name]) for name in wanted}
    found = np.empty((len(fields), len(names)), dtype=np.float64)
    for k, name in enumerate(names):
        found[:, k] = _values(name, infos, fields, lists.get(name), padding)
    return torch.from_numpy(found).float()


def _values(
    name: str,
    infos: Sequence[Mapping[str, Any]],
    fields: Sequence[Mapping[str, Any]],
    column: Sequence[Any] | None,
    padding: Sequence[bool],
) -> np.ndarray[Any, np.dtype[np.float64]]:
    """float64 [B], one name's values."""
    if any(name in info for info in infos):
        values = [info.get(name) for info in infos]
    elif any(name in row for row in fields):
        values = [row.get(name) for row in fields]
    elif column is not None:
        values = list(column)
    else:
        there = sorted({key for info in infos for key in info})
        raise ValueError(
            f"reward {name!r}: compute_score returned no such key, expected it beside "
            f"{', '.join(there) or '(it returned no dict with keys beside score)'}"
        )
    values = [None if pad else value for value, pad in zip(values, padding, strict=True)]
    try:
        numbers = np.array(values, dtype=np.float64)
    except (TypeError, ValueError):
        numbers = np.array([_number(name, value) for value in values], dtype=np.float64)
    if numbers.ndim != 1:
        raise TypeError(f"reward {name!r}: got values of shape {numbers.shape[1:]}, expected a number or None")
    bad = ~np.isfinite(numbers)
    if bad.any() and int(bad.sum()) > values.count(None):
        row = next(i for i in np.flatnonzero(bad) if values[i] is not None)
        raise ValueError(f"reward {name!r}: {values[row]} in row {row}, expected a finite number, or None to abstain")
    return numbers


def _number(name: str, value: Any) -> float:
    if value is None:
        return math.nan
    try:
        return float(value)
    except (TypeError, ValueError):
        raise TypeError(f"reward {name!r}: got {value!r}, expected a number or None") from None


def data_columns(names: Sequence[str], columns: Mapping[str, Any]) -> dict[str, list[Any]]:
    """The columns of the data that a weight policy reads. "extra_info.topic" is the entry ``topic`` of ``extra_info``.

    Raises:
        ValueError: there is no such column or entry.
    """
    found = {}
    for name in names:
        first, _, entry = name.partition(".")
        if first not in columns:
            raise ValueError(f"column {name!r}: the batch has none, expected one of {', '.join(sorted(columns))}")
        values = as_list(columns[first])
        if entry:
            values = [_entry(value, entry, name) for value in values]
        found[name] = values
    return found


def _entry(value: Any, entry: str, name: str) -> Any:
    if not isinstance(value, Mapping) or entry not in value:
        there = ", ".join(map(str, value)) if isinstance(value, Mapping) else repr(value)
        raise ValueError(f"column {name!r}: a row has no entry {entry!r}, expected one of {there}")
    return value[entry]
