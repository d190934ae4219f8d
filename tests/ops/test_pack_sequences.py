"""pack_sequences, C++ and plain Python, against a naive first-fit decreasing and the optimum by brute force."""

from __future__ import annotations

from itertools import chain
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from maestro_fast.ops.pack_sequences import pack_sequences

CAPACITY = 40
any_lengths = st.lists(st.integers(0, CAPACITY), max_size=60)
# Few values, and so many ties; all that int64 holds; and now and then one that is too long or negative.
awkward_lengths = st.lists(st.sampled_from([0, 1, 2, 3, 5, 20]), max_size=70) | st.lists(
    st.integers(0, 2**63 - 1) | st.sampled_from([-1, 0, 1, 2**62, 2**63 - 1]), max_size=20
)
both_backends = pytest.mark.parametrize("backend", ["cpp", "torch"])


def naive_first_fit_decreasing(lengths: list[int], max_tokens: int) -> list[list[int]]:
    bins: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        for members in bins:
            if sum(lengths[j] for j in members) + lengths[i] <= max_tokens:
                members.append(i)
                break
        else:
            bins.append([i])
    return [sorted(members) for members in bins]


def fewest_bins(lengths: list[int], max_tokens: int) -> int:
    """The optimum, by placing the sequences in turn into every open bin that has room, or into a new one."""
    best = len(lengths)

    def place(i: int, room: tuple[int, ...]) -> None:
        nonlocal best
        if i == len(lengths):
            best = min(best, len(room))
            return
        for b in {room.index(r) for r in room if r >= lengths[i]}:  # equal bins are one case
            place(i + 1, (*room[:b], room[b] - lengths[i], *room[b + 1 :]))
        if len(room) + 1 < best:
            place(i + 1, (*room, max_tokens - lengths[i]))

    place(0, ())
    return best


def outcome(lengths: Any, max_tokens: int, backend: Any) -> list[list[int]] | str:
    """The bins, or the error in words."""
    try:
        return pack_sequences(lengths, max_tokens, backend=backend)
    except ValueError as error:
        return str(error)


@both_backends
@given(any_lengths)
def test_equals_the_naive_algorithm(backend: Any, lengths: list[int]) -> None:
    assert pack_sequences(lengths, CAPACITY, backend=backend) == naive_first_fit_decreasing(lengths, CAPACITY)


@settings(max_examples=300)
@given(awkward_lengths, st.data())
def test_backends_give_the_same_bins_and_errors(lengths: list[int], data: st.DataObject) -> None:
    longest = max([1, *lengths])
    capacities = st.sampled_from([0, longest, min(2 * longest, 2**63 - 1), 2**63 - 1]) | st.integers(1, longest)
    max_tokens = data.draw(capacities, label="max_tokens")
    assert outcome(lengths, max_tokens, "torch") == outcome(lengths, max_tokens, "cpp")


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 63, 64, 65, 1000])
@pytest.mark.parametrize("longest", [2, 40, 400])
def test_backends_give_the_same_bins_of_many_sequences(count: int, longest: int) -> None:
    lengths = torch.randint(0, longest + 1, (count,), generator=torch.Generator().manual_seed(count))
    for max_tokens in (longest, longest + 1, 3 * longest, count * longest):
        bins = pack_sequences(lengths, max_tokens, backend="torch")
        assert bins == pack_sequences(lengths, max_tokens, backend="cpp") == pack_sequences(lengths, max_tokens)


@given(any_lengths)
def test_takes_every_index_once_and_overfills_no_bin(lengths: list[int]) -> None:
    bins = pack_sequences(lengths, CAPACITY)

    assert sorted(chain.from_iterable(bins)) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in members) <= CAPACITY for members in bins)


@given(st.lists(st.integers(1, 12), min_size=1, max_size=8))
def test_is_within_the_bound_of_the_optimum(lengths: list[int]) -> None:
    assert 9 * len(pack_sequences(lengths, 12)) <= 11 * fewest_bins(lengths, 12) + 6


