"""Balancing of sequences over a given number of parts, as many tokens in each as can be: Karmarkar-Karp, on the CPU."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from itertools import count

from torch import Tensor

from maestro_fast.ops import cpp
from maestro_fast.ops.backend import Backend, resolve
from maestro_fast.ops.pack_sequences import INT64_MAX, lengths_as_int64


def balance_sequences(
    lengths: Sequence[int] | Tensor, parts: int, *, equal_size: bool = False, backend: Backend | None = None
) -> list[list[int]]:
    """Splits sequences into ``parts`` lists with nearly equal numbers of tokens, e.g. one list per process.

    The largest differencing method (Karmarkar and Karp, "The differencing method of set partitioning", 1982), of
    which the spread between the largest and the smallest part is at most the longest sequence, and mostly far less.
    Deterministic: equal lengths are taken by lower index.

    Args:
        lengths: tokens per sequence, n >= parts integers or an integer CPU tensor [n]; 0 is allowed.
        parts: how many lists.
        equal_size: the lists hold n / parts sequences each, as a batch dimension needs it. The spread is then at most
            the largest difference in length within a run of ``parts`` of the sorted lengths.
        backend: "cpp", "torch" (the reference, in plain Python), or None: C++ where it is built. Both give the same
            lists.

    Returns:
        ``parts`` non-empty lists of indices into ``lengths``, ascending; lists by their first index.

    Raises:
        TypeError: an argument is not of these types.
        ValueError: ``lengths`` has another shape or device, a length is negative, their sum is beyond int64, or their
            number is less than ``parts`` or with ``equal_size`` no multiple of it; ``parts`` is not positive; or
            ``backend`` cannot serve here.
    """
    if isinstance(parts, bool) or not isinstance(parts, int):
        raise TypeError(f"parts: got {type(parts).__name__}, expected an int")
    if not isinstance(equal_size, bool):
        raise TypeError(f"equal_size: got {type(equal_size).__name__}, expected a bool")
    if not 1 <= parts <= INT64_MAX:
        raise ValueError(f"parts: got {parts}, expected 1 to {INT64_MAX}")
    lengths_n = lengths_as_int64(lengths)
    if resolve("balance_sequences", backend) == "cpp":
        return cpp._C.balance_sequences(lengths_n.data_ptr(), lengths_n.numel(), parts, equal_size)
    listed: list[int] = lengths_n.tolist()
    _check(listed, parts, equal_size)
    return _reference(listed, parts, equal_size)


def _check(lengths: list[int], parts: int, equal_size: bool) -> None:
    got = f"lengths: got {len(lengths)} sequences, expected"
    if len(lengths) < parts:
        raise ValueError(f"{got} at least parts = {parts}")
    if equal_size and len(lengths) % parts:
        raise ValueError(f"{got} a multiple of parts = {parts} with equal_size")
    total = 0
    for i, length in enumerate(lengths):
        if length < 0:
            raise ValueError(f"lengths[{i}]: got {length}, expected at least 0")
        total += length
        if total > INT64_MAX:
            raise ValueError("lengths: their sum is beyond int64")


# A set of sequences is minus its tokens, minus its number of sequences, its first index, and all its indices. Sets are
# sorted as these tuples are, so the one with the most tokens comes first. The number of sequences decides between equal
# tokens: a set of sequences without tokens then comes before an empty set, which gets filled. The first index decides
# last, so that the order is strict and the result depends on the lengths alone.
_Set = tuple[int, int, int, list[int]]
# A split is some of the sequences in as many sets as there are parts, sorted. Empty sets come last and are left out.
_Split = list[_Set]


def _reference(lengths: list[int], parts: int, equal_size: bool) -> list[list[int]]:
    """Until one split is left, merges the two of the largest spreads."""
    longest_first = sorted(range(len(lengths)), key=lambda i: -lengths[i])  # sorted() keeps equal lengths in order
    # With equal sizes a split starts as one sequence per part, of neighbouring lengths; merging adds up the sizes.
    step = parts if equal_size else 1
    singles: list[_Set] = [(-lengths[i], -1, i, [i]) for i in longest_first]
    splits = [singles[start : start + step] for start in range(0, len(singles), step)]
    age = count()  # the older split goes first where spreads are equal
    widest = [(-_spread(split, parts), next(age), split) for split in splits]
    heapq.heapify(widest)
    while len(widest) > 1:
        _, _, into = heapq.heappop(widest)
        _, _, other = heapq.heappop(widest)
        merged = _merge(into, other, parts)
        heapq.heappush(widest, (-_spread(merged, parts), next(age), merged))
    ((_, _, split),) = widest
    return sorted(sorted(members) for _, _, _, members in split)


def _spread(split: _Split, parts: int) -> int:
    least = split[-1][0] if len(split) == parts else 0
    return least - split[0][0]


def _merge(into: _Split, other: _Split, parts: int) -> _Split:
    """Joins the largest sets of one split with the smallest of the other, and uses both splits up."""
    merged = list(into)
    for place, small in zip(range(parts - 1, -1, -1), other, strict=False):
        if place < len(into):
            large = into[place]
            longer, shorter = (large[3], small[3]) if len(large[3]) > len(small[3]) else (small[3], large[3])
            longer += shorter  # in place, as neither list is used again; the order within it does not matter
            merged[place] = (large[0] + small[0], large[1] + small[1], large[2], longer)
        else:
            merged.append(small)
    merged.sort()
    return merged
