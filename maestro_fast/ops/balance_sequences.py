"""Balancing of sequences over a given number of parts, as many tokens in each as can be: Karmarkar-Karp, on the CPU."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from maestro_fast import _C
from maestro_fast.ops.pack_sequences import INT64_MAX, lengths_as_int64


def balance_sequences(lengths: Sequence[int] | Tensor, parts: int, *, equal_size: bool = False) -> list[list[int]]:
    """Splits sequences into ``parts`` lists with nearly equal numbers of tokens, e.g. one list per process.

    The largest differencing method (Karmarkar and Karp, "The differencing method of set partitioning", 1982), of
    which the spread between the largest and the smallest part is at most the longest sequence, and mostly far less.
    Deterministic: equal lengths are taken by lower index.

    Args:
        lengths: tokens per sequence, n >= parts integers or an integer CPU tensor [n]; 0 is allowed.
        parts: how many lists.
        equal_size: the lists hold n / parts sequences each, as a batch dimension needs it. The spread is then at most
            the largest difference in length within a run of ``parts`` of the sorted lengths.

    Returns:
        ``parts`` non-empty lists of indices into ``lengths``, ascending; lists by their first index.

    Raises:
        TypeError: an argument is not of these types.
        ValueError: ``lengths`` has another shape or device, a length is negative, their sum is beyond int64, or their
            number is less than ``parts`` or with ``equal_size`` no multiple of it; ``parts`` is not positive.
    """
    if isinstance(parts, bool) or not isinstance(parts, int):
        raise TypeError(f"parts: got {type(parts).__name__}, expected an int")
    if not isinstance(equal_size, bool):
        raise TypeError(f"equal_size: got {type(equal_size).__name__}, expected a bool")
    if not 1 <= parts <= INT64_MAX:
        raise ValueError(f"parts: got {parts}, expected 1 to {INT64_MAX}")
    lengths_n = lengths_as_int64(lengths)
    return _C.balance_sequences(lengths_n.data_ptr(), lengths_n.numel(), parts, equal_size)
