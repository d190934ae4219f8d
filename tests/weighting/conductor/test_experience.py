"""Contexts reach the right responses when they are shuffled, and running statistics do not depend on the batches."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from maestro_fast.ops import group_advantages
from maestro_fast.weighting import ConductorConfig, ContextKind, Outcome
from maestro_fast.weighting.conductor.experience import RunningStatistics
from tests.weighting.helpers import NAMES, K, context, normal

B, D = 64, 3


def seen(*batches: torch.Tensor) -> RunningStatistics:
    statistics = RunningStatistics(D)
    for rows in batches:
        statistics.update(rows)
    return statistics


@given(sizes=st.lists(st.integers(0, 9), min_size=1, max_size=8).filter(any), seed=st.integers(0, 99))
def test_any_split_equals_the_direct_formula(sizes: list[int], seed: int) -> None:
    scale, offset = torch.tensor([1.0, 1e-3, 50.0]).double(), torch.tensor([0.0, 7.0, -1e3]).double()
    rows = normal(sum(sizes), D, seed=seed).double() * scale + offset
    statistics = seen(*rows.split(sizes))
    assert statistics.count == len(rows)
    torch.testing.assert_close(statistics.mean, rows.mean(0), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(statistics.m2 / len(rows), rows.var(0, correction=0), rtol=1e-10, atol=1e-14)


def test_by_hand() -> None:
    statistics = seen(torch.tensor([[1.0, 0.0, 5.0], [3.0, 0.0, 5.0]]), torch.tensor([[8.0, 3.0, 5.0]]))
    assert statistics.count == 3
    assert statistics.mean.tolist() == pytest.approx([4, 1, 5])
    assert statistics.m2.tolist() == pytest.approx([9 + 1 + 16, 1 + 1 + 4, 0])


def test_a_large_offset_does_not_drown_the_variance() -> None:
    rows = normal(512, D, seed=1).double() + 1e6
    statistics = seen(*rows.split(8))
    torch.testing.assert_close(statistics.m2 / 512, rows.var(0, correction=0), rtol=1e-8, atol=0)


def test_standardised_rows_have_mean_0_and_variance_1() -> None:
    rows = normal(100, D, seed=2) * 30 + torch.tensor([5.0, -200.0, 0.0])
    mean, rstd = seen(rows[:40], rows[40:]).standardisation()
    assert mean.dtype == rstd.dtype == torch.float32
    x = ((rows - mean) * rstd).double()
    torch.testing.assert_close(x.mean(0), torch.zeros(D, dtype=torch.float64), rtol=0, atol=1e-5)
    torch.testing.assert_close(x.var(0, correction=0), torch.ones(D, dtype=torch.float64), rtol=1e-5, atol=0)


def test_a_constant_column_stays_finite() -> None:
    mean, rstd = seen(torch.full((10, D), 3.0)).standardisation(eps=1e-4)
    assert mean.tolist() == [3.0] * D
    assert rstd.tolist() == pytest.approx([100.0] * D)


def test_nothing_seen_changes_nothing() -> None:
    for statistics in (RunningStatistics(D), seen(torch.empty(0, D))):
        mean, rstd = statistics.standardisation()
        assert mean.tolist() == [0.0] * D and rstd.tolist() == [1.0] * D
    rows = normal(5, D, seed=3)
    assert torch.equal(seen(rows, torch.empty(0, D)).m2, seen(rows).m2)


def test_low_precision_rows_are_summed_in_float64() -> None:
    rows = normal(1000, D, seed=4).bfloat16()
    statistics = seen(*rows.split(100))
    torch.testing.assert_close(statistics.mean, rows.double().mean(0), rtol=1e-12, atol=1e-14)


def test_an_update_leaves_earlier_figures_alone() -> None:
    statistics = seen(normal(5, D, seed=5))
    before = statistics.count, statistics.mean, statistics.m2
    copies = [tensor.clone() for tensor in before]
    statistics.update(normal(5, D, seed=6))
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(before, copies, strict=True))


# --- shuffled contexts ---


def test_shuffling_gives_every_response_the_state_of_another() -> None:
    at = context(B, torch.arange(B).float()[:, None].expand(B, D), step=3)
    policy = ConductorConfig(shuffle=True, seed=5).build(NAMES, D)
    policy.observe(Outcome(at, policy.weights(at), group_advantages(at.rewards_BK, None, 4)))
    source_B = policy.state_dict()["buffer.0.h"][:, 0]
    assert sorted(source_B.tolist()) == list(range(B))
    assert (source_B != torch.arange(B)).all()


def test_shuffling_follows_from_seed_and_step_alone() -> None:
    h = normal(B, D, seed=0)

    def expected(seed: int, step: int, shuffle: bool = True) -> Tensor:
        policy = ConductorConfig(shuffle=shuffle, seed=seed).build(NAMES, D)
        policy.weight.data.copy_(normal(K, D, seed=7))
        return policy.weights(context(B, h, step=step)).expected_BK

    rows = expected(5, 3)
    assert torch.equal(expected(5, 3), rows)
    for other in (expected(5, 4), expected(6, 3), expected(5, 3, False)):
        assert not torch.equal(other, rows)
        assert sorted(other.tolist()) == sorted(rows.tolist())  # the same states, in another order


@pytest.mark.parametrize("kind", ["prompt_last", "prompt_mean", "reference_prompt_mean"])
def test_states_of_prompts_are_shuffled_among_the_groups(kind: ContextKind) -> None:
    groups = B // 4
    states_Bd = torch.arange(groups).repeat_interleave(4).float()[:, None].expand(B, D)
    policy = ConductorConfig(context=kind, shuffle=True, seed=5).build(NAMES, D)
    source_NG = policy.contexts(context(B, states_Bd, step=3, group_size=4))[:, 0].view(groups, 4)
    assert (source_NG == source_NG[:, :1]).all(), "a group has one state"
    assert sorted(source_NG[:, 0].tolist()) == list(range(groups))
    assert (source_NG[:, 0] != torch.arange(groups)).all(), "that of another group"


@pytest.mark.parametrize("batch", [0, 1, 2])
def test_shuffling_tiny_batches(batch: int) -> None:
    policy = ConductorConfig(shuffle=True).build(NAMES, D)
    assert policy.weights(context(batch, normal(batch, D, seed=0), group_size=1)).weights_BK.shape == (batch, K)
