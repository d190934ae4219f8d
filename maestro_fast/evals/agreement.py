"""Do the rewards of a run conflict? How each one agrees with the utility, family by family, before any training.

    python -m maestro_fast.evals.agreement CONFIG.yaml --prompts 24 --samples 8 --data.path validation.jsonl

The policy answers some prompts, and the rewards and the utility (the ``anchor`` of the config) judge the answers. What
GRPO learns from is the differences within a group, so the correlations are those of the deviations from the group's
mean. A reward whose sign is not the same in all families has no static weight that suits them all.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from maestro_fast.config_file import read_config
from maestro_fast.data.load import load_prompts
from maestro_fast.model import load_policy
from maestro_fast.records import RewardBatch
from maestro_fast.reporting.tables import Table, format_table
from maestro_fast.rewards import build_anchor, build_rewards
from maestro_fast.settings import SettingsError
from maestro_fast.training import TrainConfig, parse_config
from maestro_fast.training.prompt_weights import sample_responses


def judge(config: TrainConfig, count: int, samples: int, seed: int = 0) -> tuple[list[str], Tensor, Tensor, Tensor]:
    """Samples G = ``samples`` responses to each of the first N = ``count`` prompts, and has them judged.

    Returns:
        The N task families; the rewards, float32 [N, G, K]; the utilities, float32 [N, G]; and the lengths of the
        responses in tokens, float32 [N, G].

    Raises:
        SettingsError: there is no anchor, or a reward reads the policy.
        ValueError: a reward or the anchor abstains.
    """
    rewards = build_rewards(config.rewards)
    if config.anchor is None:
        raise SettingsError("anchor: missing, expected the utility with which rewards are compared")
    if any(reward.needs_entropy or reward.needs_policy for reward in rewards.rewards):
        raise SettingsError("rewards: one reads the policy, expected rewards that read completions and columns")
    anchor = build_anchor(config.anchor)
    dataset = load_prompts(config.data, config.chat)
    dataset.keep(range(min(count, len(dataset))))
    model, tokenizer = load_policy(config.model)
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    for part in sample_responses(model.eval(), tokenizer, dataset, config.sampling, samples, seed):
        batch = RewardBatch.of(part, -1)  # as in evaluations, where every prompt is labelled
        found.append((rewards(batch), anchor(batch), part.completion_lengths_B.float()))
    rewards_BK, utilities_B, lengths_B = (torch.cat(parts) for parts in zip(*found, strict=True))
    if rewards_BK.isnan().any() or utilities_B.isnan().any():
        raise ValueError("rewards: one abstains, or the anchor does, expected a value for every response")
    shape = (-1, samples)
    return dataset.families, rewards_BK.view(*shape, len(rewards)), utilities_B.view(shape), lengths_B.view(shape)


def correlation(x_NG: Tensor, y_NG: Tensor) -> float:
    """Pearson's correlation of the deviations from the means of the groups; NaN if either has none."""
    x, y = ((v - v.mean(1, keepdim=True)).double().flatten() for v in (x_NG, y_NG))
    scale = math.sqrt(float(x @ x) * float(y @ y))
    return float(x @ y) / scale if scale > 1e-9 else math.nan


def differ(values_NG: Tensor) -> float:
    """The share of groups within which the values are not all the same."""
    return float((values_NG.amax(1) - values_NG.amin(1) > 1e-6).float().mean())


def agreement_table(
    names: Sequence[str], families: Sequence[str], rewards_NGK: Tensor, utilities_NG: Tensor, lengths_NG: Tensor
) -> Table:
    """A row for each family, and one for all of them; ``names`` are the K rewards', and the rest is from ``judge``."""
    rows = []
    for family in [*dict.fromkeys(families), "all"]:
        members = [i for i, own in enumerate(families) if family in (own, "all")]
        utilities, rewards, lengths = utilities_NG[members], rewards_NGK[members], lengths_NG[members]
        of_rewards = [correlation(rewards[:, :, k], utilities) for k in range(len(names))]
        rows.append(
            (
                family,
                f"{utilities.mean():.3f}",
                f"{utilities.amax(1).mean():.3f}",
                f"{differ(utilities):.2f}",
                f"{differ(rewards.mean(2)):.2f}",
                f"{lengths.mean():.0f}",
                *("-" if math.isnan(value) else f"{value:+.2f}" for value in of_rewards),
            )
        )
    groups, samples = utilities_NG.shape
    caption = (
        f"{groups} prompts, {samples} responses each. Utility: its mean, the mean of the best response of each group, "
        "and the share of groups in which it differs, as equal weights of the rewards do. Then the correlation of each "
        "reward with the utility, within groups"
    )
    header = ("family", "utility", "best", "differs", "equal differs", "tokens", *names)
    return Table(caption, header, tuple(rows))


def main(words: Sequence[str] | None = None) -> None:
    """Prints the table of a config."""
    parser = argparse.ArgumentParser(description="How rewards agree with the utility, family by family.")
    parser.add_argument("config", type=Path)
    parser.add_argument("--prompts", type=int, default=24, help="how many of the first prompts are answered")
    parser.add_argument("--samples", type=int, default=8, help="responses to each prompt")
    given, overrides = parser.parse_known_args(words)
    config = parse_config(read_config(given.config, overrides))
    names = build_rewards(config.rewards).names
    print(format_table(agreement_table(names, *judge(config, given.prompts, given.samples)), width=120))


if __name__ == "__main__":
    main()
