"""Which backend serves an op: an explicit ``backend=`` is obeyed or raises, and nothing falls back silently."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from maestro_fast.ops import cpp, gpu

Backend = Literal["torch", "cpp", "triton"]

# Every op has a reference that needs nothing compiled, "torch"; that of pack_sequences and balance_sequences is plain
# Python. A backend is listed here once it exists and agrees with the reference. Without a choice by the caller, the
# first that can take the tensors at hand serves them.
SERVED_BY: dict[str, tuple[Backend, ...]] = {
    "group_advantages": ("cpp", "triton", "torch"),
    "counterfactual_advantages": ("cpp", "triton", "torch"),
    "maestro_advantages": ("cpp", "triton", "torch"),
    "conductor_weights": ("cpp", "triton", "torch"),
    "conductor_update": ("triton", "torch"),
    "pool_hidden": ("triton", "torch"),
    "token_logprobs": ("triton", "torch"),
    "policy_loss": ("triton", "torch"),
    "linear_policy_loss": ("triton", "torch"),
    "pack_sequences": ("cpp", "torch"),
    "balance_sequences": ("cpp", "torch"),
}

# The ops whose Triton kernels have a backward pass. Where a gradient is wanted of others, PyTorch serves them.
_DIFFERENTIABLE_BY_TRITON = ("policy_loss", "token_logprobs", "linear_policy_loss")


def resolve(op: str, backend: Backend | None, *tensors: Tensor | None) -> Backend:
    """The backend that serves ``op`` on these tensors.

    Args:
        op: a key of ``SERVED_BY``.
        backend: the caller's choice, or None for the first backend that can take the tensors.
        tensors: everything that the op reads; None stands for one that was not given.

    Raises:
        ValueError: ``backend`` names one that does not serve this op, or not on these tensors.
    """
    served = SERVED_BY[op]
    if backend is None:
        for candidate in served[:-1]:
            if _obstacle(op, candidate, tensors, False) is None:
                return candidate
        return served[-1]  # the reference, which takes all tensors
    if backend not in served:
        raise ValueError(f"backend: {backend!r} does not serve {op}, expected one of {', '.join(served)}")
    reason = _obstacle(op, backend, tensors, True)
    if reason is not None:
        raise ValueError(f"backend: {backend!r} cannot serve {op} here: {reason}")
    return backend


def _obstacle(op: str, backend: Backend, tensors: tuple[Tensor | None, ...], chosen: bool) -> str | None:
    """Why a backend cannot take these tensors, or None. The reference takes all."""
    if backend == "triton":
        return gpu.obstacle(tensors, chosen=chosen, differentiable=op in _DIFFERENTIABLE_BY_TRITON)
    return cpp.obstacle(tensors) if backend == "cpp" else None
