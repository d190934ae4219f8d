"""Task families in the log: their mean rewards and weights, and how far their weights lie apart."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def spread_between_families(
    weights_NK: Tensor, families: Sequence[str], *, shuffles: int, seed: int
) -> tuple[float, Tensor] | None:
    """How far the mean weights of the task families lie apart, and how far they would by chance.

    The figure is the root of the summed variances, over the families, of each family's mean weights.

    Args:
        weights_NK: One row of weights per prompt.
        families: N names of families. Prompts of the family "" belong to none and are left out.
        shuffles: How often the families are dealt out among the prompts at random. Weights that depend on the family
            lie further apart than after a shuffle.
        seed: The seed of the shuffles.

    Returns:
        The spread, and float64 [shuffles] with the spread after each shuffle. None if there are fewer than two
        families.
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

    Responses of the family "" belong to none and are left out. A reward that abstained from all responses of a family
    has no mean there.
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
    """The mean of the values that are not NaN, or None if all of them are."""
    live = values[~values.isnan()]
    return live.mean().item() if live.numel() else None
