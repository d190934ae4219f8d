"""Prompts that are kept from training, the utility of several policies on them, and what the difference shows."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from maestro_fast.evals.statistics import paired_difference
from maestro_fast.records import RewardBatch
from maestro_fast.reporting import Table
from maestro_fast.rewards import build_anchor
from maestro_fast.training import ModelConfig, PromptDataset, parse_config
from maestro_fast.training.prompt_weights import sample_responses
from maestro_fast.training.run import load_policy

SAMPLES, SEED = 8, 1


def split(prompts: Path, folder: Path, limit: int | None) -> None:
    """Writes train.jsonl and held_out.jsonl: of four prompts in a row, one of each family, every seventh is held out.

    ``limit``: so many prompts to train on, and a seventh of it held out.
    """
    lines = prompts.read_text(encoding="utf-8").splitlines()
    held_out = [line for i, line in enumerate(lines) if i // 4 % 7 == 6]
    train = [line for i, line in enumerate(lines) if i // 4 % 7 != 6]
    for name, rows, count in (("train", train, limit), ("held_out", held_out, None if limit is None else limit // 7)):
        (folder / f"{name}.jsonl").write_text("\n".join(rows[:count]) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class Utilities:
    """Mean utility of a policy's responses to each of N prompts, of these families."""

    families: list[str]
    mean_N: Tensor


def utilities(raw: dict[str, Any], model: Path, dataset: PromptDataset) -> Utilities:
    """Of ``SAMPLES`` responses to each prompt, sampled as the config ``raw`` says; its anchor judges them."""
    config = parse_config(raw)
    network, tokenizer = load_policy(ModelConfig(str(model)))
    anchor = build_anchor(config.anchor)
    found = []
    for part in sample_responses(network.eval(), tokenizer, dataset, config.sampling, SAMPLES, SEED):
        prompts = part.prompts
        batch = RewardBatch(prompts.texts, part.completions, part.completion_ids, prompts.columns, step=-1)
        found.append(anchor(batch).view(-1, SAMPLES).mean(1))
    return Utilities(dataset.families, torch.cat(found))


def utility_table(found: dict[str, Utilities]) -> Table:
    """A row per policy: the mean over prompts with its 95 % interval, and the mean of each family."""
    known = sorted({family for one in found.values() for family in one.families})
    rows = []
    for label, one in found.items():
        interval = paired_difference(one.mean_N, torch.zeros_like(one.mean_N))
        means = [one.mean_N[[i for i, own in enumerate(one.families) if own == f]].mean().item() for f in known]
        rows.append((label, f"{interval.mean:.3f} ± {interval.half_width:.3f}", *(f"{mean:.2f}" for mean in means)))
    count = len(next(iter(found.values())).mean_N)
    caption = (
        f"Utility on {count} held-out prompts, mean of {SAMPLES} responses each; ±: 95 % interval over the prompts"
    )
    return Table(caption, ("policy", "all", *known), tuple(rows))


def verdict(anchored: Utilities, equal: Utilities) -> list[str]:
    """What the two runs show of the anchored Conductor, and no more."""
    gap = paired_difference(anchored.mean_N, equal.mean_N)
    if gap.low > 0:
        words = "so here the anchored weights helped"
    elif gap.high < 0:
        words = "so here the anchored weights did HARM"
    else:
        words = "so these two runs do NOT show that the anchored weights help"
    sentences = [
        f"Anchored minus equal weights: {gap.mean:+.3f} ± {gap.half_width:.3f} utility on held-out prompts (95 %, "
        f"prompt by prompt), {words}. It is one run of each: another seed may say otherwise."
    ]
    by_family = {
        family: (anchored.mean_N - equal.mean_N)[[i for i, f in enumerate(equal.families) if f == family]].mean().item()
        for family in sorted(set(equal.families))
    }
    if worse := [f"{family} ({mean:+.2f})" for family, mean in by_family.items() if mean < 0]:
        sentences.append(
            f"It does not help everywhere: utility is lower than with equal weights in {', '.join(worse)}."
        )
    return sentences


def save(found: dict[str, Utilities], path: Path) -> None:
    values = {label: {"families": one.families, "utility": one.mean_N.tolist()} for label, one in found.items()}
    path.write_text(json.dumps(values) + "\n", encoding="utf-8")
