"""The partition of responses: what the padded layout holds, and that it is built from any kind of ids."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from maestro_fast.ops import Groups, counterfactual_advantages, group_advantages
from maestro_fast.ops import groups as module

META = torch.device("meta")
OTHERS = ("slot_B", "order_B", "offsets_N1")
any_ids = st.lists(st.integers(-3, 5), max_size=20)


def members(ids: list[int]) -> list[list[int]]:
    """The responses of each group, groups by ascending id."""
    return [[b for b, own in enumerate(ids) if own == group] for group in sorted(set(ids))]


def rows(groups: Groups) -> list[list[int]]:
    return [[b for b in row if b < groups.batch] for row in groups.index_NG.tolist()]


def is_response(groups: Groups) -> torch.Tensor:
    """bool [N, G_max]: True where the padded layout holds a response."""
    return groups.index_NG < groups.batch


@settings(max_examples=30, deadline=None)
@given(any_ids)
def test_ids_in_any_order_give_the_partition(ids: list[int]) -> None:
    groups = Groups.of(ids, len(ids))
    expected = members(ids)
    assert rows(groups) == expected
    assert groups.offsets_N1.diff().tolist() == [len(group) for group in expected]
    assert len(groups.index_NG) == len(expected)
    assert is_response(groups).sum() == len(ids)


@settings(max_examples=30, deadline=None)
@given(any_ids)
def test_scatter_inverts_gather_and_padding_holds_the_fill(ids: list[int]) -> None:
    groups = Groups.of(ids, len(ids))
    x_B2 = torch.randn(len(ids), 2)
    x_NG2 = groups.gather(x_B2, 7.0)
    assert torch.equal(groups.scatter(x_NG2), x_B2)
    assert (x_NG2[~is_response(groups)] == 7.0).all()


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
    assert {x.device.type for x in (there.index_NG, there.slot_B, there.offsets_N1)} == {"meta"}
    assert there.index_NG.shape == groups.index_NG.shape


@pytest.mark.parametrize(
    ("groups", "batch", "error", "message"),
    [
        (0, 4, ValueError, "groups: a group size of 0"),
        (3, 4, ValueError, "groups: 4 responses do not divide into groups of 3"),
        (True, 4, TypeError, "groups: got a bool"),
        ("abcd", 4, TypeError, "groups: got str"),
        (b"abcd", 4, TypeError, "groups: got bytes"),
        (10**30, 0, ValueError, f"groups: a group size of {10**30}, expected at most"),
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


# --- what is made once ---


class Counted(TorchDispatchMode):
    """The names of the operations that run under it."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def fresh() -> None:
    module._remembered.cache_clear()


@pytest.mark.usefixtures("fresh")
def test_a_size_is_made_into_groups_once_for_each_device() -> None:
    with Counted() as first:
        index_NG = Groups.of(4, 12).to(META).index_NG
    with Counted() as again:
        assert Groups.of(4, 12).to(META).index_NG is index_NG
    assert Groups.of(4, 12).index_NG is Groups.of(4, 12).index_NG and Groups.of(4, 16).batch == 16
    assert set(first.calls) == {"arange", "view"} and again.calls == []


@pytest.mark.usefixtures("fresh")
def test_groups_of_a_size_reach_a_device_without_a_copy_and_agree_with_those_from_ids() -> None:
    there, ids = Groups.of(3, 6).to(META), Groups.of([5, 5, 5, 7, 7, 7], 6)
    with Counted() as counted:
        shapes = [getattr(there, name).shape for name in OTHERS]
    assert "_to_copy" not in counted.calls and shapes == [getattr(ids, name).shape for name in OTHERS]
    for name in ("index_NG", *OTHERS):
        assert torch.equal(getattr(Groups.of(3, 6), name), getattr(ids, name))
        assert getattr(there, name).device == META


def test_a_device_gets_what_it_asks_for() -> None:
    groups = Groups.of([0, 1, 0], 3)
    with Counted() as counted:
        index_NG = groups.to(META).index_NG
        assert counted.calls == ["_to_copy"]
        assert groups.to(META).index_NG is index_NG and groups.to(META).order_B is groups.to(META).order_B
        assert counted.calls == ["_to_copy"] * 2
    assert [getattr(groups.to(META), name).shape for name in OTHERS] == [getattr(groups, name).shape for name in OTHERS]


