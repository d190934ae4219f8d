"""Packing of sequences into micro-batches of a bounded number of tokens: first-fit decreasing, on the CPU."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from maestro_fast import _C

INT64_MAX = torch.iinfo(torch.int64).max


def pack_sequences(lengths: Sequence[int] | Tensor, max_tokens: int) -> list[list[int]]:
    """Splits sequences into bins of at most ``max_tokens`` tokens each.

    First-fit decreasing: the sequences are taken from the longest to the shortest, equal lengths by lower
    index, and each goes into the first bin with room for it. At most 11/9 of the optimal number of bins + 6/9
    (Dosa, "The tight bound of first fit decreasing bin-packing algorithm is FFD(I) <= 11/9 OPT(I) + 6/9",
    ESCAPE 2007). Deterministic, O(n log n).

    Args:
        lengths: tokens per sequence, n integers or an integer CPU tensor [n]; 0 is allowed.
        max_tokens: the capacity of a bin, in tokens.

    Returns:
        One list of indices into ``lengths`` per bin, ascending; bins in the order in which they were opened.

    Raises:
        TypeError: ``lengths`` or ``max_tokens`` is not of these types.
        ValueError: ``lengths`` has another shape or device, a length is negative or exceeds ``max_tokens``,
            or ``max_tokens`` is not positive.
    """
    if isinstance(max_tokens, bool) or not isinstance(max_tokens, int):
        raise TypeError(f"max_tokens: got {type(max_tokens).__name__}, expected an int")
    if max_tokens > INT64_MAX:
        raise ValueError(f"max_tokens: got {max_tokens}, expected at most {INT64_MAX}")
    lengths_n = lengths_as_int64(lengths)
    return _C.pack_sequences(lengths_n.data_ptr(), lengths_n.numel(), max_tokens)


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
