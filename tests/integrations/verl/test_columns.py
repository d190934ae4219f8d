"""Rewards and columns are read from a batch of verl's queue as its parts write them. These tests need no verl."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from maestro_fast.integrations.verl.columns import data_columns, named_values

NO_PADDING = [False] * 3


def row(**info: Any) -> dict[str, Any]:
    return {"reward_extra_info": {"score": 0.0, **info}, "global_steps": 3}


def test_values_are_found_where_verl_puts_them() -> None:
    """In compute_score's dict, else in the row's extra fields, else in a column of the queue; None abstains."""
    fields = [
        {**row(a=1.0, flag=True), "tool": 0.5},
        {**row(a=None, flag=np.bool_(False)), "tool": None},
        {**row(a=np.float32(0.25), flag=1), "tool": np.int64(2)},
    ]
    found = named_values(("a", "flag", "tool", "rm"), fields, {"rm": torch.tensor([7.0, 8.0, 9.0])}, NO_PADDING)
    nan = math.nan
    expected = torch.tensor([[1.0, 1.0, 0.5, 7.0], [nan, 0.0, nan, 8.0], [0.25, 1.0, 2.0, 9.0]])
    torch.testing.assert_close(found, expected, rtol=0.0, atol=0.0, equal_nan=True)


def test_a_row_without_the_key_abstains() -> None:
    """Tasks whose compute_score returns other keys stand in one batch."""
    found = named_values(("a",), [row(a=1.0), row(b=2.0), {"reward_extra_info": None}], {}, NO_PADDING)
    assert found[0, 0] == 1.0 and bool(found[1:].isnan().all())


def test_each_row_is_looked_up_by_itself() -> None:
    """Agent loops that judge themselves stand in one batch with rows of compute_score."""
    fields = [row(a=1.0), {"a": 2.0}, {}]
    assert named_values(("a",), fields, {"a": [9.0, 9.0, 3.0]}, NO_PADDING)[:, 0].tolist() == [1.0, 2.0, 3.0]


def test_a_name_that_earlier_batches_had_may_be_missing_from_one() -> None:
    known: set[str] = set()
    named_values(("a",), [row(a=1.0)] * 3, {}, NO_PADDING, known)
    assert known == {"a"}
    assert bool(named_values(("a",), [row(b=1.0)] * 3, {}, NO_PADDING, known).isnan().all())
    with pytest.raises(ValueError, match="reward 'c'"):
        named_values(("c",), [row(b=1.0)] * 3, {}, NO_PADDING, known)


def test_padding_is_not_read() -> None:
    fields = [row(a=1.0), row(a=math.inf), row(a="text")]
    found = named_values(("a",), fields, {}, [False, True, True])
    assert found[0, 0] == 1.0 and bool(found[1:].isnan().all())


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ([1.0, math.nan, None], ValueError, "reward 'a': nan in row 1, expected a finite number, or None"),
        ([None, 1.0, math.inf], ValueError, "reward 'a': inf in row 2"),
        ([1.0, "0.5", 2.0], TypeError, "reward 'a': got '0.5', expected a number or None"),
        ([1.0, 1e39, 2.0], ValueError, r"reward 'a': 1e\+39 in row 1, expected a finite number"),
        ([1.0, [2.0, 3.0], 2.0], TypeError, r"reward 'a': got \[2.0, 3.0\], expected a number"),
        ([[1.0], [2.0], [3.0]], TypeError, r"reward 'a': got values of shape \(1,\)"),
    ],
)
def test_wrong_values_are_named(values: list[Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        named_values(("a",), [row(a=value) for value in values], {}, NO_PADDING)


def test_a_key_that_no_row_has_is_named() -> None:
    with pytest.raises(ValueError, match=r"reward 'corect': compute_score returned no such key.*correct, score"):
        named_values(("corect",), [row(correct=1.0)] * 3, {}, NO_PADDING)
    with pytest.raises(ValueError, match="returned no dict"):
        named_values(("a",), [{}, {}, {}], {}, NO_PADDING)


def test_columns_of_the_data_and_their_entries() -> None:
    columns = {"data_source": np.array(["x", "y"], dtype=object), "extra_info": [{"topic": "a"}, {"topic": "b"}]}
    assert data_columns(("extra_info.topic", "data_source"), columns) == {
        "extra_info.topic": ["a", "b"],
        "data_source": ["x", "y"],
    }
    with pytest.raises(ValueError, match="column 'topic': the data have none, expected one of data_source, extra_info"):
        data_columns(("topic",), columns, [*columns])
    with pytest.raises(
        ValueError, match=r"column 'extra_info\.kind': a row has no entry 'kind', expected one of topic"
    ):
        data_columns(("extra_info.kind",), columns)
