"""The figures of a generation batch for the log, under TRL's names where TRL has them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from maestro_fast.ops.group_advantages import GroupAdvantages
from maestro_fast.records import PolicyOutputs, Rollouts, StepRecord
from maestro_fast.weighting.families import spread_between_families

LOSS_METRICS = {  # by the names of ``ops.policy_loss``
    "clip_low": "clip_ratio/low_mean",
    "clip_high": "clip_ratio/high_mean",
    "ratio": "ratio/mean",
    "kl": "kl",
    "sampler_ratio": "sampling/importance_sampling_ratio/mean",
}


def batch_metrics(record: StepRecord, advantages: GroupAdvantages) -> dict[str, float]:
    """Means over the whole generation batch, over all processes."""
    lengths = record.lengths_B.float()
    metrics = {
        "reward": record.scores_B.mean().item(),
        "reward_std": advantages.std.mean().item(),
        "frac_reward_zero_std": record.degenerate_B.float().mean().item(),
        "advantages/std": record.advantages_B.std(correction=0).item(),
        "advantages/abs_mean": record.advantages_B.abs().mean().item(),
        "completions/mean_length": lengths.mean().item(),
        "completions/min_length": lengths.min().item(),
        "completions/max_length": lengths.max().item(),
        "completions/clipped_ratio": record.truncated_B.float().mean().item(),
    }
    if record.utilities_B is not None:
        known = record.utilities_B[~record.utilities_B.isnan()]
        metrics["anchor/labelled"] = known.numel() / record.utilities_B.numel()
        if known.numel():
            metrics["anchor/utility"] = known.mean().item()
    for k, name in enumerate(record.reward_names):
        column = record.rewards_BK[:, k]
        live = column[~column.isnan()]
        metrics[f"rewards/{name}/abstained"] = column.isnan().float().mean().item()
        if live.numel():
            metrics[f"rewards/{name}/mean"] = live.mean().item()
            metrics[f"rewards/{name}/std"] = live.std(correction=0).item()
        metrics[f"weights/{name}"] = record.expected_weights_BK[:, k].mean().item()
    by_family = family_metrics(
        record.families, record.reward_names, record.rewards_BK, record.expected_weights_BK, record.lengths_B
    )
    return metrics | by_family | _family_spread(record)


def _family_spread(record: StepRecord) -> dict[str, float]:
    """How far the families' mean expected weights lie apart, and the mean of the same over eight shuffles.

    Of each group the first response speaks for all.
    """
    firsts = [i for i, text in enumerate(record.prompts) if i == 0 or text != record.prompts[i - 1]]
    families = [record.families[i] for i in firsts]
    found = spread_between_families(record.expected_weights_BK[firsts], families, shuffles=8, seed=record.step)
    if found is None:
        return {}
    spread, chance = found
    return {"diagnostics/family_spread": spread, "diagnostics/family_spread_shuffled": chance.mean().item()}


def family_metrics(
    families: Sequence[str],
    reward_names: Sequence[str],
    rewards_BK: Tensor,
    expected_weights_BK: Tensor,
    lengths_B: Tensor,
) -> dict[str, float]:
    """Means over the responses of each family; "" is none."""
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


def response_means(values_C: Tensor, rollouts: Rollouts) -> Tensor:
    """[C] -> [B], the mean over each response's tokens."""
    parts = values_C.split(rollouts.completion_lengths_B.tolist())
    return torch.stack([part.mean() if part.numel() else part.new_zeros(()) for part in parts])


def policy_metrics(
    rollouts: Rollouts, outputs: PolicyOutputs | None, gather: Callable[[Tensor], Tensor]
) -> dict[str, float]:
    """Entropy of the policy, and how far its log-probs lie from the sampler's, over the tokens of all processes.

    Nothing where no process has a token. ``gather`` concatenates a tensor of every process.
    """
    if outputs is None:
        return {}
    logprobs_C = outputs.logprobs_C
    sums = torch.zeros(1, 4, dtype=torch.float64)  # tokens, their entropies, their gaps; and the widest gap
    if logprobs_C.numel():
        sums[0, 0] = logprobs_C.numel()
        if outputs.entropies_C is not None:
            sums[0, 1] = outputs.entropies_C.sum(dtype=torch.float64)
        if rollouts.sampling_logprobs_C is not None:
            gap = (logprobs_C.cpu() - rollouts.sampling_logprobs_C).abs()
            sums[0, 2], sums[0, 3] = gap.sum(dtype=torch.float64), gap.max()
    each = gather(sums.to(logprobs_C.device)).cpu()
    tokens, entropy, gap_sum, _ = each.sum(0).tolist()
    metrics: dict[str, float] = {}
    if tokens and outputs.entropies_C is not None:
        metrics["entropy"] = entropy / tokens
    if tokens and rollouts.sampling_logprobs_C is not None:
        metrics["sampling/logprob_gap_mean"] = gap_sum / tokens
        metrics["sampling/logprob_gap_max"] = each[:, 3].max().item()
    return metrics


class MetricMeans:
    """Means of what was added between two log lines."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._counts: dict[str, int] = {}

    def add(self, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
            self._counts[name] = self._counts.get(name, 0) + 1

    def state(self) -> dict[str, tuple[float, int]]:
        """Sum and count by name, for a checkpoint."""
        return {name: (total, self._counts[name]) for name, total in self._sums.items()}

    @staticmethod
    def of(state: Mapping[str, Sequence[Any]]) -> MetricMeans:
        """The means that had this ``state``."""
        means = MetricMeans()
        means._sums = {name: float(total) for name, (total, _) in state.items()}
        means._counts = {name: int(count) for name, (_, count) in state.items()}
        return means

    def join(self, others: Sequence[Mapping[str, Sequence[Any]]]) -> None:
        """Adds what had these states: the same batches on other processes."""
        for state in others:
            for name, (total, count) in state.items():
                self._sums[name] = self._sums.get(name, 0.0) + float(total)
                self._counts[name] = self._counts.get(name, 0) + int(count)

    def pop(self) -> dict[str, float]:
        """The means; starts anew."""
        means = {name: total / self._counts[name] for name, total in self._sums.items()}
        self._sums.clear()
        self._counts.clear()
        return means
