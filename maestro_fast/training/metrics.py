"""The figures of a generation batch for the log, under TRL's names where TRL has them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from maestro_fast.ops.group_advantages import GroupAdvantages
from maestro_fast.records import PolicyOutputs, Rollouts, StepRecord
from maestro_fast.weighting.families import family_metrics, spread_between_families

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


def response_means(values_C: Tensor, rollouts: Rollouts) -> Tensor:
    """[C] -> [B], the mean over each response's tokens."""
    parts = values_C.split(rollouts.completion_lengths_B.tolist())
    return torch.stack([part.mean() if part.numel() else part.new_zeros(()) for part in parts])


def policy_metrics(
    rollouts: Rollouts, outputs: PolicyOutputs | None, gather: Callable[[Tensor], Tensor]
) -> dict[str, float]:
    """Entropy of the policy, and ``sampler_metrics``; nothing where no process has a token."""
    if outputs is None:
        return {}
    return sampler_metrics(outputs.logprobs_C, rollouts.sampling_logprobs_C, gather, outputs.entropies_C)


def sampler_metrics(
    logprobs_C: Tensor,
    sampling_logprobs_C: Tensor | None,
    gather: Callable[[Tensor], Tensor],
    entropies_C: Tensor | None = None,
) -> dict[str, float]:
    """How far the policy's log-probs lie from the sampler's, over the tokens of all processes, in nats.

    The mean and the largest absolute difference, and k3: the mean of r - 1 - log r with r = policy / sampler, an
    estimate of KL(sampler || policy) (J. Schulman, "Approximating KL divergence", 2020). ``gather`` concatenates a
    tensor of every process.
    """
    sums = torch.zeros(1, 5, dtype=torch.float64)  # tokens, their entropies, gaps and k3; and the widest gap
    sums[0, 0] = logprobs_C.numel()
    if logprobs_C.numel():
        if entropies_C is not None:
            sums[0, 1] = entropies_C.sum(dtype=torch.float64)
        if sampling_logprobs_C is not None:
            gap_C = (logprobs_C.cpu() - sampling_logprobs_C.cpu()).double()
            sums[0, 2], sums[0, 3], sums[0, 4] = gap_C.abs().sum(), (gap_C.expm1() - gap_C).sum(), gap_C.abs().max()
    each = gather(sums.to(logprobs_C.device)).cpu()
    tokens, entropy, gap, k3, _ = each.sum(0).tolist()
    metrics: dict[str, float] = {}
    if tokens and entropies_C is not None:
        metrics["entropy"] = entropy / tokens
    if tokens and sampling_logprobs_C is not None:
        metrics["sampling/logprob_gap_mean"] = gap / tokens
        metrics["sampling/logprob_gap_max"] = each[:, 4].max().item()
        metrics["sampling/k3"] = k3 / tokens
    return metrics


class SamplerGaps:
    """The same from the training forwards, where no forward before them gives log-probs of the policy that sampled."""

    def __init__(self, gather: Callable[[Tensor], Tensor]) -> None:
        self._gather = gather
        self._parts: list[tuple[Tensor, Tensor]] = []

    def add(self, logprobs_C: Tensor, sampling_logprobs_C: Tensor | None, *, last: bool) -> dict[str, float]:
        """Takes in a micro-batch; after the ``last`` of a generation batch, the figures of all of it."""
        if sampling_logprobs_C is None:
            return {}
        self._parts.append((logprobs_C.detach(), sampling_logprobs_C))
        if not last:
            return {}
        ours, theirs = (torch.cat(parts) for parts in zip(*self._parts, strict=True))
        self._parts = []
        return sampler_metrics(ours, theirs, self._gather)


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
