"""Makes TRL train with the advantages of a profile: one of TRL's own four, or any other of ours.

TRL's ``multi_objective_aggregation`` and ``scale_rewards`` name four advantage profiles, which TRL goes on to compute
itself. Every other profile is computed by ``ops`` and replaces TRL's advantages.
"""

from __future__ import annotations

from typing import Any

import torch

from maestro_fast.ops import AdvantageProfile, GroupAdvantages
from maestro_fast.specs import PROFILES, resolve_profile

# For each profile of TRL's: (multi_objective_aggregation, scale_rewards) in GRPOConfig.
TRL_OPTIONS = {
    "grpo": ("sum_then_normalize", "group"),
    "grpo_batch": ("sum_then_normalize", "batch"),
    "dr_grpo": ("sum_then_normalize", "none"),
    "gdpo": ("normalize_then_sum", "group"),
}


def configured_profile(aggregation: str, scale_rewards: str) -> str:
    """The name of the profile that a ``GRPOConfig`` asks for.

    Raises:
        ValueError: these are not options of TRL.
    """
    for name, (known, scale) in TRL_OPTIONS.items():
        if aggregation == known and (scale_rewards == scale or known == "normalize_then_sum"):
            return name
    raise ValueError(f"scale_rewards, multi_objective_aggregation: {scale_rewards!r}, {aggregation!r}, unknown to TRL")


def apply_profile(trainer: Any, profile: str | AdvantageProfile | None) -> tuple[AdvantageProfile, bool]:
    """Returns the profile to train with, and whether TRL's own aggregation computes it.

    A profile of TRL's is set on the trainer even if the config says otherwise, so that TRL computes and logs it.
    """
    if profile is None:
        profile = configured_profile(trainer.multi_objective_aggregation, trainer.scale_rewards)
    resolved = resolve_profile(profile)
    for name, (aggregation, scale_rewards) in TRL_OPTIONS.items():
        if resolved == PROFILES[name]:
            trainer.multi_objective_aggregation, trainer.scale_rewards = aggregation, scale_rewards
            return resolved, True
    return resolved, False


def set_advantages(
    trainer: Any, output: dict[str, Any], advantages: GroupAdvantages, mode: str, *, trl_aggregates: bool
) -> None:
    """Puts this process's share of the advantages into TRL's output, and corrects what TRL has logged about them.

    TRL keeps the advantages that it has aggregated itself, except in groups without spread: TRL's are rounding noise
    there, and ours are exactly 0.
    """
    own = len(output["advantages"])
    rows = slice(trainer.accelerator.process_index * own, (trainer.accelerator.process_index + 1) * own)
    ours, degenerate = advantages.advantages[rows], advantages.degenerate[rows]
    output["advantages"] = torch.where(degenerate, ours, output["advantages"]) if trl_aggregates else ours
    log, values = trainer._logs["advantages"], advantages.advantages.tolist()
    for _ in range(min(len(log), len(values))):
        log.pop()
    log.extend(values)
    if not trl_aggregates:
        trainer._metrics[mode]["frac_reward_zero_std"][-1] = advantages.degenerate.float().mean().item()