def test_ids_are_read_anew_at_each_call() -> None:
    ids = [0, 0, 1]
    assert Groups.of(ids, 3) is not Groups.of(ids, 3)
    before = Groups.of(ids, 3)
    ids[0] = 1
    assert rows(before) == [[0, 1], [2]] and rows(Groups.of(ids, 3)) == [[1], [0, 2]]


def test_the_number_of_remembered_partitions_is_bounded() -> None:
    for batch in range(1, 200):
        Groups.of(1, batch)
    assert module._remembered.cache_info().currsize == module._REMEMBERED


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("groups", [2, [0, 1, 1, 0]], ids=["a size", "ids"])
def test_each_stream_has_its_own_copy(groups: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a stream reads, that stream has computed or fetched; a copy lives as long as the partition."""
    stream, device = SimpleNamespace(stream_id=3), torch.device("cuda:0")
    on_cpu = Groups.of(groups, 4)
    monkeypatch.setattr(torch.accelerator, "current_stream", lambda device: stream)
    monkeypatch.setattr(module, "_computed", lambda size, batch, device: Groups(torch.arange(4).view(2, 2), 4, 2))
    monkeypatch.setattr(module, "_copied", lambda x, device: x.clone())
    one = on_cpu.to(device)
    assert on_cpu.to(device) is one
    stream.stream_id = 4
    two = on_cpu.to(device)
    assert two is not one and two.index_NG is not one.index_NG
    module._remembered.cache_clear()
    assert on_cpu.to(device) is two
    stream.stream_id = 3
    assert on_cpu.to(device) is one


def test_ids_travel_through_pinned_memory_and_nobody_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "readable", lambda x: True)
    device, x = torch.device("cuda:0"), mock.Mock()
    module._copied(x, device)
    assert x.mock_calls == [mock.call.pin_memory(), mock.call.pin_memory().to(device, non_blocking=True)]
    monkeypatch.setattr(module, "_captured", lambda: True)
    with pytest.raises(RuntimeError, match=r"groups: not on cuda:0, expected groups.to\(device\) before a CUDA graph"):
        module._copied(x, device)


@pytest.mark.usefixtures("fresh")
def test_a_captured_graph_keeps_what_it_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a graph computes has no values before its replay, and what it reads must not be forgotten by a cache."""
    known = Groups.of(2, 4)
    there = known.to(META)
    monkeypatch.setattr(module, "_captured", lambda: True)
    captured = Groups.of(2, 4)
    assert captured is not known and captured.to(META) is not there, "the cache may forget it"
    assert known.to(META) is there, "its owner keeps it"
    assert Groups.of(2, 6).to(META) is not Groups.of(2, 6).to(META)
    monkeypatch.setattr(module, "_captured", lambda: False)
    assert Groups.of(2, 4) is known


@pytest.mark.usefixtures("fresh")
def test_fake_tensors_are_not_remembered() -> None:
    with FakeTensorMode():
        assert type(Groups.of(2, 8).to(torch.device("cuda:0")).slot_B) is not torch.Tensor
    assert Groups.of(2, 8).index_NG.tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]]
    with FakeTensorMode():
        assert type(Groups.of(2, 8).index_NG) is not torch.Tensor


@pytest.mark.usefixtures("fresh")
def test_a_first_call_in_inference_mode_serves_a_backward_pass() -> None:
    for groups in (2, Groups.of([0, 1, 1, 0], 4)):
        weights = torch.rand(4, 2, requires_grad=True)
        with torch.inference_mode():
            group_advantages(torch.rand(4, 2), weights.detach(), groups, backend="torch")
        group_advantages(torch.rand(4, 2), weights, groups, backend="torch").advantages.square().sum().backward()
        assert weights.grad is not None


def test_the_partition_is_made_on_the_host_whatever_the_default_device() -> None:
    with META:
        assert Groups.of(2, 10).index_NG.device.type == "cpu"
        assert Groups.of([0, 1, 0], 3).order_B.device.type == "cpu"


@pytest.mark.parametrize("backend", ["torch", "cpp"])
def test_no_op_writes_into_what_is_shared(backend: Any) -> None:
    groups, rewards = Groups.of(3, 6), torch.rand(6, 2)
    tensors = {name: getattr(groups, name) for name in ("index_NG", *OTHERS)}
    before = {name: (x._version, x.clone()) for name, x in tensors.items()}
    group_advantages(rewards, None, 3, backend=backend)
    counterfactual_advantages(rewards, torch.rand(6, 2), torch.eye(2), 3, backend=backend)
    assert {name: (x._version, x.tolist()) for name, x in tensors.items()} == {
        name: (version, x.tolist()) for name, (version, x) in before.items()
    }
