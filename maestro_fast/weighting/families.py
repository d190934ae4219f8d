"""Task families in the log: their mean rewards and weights, and how far their weights lie apart."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def spread_between_families(
    weights_NK: Tensor, families: Sequence[str], *, shuffles: int, seed: int
) -> tuple[float, Tensor] | None:
    """Root of the summed variances, over families, of each family's mean weights; and the same by chance.

    Args:
        weights_NK: one row per prompt.
        families: N names, "" for none; rows without a family are left out.
        shuffles: of the families among the prompts; weights that depend on the family exceed these.
        seed: of the shuffles.

    Returns:
        The spread, and float64 [shuffles]; None where there are fewer than two families.
    """
    rows = [i for i, family in enumerate(families) if family]
    known = sorted({families[i] for i in rows})
    if len(known) < 2:
        return None
    weights_NK = weights_NK[rows].double()
    labels_N = torch.tensor([known.index(families[i]) for i in rows])

    def spread(labels_N: Tensor) -> Tensor:
        means_FK = torch.stack([weights_NK[labels_N == f].mean(0) for f in range(len(known))])
        return means_FK.var(0, correction=0).sum().sqrt()

    generator = torch.Generator().manual_seed(seed)
    chance = [spread(labels_N[torch.randperm(len(labels_N), generator=generator)]) for _ in range(shuffles)]
    return spread(labels_N).item(), torch.stack(chance)


def family_metrics(
    families: Sequence[str],
    reward_names: Sequence[str],
    rewards_BK: Tensor,
    expected_weights_BK: Tensor,
    lengths_B: Tensor,
) -> dict[str, float]:
    """Figures for the log: each family's mean completion length, expected weights and rewards.

    Responses of the family "" have none and are left out, and so is the mean of a reward that abstained from all of a
    family.
    """
    metrics: dict[str, float] = {}
    for family in sorted(set(families) - {""}):
        rows = [i for i, name in enumerate(families) if name == family]
        prefix = f"families/{family}"
        metrics[f"{prefix}/completion_length"] = lengths_B[rows].float().mean().item()
        for k, name in enumerate(reward_names):
            metrics[f"{prefix}/weights/{name}"] = expected_weights_BK[rows, k].mean().item()
            if (mean := _live_mean(rewards_BK[rows, k])) is not None:
                metrics[f"{prefix}/rewards/{name}"] = mean
    return metrics


def _live_mean(values: Tensor) -> float | None:
    live = values[~values.isnan()]
    return live.mean().item() if live.numel() else None
