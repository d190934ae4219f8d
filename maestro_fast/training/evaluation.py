"""Computes rewards, and utility where there is an anchor, on held-out prompts during training.

An evaluation changes nothing that training draws or counts.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import TrainingArguments
from transformers.trainer_utils import SaveStrategy, SchedulerType

from maestro_fast.data.dataset import PromptDataset, Row
from maestro_fast.data.order import shuffled
from maestro_fast.model.rows import Sequences
from maestro_fast.settings import near
from maestro_fast.training.batches import Processes
from maestro_fast.training.metrics import MetricMeans
from maestro_fast.training.parts import Judges, Sampler
from maestro_fast.watching.best_checkpoint import SETTING, BestCheckpoint, is_of_evaluation
from maestro_fast.watching.log_lines import check_metric


@torch.no_grad()
def evaluate_rewards(
    sampler: Sampler,
    judges: Judges,
    model: nn.Module,
    dataset: PromptDataset,
    samples: int,
    *,
    prompts_at_once: int,
    prefix: str,
    progress: bool,
) -> dict[str, float]:
    """Means over ``samples`` responses to each prompt of ``dataset``, sampled and judged as in training.

    The random draws are the same at every call with the same number of processes, so two evaluations differ by the
    policy alone.
    The names are the same at every call, too, see ``evaluation_names``: a mean is NaN where a reward abstained from
    everything.

    Args:
        sampler, judges: the sampler and the judges of training.
        model: the policy.
        dataset: the held-out prompts. All of them are labelled: an anchor's ``labels`` thin out training data alone.
        samples: the number of responses to each prompt.
        prompts_at_once: how many prompts of a process are sampled for at a time.
        prefix: the word in front of every name.
        progress: whether to show a progress bar.

    Returns:
        With the prefix "eval": eval_rewards/<name>/mean, eval_rewards/<name>/abstained, eval_completions/mean_length,
        eval_completions/clipped_ratio, and eval_families/<family>/rewards/<name> where the data names families. With an
        anchor there are also eval_utility, the mean over the responses whose utility is known, eval_utility_count, the
        number of these, and eval_families/<family>/utility. What rewards have of figures of their own is
        eval_rewards/<name>/<figure> and eval_anchor/<figure>, as means over the processes.
    """
    processes = judges.processes
    chunks = _chunks(dataset, processes, prompts_at_once)
    rewards, utilities, lengths, truncated = [], [], [], []
    judges.metrics()  # Figures of a training batch that failed are not those of this evaluation.
    for i, rows in enumerate(tqdm(chunks, desc="Evaluation", leave=False, disable=not progress)):
        prompts = dataset.prompts(rows, judges.tokenizer).repeat(samples)
        number = -1 - i  # Training numbers its batches from 0, so it never makes the draws of a negative number.
        rollouts = sampler(model, prompts, number)
        outputs = None
        if judges.rewards.needs_entropy:
            outputs = judges.scorer(model, Sequences(prompts.token_ids, rollouts.completion_ids), entropy=True)
        rewards_BK, utilities_B = judges(model, rollouts, outputs, number)
        rewards.append(rewards_BK.view(len(rows), samples, -1))
        if utilities_B is not None:
            utilities.append(utilities_B.view(len(rows), samples))
        lengths.append(rollouts.completion_lengths_B.view(len(rows), samples).float())
        truncated.append(rollouts.truncated_B.view(len(rows), samples).float())
    count = len(dataset)
    rewards_NSK, lengths_NS, truncated_NS = (
        processes.gather_rows(torch.cat(parts), count) for parts in (rewards, lengths, truncated)
    )
    metrics = {
        "completions/mean_length": lengths_NS.mean().item(),
        "completions/clipped_ratio": truncated_NS.mean().item(),
    } | _reward_metrics(rewards_NSK, judges.rewards.names, dataset.families)
    if utilities:
        metrics |= _utility_metrics(processes.gather_rows(torch.cat(utilities), count), dataset.families)
    own = MetricMeans()
    own.join(processes.gather_objects([{name: (value, 1) for name, value in judges.metrics().items()}]))
    return {f"{prefix}_{name}": value for name, value in (metrics | own.pop()).items()}


def keep_subset(dataset: PromptDataset, prompts: int | None, seed: int) -> None:
    """Leaves ``prompts`` prompts in the held-out data, drawn by the seed; None leaves all.

    Each task family keeps its share of them, rounded by the largest remainders, and at least one.

    Raises:
        ValueError: there are more families than ``prompts``.
    """
    if prompts is None or prompts >= len(dataset):
        return
    families = dataset.families
    rows_of_family = {name: [i for i, own in enumerate(families) if own == name] for name in sorted(set(families))}
    if prompts < len(rows_of_family):
        raise ValueError(
            f"evaluation.prompts: {prompts}, but the held-out prompts are of {len(rows_of_family)} families, expected "
            "at least one prompt of each"
        )
    shares = {name: prompts * len(rows) / len(families) for name, rows in rows_of_family.items()}
    counts = {name: max(1, int(share)) for name, share in shares.items()}
    while (missing := prompts - sum(counts.values())) != 0:
        step = 1 if missing > 0 else -1  # Families that are too small for a share of 1 take theirs from the others.
        name = max((n for n in counts if step > 0 or counts[n] > 1), key=lambda n: step * (shares[n] - counts[n]))
        counts[name] += step
    dataset.keep(
        sorted(
            rows[place]
            for i, (name, rows) in enumerate(rows_of_family.items())
            for place in shuffled(len(rows), seed, i)[: counts[name]]
        )
    )


def _chunks(dataset: PromptDataset, processes: Processes, size: int) -> list[list[Row]]:
    """This process's rows in pieces of ``size``.

    Each process has every n-th row. All have the same number of rows, so the last rows may stand twice.
    """
    share = -(-len(dataset) // processes.count)
    own = [dataset[min(i * processes.count + processes.rank, len(dataset) - 1)] for i in range(share)]
    return [own[i : i + size] for i in range(0, share, size)]


def _reward_metrics(rewards_NSK: Tensor, names: tuple[str, ...], families: list[str]) -> dict[str, float]:
    metrics: dict[str, float] = {}
    rows_of_family = _rows_of_family(families)
    for k, name in enumerate(names):
        column = rewards_NSK[..., k]
        metrics[f"rewards/{name}/abstained"] = column.isnan().float().mean().item()
        metrics[f"rewards/{name}/mean"] = column.nanmean().item()
        for family, rows in rows_of_family.items():
            metrics[f"families/{family}/rewards/{name}"] = column[rows].nanmean().item()
    return metrics


def _utility_metrics(utilities_NS: Tensor, families: list[str]) -> dict[str, float]:
    known = utilities_NS.isfinite()
    metrics = {"utility": utilities_NS.nanmean().item(), "utility_count": float(known.sum())}
    for family, rows in _rows_of_family(families).items():
        metrics[f"families/{family}/utility"] = utilities_NS[rows].nanmean().item()
    return metrics


def _rows_of_family(families: list[str]) -> dict[str, list[int]]:
    """The rows of each task family, by its name; rows of the family "" belong to none and are left out."""
    return {name: [i for i, own in enumerate(families) if own == name] for name in sorted(set(families) - {""})}


def evaluation_names(reward_names: tuple[str, ...], dataset: PromptDataset, anchored: bool = False) -> list[str]:
    """The names of what ``evaluate_rewards`` returns, without the prefix; ``anchored``: there is an anchor."""
    families = list(_rows_of_family(dataset.families))
    names = ["completions/mean_length", "completions/clipped_ratio"]
    for name in reward_names:
        names += [f"rewards/{name}/abstained", f"rewards/{name}/mean"]
        names += [f"families/{family}/rewards/{name}" for family in families]
    if anchored:
        names += ["utility", "utility_count", *(f"families/{family}/utility" for family in families)]
    return names


def check_best_metric(
    args: TrainingArguments, reward_names: tuple[str, ...], dataset: PromptDataset | None, anchored: bool = False
) -> BestCheckpoint | None:
    """Checks the metric by which the best checkpoint is to be chosen.

    Returns:
        What judges the checkpoints where it is a metric of training; None where an evaluation gives it, or nothing is
        chosen.

    Raises:
        ValueError: neither training nor an evaluation on ``dataset`` gives the metric, or checkpoints cannot be judged
            by one of training.
    """
    names = [] if dataset is None else evaluation_names(reward_names, dataset, anchored)
    metric = args.metric_for_best_model
    if metric is None:
        return None
    if is_of_evaluation(metric, names) and dataset is not None:
        if metric.removeprefix("eval_") not in names:
            raise ValueError(f"{SETTING}: {metric!r}, expected one of {', '.join(names)}{near(metric, names)}")
        return None
    check_metric(metric, SETTING, reward_names, evaluates=dataset is not None)
    if metric == "loss":  # transformers takes it where no metric is named.
        raise ValueError(f"{SETTING}: 'loss', which does not tell a good policy from a bad one, expected reward, say")
    plateau = args.lr_scheduler_type in (SchedulerType.REDUCE_ON_PLATEAU, SchedulerType.GREEDY)
    for name, wrong in (("save_strategy", args.save_strategy == SaveStrategy.BEST), ("lr_scheduler_type", plateau)):
        if wrong:
            got = getattr(args, name).value
            raise ValueError(f"trainer.{name}: {got} needs a figure of an evaluation, and {SETTING} is {metric}")
    return BestCheckpoint(metric, greater_is_better=bool(args.greater_is_better))
