"""pack_sequences and balance_sequences, C++ and plain Python, against naive ones, bounds, and optima by brute force."""

from __future__ import annotations

from itertools import chain, pairwise, product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from maestro_fast.ops import balance_sequences, pack_sequences

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
        (torch.tensor([1]).to_sparse(), 8, TypeError, r"lengths: layout torch.sparse_coo, expected a dense tensor"),
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


# --- balance_sequences ---

lengths_to_balance = st.lists(st.integers(0, 60), min_size=5, max_size=40)
parts_and_lengths = st.integers(1, 5).flatmap(lambda parts: st.tuples(st.just(parts), lengths_to_balance))
parts_and_even_lengths = st.integers(1, 5).flatmap(
    lambda parts: st.tuples(
        st.just(parts),
        st.integers(1, 6).flatmap(lambda n: st.lists(st.integers(0, 60), min_size=n * parts, max_size=n * parts)),
    )
)
# Few values, and so many ties; all that int64 holds; and now and then a sum beyond it or a negative length.
awkward_to_balance = st.lists(st.sampled_from([0, 1, 2, 3, 5, 20]), max_size=60) | st.lists(
    st.integers(0, 2**58) | st.sampled_from([-1, 0, 1, 2**62, 2**63 - 1]), max_size=20
)


def naive_largest_differencing(lengths: list[int], parts: int, equal_size: bool) -> list[list[int]]:
    """Tuples of lists, the two of the largest spread merged at a time; ties as the op documents them."""

    def order(members: list[int]) -> tuple[int, int, int]:
        return -sum(lengths[i] for i in members), -len(members), members[0] if members else 0

    def spread(split: list[list[int]]) -> int:
        totals = [sum(lengths[i] for i in members) for members in split]
        return max(totals) - min(totals)

    longest_first = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    step = parts if equal_size else 1
    splits = [
        [[i] for i in longest_first[start : start + step]] + [[] for _ in range(parts - step)]
        for start in range(0, len(lengths), step)
    ]
    while len(splits) > 1:  # in order of age, and max takes the first of equals
        one = max(splits, key=spread)
        splits.remove(one)
        other = max(splits, key=spread)
        splits.remove(other)
        merged = [a + b for a, b in zip(one, reversed(other), strict=True)]
        splits.append(sorted(merged, key=order))
    return sorted(sorted(members) for members in splits[0])


def totals(lengths: list[int], split: list[list[int]]) -> list[int]:
    return [sum(lengths[i] for i in members) for members in split]


def outcome_of_balance(lengths: Any, parts: int, equal_size: bool, backend: Any) -> list[list[int]] | str:
    """The lists, or the error in words."""
    try:
        return balance_sequences(lengths, parts, equal_size=equal_size, backend=backend)
    except ValueError as error:
        return str(error)


@both_backends
@given(parts_and_lengths)
def test_balance_equals_the_naive_algorithm(backend: Any, drawn: tuple[int, list[int]]) -> None:
    parts, lengths = drawn
    split = balance_sequences(lengths, parts, backend=backend)
    assert split == naive_largest_differencing(lengths, parts, False)


@both_backends
@given(parts_and_even_lengths)
def test_balance_equals_the_naive_algorithm_with_equal_sizes(backend: Any, drawn: tuple[int, list[int]]) -> None:
    parts, lengths = drawn
    split = balance_sequences(lengths, parts, equal_size=True, backend=backend)
    assert split == naive_largest_differencing(lengths, parts, True)


