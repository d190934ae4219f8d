"""Reads the columns of a batch in verl's queue: K named rewards, utilities, and what a weight policy asks for.

In each row a reward is found by its name in ``reward_extra_info``, the dict that compute_score returned; else in the
row's other extra fields, where an agent loop may put one; else in a column of the queue, where a colocated reward model
puts it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import chain
from operator import itemgetter, pos
from typing import Any

import numpy as np
import torch
from torch import Tensor

_INFO = "reward_extra_info"


def as_list(column: Any) -> list[Any]:
    """A column of the queue as a list, whether it came as a tensor, an array, a stack or a list of tensordict."""
    return list(column.tolist() if hasattr(column, "tolist") else column)


def named_values(
    names: Sequence[str],
    extra_fields: Sequence[Any],
    columns: Mapping[str, Any],
    padding: Sequence[bool],
    known: set[str] | None = None,
) -> Tensor:
    """The values of K names for each of B rows.

    Args:
        names: K names.
        extra_fields: the column of this name, a mapping for each row.
        columns: those columns of the queue that have one of the names.
        padding: whether a row is nobody's response; such rows are not read.
        known: the names that earlier batches of the run had, to which those of this batch are added. A batch may lack
            a known name in all of its rows: compute_score may return other keys for other tasks.

    Returns:
        float32 [B, K], NaN where the value is None or the row has none, and in padding.

    Raises:
        ValueError: no row has the name, now or before, or a value is NaN or does not fit into float32. None says that
            a reward abstains.
        TypeError: a value is not a number.
    """
    fields = [row if type(row) is dict or isinstance(row, Mapping) else {} for row in extra_fields]
    infos = [row.get(_INFO) or {} for row in fields]
    complete = _complete(names, infos, padding)
    if complete is not None:
        if known is not None:
            known.update(names)
        return torch.from_numpy(complete)
    found = np.empty((len(fields), len(names)), dtype=np.float32)
    for k, name in enumerate(names):
        column = as_list(columns[name]) if name in columns else None
        values = [_ABSENT if pad else v for v, pad in zip(_values(name, infos, fields, column), padding, strict=True)]
        if known is not None and any(value is not _ABSENT for value in values):
            known.add(name)
        if all(value is _ABSENT for value in values) and not all(padding) and name not in (known or ()):
            there = sorted({key for info in infos for key in info})
            raise ValueError(
                f"reward {name!r}: compute_score returned no such key, expected it beside "
                f"{', '.join(there) or '(it returned no dict with keys beside score)'}"
            )
        found[:, k] = _numbers(name, [None if value is _ABSENT else value for value in values])
    return torch.from_numpy(found)


_ABSENT: Any = object()


def _complete(
    names: Sequence[str], infos: Sequence[Mapping[str, Any]], padding: Sequence[bool]
) -> np.ndarray[Any, np.dtype[np.float32]] | None:
    """float32 [B, K] where compute_score returned a finite number for every name and row, in one pass over the dicts.

    Otherwise None: then each name is looked at by itself, and what is wrong gets its error.
    """
    read = [info for info, pad in zip(infos, padding, strict=True) if not pad]
    if not read or not names:
        return None
    rows = map(itemgetter(*names), read)
    values = rows if len(names) == 1 else chain.from_iterable(rows)
    try:  # ``pos`` refuses texts, which NumPy would read as numbers.
        exact = np.fromiter(map(pos, values), np.float64, len(read) * len(names))
    except (KeyError, TypeError, ValueError):
        return None
    with np.errstate(over="ignore"):
        numbers = exact.astype(np.float32)
    if not np.isfinite(numbers).all():
        return None
    found = np.full((len(infos), len(names)), np.nan, dtype=np.float32)
    found[~np.array(padding, dtype=bool)] = numbers.reshape(len(read), len(names))
    return found


def _values(
    name: str, infos: Sequence[Mapping[str, Any]], fields: Sequence[Mapping[str, Any]], column: Sequence[Any] | None
) -> list[Any]:
    """One name's value in each row, ``_ABSENT`` where the row has none."""
    if column is None and all(name in info for info in infos):
        return [info[name] for info in infos]
    others = [_ABSENT] * len(infos) if column is None else column
    return [
        info[name] if name in info else row.get(name, other)
        for info, row, other in zip(infos, fields, others, strict=True)
    ]


def _numbers(name: str, values: list[Any]) -> np.ndarray[Any, np.dtype[np.float32]]:
    """float32 [B], NaN for None."""
    if any(isinstance(value, str | bytes) for value in values):
        text = next(value for value in values if isinstance(value, str | bytes))
        raise TypeError(f"reward {name!r}: got {text!r}, expected a number or None")
    try:
        exact = np.array(values, dtype=np.float64)
    except (TypeError, ValueError):
        exact = np.array([_number(name, value) for value in values], dtype=np.float64)
    if exact.ndim != 1:
        raise TypeError(f"reward {name!r}: got values of shape {exact.shape[1:]}, expected a number or None")
    with np.errstate(over="ignore"):
        numbers = exact.astype(np.float32)
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


def data_columns(names: Sequence[str], columns: Mapping[str, Any], there: Sequence[str] = ()) -> dict[str, list[Any]]:
    """The columns of the data that a weight policy reads. "extra_info.topic" is the entry ``topic`` of ``extra_info``.

    Args:
        names: what the policy reads.
        columns: columns by name.
        there: the names of all columns, for messages.

    Raises:
        ValueError: there is no such column or entry.
    """
    found = {}
    for name in names:
        first, _, entry = name.partition(".")
        if first not in columns:
            listed = f", expected one of {', '.join(sorted(there))}" if there else ""
            raise ValueError(f"column {name!r}: the data have none{listed}")
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
