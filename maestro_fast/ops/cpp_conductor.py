"""The Conductor's forward by C++: the launch, and the operator that ``torch.compile`` sees."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from maestro_fast.ops import cpp
from maestro_fast.ops.cpp import address
from maestro_fast.ops.tensors import floats, library

CPU = torch.device("cpu")
Choice = tuple[float, float, float, bool, int, int, int]  # tau, min_prob, alpha, soft, seed, step, offset


def conductor_weights(
    h: Tensor, mean: Tensor | None, rstd: Tensor | None, weight: Tensor, bias: Tensor, choice: Choice
) -> tuple[Tensor, ...]:
    """The fields of ``ConductorSample`` for a linear head; without mean and rstd, h goes in as it is."""
    if torch.compiler.is_compiling():
        registered: Callable[..., tuple[Tensor, ...]] = torch.ops.maestro_fast.conductor_weights
        tau, min_prob, alpha, soft, seed, step, offset = choice
        halves = seed & 0xFFFFFFFF, seed >> 32  # an operator's integers are signed
        return registered(
            h, mean, rstd, weight, bias, float(tau), float(min_prob), float(alpha), soft, *halves, step, offset
        )
    return _conductor_weights(h, mean, rstd, weight, bias, choice)


def _conductor_weights(
    h: Tensor, mean: Tensor | None, rstd: Tensor | None, weight: Tensor, bias: Tensor, choice: Choice
) -> tuple[Tensor, ...]:
    h = h.contiguous() if h.dtype is torch.bfloat16 else floats(h)
    mean, rstd = (None if x is None else floats(x) for x in (mean, rstd))
    weight, bias = floats(weight), floats(bias)
    (batch, size), K = h.shape, weight.shape[0]
    out = _empty_outputs(batch, K)
    weights, actions, log_probs, entropy, probs = out
    cpp._C.conductor_weights(
        h.data_ptr(),
        h.dtype is torch.bfloat16,
        batch,
        size,
        K,
        address(mean),
        address(rstd),
        weight.data_ptr(),
        bias.data_ptr(),
        *choice,
        weights.data_ptr(),
        actions.data_ptr(),
        log_probs.data_ptr(),
        entropy.data_ptr(),
        probs.data_ptr(),
        torch.get_num_threads(),
    )
    return out


def _empty_outputs(batch: int, K: int) -> tuple[Tensor, ...]:
    f32 = torch.float32
    return (
        torch.empty((batch, K), dtype=f32, device=CPU),
        torch.empty(batch, dtype=torch.int64, device=CPU),
        torch.empty(batch, dtype=f32, device=CPU),
        torch.empty(batch, dtype=f32, device=CPU),
        torch.empty((batch, K), dtype=f32, device=CPU),
    )


library.define(
    "conductor_weights(Tensor h, Tensor? mean, Tensor? rstd, Tensor weight, Tensor bias, float tau, float min_prob,"
    " float alpha, bool soft, int seed_low, int seed_high, int step, int offset)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)


@torch.library.impl(library, "conductor_weights", "CPU")
def _operator(h, mean, rstd, weight, bias, tau, min_prob, alpha, soft, seed_low, seed_high, step, offset):  # type: ignore[no-untyped-def]
    choice = (tau, min_prob, alpha, soft, seed_low | seed_high << 32, step, offset)
    return _conductor_weights(h, mean, rstd, weight, bias, choice)


@torch.library.register_fake("maestro_fast::conductor_weights", lib=library)
def _shapes(h, mean, rstd, weight, bias, tau, min_prob, alpha, soft, seed_low, seed_high, step, offset):  # type: ignore[no-untyped-def]
    return _empty_outputs(h.shape[0], weight.shape[0])
