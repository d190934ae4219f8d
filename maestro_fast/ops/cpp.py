"""How tensors reach the C++ kernels: as addresses, in float32 or bfloat16, contiguous, on the CPU.

In eager mode an op calls ``maestro_fast._C`` itself, since a registered operator costs about 4 us more, a fifth of the
whole call. ``torch.compile`` takes the registered one, which it does not look into. Both run the same kernel.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from maestro_fast import _C

CPU = torch.device("cpu")
library = torch.library.Library("maestro_fast", "FRAGMENT")
_PLAIN = (Tensor, torch.nn.Parameter)
_NEEDED = ("AdvantageProfile", "Partition", "group_advantages", "counterfactual_advantages", "conductor_weights")


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


check_build(_C)


def obstacle(tensors: tuple[Tensor | None, ...]) -> str | None:
    """Why the C++ kernels cannot serve these tensors, or None."""
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
    if forward_ad._current_level >= 0:
        return "forward-mode derivatives are wanted, which it does not compute"
    return None


def address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def floats(x: Tensor) -> Tensor:
    """Contiguous float32."""
    return (x if x.dtype is torch.float32 else x.float()).contiguous()
