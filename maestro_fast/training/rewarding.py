"""Rewards of one process's responses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from maestro_fast.model.text_scorer import text_scorer
from maestro_fast.records import PolicyOutputs, RewardBatch, Rollouts, Text
from maestro_fast.training.metrics import response_means

if TYPE_CHECKING:
    from maestro_fast.training.pipeline import Pipeline


def own_rewards(
    pipeline: Pipeline, model: nn.Module, rollouts: Rollouts, outputs: PolicyOutputs | None, number: int
) -> tuple[Tensor, Tensor | None]:
    """Rewards [B, K] and known utilities [B], NaN where there is none; utilities are None without an anchor."""
    batch = reward_batch(pipeline, model, rollouts, outputs, number)
    return pipeline.rewards(batch), None if pipeline.anchor is None else pipeline.anchor(batch)[:, 0]


def joined_rewards(parts: Sequence[tuple[Tensor, Tensor | None]]) -> tuple[Tensor, Tensor | None]:
    """What ``own_rewards`` gives for a batch, from what it gave for its parts."""
    utilities = [known for _, known in parts if known is not None]
    return torch.cat([rewards for rewards, _ in parts]), torch.cat(utilities) if utilities else None


def reward_batch(
    pipeline: Pipeline, model: nn.Module, rollouts: Rollouts, outputs: PolicyOutputs | None, number: int
) -> RewardBatch:
    """What the rewards read of these responses."""
    entropies = logprobs = None
    if pipeline.rewards.needs_entropy:
        assert outputs is not None and outputs.entropies_C is not None
        entropies = response_means(outputs.entropies_C, rollouts).cpu()
        logprobs = response_means(outputs.logprobs_C, rollouts).cpu()
    prompts, anchor = rollouts.prompts, pipeline.anchor
    needs_policy = pipeline.rewards.needs_policy or (anchor is not None and anchor.needs_policy)
    return RewardBatch(
        prompts.texts,
        rollouts.completions,
        rollouts.completion_ids,
        prompts.columns,
        entropies,
        policy_text_scorer(pipeline, model) if needs_policy else None,
        pipeline.accelerator.device,
        logprobs,
        number,
    )


def policy_text_scorer(
    pipeline: Pipeline, model: nn.Module
) -> Callable[[Sequence[Text], Sequence[str], Sequence[str]], list[Tensor]]:
    """``RewardBatch.score_texts`` under ``model``, over all processes."""
    forward = partial(pipeline.forward, model, temperature=1.0)
    return text_scorer(pipeline.tokenizer, forward, pipeline.gather, pipeline.accelerator.device)
