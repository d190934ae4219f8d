"""What is added to TRL's log: TRL's names stay TRL's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from maestro_fast.ops import GroupAdvantages
from maestro_fast.weighting import Outcome
from maestro_fast.weighting.families import family_metrics


def weight_metrics(outcome: Outcome, families: Sequence[str], lengths_B: torch.Tensor) -> dict[str, float]:
    """Figures of one generation batch over all processes; ``families`` and ``lengths_B`` of its B responses."""
    context, expected_BK = outcome.context, outcome.weights.expected_BK
    advantages = outcome.advantages.advantages
    metrics = {
        "advantages/std": advantages.std(correction=0).item(),
        "advantages/abs_mean": advantages.abs().mean().item(),
    }
    for k, name in enumerate(context.reward_names):
        metrics[f"rewards/{name}/abstained"] = context.rewards_BK[:, k].isnan().float().mean().item()
        metrics[f"weights/{name}"] = expected_BK[:, k].mean().item()
    return metrics | family_metrics(families, context.reward_names, context.rewards_BK, expected_BK, lengths_B)


def replace_logged_advantages(trainer: Any, mode: str, advantages: GroupAdvantages, *, own_profile: bool) -> None:
    """Corrects what TRL has just logged about advantages that are not the ones trained with."""
    log = trainer._logs["advantages"]
    values = advantages.advantages.tolist()
    for _ in range(min(len(log), len(values))):
        log.pop()
    log.extend(values)
    if own_profile:
        trainer._metrics[mode]["frac_reward_zero_std"][-1] = advantages.degenerate.float().mean().item()
