"""The matrix products of a language-model head: 16-bit operands on a CUDA device, sums in float32.

Eager calls go straight to ``torch.mm`` and ``torch.addmm`` with ``out_dtype``. A graph cannot: ``torch.addmm`` with
``out_dtype`` raises TypeError on the fake tensors of torch 2.11, Inductor's own ``addmm`` does not know the argument,
and Dynamo refuses an ``out`` whose rows are apart. So a graph takes the operators registered below, which it does not
look into.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from maestro_fast.ops.gpu import define
from maestro_fast.ops.tensors import wide, without_autocast

_HALVES = torch.bfloat16, torch.float16


def is_half(x: Tensor) -> bool:
    return x.dtype in _HALVES


def operand(x: Tensor) -> Tensor:
    """``x`` as the products take it: 16-bit on a CUDA device, whose tensor cores add up in float32; else wide."""
    return x if x.is_cuda and is_half(x) else wide(x)


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in float32 (float64)."""
    if not _both_half(a, b):
        with without_autocast(a):
            return wide(a) @ wide(b)
    out = torch.empty(a.shape[0], b.shape[1], device=a.device, dtype=torch.float32)
    product_into(out, a, b)
    return out


def product_into(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out = a @ b. ``out`` is float32 and may have gaps between its rows; a and b share a dtype, float32 or 16-bit."""
    if _traced(out):
        torch.ops.maestro_fast.head_product_into(out, a, b)
    else:
        _product_into(out, a, b)


def add_product_(total: Tensor, a: Tensor, b: Tensor, alpha: float) -> None:
    """total += alpha * a @ b. ``total`` is wide."""
    if not _both_half(a, b):
        with without_autocast(a):
            total.addmm_(wide(a), wide(b), alpha=alpha)
    elif _traced(total):
        torch.ops.maestro_fast.head_add_product_(total, a, b, float(alpha))
    else:
        _add_product_(total, a, b, alpha)


def _both_half(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and is_half(a)


def _traced(x: Tensor) -> bool:
    return torch.compiler.is_compiling() or isinstance(x, FakeTensor)


def _product_into(out: Tensor, a: Tensor, b: Tensor) -> None:
    with without_autocast(a):
        if is_half(a):
            torch.mm(a, b, out_dtype=torch.float32, out=out)
        else:
            torch.mm(a, b, out=out)


def _add_product_(total: Tensor, a: Tensor, b: Tensor, alpha: float) -> None:
    with without_autocast(a):
        torch.addmm(total, a, b, alpha=alpha, out_dtype=torch.float32, out=total)


def _nothing(*_: Tensor | float) -> None:
    """The operators return nothing: what they write has its shape already."""


define(
    "head_product_into(Tensor(a!) out, Tensor a, Tensor b) -> ()",
    lambda *given: _product_into(*given),
    _nothing,
)
define(
    "head_add_product_(Tensor(a!) total, Tensor a, Tensor b, float alpha) -> ()",
    lambda *given: _add_product_(*given),
    _nothing,
)
