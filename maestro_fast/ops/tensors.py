"""Dtypes and layouts that ops need, and how a function of tensors becomes an operator that ``torch.compile`` can call.

A registered operator costs an eager call about 4 us, a fifth of the whole C++ ``group_advantages``. So eager calls run
the function itself. Only ``torch.compile`` goes through the operator, and treats it as a black box.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from numbers import Real
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

_LARGEST, _SMALLEST = torch.finfo(torch.float32).max, torch.finfo(torch.float32).tiny
_SIGNED = (torch.int64, torch.int32, torch.int16, torch.int8)
PLAIN = (Tensor, torch.nn.Parameter)  # other subclasses of Tensor may hold no values, or compute in their own way
library = torch.library.Library("maestro_fast", "FRAGMENT")
P = ParamSpec("P")
R = TypeVar("R")


def wide(x: Tensor) -> Tensor:
    """The tensor in the precision that ops compute in: float64 stays, every other dtype becomes float32."""
    return x if x.dtype == torch.float64 else x.float()


def floats(x: Tensor) -> Tensor:
    """The tensor in contiguous float32, as most kernels read it."""
    return (x if x.dtype is torch.float32 else x.float()).contiguous()


def contiguous_columns(x: Tensor) -> Tensor:
    """The tensor with contiguous columns, as the Triton kernels read rows. The rows may have any stride."""
    return x if x.stride(-1) == 1 else x.contiguous()


def readable(x: Tensor) -> bool:
    """Whether the host can read the values: the tensor is on the CPU, and neither traced nor fake (a subclass)."""
    return x.device.type == "cpu" and type(x) is Tensor and not torch.compiler.is_compiling()


def without_autocast(x: Tensor) -> torch.autocast:
    """A context that switches autocast off, for ops whose matrix products must keep their dtype."""
    return torch.autocast(x.device.type, enabled=False)


def is_integer(x: Tensor) -> bool:
    """Whether the dtype is a signed integer. Differences of unsigned ones wrap, and PyTorch lacks most of their ops."""
    return x.dtype in _SIGNED


def check_tensors(needed: int, **given: Any) -> None:
    """Raises a TypeError unless every argument is a dense tensor; all but the first ``needed`` ones may be None.

    Ops call it first. It has to be quick, because the C++ kernels take only 10 us.
    """
    for name, x in given.items():
        needed -= 1
        if isinstance(x, Tensor):
            if x.layout is not torch.strided:
                raise TypeError(f"{name}: layout {x.layout}, expected a dense tensor")
        elif x is not None or needed >= 0:
            raise TypeError(f"{name}: got {type(x).__name__}, expected a tensor")


def check_number(name: str, x: Any, least: float = -math.inf, *, above: bool = False) -> None:
    """Raises a TypeError or a ValueError unless ``x`` is a finite number of at least ``least``, or above it.

    It has to be quick, because the C++ kernels take only 10 us.
    """
    if isinstance(x, bool) or not isinstance(x, int | float | Real):
        raise TypeError(f"{name}: got {type(x).__name__} {x!r}, expected a number")
    size: Any = abs(x)
    held = size == 0 or _SMALLEST <= size <= _LARGEST  # A NaN is not within bounds.
    if not held or x < least or (above and x == least):
        bound = "" if least == -math.inf else f" {'>' if above else '>='} {least:g}"
        if isinstance(x, int) and not held:
            raise ValueError(f"{name}: an integer beyond float32, expected a finite number{bound}")
        beyond = "" if held or not math.isfinite(x) else " that float32 can hold"
        raise ValueError(f"{name}: {x}, expected a finite number{bound}{beyond}")


# --- operators ---


def no_outputs(*_: Any) -> None:
    """The ``shapes`` of an operator that writes into its first argument and returns nothing."""


def define(signature: str, run: Callable[..., Any], shapes: Callable[..., Any], *, devices: dict[str, Any]) -> Any:
    """Registers an operator that is a black box to compilation, and returns it.

    Args:
        signature: the operator's signature as ``torch.library`` takes it, without the namespace.
        run: is called with a function of ``devices`` and the operator's arguments, and returns the outputs.
        shapes: makes empty outputs from the operator's arguments, for fake tensors.
        devices: the function for each dispatch key of torch ("CPU", "CUDA").
    """
    name = signature.partition("(")[0]
    library.define(signature)
    for key, function in devices.items():
        library.impl(name, functools.partial(run, function), key)
    torch.library.register_fake(f"maestro_fast::{name}", shapes, lib=library)
    return getattr(torch.ops.maestro_fast, name)


def as_operator(
    launch: Callable[P, R],
    signature: str,
    shapes: Callable[..., Any],
    *,
    flat: Callable[..., Any] | None,
    whole: Callable[..., Any] | None,
    result: Callable[..., R] | None,
    devices: dict[str, Callable[P, R]],
) -> Callable[P, R]:
    """A function that runs the launch in eager calls, and an operator under ``torch.compile``; see ``gpu.operator``."""

    def run(function: Callable[..., Any], *arguments: Any) -> Any:
        outputs = function(*(arguments if whole is None else whole(*arguments)))
        return tuple(_tensors(outputs)) if isinstance(outputs, tuple) else outputs

    registered = define(signature, run, shapes, devices=devices)

    @functools.wraps(launch)
    def call(*arguments: Any) -> Any:
        if torch.compiler.is_compiling():
            outputs = registered(*(arguments if flat is None else flat(*arguments)))
            return outputs if result is None else result(*outputs)
        return launch(*arguments)  # type: ignore[call-arg]

    return call  # type: ignore[return-value]


def _tensors(outputs: Any) -> Iterator[Tensor]:
    """The tensors of nested tuples, in their order, since an operator returns tensors alone."""
    for x in outputs:
        if isinstance(x, tuple):
            yield from _tensors(x)
        else:
            yield x
