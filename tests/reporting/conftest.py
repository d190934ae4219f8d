"""Makes run directories as a trainer leaves them, with invented numbers for 4 task families and 5 rewards."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from maestro_fast.records import StepRecord
from maestro_fast.reporting.json_lines import JsonLines
from maestro_fast.reporting.run_log import RolloutsLog, TimingsLog

FAMILIES = ("reasoning", "story", "translation", "emotion")
REWARDS = ("perplexity", "format", "entropy", "length", "preference")
CONFIG = "model: tiny\ntraining:\n  max_completion_length: 256\nweighting:\n  name: conductor\n"


@pytest.fixture
def make_record() -> Callable[[int], StepRecord]:
    return lambda step: record(step, FAMILIES, REWARDS, "an answer")


@pytest.fixture(scope="session")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 60 steps, which no test may change."""
    return synthetic_run(tmp_path_factory.mktemp("session") / "run", 60)


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    def make(name: str = "run", steps: int = 60, **options: Any) -> Path:
        return synthetic_run(tmp_path / name, steps, **options)

    return make


def synthetic_run(
    run_dir: Path,
    steps: int,
    *,
    families: tuple[str, ...] = FAMILIES,
    rewards: tuple[str, ...] = REWARDS,
    rollouts: bool = True,
    drift: float = 1.0,
    completion: str = "<think>step by step</think> 42",
) -> Path:
    rng = np.random.default_rng(0)
    run_dir.mkdir(parents=True)
    (run_dir / "config.yaml").write_text(CONFIG)
    preferred = rng.normal(size=(len(families), len(rewards)))
    metrics = JsonLines(run_dir / "metrics.jsonl")
    metrics.append(*(metrics_row(s, steps, preferred * drift, families, rewards, rng) for s in range(1, steps + 1)))
    timings, responses = TimingsLog(run_dir), RolloutsLog(run_dir)
    for step in range(steps):
        timings(timings_row(step, rng))
        if rollouts and (step < 3 or step >= steps - 3):
            responses(record(step, families, rewards, completion))
    return run_dir


def metrics_row(
    step: int,
    steps: int,
    preferred: np.ndarray,
    families: tuple[str, ...],
    rewards: tuple[str, ...],
    rng: np.random.Generator,
) -> dict[str, Any]:
    done = step / steps
    logits = done * preferred + 0.15 * rng.normal(size=preferred.shape)
    weights = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    noise = 0.05 * rng.normal(size=preferred.shape)
    scales = 10.0 ** (np.arange(len(rewards)) % 3 - 1)
    means = scales * (0.3 + 0.4 * (1 - np.exp(-3 * done)) + 0.1 * preferred + noise)
    lengths = 180 * np.exp(-0.8 * done) + 20 * rng.normal(size=len(families)) + 15 * np.arange(len(families))
    row: dict[str, Any] = {"step": step, "loss": 0.1 * rng.normal()}
    row |= {"grad_norm": 0.4 + 0.1 * rng.random(), "learning_rate": 1e-5 * (1 - done), "epoch": done}
    row |= {
        "reward": means.mean(),
        "reward_std": 0.3 * means.std(),
        "score_std": 0.5,
        "entropy": 2.2 - done,
        "kl": 0.02 * done,
    }
    for k, name in enumerate(rewards):
        row[f"rewards/{name}/mean"], row[f"rewards/{name}/std"] = means[:, k].mean(), 0.25 * scales[k]
        row[f"rewards/{name}/abstained"] = 0.12 if k == 0 else 0.0
        row[f"weights/{name}"] = weights[:, k].mean()
        if step % 10 == 0:
            row[f"eval_rewards/{name}/mean"] = means[:, k].mean() - 0.1 * scales[k] * done
        for f, family in enumerate(families):
            absent = rng.random() < 0.1  # Then this step had no prompt of the family.
            row[f"families/{family}/weights/{name}"] = None if absent else weights[f, k]
            row[f"families/{family}/rewards/{name}"] = None if absent else means[f, k]
    row |= {f"families/{f}/completion_length": n for f, n in zip(families, lengths, strict=True)}
    row |= {"completions/mean_length": lengths.mean(), "completions/clipped_ratio": 0.2 * np.exp(-4 * done)}
    row |= {"advantages/std": 0.9 + 0.05 * rng.random(), "advantages/abs_mean": 0.7 + 0.05 * rng.random()}
    row |= {"frac_reward_zero_std": 0.1 * rng.random(), "clip_ratio/low_mean": 0.01 * rng.random()}
    row |= {"clip_ratio/high_mean": 0.02 * rng.random(), "conductor/objective": 0.2 * rng.normal()}
    row |= {"conductor/entropy": np.log(len(rewards)) - 0.3 * done, "conductor/grad_norm": rng.random()}
    row |= {f"advantage_share/{name}": weights[:, k].mean() for k, name in enumerate(rewards)}
    row |= {"diagnostics/self_flattery": 0.09 * done, "diagnostics/entropy": 1 - 0.2 * done}
    row |= {"diagnostics/family_spread": 0.3 * done, "diagnostics/family_spread_shuffled": 0.1 * done}
    return row | {"conductor/self_flattery": 0.09 * done + 0.01 * rng.normal()}


def timings_row(step: int, rng: np.random.Generator) -> dict[str, float]:
    noise = 1 + 0.1 * rng.normal()
    row = {"step": step, "generate": 1.6 * noise, "score": 0.3, "rewards": 0.1, "weights": 0.002}
    row |= {"advantages": 0.0004, "train": 0.9 * noise, "weight_sync": 0.05}
    if step == 0:
        row["generate"] += 25.0  # The first step compiles.
    if step % 5 == 0:
        row["conductor_update"] = 0.01
    tokens = {"tokens/computed": 1500.0, "tokens/of_sequences": 6000.0}
    return row | {"total": sum(v for k, v in row.items() if k != "step") + 0.15} | tokens


def record(
    step: int, families: tuple[str, ...], rewards: tuple[str, ...], completion: str, group: int = 2
) -> StepRecord:
    names = [family for family in families for _ in range(2 * group)]
    prompts = [f"A {family} task, number {(n // group) % 2}" for n, family in enumerate(names)]
    generator = torch.Generator().manual_seed(step)
    values = torch.rand(len(names), len(rewards), generator=generator)
    values[0, 0] = torch.nan  # This reward abstains.
    weights = torch.full_like(values, 1 / len(rewards))
    advantages = torch.randn(len(names), generator=generator)
    return StepRecord(
        step=step,
        reward_names=rewards,
        families=names,
        prompts=[[{"role": "user", "content": prompt}] for prompt in prompts],
        completions=[f"{completion} (step {step}, response {n})" for n in range(len(names))],
        rewards_BK=values,
        weights_BK=weights,
        expected_weights_BK=weights,
        advantages_B=advantages,
        scores_B=advantages,
        degenerate_B=torch.zeros(len(names), dtype=torch.bool),
        lengths_B=torch.arange(len(names)) + 10,
        truncated_B=torch.arange(len(names)) % 3 == 0,
    )
