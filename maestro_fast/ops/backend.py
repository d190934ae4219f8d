"""Which backend serves an op: an explicit ``backend=`` is obeyed or raises, nothing falls back silently."""

from __future__ import annotations

from typing import Literal

Backend = Literal["torch", "cpp", "triton"]

# Every op has the PyTorch reference. A backend is listed here once it exists and agrees with the reference.
SERVED_BY: dict[str, tuple[Backend, ...]] = {
    "group_advantages": ("torch",),
    "counterfactual_advantages": ("torch",),
    "maestro_advantages": ("torch",),
    "conductor_weights": ("torch",),
    "pool_hidden": ("torch",),
    "token_logprobs": ("torch",),
    "policy_loss": ("torch",),
    "pack_sequences": ("cpp",),
}


def resolve(op: str, backend: Backend | None) -> Backend:
    """The backend that serves ``op``.

    Raises:
        ValueError: ``backend`` names one that does not serve this op.
    """
    served = SERVED_BY[op]
    if backend is None:
        return served[0]
    if backend not in served:
        raise ValueError(f"backend: {backend!r} does not serve {op}, expected one of {', '.join(served)}")
    return backend
