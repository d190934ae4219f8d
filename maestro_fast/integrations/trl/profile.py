"""Which of TRL's two aggregations is which advantage profile."""

from __future__ import annotations

from typing import Any

from maestro_fast.specs import PROFILES, AdvantageProfile, resolve_profile

# profile: (multi_objective_aggregation, scale_rewards) of GRPOConfig
TRL_OPTIONS = {
    "grpo": ("sum_then_normalize", "group"),
    "grpo_batch": ("sum_then_normalize", "batch"),
    "dr_grpo": ("sum_then_normalize", "none"),
    "gdpo": ("normalize_then_sum", "group"),
}


def configured_profile(aggregation: str, scale_rewards: str) -> str:
    """The profile that a ``GRPOConfig`` asks for.

    Raises:
        ValueError: options that TRL does not know either.
    """
    for name, (known, scale) in TRL_OPTIONS.items():
        if aggregation == known and (scale_rewards == scale or known == "normalize_then_sum"):
            return name
    raise ValueError(f"scale_rewards, multi_objective_aggregation: {scale_rewards!r}, {aggregation!r}, unknown to TRL")


def apply_profile(trainer: Any, profile: str | AdvantageProfile | None) -> tuple[AdvantageProfile, bool]:
    """The profile to train with, and whether TRL's own aggregation computes it.

    A profile of TRL's that differs from the config is set on the trainer, so that TRL computes and logs it.
    """
    if profile is None:
        profile = configured_profile(trainer.multi_objective_aggregation, trainer.scale_rewards)
    resolved = resolve_profile(profile)
    for name, (aggregation, scale_rewards) in TRL_OPTIONS.items():
        if resolved == PROFILES[name]:
            trainer.multi_objective_aggregation, trainer.scale_rewards = aggregation, scale_rewards
            return resolved, True
    return resolved, False
