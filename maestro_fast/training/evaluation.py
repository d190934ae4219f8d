"""Rewards, and utility where there is an anchor, on held-out prompts during training.

Nothing that training draws or counts is touched.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from maestro_fast.training.data import PromptDataset, Row
from maestro_fast.training.pipeline import Pipeline, Sampled
from maestro_fast.training.rewarding import reward_batch


@torch.no_grad()
def evaluate_rewards(
    pipeline: Pipeline, model: nn.Module, dataset: PromptDataset, samples: int, *, prefix: str, progress: bool
) -> dict[str, float]:
    """Means over ``samples`` responses to each prompt of ``dataset``, sampled as in training.

    The random draws are the same at every call with as many processes, so that two evaluations differ by the policy.
    The names are the same at every call too, see ``evaluation_names``: NaN where a reward abstained from everything.

    Args:
        prefix: of every name: "eval" gives eval_rewards/<name>/mean, eval_rewards/<name>/abstained,
            eval_completions/mean_length, eval_completions/clipped_ratio and, where the data name families,
            eval_families/<family>/rewards/<name>; with an anchor eval_utility, the mean over the responses whose
            utility is known, eval_utility_count, how many these are, and eval_families/<family>/utility. The
            ``labels`` of the anchor thin out what is trained from: held-out prompts are all labelled.
        progress: show a bar.
    """
    chunks = _chunks(dataset, pipeline)
    rewards, utilities, lengths, truncated = [], [], [], []
    for i, rows in enumerate(tqdm(chunks, desc="Evaluation", leave=False, disable=not progress)):
        prompts = dataset.prompts(rows, pipeline.tokenizer).repeat(samples)
        # training counts its batches from 0: the draws are of negative ones
        sampled = Sampled(pipeline.generate(model, prompts, -1 - i), -1 - i, 0)
        reads = pipeline.rewards.needs_entropy
        outputs = pipeline.forward(model, sampled.sequences, entropy=True) if reads else None
        batch = reward_batch(pipeline, model, sampled.rollouts, outputs, sampled.number)
        rewards.append(pipeline.rewards(batch).view(len(rows), samples, -1))
        if pipeline.anchor is not None:
            utilities.append(pipeline.anchor(batch).view(len(rows), samples))
        lengths.append(sampled.rollouts.completion_lengths_B.view(len(rows), samples).float())
        truncated.append(sampled.rollouts.truncated_B.view(len(rows), samples).float())
    count = len(dataset)
    rewards_NSK, lengths_NS, truncated_NS = (
        pipeline.gather_rows(torch.cat(parts), count) for parts in (rewards, lengths, truncated)
    )
    metrics = {
        "completions/mean_length": lengths_NS.mean().item(),
        "completions/clipped_ratio": truncated_NS.mean().item(),
    } | _reward_metrics(rewards_NSK, pipeline.rewards.names, dataset.families)
    if utilities:
        metrics |= _utility_metrics(pipeline.gather_rows(torch.cat(utilities), count), dataset.families)
    return {f"{prefix}_{name}": value for name, value in metrics.items()}


def _chunks(dataset: PromptDataset, pipeline: Pipeline) -> list[list[Row]]:
    """This process's rows, every n-th, in as many pieces as on any other process: the last rows may stand twice."""
    rank, processes = pipeline.accelerator.process_index, pipeline.accelerator.num_processes
    share = -(-len(dataset) // processes)
    own = [dataset[min(i * processes + rank, len(dataset) - 1)] for i in range(share)]
    size = pipeline.plan.prompts
    return [own[i : i + size] for i in range(0, share, size)]


def _reward_metrics(rewards_NSK: Tensor, names: tuple[str, ...], families: list[str]) -> dict[str, float]:
    metrics: dict[str, float] = {}
    for k, name in enumerate(names):
        column = rewards_NSK[..., k]
        metrics[f"rewards/{name}/abstained"] = column.isnan().float().mean().item()
        metrics[f"rewards/{name}/mean"] = column.nanmean().item()
        for family in sorted(set(families) - {""}):
            rows = [i for i, own in enumerate(families) if own == family]
            metrics[f"families/{family}/rewards/{name}"] = column[rows].nanmean().item()
    return metrics


def _utility_metrics(utilities_NS: Tensor, families: list[str]) -> dict[str, float]:
    known = utilities_NS.isfinite()
    metrics = {"utility": utilities_NS.nanmean().item(), "utility_count": float(known.sum())}
    for family in sorted(set(families) - {""}):
        rows = [i for i, own in enumerate(families) if own == family]
        metrics[f"families/{family}/utility"] = utilities_NS[rows].nanmean().item()
    return metrics


def evaluation_names(reward_names: tuple[str, ...], dataset: PromptDataset, anchored: bool = False) -> list[str]:
    """Names of what ``evaluate_rewards`` returns, without the prefix; ``anchored``: there is an anchor."""
    families = sorted(set(dataset.families) - {""})
    names = ["completions/mean_length", "completions/clipped_ratio"]
    for name in reward_names:
        names += [f"rewards/{name}/abstained", f"rewards/{name}/mean"]
        names += [f"families/{family}/rewards/{name}" for family in families]
    if anchored:
        names += ["utility", "utility_count", *(f"families/{family}/utility" for family in families)]
    return names


def check_best_metric(
    metric: str | None, reward_names: tuple[str, ...], dataset: PromptDataset | None, anchored: bool = False
) -> None:
    """
    Raises:
        ValueError: the ``metric`` that is to tell the best checkpoint is none of an evaluation on ``dataset``.
    """
    if metric is None or dataset is None:
        return
    names = evaluation_names(reward_names, dataset, anchored)
    if metric.removeprefix("eval_") not in names:
        raise ValueError(f"trainer.metric_for_best_model: {metric!r}, expected one of {', '.join(names)}")
