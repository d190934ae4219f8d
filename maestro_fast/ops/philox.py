"""Philox4x32-10 (Salmon et al., SC 2011): random numbers keyed by what they are for, the same on every backend.

A draw is a pure function of (seed, step, index), so it does not depend on the device, on the order of calls, on how
responses are sharded over processes, or on a run having been resumed.
"""

from __future__ import annotations

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def philox_4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Ten rounds of Philox4x32 on int64 tensors that hold uint32 words; returns four such tensors."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        low0, high0 = _multiply(c0, _MULTIPLIERS[0])
        low1, high1 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return c0, c1, c2, c3


def _multiply(x: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """Low and high word of the 64-bit product, in halves: int64 cannot hold an unsigned 64-bit product."""
    low, high = factor & 0xFFFF, factor >> 16
    below = x * low
    above = x * high + (below >> 16)
    return ((above & 0xFFFF) << 16) | (below & 0xFFFF), above >> 16


def uniform(seed: int, step: int, offset: int, count: int, device: torch.device) -> Tensor:
    """Uniform numbers in [0, 1) for the responses ``offset .. offset + count``: float32 [count], multiples of 2^-24.

    Args:
        seed: 64 bits, the key.
        step: 32 bits, words 2 of the counter.
        offset: 64 bits, global index of the first response, words 0 and 1 of the counter.

    Raises:
        ValueError: a number that does not fit.
    """
    check_key(seed, step, offset)
    index = torch.arange(offset, offset + count, device=device)
    zero = torch.zeros_like(index)
    words = philox_4x32((index & _WORD, index >> 32, zero + step, zero), (seed & _WORD, seed >> 32))
    return (words[0] >> 8).float() * 2.0**-24


def check_key(seed: int, step: int, offset: int) -> None:
    """Raises ValueError for a number that does not fit."""
    for name, value, bits in (("seed", seed, 64), ("step", step, 32), ("offset", offset, 63)):
        if not 0 <= value < 1 << bits:
            raise ValueError(f"{name}: {value}, expected 0 <= {name} < 2**{bits}")
