"""Whole groups in whole blocks, each prompt once an epoch."""

from __future__ import annotations

import pytest

from maestro_fast.training.sampler import GroupSampler


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


def test_fewer_prompts_than_a_block_are_refused() -> None:
    with pytest.raises(ValueError, match="prompts_per_batch: 8 over all processes, but the data holds 5"):
        GroupSampler(size=5, block=8, repeat=1, seed=0)
