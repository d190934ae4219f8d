"""The contexts that a Conductor reads, from those that the policy's forward gave."""

from __future__ import annotations

import torch
from torch import Tensor

from maestro_fast.weighting.policy import WeightContext


def policy_contexts(context: WeightContext, kind: str, size: int, seed: int, device: torch.device) -> Tensor:
    """float32 [B, d] on ``device``.

    Args:
        kind: as ``ConductorConfig.context``. Contexts of the prompt are made exactly equal within a group: a batched
            forward leaves rounding noise between copies of one prompt.
        size: d that is expected.
        seed: with the step, the key of ``shuffled``.

    Raises:
        ValueError: contexts that are missing or of a wrong shape.
    """
    if context.context_Bd is None:
        raise ValueError("context_Bd: missing, the Conductor reads the hidden state of each response")
    expected = (context.rewards_BK.shape[0], size)
    if context.context_Bd.shape != expected:
        raise ValueError(f"context_Bd: shape {tuple(context.context_Bd.shape)}, expected {expected}")
    h = context.context_Bd.detach().float().to(device)
    if kind == "shuffled":
        return _shuffled(h, seed, context.step)
    return h if kind == "response" else h[:: context.group_size].repeat_interleave(context.group_size, 0)


def group_mean(h_Bd: Tensor, group_size: int) -> Tensor:
    """[N, d]."""
    return h_Bd.view(-1, group_size, h_Bd.shape[-1]).mean(1)


def _shuffled(h_Bd: Tensor, seed: int, step: int) -> Tensor:
    generator = torch.Generator().manual_seed((seed + step) % 2**63)
    order = torch.randperm(h_Bd.shape[0], generator=generator).to(h_Bd.device)
    shuffled = torch.empty_like(h_Bd)
    shuffled[order] = h_Bd[order.roll(1)]  # one random cycle: a plain permutation may leave a response its own state
    return shuffled