@settings(max_examples=300)
@given(awkward_to_balance, st.integers(1, 12), st.booleans(), st.booleans())
def test_backends_give_the_same_lists_and_errors(lengths: list[int], parts: int, equal_size: bool, cut: bool) -> None:
    if cut:
        lengths = lengths[: len(lengths) // parts * parts]
    assert outcome_of_balance(lengths, parts, equal_size, "torch") == outcome_of_balance(
        lengths, parts, equal_size, "cpp"
    )


@pytest.mark.parametrize("longest", [0, 1, 40, 16_384])
@pytest.mark.parametrize("parts", [1, 2, 3, 8, 500, 1000])
def test_backends_give_the_same_lists_of_many_sequences(parts: int, longest: int) -> None:
    lengths = torch.randint(0, longest + 1, (parts * (1000 // parts),), generator=torch.Generator().manual_seed(parts))
    for equal_size in (False, True):
        split = balance_sequences(lengths, parts, equal_size=equal_size, backend="torch")
        assert split == balance_sequences(lengths, parts, equal_size=equal_size, backend="cpp")
        assert split == balance_sequences(lengths, parts, equal_size=equal_size)


@given(parts_and_lengths)
def test_takes_every_index_once_and_leaves_no_part_empty(drawn: tuple[int, list[int]]) -> None:
    parts, lengths = drawn
    split = balance_sequences(lengths, parts)
    assert len(split) == parts and all(split)
    assert sorted(chain.from_iterable(split)) == list(range(len(lengths)))
    assert all(a < b for members in split for a, b in pairwise(members))
    assert max(totals(lengths, split)) - min(totals(lengths, split)) <= max(lengths)


@given(parts_and_even_lengths)
def test_equal_sizes_are_equal_and_within_their_bound(drawn: tuple[int, list[int]]) -> None:
    parts, lengths = drawn
    split = balance_sequences(lengths, parts, equal_size=True)
    assert {len(members) for members in split} == {len(lengths) // parts}
    assert sorted(chain.from_iterable(split)) == list(range(len(lengths)))
    longest_first = sorted(lengths, reverse=True)
    bound = max(longest_first[i] - longest_first[i + parts - 1] for i in range(0, len(lengths), parts))
    assert max(totals(lengths, split)) - min(totals(lengths, split)) <= bound


@given(st.lists(st.integers(1, 30), min_size=2, max_size=9))
def test_two_parts_are_within_the_bound_of_the_optimum(lengths: list[int]) -> None:
    best = min(
        max(sum(x for x, side in zip(lengths, sides, strict=True) if side == s) for s in (0, 1))
        for sides in product((0, 1), repeat=len(lengths))
    )
    worst = max(totals(lengths, balance_sequences(lengths, 2)))
    assert 6 * worst <= 7 * best  # Fischetti and Martello 1987


def test_known_splits() -> None:
    assert balance_sequences([8, 7, 6, 5, 4], 2) == [[0, 2], [1, 3, 4]]  # 14 and 16, the textbook case
    assert balance_sequences([5, 5, 5, 5], 4) == [[0], [1], [2], [3]]
    assert balance_sequences([0, 0, 0], 3) == [[0], [1], [2]]
    assert balance_sequences([9, 1, 8, 2], 2, equal_size=True) == [[0, 1], [2, 3]]
    assert balance_sequences([3], 1) == [[0]]


def test_thousands_of_sequences_are_level() -> None:
    lengths = torch.randint(1, 16_384, (4096,), generator=torch.Generator().manual_seed(0))
    for equal_size in (False, True):
        split = balance_sequences(lengths, 8, equal_size=equal_size)
        sums = totals(lengths.tolist(), split)
        assert max(sums) - min(sums) < 1e-5 * sum(sums)


@pytest.mark.parametrize("lengths", [(3, 4, 5), torch.tensor([3, 4, 5]), torch.tensor([3, 4, 5], dtype=torch.int32)])
def test_forms_of_lengths_agree(lengths: Any) -> None:
    assert balance_sequences(lengths, 2) == balance_sequences([3, 4, 5], 2)


@both_backends
@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"parts": 0}, ValueError, "parts: got 0, expected 1 to"),
        ({"parts": 2**63}, ValueError, "parts: got 9223372036854775808"),
        ({"parts": 2.0}, TypeError, "parts: got float, expected an int"),
        ({"parts": True}, TypeError, "parts: got bool"),
        ({"equal_size": 1}, TypeError, "equal_size: got int, expected a bool"),
        ({"lengths": [1]}, ValueError, "lengths: got 1 sequences, expected at least parts = 2"),
        ({"lengths": [1, 2, 3], "equal_size": True}, ValueError, "lengths: got 3 sequences, expected a multiple of"),
        ({"lengths": [1, -2]}, ValueError, r"lengths\[1\]: got -2, expected at least 0"),
        ({"lengths": [2**62, 2**62]}, ValueError, "lengths: their sum is beyond int64"),
        ({"lengths": [1.0, 2.0]}, TypeError, "lengths: "),
        ({"lengths": torch.ones(2, 2).long()}, ValueError, r"lengths: got shape \(2, 2\)"),
    ],
)
def test_bad_arguments_of_balance_are_named(
    changes: dict[str, Any], error: type[Exception], message: str, backend: Any
) -> None:
    arguments: dict[str, Any] = {"lengths": [3, 4, 5, 6], "parts": 2, "backend": backend, **changes}
    with pytest.raises(error, match=message):
        balance_sequences(**arguments)


def test_an_unknown_backend_of_balance_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="'triton' does not serve balance_sequences, expected one of cpp, torch"):
        balance_sequences([1], 1, backend="triton")
