"""Known utilities of responses: what an anchor (a judge, a verifier, people) says that a response is worth.

Utilities are known for some groups and NaN elsewhere. They are used in three ways: policies learn from labelled groups,
the guard hides some of them from the policy and watches these, and hybrid policies score labelled groups by the
utility itself.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from maestro_fast.ops.group_advantages import group_advantages
from maestro_fast.weighting.policy import WeightContext, live_range


def labelled_groups(context: WeightContext) -> Tensor:
    """bool [N] on the CPU: True for groups whose utilities are all known and not all the same.

    A response from which every reward abstains has no part in its group's comparison, and needs no utility.

    Raises:
        ValueError: There is no anchor, or the utilities have a wrong shape.
    """
    utilities_NG = _utilities(context)
    known_NG = utilities_NG.isfinite()
    low_N, high_N = live_range(torch.where(known_NG, utilities_NG, float("nan")), 1)
    absent_NG = context.rewards_BK.isnan().all(1).cpu().view_as(known_NG) & utilities_NG.isnan()
    return (high_N > low_N) & (known_NG | absent_NG).all(1)


def standardised_utilities(context: WeightContext) -> Tensor:
    """z(U) = (U - mean) / (sample std + 1e-4) within each labelled group, NaN in the others.

    It is 0 for a response of a labelled group that has neither rewards nor a utility.

    Returns:
        float32 [B] on the CPU.

    Raises:
        ValueError: There is no anchor, or the utilities have a wrong shape.
    """
    labelled_B = labelled_groups(context).repeat_interleave(context.group_size)
    utilities_B = torch.where(labelled_B, _utilities(context).flatten(), 0.0)
    z_B = group_advantages(utilities_B, None, context.group_size, profile="grpo").advantages
    return torch.where(labelled_B, z_B, float("nan"))


def _utilities(context: WeightContext) -> Tensor:
    """float32 [N, G] on the CPU."""
    if context.utilities_B is None:
        raise ValueError("utilities_B: missing, this weight policy needs an anchor (section anchor of the config)")
    if context.utilities_B.shape != context.rewards_BK.shape[:1]:
        raise ValueError(
            f"utilities_B: shape {tuple(context.utilities_B.shape)}, expected ({context.rewards_BK.shape[0]},)"
        )
    return context.utilities_B.detach().float().cpu().view(-1, context.group_size)


def hide_utilities(context: WeightContext, hidden_N: Tensor) -> WeightContext:
    """The same context with the utilities of the groups ``hidden_N`` (bool [N]) set to unknown."""
    assert context.utilities_B is not None
    hidden_B = hidden_N.repeat_interleave(context.group_size).to(context.utilities_B.device)
    return replace(context, utilities_B=torch.where(hidden_B, float("nan"), context.utilities_B))
