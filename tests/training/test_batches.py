"""A generation batch divides without losing or doubling a token, into whole groups and whole blocks."""

from __future__ import annotations

import pytest
import torch

from maestro_fast.data.order import ShuffledOrder
from maestro_fast.model.rows import Sequences
from maestro_fast.ops import PolicyLossConfig, policy_loss
from maestro_fast.records import cumulative
from maestro_fast.training.batches import (
    BatchConfig,
    BatchPlan,
    GroupSampler,
    TokenLogprobs,
    UpdateTotals,
    cut_order,
    split_micro_batches,
)
from tests.ops.trl_oracle import trl_policy_loss

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


@pytest.mark.parametrize("name", ["prompts_per_batch", "micro_batch", "updates_per_batch", "max_refills"])
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

    live = torch.ones(8, dtype=torch.bool)
    parts = split_micro_batches(
        plan,
        sequences,
        advantages,
        TokenLogprobs(old, logprobs),
        cut_order(plan, order, live),
        live,
        UpdateTotals(config.normalization, [float(tokens)], [8.0], [4.0]),
        torch.device("cpu"),
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
        [[0, 1], [2, 3]],
        torch.ones(4, dtype=torch.bool),
        UpdateTotals("bnpo", [16.0], [4.0], [2.0]),
        torch.device("cpu"),
    )

    assert [part.normalizer for part in parts] == [2 * 4.0, 2 * 12.0]
    assert [part.entropy_normalizer for part in parts] == [16.0, 16.0]


@pytest.mark.parametrize("normalization", ["dapo", "grpo", "bnpo", "dr_grpo"])
@pytest.mark.parametrize("dead", [[2], [0, 1, 2, 3], [0, 1, 2, 3, 4, 5, 7], list(range(8))], ids=str)
def test_truncated_responses_are_masked_as_in_trl(normalization: str, dead: list[int]) -> None:
    """The micro-batches add up to TRL's loss, executed with the masks that mask_truncated_completions makes."""
    generator = torch.Generator().manual_seed(0)
    logprobs = -torch.rand(sum(LENGTHS), generator=generator, dtype=torch.float64)
    old = logprobs + 0.3 * torch.randn(sum(LENGTHS), generator=generator, dtype=torch.float64)
    advantages = torch.randn(8, generator=generator, dtype=torch.float64)
    live = torch.ones(8, dtype=torch.bool)
    live[dead] = False
    steps = 1 if normalization == "bnpo" else 2  # TRL's bnpo depends on the micro-batches
    plan = BatchPlan(prompts=2, responses=8, accumulation=steps, updates=1, masks_truncated=True)
    tokens = float(sum(n for n, kept in zip(LENGTHS, live.tolist(), strict=True) if kept))
    sequences = Sequences([[1]] * 8, [list(range(n)) for n in LENGTHS])
    cut = cut_order(plan, list(range(8)), live)
    parts = split_micro_batches(
        plan,
        sequences,
        advantages,
        TokenLogprobs(old, logprobs),
        cut,
        live,
        UpdateTotals(normalization, [tokens], [8.0], [1.0]),
        torch.device("cpu"),
    )
    config = PolicyLossConfig(normalization, max_completion_length=6)  # type: ignore[arg-type]
    total = sum(
        policy_loss(
            part.logprobs.ref_C,
            part.advantages_B,
            part.cu_seqlens,
            old_logprobs=part.logprobs.old_C,
            token_mask=part.token_mask_C,
            normalizer=part.normalizer,
            config=config,
        ).loss
        for part in parts
    )

    def pad(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.utils.rnn.pad_sequence(list(x.split(LENGTHS)), batch_first=True)

    mask = pad(live.double().repeat_interleave(torch.tensor(LENGTHS)))
    expected, _ = trl_policy_loss(
        pad(logprobs), mask, advantages, old_logprobs_BT=pad(old), loss_type=normalization, max_completion_length=6
    )
    torch.testing.assert_close(total, expected, rtol=1e-11, atol=1e-13)
    kept = sorted(j for members in cut for j in members if live[j])
    assert kept == live.nonzero().flatten().tolist()  # Each is trained on once.
    assert all(cut)  # As many forwards as on any other process.


def test_whole_groups_stay_together_when_others_are_left_out() -> None:
    plan = BatchPlan(prompts=4, responses=16, accumulation=2, updates=1)
    live = torch.ones(16, dtype=torch.bool)
    live[4:8] = False
    live[13] = False

    assert cut_order(plan, list(range(16)), live) == [[0, 1, 2, 3], [8, 9, 10, 11, 12, 14, 15]]
    assert cut_order(plan, list(range(16)), torch.zeros(16, dtype=torch.bool)) == [[0], [0]]


def test_blocks_come_in_a_row_and_every_prompt_once() -> None:
    sampler = GroupSampler(ShuffledOrder(11, block=4, seed=0), repeat=3)

    indices = list(sampler)
    blocks = [indices[i : i + 4] for i in range(0, len(indices), 4)]

    assert len(indices) == len(sampler) == 24
    assert blocks[0] == blocks[1] == blocks[2]
    assert blocks[3] == blocks[4] == blocks[5]
    assert len(set(blocks[0] + blocks[3])) == 8


def test_epochs_differ_and_repeat() -> None:
    sampler = GroupSampler(ShuffledOrder(32, block=4, seed=0), repeat=1)
    first, again = list(sampler), list(sampler)
    sampler.set_epoch(1)
    second = list(sampler)

    assert first == again
    assert first != second
    assert sorted(first) == sorted(second)
    assert first != list(GroupSampler(ShuffledOrder(32, block=4, seed=1), repeat=1))


def test_the_rows_of_a_batch_are_those_that_the_sampler_gives() -> None:
    """Batches count over all epochs, and the last two of the eleven prompts are left out in each."""
    sampler, given = GroupSampler(ShuffledOrder(11, block=3, seed=4), repeat=2), []
    for epoch in range(2):
        sampler.set_epoch(epoch)
        indices = list(sampler)
        given += [indices[i : i + 3] for i in range(0, len(indices), 6)]

    assert [sampler.rows(number) for number in range(6)] == given
