"""The partition of responses: what the padded layout holds, and that it is built from any kind of ids."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from maestro_fast.ops import Groups

any_ids = st.lists(st.integers(-3, 5), max_size=20)


def members(ids: list[int]) -> list[list[int]]:
    """The responses of each group, groups by ascending id."""
    return [[b for b, own in enumerate(ids) if own == group] for group in sorted(set(ids))]


def rows(groups: Groups) -> list[list[int]]:
    return [[b for b in row if b < groups.batch] for row in groups.index_NG.tolist()]


@settings(max_examples=30, deadline=None)
@given(any_ids)
def test_ids_in_any_order_give_the_partition(ids: list[int]) -> None:
    groups = Groups.of(ids, len(ids))
    expected = members(ids)
    assert rows(groups) == expected
    assert groups.sizes_N.tolist() == [len(group) for group in expected]
    assert groups.num_groups == len(expected)
    assert groups.live_NG.sum() == len(ids)


@settings(max_examples=30, deadline=None)
@given(any_ids)
def test_scatter_inverts_gather_and_padding_holds_the_fill(ids: list[int]) -> None:
    groups = Groups.of(ids, len(ids))
    x_B2 = torch.randn(len(ids), 2)
    x_NG2 = groups.gather(x_B2, 7.0)
    assert torch.equal(groups.scatter(x_NG2), x_B2)
    assert (x_NG2[~groups.live_NG] == 7.0).all()


def test_a_size_means_consecutive_groups() -> None:
    assert rows(Groups.of(3, 6)) == rows(Groups.of([0, 0, 0, 1, 1, 1], 6)) == [[0, 1, 2], [3, 4, 5]]


def test_lists_and_both_integer_dtypes_agree() -> None:
    ids = [4, -1, 4, 2, -1]
    for given_ids in (ids, tuple(ids), torch.tensor(ids), torch.tensor(ids, dtype=torch.int32)):
        assert rows(Groups.of(given_ids, 5)) == [[1, 4], [3], [0, 2]]


def test_a_finished_partition_is_returned_as_it_is() -> None:
    groups = Groups.of(2, 4)
    assert Groups.of(groups, 4) is groups
    assert groups.to(torch.device("cpu")) is groups


def test_the_copy_on_a_device_is_made_once() -> None:
    groups = Groups.of([0, 1, 0], 3)
    there = groups.to(torch.device("meta"))
    assert there is groups.to(torch.device("meta"))
    assert {x.device.type for x in (there.index_NG, there.slot_B, there.sizes_N)} == {"meta"}
    assert there.index_NG.shape == groups.index_NG.shape


@pytest.mark.parametrize(
    ("groups", "batch", "error", "message"),
    [
        (0, 4, ValueError, "groups: a group size of 0"),
        (3, 4, ValueError, "groups: 4 responses do not divide into groups of 3"),
        (True, 4, TypeError, "groups: got a bool"),
        ("abcd", 4, TypeError, "groups: got str"),
        (2.0, 4, TypeError, "groups: got float"),
        ([0, 1.0], 2, TypeError, "groups: got list"),
        ([0, True], 2, TypeError, "groups: got list"),
        ([0, 1], 3, ValueError, r"groups: ids of shape \(2,\), expected \(3,\)"),
        (torch.zeros(2, 1, dtype=torch.int64), 2, ValueError, r"groups: ids of shape \(2, 1\)"),
        (torch.zeros(2), 2, TypeError, "groups: ids of dtype torch.float32"),
        (torch.zeros(2, dtype=torch.int64, device="meta"), 2, TypeError, "groups: ids on meta"),
        (Groups.of(2, 4), 6, ValueError, "groups: holds 4 responses, expected 6"),
    ],
)
def test_errors_name_groups(groups: Any, batch: int, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Groups.of(groups, batch)
