"""The figures of a generation batch for the log, with TRL's names where TRL has them, and the seconds of each stage."""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from maestro_fast.ops.group_advantages import GroupAdvantages
from maestro_fast.records import PolicyOutputs, Rollouts, StepRecord
from maestro_fast.weighting.families import family_metrics, spread_between_families

LOSS_METRICS = {  # the name in the log for each metric of ``ops.policy_loss``
    "clip_low": "clip_ratio/low_mean",
    "clip_high": "clip_ratio/high_mean",
    "ratio": "ratio/mean",
    "kl": "kl",
    "sampler_ratio": "sampling/importance_sampling_ratio/mean",
}


def batch_metrics(record: StepRecord, advantages: GroupAdvantages) -> dict[str, float]:
    """The figures of a generation batch over all processes, most of them means over its responses.

    ``reward`` and ``reward_std`` are those of ``reward_figures``. ``score_std`` is the mean over the responses of the
    standard deviation by which their scores are compared; a score is the weighted sum of normalised rewards.
    """
    lengths = record.lengths_B.float()
    metrics = reward_figures(record.rewards_BK, record.weights_BK) | {
        "score_std": advantages.std.mean().item(),
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


def reward_figures(rewards_BK: Tensor, weights_BK: Tensor) -> dict[str, float]:
    """The weighted sum of the raw rewards of a response, as TRL's GRPOTrainer logs it.

    A response has sum_k w_k r_k over the rewards that did not abstain; one from which all abstained is left out. Here
    the weights of a policy add up to 1, where TRL's are 1 each by default.

    Args:
        rewards_BK, weights_BK: float32 [B, K]; a NaN is an abstention.

    Returns:
        ``reward``, the mean over the responses, and ``reward_std``, their standard deviation with Bessel's correction.
        Both are left out if no response has a reward, and the second also if only one has.
    """
    live_B = ~rewards_BK.isnan().all(1)
    reward = (rewards_BK * weights_BK).double().nansum(1)[live_B]
    figures = {"reward": reward.mean().item()} if reward.numel() else {}
    return figures | ({"reward_std": reward.std().item()} if reward.numel() > 1 else {})


def _family_spread(record: StepRecord) -> dict[str, float]:
    """How far the families' mean expected weights lie apart, and how far they do on average after eight shuffles.

    Only the first response of each group counts.
    """
    firsts = [i for i, text in enumerate(record.prompts) if i == 0 or text != record.prompts[i - 1]]
    families = [record.families[i] for i in firsts]
    found = spread_between_families(record.expected_weights_BK[firsts], families, shuffles=8, seed=record.step)
    if found is None:
        return {}
    spread, chance = found
    return {"diagnostics/family_spread": spread, "diagnostics/family_spread_shuffled": chance.mean().item()}


def policy_metrics(
    rollouts: Rollouts,
    outputs: PolicyOutputs | None,
    gather: Callable[[Tensor], Tensor],
    ref_logprobs_C: Tensor | None = None,
) -> dict[str, float]:
    """The mean entropy of the policy, and ``sampler_metrics``; nothing if no forward has scored the responses.

    With the reference's log-probs, float32 [C], there is also ``kl``, the mean of ``divergence`` over all tokens.
    """
    if outputs is None:
        return {}
    metrics = sampler_metrics(outputs.logprobs_C, rollouts.sampling_logprobs_C, gather, outputs.entropies_C)
    if ref_logprobs_C is not None:
        sums = divergence(outputs.logprobs_C, ref_logprobs_C)
        tokens, kl = gather(sums[None].to(outputs.logprobs_C.device)).cpu().sum(0).tolist()
        metrics |= {"kl": kl / tokens} if tokens else {}
    return metrics


def divergence(logprobs_C: Tensor, ref_logprobs_C: Tensor) -> Tensor:
    """The number of tokens, and the sum over them of k3, an estimate of KL(policy || reference) in nats, float64 [2].

    k3 is r - 1 - log r with r = reference / policy (J. Schulman, "Approximating KL divergence", 2020). The loss and
    TRL log its mean over the tokens as ``kl``.
    """
    gap_C = (ref_logprobs_C - logprobs_C).detach().double()
    return torch.stack([gap_C.new_tensor(gap_C.numel()), (gap_C.expm1() - gap_C).sum()])


def sampler_metrics(
    logprobs_C: Tensor,
    sampling_logprobs_C: Tensor | None,
    gather: Callable[[Tensor], Tensor],
    entropies_C: Tensor | None = None,
) -> dict[str, float]:
    """How far the policy's log-probs lie from the sampler's, over the tokens of all processes, in nats.

    These are the mean and the largest absolute difference, and k3: the mean of r - 1 - log r with r = policy / sampler,
    an estimate of KL(sampler || policy) (J. Schulman, "Approximating KL divergence", 2020). With entropies, their mean
    is among the figures. If no process has a token, there are none.

    Args:
        logprobs_C, sampling_logprobs_C, entropies_C: float32 [C]; a None adds no figures.
        gather: concatenates a tensor over all processes.
    """
    # The columns are the count of tokens, the sums of entropy, gap and k3, and the widest gap.
    sums = torch.zeros(1, 5, dtype=torch.float64)
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
    """Gives ``sampler_metrics`` from the training forwards, in runs where no earlier forward scores the responses."""

    def __init__(self, gather: Callable[[Tensor], Tensor]) -> None:
        self._gather = gather
        self._parts: list[tuple[Tensor, Tensor]] = []

    def add(self, logprobs_C: Tensor, sampling_logprobs_C: Tensor | None, *, last: bool) -> dict[str, float]:
        """Takes in a micro-batch. After the ``last`` one of a generation batch, it returns the figures of the batch."""
        if sampling_logprobs_C is None:
            return {}
        self._parts.append((logprobs_C.detach(), sampling_logprobs_C))
        if not last:
            return {}
        ours, theirs = (torch.cat(parts) for parts in zip(*self._parts, strict=True))
        self._parts = []
        return sampler_metrics(ours, theirs, self._gather)


class MetricMeans:
    """Means of the figures that were added between two log lines, weighted where a figure came with a weight."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._counts: dict[str, int] = {}

    def add(self, metrics: dict[str, float], weight: int = 1) -> None:
        """Adds figures; ``weight`` is over how many tokens they are means. With the weight 0 they say nothing."""
        for name, value in metrics.items() if weight else ():
            self._sums[name] = self._sums.get(name, 0.0) + value * weight
            self._counts[name] = self._counts.get(name, 0) + weight

    def state(self) -> dict[str, tuple[float, int]]:
        """Sum and count by name, for a checkpoint."""
        return {name: (total, self._counts[name]) for name, total in self._sums.items()}

    @staticmethod
    def of(state: Mapping[str, Sequence[Any]]) -> MetricMeans:
        """Makes the means that had this ``state``."""
        means = MetricMeans()
        means._sums = {name: float(total) for name, (total, _) in state.items()}
        means._counts = {name: int(count) for name, (_, count) in state.items()}
        return means

    def join(self, others: Sequence[Mapping[str, Sequence[Any]]]) -> None:
        """Adds the sums and counts of other processes, which are ``state()`` of their own means."""
        for state in others:
            for name, (total, count) in state.items():
                self._sums[name] = self._sums.get(name, 0.0) + float(total)
                self._counts[name] = self._counts.get(name, 0) + int(count)

    def pop(self) -> dict[str, float]:
        """Returns the means and forgets them."""
        means = {name: total / self._counts[name] for name, total in self._sums.items()}
        self._sums.clear()
        self._counts.clear()
        return means


class StageClock:
    """Adds up the seconds of each stage, and tells a listener which stage begins.

    A stage inside another takes its time out of the outer one's, so that no second counts twice. On a CUDA device the
    clock waits for the device where a stage begins or ends, because the time would otherwise go to whatever stage waits
    next.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seconds: dict[str, float] = defaultdict(float)
        self._running: list[str] = []
        self._began = self._last = time.perf_counter()
        self.on_stage: Callable[[str], None] = lambda stage: None

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        self._switch()
        self._running.append(name)
        self.on_stage(name)
        try:
            yield
        finally:
            self._switch()
            self._running.pop()
            if self._running:
                self.on_stage(self._running[-1])

    def _switch(self) -> None:
        """Gives the time since the last switch to the stage that ran."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now = time.perf_counter()
        if self._running:
            self._seconds[self._running[-1]] += now - self._last
        self._last = now

    def lap(self) -> dict[str, float]:
        """Returns the seconds by stage since the last lap, and the ``total`` by the wall clock; starts the next lap."""
        now = time.perf_counter()
        seconds = {**self._seconds, "total": now - self._began}
        self._seconds.clear()
        self._began = now
        return seconds
