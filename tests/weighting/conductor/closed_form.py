"""The closed form of ``ops.conductor_update`` by the logits themselves."""

from __future__ import annotations

import torch
from torch import Tensor

from maestro_fast.ops import ConductorBatch, ConductorUpdateConfig
from maestro_fast.ops.conductor_update import logit_gradient


def climbed(
    logits_BK: Tensor, actions_B: Tensor | None, meta: Tensor, *, tau: float, min_prob: float, entropy_coef: float
) -> tuple[Tensor, Tensor]:
    """J, the mean over the responses, and its gradient [B, K] by the logits."""
    config = ConductorUpdateConfig(tau, min_prob, entropy_coef)
    gradient_BK, gain_B = logit_gradient(logits_BK, ConductorBatch(torch.empty(0), meta, actions_B), config)
    return gain_B.mean(), gradient_BK / len(logits_BK)
