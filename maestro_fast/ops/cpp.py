"""How tensors reach the C++ kernels: as addresses, in float32 or bfloat16, contiguous, on the CPU.

In eager mode an op calls ``maestro_fast._C`` itself, since a registered operator costs about 4 us more, a fifth of the
whole call. ``torch.compile`` takes the registered one, which it does not look into. Both run the same kernel.

The compiled module is optional. Where it is missing, ``obstacle`` says why, the backend "cpp" refuses with that reason,
and the other backends serve. This file is the only one that imports it; the others take ``_C`` from here.
"""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

__all__ = ["CPU", "_C", "address", "check_build", "floats", "library", "obstacle", "why_missing"]

CPU = torch.device("cpu")
library = torch.library.Library("maestro_fast", "FRAGMENT")
_PLAIN = (Tensor, torch.nn.Parameter)
_NEEDED = (
    "AdvantageProfile",
    "Partition",
    "group_advantages",
    "counterfactual_advantages",
    "conductor_weights",
    "pack_sequences",
    "balance_sequences",
)


class _Missing:
    """Stands in for a compiled module that is missing. A graph that was exported elsewhere may still call on it."""

    def __init__(self, reason: str) -> None:
        self._reason = reason

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):  # what Python itself asks of any object
            raise AttributeError(name)
        raise ImportError(self._reason)


def why_missing(error: ImportError) -> str:
    """The reason in words, given what the import of ``maestro_fast._C`` raised."""
    remedy = "pip install . in a checkout builds it, where there is a C++ compiler"
    if not isinstance(error, ModuleNotFoundError) or error.name != "maestro_fast._C":
        return f"maestro_fast._C is there but does not load ({error}); {remedy}"
    others = sorted(path.name for path in Path(__file__).parents[1].glob("_C.*.so"))
    only = f" for this Python (there is {', '.join(others)})" if others else ""
    return f"maestro_fast._C is not built{only}; {remedy}"


def check_build(module: object) -> None:
    """
    Raises:
        ImportError: the compiled module lacks something, so it is older than this code.
    """
    missing = [name for name in _NEEDED if not hasattr(module, name)]
    if missing:
        raise ImportError(
            f"maestro_fast._C has no {', '.join(missing)}: it is older than the Python code, rebuild it: pip install"
        )


_obstacle_here: str | None = None
try:
    import maestro_fast._C as _C
except ImportError as error:
    _obstacle_here = why_missing(error)
    _C = _Missing(_obstacle_here)  # type: ignore[assignment]
else:
    check_build(_C)  # outside of the try: a stale build is an error, and not a reason to do without


def obstacle(tensors: tuple[Tensor | None, ...]) -> str | None:
    """Why the C++ kernels cannot serve these tensors, or None; without tensors, why they cannot serve at all."""
    if _obstacle_here is not None:
        return _obstacle_here
    for x in tensors:
        if x is None:
            continue
        if type(x) not in _PLAIN:
            return f"got a {type(x).__name__}, expected plain tensors"
        if not x.is_cpu:
            return f"got a tensor on {x.device}, expected the CPU"
        if x.dtype is torch.float64:
            return "got float64, expected float32 or bfloat16"
        if x.requires_grad and torch.is_grad_enabled():
            return "a gradient is wanted, which it does not compute"
    if tensors and forward_ad._current_level >= 0:
        return "forward-mode derivatives are wanted, which it does not compute"
    return None


def address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def floats(x: Tensor) -> Tensor:
    """Contiguous float32."""
    return (x if x.dtype is torch.float32 else x.float()).contiguous()
