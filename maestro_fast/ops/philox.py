"""Philox4x32-10 (Salmon et al., SC 2011): random numbers that are the same on every backend.

A draw is a pure function of (seed, step, index of the response). So it does not depend on the device, on the order of
calls, on how responses are split over processes, or on whether a run has been resumed. The kernels in Triton
(``kernels/conductor_weights.py``) and C++ (``csrc/conductor_weights.cpp``) draw the same bits.
"""

from __future__ import annotations

from numbers import Integral

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)  # are added to the two words of the key after each round


def uniform(seed: int, step: int, offset: int, count: int, device: torch.device) -> Tensor:
    """Uniform numbers in [0, 1) for the responses ``offset .. offset + count``: float32 [count], multiples of 2^-24.

    Args:
        seed: the key, an integer of 64 bits.
        step: word 2 of the counter, an integer of 32 bits.
        offset: the global index of the first response, an integer of 63 bits. An index is words 0 and 1 of the counter.
        count: how many responses there are.
        device: where the numbers are made.

    Raises:
        ValueError: a number does not fit into these bits.
        TypeError: a number is no integer.
    """
    check_key(seed, step, offset, count)
    index = torch.arange(offset, offset + count, device=device)
    zero = torch.zeros_like(index)
    words = philox_4x32((index & _WORD, index >> 32, zero + step, zero), (seed & _WORD, seed >> 32))
    return (words[0] >> 8).float() * 2.0**-24  # a float32 holds 24 bits exactly


def check_key(seed: int, step: int, offset: int, count: int = 0) -> None:
    """Raises a TypeError for what is no integer, and a ValueError for one that does not fit into the bits of its place.

    ``count`` is the number of responses from ``offset`` on.
    """
    for name, value, bits in (("seed", seed, 64), ("step", step, 32), ("offset", offset, 63)):
        if isinstance(value, bool) or not isinstance(value, int | Integral):
            raise TypeError(f"{name}: got {type(value).__name__} {value!r}, expected an integer")
        if not 0 <= value < 1 << bits:
            raise ValueError(f"{name}: {value}, expected 0 <= {name} < 2**{bits}")
    if offset + count >= 1 << 63:
        raise ValueError(f"offset: {offset} with {count} responses, expected offset + responses < 2**63")


def philox_4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Ten rounds of Philox4x32 on int64 tensors that hold uint32 words. Returns four such tensors."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        low0, high0 = _multiply(c0, _MULTIPLIERS[0])
        low1, high1 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return c0, c1, c2, c3


def _multiply(x: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """The low and the high word of the product of two words, from halves, as int64 cannot hold 64 unsigned bits."""
    low, high = factor & 0xFFFF, factor >> 16
    below = x * low
    above = x * high + (below >> 16)
    return ((above & 0xFFFF) << 16) | (below & 0xFFFF), above >> 16
