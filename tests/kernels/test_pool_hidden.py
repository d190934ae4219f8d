"""Pooling by the kernel against the mean and the last token in float64."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from maestro_fast.kernels import pool_hidden as kernel
from tests.kernels.helpers import DEVICE, DTYPES, assert_close

EPSILON = 1e-6  # one division, and a sum that is at most as long as the plain op's


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 16 tokens in steps of 4 take short sequences through both launches."""
    for name, value in (("_CHUNK", 16), ("_TOKENS", 4), ("_COLUMNS", 32)):
        monkeypatch.setattr(kernel, name, value)


def pooled(flat: Tensor, start_B: Tensor, length_B: Tensor, *, mean: bool, longest: int | None = None) -> Tensor:
    arguments = (flat.to(DEVICE), start_B.to(DEVICE), length_B.to(DEVICE))
    ours = kernel.pool_hidden(*arguments, mean=mean, longest=longest)
    assert torch.equal(ours, kernel.pool_hidden(*arguments, mean=mean, longest=longest))
    return ours


def truth(flat: Tensor, start_B: Tensor, length_B: Tensor, mean: bool) -> Tensor:
    rows = []
    for start, length in zip(start_B.tolist(), length_B.tolist(), strict=True):
        x = flat[start : start + length].double()
        rows.append(torch.zeros(flat.shape[1], dtype=torch.float64) if length == 0 else x.mean(0) if mean else x[-1])
    return torch.stack(rows)


def packed(lengths: list[int], size: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(sum(lengths))
    length_B = torch.tensor(lengths)
    flat = torch.randn(int(length_B.sum()), size, generator=generator) * 3 + 2
    return flat.to(dtype), length_B.cumsum(0) - length_B, length_B


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("lengths", [[1], [3, 7], [15, 16, 17], [0, 33, 0, 0, 1, 48, 0], [70, 5, 32]], ids=str)
def test_packed(lengths: list[int], mean: bool, dtype: torch.dtype) -> None:
    flat, start_B, length_B = packed(lengths, 40, dtype)
    ours = pooled(flat, start_B, length_B, mean=mean)
    assert ours.dtype == torch.float32
    assert_close(ours, truth(flat, start_B, length_B, mean), epsilon=EPSILON)


@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("width", [7, 40])
def test_padded_on_the_left_reads_no_padding(width: int, mean: bool) -> None:
    length_B = torch.tensor([width, 1, 0, 5])
    start_B = torch.arange(4) * width + width - length_B
    flat = torch.full((4 * width, 33), float("nan"))
    for start, length in zip(start_B.tolist(), length_B.tolist(), strict=True):
        flat[start : start + length] = torch.randn(length, 33, generator=torch.Generator().manual_seed(length))
    ours = pooled(flat, start_B, length_B, mean=mean, longest=width)
    assert_close(ours, truth(flat, start_B, length_B, mean), epsilon=EPSILON)


@pytest.mark.parametrize("mean", [False, True])
def test_prompts_alone(mean: bool) -> None:
    """A prompt ends before its sequence does, so slots stay empty."""
    flat, start_B, length_B = packed([50, 20, 41], 24)
    prompt_B = torch.minimum(torch.tensor([18, 20, 0]), length_B)
    assert_close(pooled(flat, start_B, prompt_B, mean=mean), truth(flat, start_B, prompt_B, mean), epsilon=EPSILON)


def test_rows_with_a_stride() -> None:
    flat, start_B, length_B = packed([19, 4], 40)
    wide = torch.full((23, 64), float("nan"))
    wide[:, :40] = flat
    assert torch.equal(pooled(wide[:, :40], start_B, length_B, mean=True), pooled(flat, start_B, length_B, mean=True))


def test_a_sequence_does_not_depend_on_the_others() -> None:
    flat, start_B, length_B = packed([50, 37, 41], 24)
    whole = pooled(flat, start_B, length_B, mean=True)
    for i, (begin, end) in enumerate(pairwise([0, 50, 87, 128])):
        alone = pooled(flat[begin:end], torch.tensor([0]), length_B[i : i + 1], mean=True)
        assert torch.equal(alone[0], whole[i])


def test_more_sequences_than_one_step_of_the_search() -> None:
    lengths = [1 + i % 3 for i in range(1100)]
    flat, start_B, length_B = packed(lengths, 2)
    if DEVICE == "cuda":
        assert_close(pooled(flat, start_B, length_B, mean=True), truth(flat, start_B, length_B, True), epsilon=EPSILON)
    slots = [int(s) // 16 + b + c for b, s in enumerate(start_B) for c in range(-(-lengths[b] // 16))]
    assert len(set(slots)) == len(slots) and max(slots) < flat.shape[0] // 16 + len(lengths)


def test_nothing_to_pool() -> None:
    none = torch.zeros(0, dtype=torch.int64)
    assert pooled(torch.zeros(0, 8), none, none, mean=True).shape == (0, 8)
    assert torch.equal(
        pooled(
            torch.zeros(0, 8), torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.int64), mean=True
        ).cpu(),
        torch.zeros(2, 8),
    )
