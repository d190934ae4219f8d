"""Packing of sequences into micro-batches of a bounded number of tokens: first-fit decreasing, on the CPU."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from maestro_fast.ops import cpp
from maestro_fast.ops.backend import Backend, resolve

INT64_MAX = torch.iinfo(torch.int64).max


def pack_sequences(
    lengths: Sequence[int] | Tensor, max_tokens: int, *, backend: Backend | None = None
) -> list[list[int]]:
    """Splits sequences into bins of at most ``max_tokens`` tokens each.

    First-fit decreasing: the sequences are taken from the longest to the shortest, equal lengths by lower
    index, and each goes into the first bin with room for it. At most 11/9 of the optimal number of bins + 6/9
    (Dosa, "The tight bound of first fit decreasing bin-packing algorithm is FFD(I) <= 11/9 OPT(I) + 6/9",
    ESCAPE 2007). Deterministic, O(n log n).

    Args:
        lengths: tokens per sequence, n integers or an integer CPU tensor [n]; 0 is allowed.
        max_tokens: the capacity of a bin, in tokens.
        backend: "cpp", "torch" (the reference, in plain Python), or None: C++ where it is built. Both give the same
            bins.

    Returns:
        One list of indices into ``lengths`` per bin, ascending; bins in the order in which they were opened.

    Raises:
        TypeError: ``lengths`` or ``max_tokens`` is not of these types.
        ValueError: ``lengths`` has another shape or device, a length is negative or exceeds ``max_tokens``,
            ``max_tokens`` is not positive, or ``backend`` cannot serve here.
    """
    if isinstance(max_tokens, bool) or not isinstance(max_tokens, int):
        raise TypeError(f"max_tokens: got {type(max_tokens).__name__}, expected an int")
    if max_tokens < 1:
        raise ValueError(f"max_tokens: got {max_tokens}, expected at least 1")
    if max_tokens > INT64_MAX:
        raise ValueError(f"max_tokens: got {max_tokens}, expected at most {INT64_MAX}")
    lengths_n = lengths_as_int64(lengths)
    if resolve("pack_sequences", backend) == "cpp":
        return cpp._C.pack_sequences(lengths_n.data_ptr(), lengths_n.numel(), max_tokens)
    return _reference(lengths_n.tolist(), max_tokens)


def _reference(lengths: list[int], max_tokens: int) -> list[list[int]]:
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

    A bin that nobody has used yet has all its room, so the leftmost bin that fits opens bins in order.
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


def lengths_as_int64(lengths: Sequence[int] | Tensor) -> Tensor:
    """int64 [n], contiguous, on the CPU."""
    return _checked_tensor(lengths) if isinstance(lengths, Tensor) else _checked_ints(lengths)


def _checked_tensor(lengths: Tensor) -> Tensor:
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
        # By way of array, which refuses floats: torch would truncate them.
        return torch.from_numpy(np.asarray(array("q", lengths)))
    except TypeError as error:
        raise TypeError(f"lengths: {error}, expected ints") from error
    except OverflowError as error:
        raise ValueError("lengths: got an int beyond int64") from error
