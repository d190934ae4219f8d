"""Which backend serves an op. An explicit ``backend=`` is obeyed or raises an error; nothing falls back silently."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from maestro_fast.ops import cpp, gpu

Backend = Literal["torch", "cpp", "triton"]

# The backends of each op, in order of preference: without a choice by the caller, the first one that can take the
# tensors serves them. The last one, "torch", is the reference, which takes all tensors and needs nothing compiled. For
# pack_sequences and balance_sequences it is plain Python.
SERVED_BY: dict[str, tuple[Backend, ...]] = {
    "group_advantages": ("cpp", "triton", "torch"),
    "counterfactual_advantages": ("cpp", "triton", "torch"),
    "maestro_advantages": ("cpp", "triton", "torch"),
    "conductor_weights": ("cpp", "triton", "torch"),
    "conductor_update": ("triton", "torch"),
    "pool_hidden": ("triton", "torch"),
    "token_logprobs": ("cpp", "triton", "torch"),
    "policy_loss": ("triton", "torch"),
    "linear_policy_loss": ("cpp", "triton", "torch"),
    "pack_sequences": ("cpp", "torch"),
    "balance_sequences": ("cpp", "torch"),
    "token_mask": ("cpp", "torch"),
    "sum_tokens": ("cpp", "torch"),
}

# The ops whose kernels have a backward pass. PyTorch serves the other ops where a gradient is wanted.
_DIFFERENTIABLE = ("policy_loss", "token_logprobs", "linear_policy_loss")


def resolve(op: str, backend: Backend | None, *tensors: Tensor | None) -> Backend:
    """The backend that serves ``op`` on these tensors.

    Args:
        op: a key of ``SERVED_BY``.
        backend: the caller's choice, or None for the first backend that can take the tensors.
        tensors: all tensors that the op reads; None stands for an optional tensor that is missing.

    Raises:
        ValueError: the backend named by ``backend`` does not serve this op, or cannot take these tensors.
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
    """The reason why a backend cannot take these tensors, or None if it can. The reference takes all tensors."""
    differentiable = op in _DIFFERENTIABLE
    if backend == "triton":
        return gpu.obstacle(tensors, chosen=chosen, differentiable=differentiable)
    return cpp.obstacle(tensors, differentiable=differentiable) if backend == "cpp" else None
