"""Holds prompts out from training, measures policies' utility on them, and says what the difference shows."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from maestro_fast.evals.statistics import paired_difference
from maestro_fast.model import ModelConfig, load_policy
from maestro_fast.records import RewardBatch
from maestro_fast.reporting import Table
from maestro_fast.rewards import build_anchor
from maestro_fast.training import PromptDataset, parse_config
from maestro_fast.training.prompt_weights import sample_responses

SAMPLES, SEED = 6, 1  # the number of responses to each prompt, and the seed with which they are sampled


def split(prompts: Path, folder: Path, limit: int | None) -> None:
    """Writes train.jsonl and held_out.jsonl. Every seventh block of four prompts, one of each family, is held out.

    With ``limit``, only this many prompts are kept for training, and a seventh of this number is held out.
    """
    lines = prompts.read_text(encoding="utf-8").splitlines()
    held_out = [line for i, line in enumerate(lines) if i // 4 % 7 == 6]
    train = [line for i, line in enumerate(lines) if i // 4 % 7 != 6]
    for name, rows, count in (("train", train, limit), ("held_out", held_out, None if limit is None else limit // 7)):
        (folder / f"{name}.jsonl").write_text("\n".join(rows[:count]) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class Utilities:
    """The utility of a policy on N prompts.

    Attributes:
        families: The N task families of the prompts.
        mean_N: The mean utility of the responses to each prompt.
    """

    families: list[str]
    mean_N: Tensor

    def by_family(self) -> dict[str, float]:
        """The mean over the prompts of each family, in alphabetical order."""
        members = {family: [i for i, own in enumerate(self.families) if own == family] for family in self.families}
        return {family: self.mean_N[members[family]].mean().item() for family in sorted(members)}


def utilities(raw: dict[str, Any], model: Path, dataset: PromptDataset) -> Utilities:
    """Measures the utility of the policy in the folder ``model``.

    ``SAMPLES`` responses to each prompt are sampled as the config ``raw`` says, and its anchor gives their utility.
    """
    config = parse_config(raw)
    network, tokenizer = load_policy(ModelConfig(str(model)))
    anchor = build_anchor(config.anchor)
    found = []
    for part in sample_responses(network.eval(), tokenizer, dataset, config.sampling, SAMPLES, SEED):
        found.append(anchor(RewardBatch.of(part, -1)).view(-1, SAMPLES).mean(1))
    return Utilities(dataset.families, torch.cat(found))


def utility_table(found: dict[str, Utilities]) -> Table:
    """A table with a row for each policy: its mean over the prompts with a 95 % interval, and the mean of each family.

    All policies must have been measured on the same prompts.
    """
    rows = []
    for label, one in found.items():
        interval = paired_difference(one.mean_N, torch.zeros_like(one.mean_N))
        means = [f"{mean:.2f}" for mean in one.by_family().values()]
        rows.append((label, f"{interval.mean:.3f} ± {interval.half_width:.3f}", *means))
    first = next(iter(found.values()))
    count, known = len(first.mean_N), first.by_family()
    caption = (
        f"Utility on {count} held-out prompts, mean of {SAMPLES} responses each; ±: 95 % interval over the prompts"
    )
    return Table(caption, ("policy", "all", *known), tuple(rows))


def verdict(found: dict[str, Utilities], label: str, start: str) -> list[str]:
    """Sentences on what the runs show about the one called ``label``. They claim no more than the intervals do.

    Args:
        found: the utilities of all policies on the same prompts, by label.
        label: the policy that is compared with all others.
        start: the policy that all others were trained from.
    """
    own = found[label]
    rise = paired_difference(own.mean_N, found[start].mean_N)
    words = "it rose" if rise.low > 0 else "it FELL" if rise.high < 0 else "it did NOT clearly change"
    sentences = [
        f"Utility of the {label} policy on held-out prompts: {rise.mean:+.3f} ± {rise.half_width:.3f} from the {start} "
        f"(95 %, prompt by prompt), so {words}."
    ]
    for other, theirs in found.items():
        if other in (label, start):
            continue
        gap = paired_difference(own.mean_N, theirs.mean_N)
        if gap.low > 0:
            words = "so here the anchored weights helped"
        elif gap.high < 0:
            words = "so here the anchored weights did HARM"
        else:
            words = "so these two runs do NOT show that the anchored weights help"
        gaps = Utilities(theirs.families, own.mean_N - theirs.mean_N).by_family()
        worse = [f"{family} ({mean:+.2f})" for family, mean in gaps.items() if mean < 0]
        sentences.append(
            f"{label.capitalize()} minus {other}: {gap.mean:+.3f} ± {gap.half_width:.3f}, {words}"
            + (f"; it is lower in {', '.join(worse)}." if worse else ".")
        )
    sentences.append("It is one run of each: another seed may say otherwise.")
    return sentences


def save(found: dict[str, Utilities], path: Path) -> None:
    """Writes the utility of each policy on each prompt as JSON."""
    values = {label: {"families": one.families, "utility": one.mean_N.tolist()} for label, one in found.items()}
    path.write_text(json.dumps(values) + "\n", encoding="utf-8")
