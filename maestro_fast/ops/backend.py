"""Which backend serves an op: an explicit ``backend=`` is obeyed or raises, nothing falls back silently."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from maestro_fast.ops import cpp, gpu

Backend = Literal["torch", "cpp", "triton"]

# Every op has a reference that needs nothing compiled, "torch"; that of the last two is plain Python. A backend is
# listed here once it exists and agrees with the reference; the first that can take the tensors at hand serves them.
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


_DIFFERENTIABLE = ("policy_loss", "token_logprobs", "linear_policy_loss")  # by Triton


def resolve(op: str, backend: Backend | None, *tensors: Tensor | None) -> Backend:
    """The backend that serves ``op`` on these tensors.

    Raises:
        ValueError: ``backend`` names one that does not serve this op, or not on these tensors.
    """
    served = SERVED_BY[op]
    if backend is None:
        return next(candidate for candidate in served if _obstacle(op, candidate, tensors, False) is None)
    if backend not in served:
        raise ValueError(f"backend: {backend!r} does not serve {op}, expected one of {', '.join(served)}")
    reason = _obstacle(op, backend, tensors, True)
    if reason is not None:
        raise ValueError(f"backend: {backend!r} cannot serve {op} here: {reason}")
    return backend


def _obstacle(op: str, backend: Backend, tensors: tuple[Tensor | None, ...], chosen: bool) -> str | None:
    """Why a backend cannot take these tensors, or None; the reference takes all."""
    if backend == "triton":
        return gpu.obstacle(tensors, chosen=chosen, differentiable=op in _DIFFERENTIABLE)
    return cpp.obstacle(tensors) if backend == "cpp" else None