@given(any_lengths, st.randoms(use_true_random=False))
def test_order_of_the_input_decides_only_between_equal_lengths(lengths: list[int], random: Any) -> None:
    shuffled = random.sample(lengths, len(lengths))

    def as_lengths(given_lengths: list[int]) -> list[list[int]]:
        return [sorted(given_lengths[i] for i in members) for members in pack_sequences(given_lengths, CAPACITY)]

    assert as_lengths(shuffled) == as_lengths(lengths)


def test_ties_go_by_lower_index_and_bins_stand_in_order_of_creation() -> None:
    assert pack_sequences([5, 5, 5, 5, 1], 10) == [[0, 1], [2, 3], [4]]
    assert pack_sequences([1, 7, 2, 9], 10) == [[0, 3], [1, 2]]


@pytest.mark.parametrize(("count", "backend"), [(100_000, "cpp"), (20_000, "torch")])
def test_many_sequences_of_one_token_each_in_bins_of_their_own(count: int, backend: Any) -> None:
    assert pack_sequences([1] * count, 1, backend=backend) == [[i] for i in range(count)]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_tensors_of_any_integer_dtype_and_stride(dtype: torch.dtype) -> None:
    lengths = torch.tensor([5, 99, 0, 99, 7, 99, 3, 99], dtype=dtype)[::2]

    assert pack_sequences(lengths, 8) == [[1, 2], [0, 3]] == pack_sequences((5, 0, 7, 3), 8)


@both_backends
@pytest.mark.parametrize("empty", [[], torch.tensor([], dtype=torch.int64)])
def test_nothing_needs_no_bin(empty: Any, backend: Any) -> None:
    assert pack_sequences(empty, 8, backend=backend) == []


def test_empty_sequences_share_the_first_bin() -> None:
    assert pack_sequences([0, 0, 8, 8], 8) == [[0, 1, 2], [3]]


def test_capacity_may_be_as_large_as_int64() -> None:
    assert pack_sequences([2**63 - 1, 1], 2**63 - 1) == [[0], [1]]


@both_backends
@pytest.mark.parametrize(
    ("lengths", "max_tokens", "error", "message"),
    [
        ([1, 2], 0, ValueError, r"max_tokens: got 0, expected at least 1"),
        ([1, 2], -3, ValueError, r"max_tokens: got -3, expected at least 1"),
        ([1, 2], -(2**64), ValueError, r"max_tokens: got -18446744073709551616, expected at least 1"),
        ([1, 2], 2**63, ValueError, r"max_tokens: got 9223372036854775808, expected at most"),
        ([1, 2], 8.0, TypeError, r"max_tokens: got float, expected an int"),
        ([1, 2], True, TypeError, r"max_tokens: got bool, expected an int"),
        ([1, -2], 8, ValueError, r"lengths\[1\]: got -2, expected 0 to max_tokens = 8"),
        ([1, 2, 9], 8, ValueError, r"lengths\[2\]: got 9, expected 0 to max_tokens = 8"),
        ([1, 2**63], 8, ValueError, r"lengths: got an int beyond int64"),
        ([1, 2.0], 8, TypeError, r"lengths: 'float' .*, expected ints"),
        ("12", 8, TypeError, r"lengths: got str, expected a sequence of ints or a tensor"),
        ({1, 2}, 8, TypeError, r"lengths: got set, expected a sequence of ints or a tensor"),
        (torch.tensor([1.0]), 8, TypeError, r"lengths: got dtype torch.float32, expected an integer dtype"),
        (torch.tensor([True]), 8, TypeError, r"lengths: got dtype torch.bool, expected an integer dtype"),
        (torch.tensor([[1]]), 8, ValueError, r"lengths: got shape \(1, 1\), expected \[n\]"),
        (torch.tensor(1), 8, ValueError, r"lengths: got shape \(\), expected \[n\]"),
        (torch.empty(1, dtype=torch.int64, device="meta"), 8, ValueError, r"lengths: got a tensor on meta"),
    ],
)
def test_bad_arguments_are_named(
    lengths: Any, max_tokens: Any, error: type[Exception], message: str, backend: Any
) -> None:
    with pytest.raises(error, match=message):
        pack_sequences(lengths, max_tokens, backend=backend)


def test_an_unknown_backend_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="backend: 'triton' does not serve pack_sequences, expected one of cpp, torch"):
        pack_sequences([1], 1, backend="triton")
