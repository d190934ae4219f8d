"""A generation batch divides without losing or doubling a token, into whole groups and whole blocks."""

from __future__ import annotations

import pytest
import torch

from maestro_fast.model.rows import Sequences
from maestro_fast.ops import PolicyLossConfig, policy_loss
from maestro_fast.records import cumulative
from maestro_fast.training.batches import BatchConfig, BatchPlan, GroupSampler, TokenLogprobs, split_micro_batches

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
        plan, sequences, advantages, compared, [float(tokens)], config.normalization, order, torch.device("cpu")
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
        "bnpo",
        [0, 1, 2, 3],
        torch.device("cpu"),
    )

    assert [part.normalizer for part in parts] == [2 * 4.0, 2 * 12.0]
    assert [part.entropy_normalizer for part in parts] == [16.0, 16.0]


def test_blocks_come_in_a_row_and_every_prompt_once() -> None:
    sampler = GroupSampler(size=11, block=4, repeat=3, seed=0)

    indices = list(sampler)
    blocks = [indices[i : i + 4] for i in range(0, len(indices), 4)]

    assert len(indices) == len(sampler) == 24
    assert blocks[0] == blocks[1] == blocks[2]
    assert blocks[3] == blocks[4] == blocks[5]
    assert len(set(blocks[0] + blocks[3])) == 8


def test_epochs_differ_and_repeat() -> None:
    sampler = GroupSampler(size=32, block=4, repeat=1, seed=0)
    first, again = list(sampler), list(sampler)
    sampler.set_epoch(1)
    second = list(sampler)

    assert first == again
    assert first != second
    assert sorted(first) == sorted(second)
    assert first != list(GroupSampler(size=32, block=4, repeat=1, seed=1))


def test_the_rows_of_a_batch_are_those_that_the_sampler_gives() -> None:
    """Batches count over all epochs, and the last two of the eleven prompts are left out in each."""
    sampler, given = GroupSampler(size=11, block=3, repeat=2, seed=4), []
    for epoch in range(2):
        sampler.set_epoch(epoch)
        indices = list(sampler)
        given += [indices[i : i + 3] for i in range(0, len(indices), 6)]

    assert [sampler.rows(number) for number in range(6)] == given
