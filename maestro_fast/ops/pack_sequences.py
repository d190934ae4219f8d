"""Distributes sequences of different lengths on the CPU: into bins of bounded size, or over a given number of parts.

``pack_sequences`` fills micro-batches of at most so many tokens, by first-fit decreasing. ``balance_sequences`` gives
every process about as many tokens as the others, by Karmarkar-Karp. Both are deterministic, and C++ and plain Python
give the same lists.
"""

from __future__ import annotations

import heapq
from array import array
from collections.abc import Sequence
from itertools import count

import numpy as np
import torch
from torch import Tensor

from maestro_fast.ops import cpp
from maestro_fast.ops.backend import Backend, resolve
from maestro_fast.ops.tensors import check_tensors

_INT64_MAX = torch.iinfo(torch.int64).max


def pack_sequences(
    lengths: Sequence[int] | Tensor, max_tokens: int, *, backend: Backend | None = None
) -> list[list[int]]:
    """Splits sequences into bins of at most ``max_tokens`` tokens each.

    First-fit decreasing takes the sequences from the longest to the shortest, equal lengths by lower index, and puts
    each into the first bin with room for it. That takes O(n log n) time, and at most 11/9 OPT + 6/9 bins where OPT bins
    would be enough (Dosa, "The tight bound of first fit decreasing bin-packing algorithm is FFD(I) <= 11/9 OPT(I) +
    6/9", ESCAPE 2007).

    Args:
        lengths: tokens per sequence, n integers or an integer CPU tensor [n]; 0 is allowed.
        max_tokens: the capacity of a bin, in tokens.
        backend: "cpp" or "torch" (the reference, in plain Python). None takes C++ where it is built.

    Returns:
        One list of ascending indices into ``lengths`` per bin. The bins are in the order in which they were opened.

    Raises:
        TypeError: ``lengths`` or ``max_tokens`` has another type.
        ValueError: ``lengths`` has another shape or device, a length is negative or exceeds ``max_tokens``,
            ``max_tokens`` is not positive, or ``backend`` cannot serve here.
    """
    if isinstance(max_tokens, bool) or not isinstance(max_tokens, int):
        raise TypeError(f"max_tokens: got {type(max_tokens).__name__}, expected an int")
    if max_tokens < 1:
        raise ValueError(f"max_tokens: got {max_tokens}, expected at least 1")
    if max_tokens > _INT64_MAX:
        raise ValueError(f"max_tokens: got {max_tokens}, expected at most {_INT64_MAX}")
    lengths_n = _as_int64(lengths)
    if resolve("pack_sequences", backend) == "cpp":
        return cpp._C.pack_sequences(lengths_n.data_ptr(), lengths_n.numel(), max_tokens)
    return _first_fit_decreasing(lengths_n.tolist(), max_tokens)


def _first_fit_decreasing(lengths: list[int], max_tokens: int) -> list[list[int]]:
    """The reference of ``pack_sequences``."""
    for i, length in enumerate(lengths):
        if not 0 <= length <= max_tokens:
            raise ValueError(f"lengths[{i}]: got {length}, expected 0 to max_tokens = {max_tokens}")
    room = _FreeRoom(len(lengths), max_tokens)
    bins: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):  # sorted() keeps equal lengths in order
        b = room.take(lengths[i])
        if b == len(bins):
            bins.append([])
        bins[b].append(i)
    return [sorted(members) for members in bins]


class _FreeRoom:
    """The free room of every bin, in a complete binary tree whose inner nodes hold the maximum of their children.

    Unused bins have all their room. Taking the leftmost bin that fits therefore opens the bins in order.
    """

    def __init__(self, bins: int, capacity: int) -> None:
        self._leaves = 1 << max(bins - 1, 0).bit_length()
        self._room = [capacity] * (2 * self._leaves)  # node k has the children 2 k and 2 k + 1; the root is node 1

    def take(self, length: int) -> int:
        """Takes the length from the leftmost bin that has room for it, and returns that bin."""
        room, leaves = self._room, self._leaves
        node = 1
        while node < leaves:
            node *= 2
            if room[node] < length:
                node += 1
        room[node] -= length
        taken = node - leaves
        while node > 1:
            node //= 2
            room[node] = max(room[2 * node], room[2 * node + 1])
        return taken


