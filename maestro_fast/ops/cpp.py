"""How tensors reach the C++ kernels: as addresses of float32 or bfloat16 on the CPU, contiguous but for rows of logits.

The compiled module is optional. It is loaded when an op first asks for it. Where it is missing, ``backend="cpp"``
raises an error with the reason, and without a choice by the caller the other backends serve. This file alone imports
the module; ops write ``cpp._C``. Every call of a C++ kernel is decorated with ``operator``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

from maestro_fast.ops.tensors import PLAIN, P, R, as_operator, floats
from maestro_fast.specs.text import constant_in_graphs

if TYPE_CHECKING:
    from maestro_fast import _C

__all__ = ["_C", "address", "check_build", "floats_or_bfloat16", "obstacle", "operator", "why_missing", "why_not_built"]

_NEEDED = (
    "AdvantageProfile",
    "Partition",
    "LogitRows",
    "HeadNumbers",
    "group_advantages",
    "counterfactual_advantages",
    "conductor_weights",
    "pack_sequences",
    "balance_sequences",
    "row_statistics",
    "dlogits",
    "number_keys",
    "number_session_keys",
    "order_by_group",
    "examine_mask",
    "spread_over_tokens",
    "sum_over_tokens",
)


class _Missing:
    """Stands in for a missing compiled module. A graph that was exported elsewhere may still call its functions."""

    def __init__(self, reason: str) -> None:
        self.reason = reason

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):  # Python itself looks such names up on any object
            raise AttributeError(name)
        raise ImportError(self.reason)


@cache
def _load() -> Any:
    """The compiled module, or a ``_Missing`` with the reason why there is none."""
    try:
        import maestro_fast._C as module
    except ImportError as error:
        return _Missing(why_missing(error))
    check_build(module)  # outside of the try: a stale build is an error, no reason to use other backends
    return module


def __getattr__(name: str) -> Any:
    """Loads ``_C`` when it is first asked for; after that it is an attribute like any other."""
    if name != "_C":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()["_C"] = module = _load()
    return module


def why_missing(error: ImportError) -> str:
    """Explains the error that the import of ``maestro_fast._C`` raised, and what to do about it."""
    remedy = "pip install . in a checkout builds it, where there is a C++ compiler"
    if not isinstance(error, ModuleNotFoundError) or error.name != "maestro_fast._C":
        return f"maestro_fast._C is there but does not load ({error}); {remedy}"
    others = sorted(path.name for path in Path(__file__).parents[1].glob("_C.*.so"))
    only = f" for this Python (there is {', '.join(others)})" if others else ""
    return f"maestro_fast._C is not built{only}; {remedy}"


def check_build(module: object) -> None:
    """Checks that the compiled module has all functions and classes that the ops call.

    Raises:
        ImportError: something is missing, so the module is older than this code.
    """
    missing = [name for name in _NEEDED if not hasattr(module, name)]
    if missing:
        raise ImportError(
            f"maestro_fast._C has no {', '.join(missing)}: it is older than the Python code, rebuild it: pip install"
        )


@constant_in_graphs
def why_not_built() -> str | None:
    """The reason why there is no compiled module, or None if there is one."""
    module = _load()
    return module.reason if isinstance(module, _Missing) else None


def obstacle(tensors: tuple[Tensor | None, ...], *, differentiable: bool = False) -> str | None:
    """The reason why the C++ kernels cannot serve these tensors, or None if they can.

    Without tensors it is the reason why they cannot serve at all. ``differentiable`` says that the op computes
    gradients.
    """
    reason = why_not_built()
    if reason is not None:
        return reason
    for x in tensors:
        if x is None:
            continue
        if type(x) not in PLAIN:
            return f"got a {type(x).__name__}, expected plain tensors"
        if not x.is_cpu:
            return f"got a tensor on {x.device}, expected the CPU"
        if x.dtype is torch.float64:
            return "got float64, expected float32 or bfloat16"
        if x.requires_grad and torch.is_grad_enabled() and not differentiable:
            return "a gradient is wanted, which it does not compute"
    if tensors and forward_ad._current_level >= 0:
        return "forward-mode derivatives are wanted, which it does not compute"
    return None


def operator(
    signature: str,
    shapes: Callable[..., Any],
    *,
    flat: Callable[..., Any] | None = None,
    whole: Callable[..., Any] | None = None,
    result: Callable[..., Any] | None = None,
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A decorator that makes a launch an op of its own, for eager calls and for ``torch.compile``.

    It takes the same arguments as ``gpu.operator``, and treats the launch's arguments and result in the same way.
    """

    def decorate(launch: Callable[P, R]) -> Callable[P, R]:
        return as_operator(launch, signature, shapes, flat=flat, whole=whole, result=result, devices={"CPU": launch})

    return decorate


def floats_or_bfloat16(x: Tensor) -> Tensor:
    """The tensor in contiguous bfloat16 or float32, as the C++ kernels read rewards and contexts."""
    return x.contiguous() if x.dtype is torch.bfloat16 else floats(x)


def address(x: Tensor | None) -> int:
    """Where the tensor's data begins; 0 stands for None.

    Raises:
        TypeError: the tensor is of a class of its own, which may hold no data.
    """
    if x is None:
        return 0
    if type(x) not in PLAIN:
        raise TypeError(f"C++: got a {type(x).__name__}, expected plain tensors")
    return x.data_ptr()
