"""A generation batch divides without losing or doubling a token."""

from __future__ import annotations

import pytest
import torch

from maestro_fast.model.forward import Sequences
from maestro_fast.ops import PolicyLossConfig, policy_loss
from maestro_fast.records import cumulative
from maestro_fast.training.batches import BatchConfig, BatchPlan, TokenLogprobs, split_micro_batches

LENGTHS = [3, 1, 4, 2, 5, 2, 1, 6]


def test_plan_divides() -> None:
    plan = BatchPlan.of(BatchConfig(prompts_per_batch=8, micro_batch=4, updates_per_batch=2), group_size=4, processes=2)

    assert (plan.prompts, plan.responses, plan.accumulation, plan.micro_steps) == (4, 16, 2, 4)


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        (BatchConfig(prompts_per_batch=3), "prompts_per_batch: 3, expected a multiple of the 2 processes"),
        (BatchConfig(prompts_per_batch=4, micro_batch=3), "micro_batch: 3 responses .* do not divide the 8 responses"),
        (BatchConfig(4, 8, updates_per_batch=2), "micro_batch: 8 responses times updates_per_batch 2"),
    ],
)
def test_numbers_that_do_not_divide_are_named(config: BatchConfig, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        BatchPlan.of(config, group_size=4, processes=2)


@pytest.mark.parametrize("name", ["prompts_per_batch", "micro_batch", "updates_per_batch"])
def test_sizes_are_positive(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: 0, expected at least 1"):
        BatchConfig(**{name: 0})


@pytest.mark.parametrize("normalization", ["dapo", "grpo", "dr_grpo"])
@pytest.mark.parametrize("order", [list(range(8)), [5, 0, 7, 2, 1, 6, 3, 4]])
def test_micro_batches_add_up_to_the_whole(normalization: str, order: list[int]) -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = sum(LENGTHS)
    logprobs = -torch.rand(tokens, generator=generator, dtype=torch.float64)
    old = logprobs + 0.3 * torch.randn(tokens, generator=generator, dtype=torch.float64)
    advantages = torch.randn(8, generator=generator, dtype=torch.float64)
    config = PolicyLossConfig(normalization, max_completion_length=6)  # type: ignore[arg-type]
    sequences = Sequences([[1]] * 8, [list(range(n)) for n in LENGTHS])
    plan = BatchPlan(prompts=2, responses=8, accumulation=4, updates=1)

    compared = TokenLogprobs(old, logprobs)
    parts = split_micro_batches(
        plan, sequences, advantages, compared, [float(tokens)], config, order, torch.device("cpu")
    )
    total = sum(
        # the reference log-probs stand in for the current ones: they are cut the same way
        policy_loss(
            part.logprobs.ref_C,
            part.advantages_B,
            part.cu_seqlens,
            old_logprobs=part.logprobs.old_C,
            normalizer=part.normalizer,
            config=config,
        ).loss
        for part in parts
    )
    whole = policy_loss(
        logprobs,
        advantages,
        cumulative(torch.tensor(LENGTHS)),
        old_logprobs=old,
        normalizer=float(tokens) if normalization == "dapo" else None,
        config=config,
    ).loss

    assert len(parts) == 4
    torch.testing.assert_close(total, whole, rtol=1e-12, atol=1e-12)


def test_bnpo_averages_the_means_of_the_micro_batches() -> None:
    sequences = Sequences([[1]] * 4, [[1] * n for n in (1, 3, 5, 7)])
    plan = BatchPlan(prompts=1, responses=4, accumulation=2, updates=1)
    parts = split_micro_batches(
        plan,
        sequences,
        torch.ones(4),
        TokenLogprobs(),
        [16.0],
        PolicyLossConfig("bnpo"),
        [0, 1, 2, 3],
        torch.device("cpu"),
    )

    assert [part.normalizer for part in parts] == [2 * 4.0, 2 * 12.0]
    assert [part.entropy_normalizer for part in parts] == [16.0, 16.0]