def balance_sequences(
    lengths: Sequence[int] | Tensor, parts: int, *, equal_size: bool = False, backend: Backend | None = None
) -> list[list[int]]:
    """Splits sequences into ``parts`` lists with nearly equal numbers of tokens, e.g. one list per process.

    By the largest differencing method (Karmarkar and Karp, "The differencing method of set partitioning", 1982) the
    spread between the largest and the smallest part is at most the longest sequence, and mostly far less. Equal lengths
    are taken by lower index.

    Args:
        lengths: tokens per sequence, n >= parts integers or an integer CPU tensor [n]; 0 is allowed.
        parts: how many lists there are.
        equal_size: whether each list has to hold n / parts sequences, as a batch dimension needs it. The spread is then
            at most the largest difference in length within a run of ``parts`` of the sorted lengths.
        backend: "cpp" or "torch" (the reference, in plain Python). None takes C++ where it is built.

    Returns:
        ``parts`` non-empty lists of ascending indices into ``lengths``. The lists are sorted by their first index.

    Raises:
        TypeError: an argument has another type.
        ValueError: ``lengths`` has another shape or device, a length is negative, their sum is beyond int64, or their
            number is less than ``parts`` or with ``equal_size`` no multiple of it; ``parts`` is not positive; or
            ``backend`` cannot serve here.
    """
    if isinstance(parts, bool) or not isinstance(parts, int):
        raise TypeError(f"parts: got {type(parts).__name__}, expected an int")
    if not isinstance(equal_size, bool):
        raise TypeError(f"equal_size: got {type(equal_size).__name__}, expected a bool")
    if not 1 <= parts <= _INT64_MAX:
        raise ValueError(f"parts: got {parts}, expected 1 to {_INT64_MAX}")
    lengths_n = _as_int64(lengths)
    if resolve("balance_sequences", backend) == "cpp":
        return cpp._C.balance_sequences(lengths_n.data_ptr(), lengths_n.numel(), parts, equal_size)
    listed: list[int] = lengths_n.tolist()
    _check_parts(listed, parts, equal_size)
    return _karmarkar_karp(listed, parts, equal_size)


def _check_parts(lengths: list[int], parts: int, equal_size: bool) -> None:
    """Raises the errors of ``balance_sequences`` for the Python code. The C++ code raises the same ones itself."""
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
        if total > _INT64_MAX:
            raise ValueError("lengths: their sum is beyond int64")


# A set of sequences is a tuple: minus its tokens, minus its number of sequences, its first index, all its indices. Sets
# are sorted as these tuples, so the set with the most tokens comes first. Between sets of equal tokens the number
# of sequences decides: a set of sequences without tokens comes before an empty set, so that the empty set gets filled.
# The first index decides last, so that the order is strict and the result depends on the lengths alone.
_Set = tuple[int, int, int, list[int]]
# A split deals some of the sequences into as many sets as there are parts. Sets are sorted; empty ones are left out.
_Split = list[_Set]


def _karmarkar_karp(lengths: list[int], parts: int, equal_size: bool) -> list[list[int]]:
    """The reference of ``balance_sequences``: merges the two splits of the largest spreads until one is left."""
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
    """The tokens of the largest set minus the tokens of the smallest."""
    least = split[-1][0] if len(split) == parts else 0
    return least - split[0][0]


def _merge(into: _Split, other: _Split, parts: int) -> _Split:
    """Joins the largest sets of one split with the smallest sets of the other. Neither may be used afterwards."""
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


# --- lengths, checked ---


def _as_int64(lengths: Sequence[int] | Tensor) -> Tensor:
    """The lengths as a contiguous int64 tensor [n] on the CPU."""
    return _checked_tensor(lengths) if isinstance(lengths, Tensor) else _checked_ints(lengths)


def _checked_tensor(lengths: Tensor) -> Tensor:
    check_tensors(1, lengths=lengths)
    if lengths.dtype is torch.bool or lengths.is_floating_point() or lengths.is_complex():
        raise TypeError(f"lengths: got dtype {lengths.dtype}, expected an integer dtype")
    if lengths.device.type != "cpu":
        raise ValueError(f"lengths: got a tensor on {lengths.device}, expected one on the CPU")
    if lengths.dim() != 1:
        raise ValueError(f"lengths: got shape {tuple(lengths.shape)}, expected [n]")
    return lengths.to(torch.int64).contiguous()


def _checked_ints(lengths: Sequence[int]) -> Tensor:
    if isinstance(lengths, (str, bytes, bytearray)) or not isinstance(lengths, Sequence):
        raise TypeError(f"lengths: got {type(lengths).__name__}, expected a sequence of ints or a tensor")
    try:
        # An array refuses floats, which torch would truncate.
        return torch.from_numpy(np.asarray(array("q", lengths)))
    except TypeError as error:
        raise TypeError(f"lengths: {error}, expected ints") from error
    except OverflowError as error:
        raise ValueError("lengths: got an int beyond int64") from error
