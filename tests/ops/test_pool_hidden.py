"""Pooling: every layout of the same sequences gives the same context, and nothing of the padding enters it."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from maestro_fast.ops import pool_hidden
from maestro_fast.ops.pool_hidden import PoolMode
from tests.ops.helpers import assert_same_compiled, assert_same_fake

MODES = get_args(PoolMode)
LENGTHS = [3, 1, 0, 7, 5]
PROMPTS = [2, 1, 0, 4, 9]  # the last one is longer than its sequence, which is all prompt
WIDTH, D = 7, 4
NAN = float("nan")
lengths_B, prompts_B = torch.tensor(LENGTHS), torch.tensor(PROMPTS)
cu_seqlens = torch.tensor([0, 3, 4, 4, 11, 16])


def sequences(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(length, D, dtype=torch.float64, generator=generator).to(dtype) for length in LENGTHS]


def padded(parts: list[Tensor], side: str) -> tuple[Tensor, Tensor]:
    """The sequences as [B, WIDTH, D] with NaN as padding, and their mask."""
    hidden = torch.full((len(parts), WIDTH, D), NAN, dtype=parts[0].dtype)
    mask = torch.zeros(len(parts), WIDTH, dtype=torch.int64)
    for b, part in enumerate(parts):
        place = slice(0, len(part)) if side == "right" else slice(WIDTH - len(part), WIDTH)
        hidden[b, place], mask[b, place] = part, 1
    return hidden, mask


def direct(parts: list[Tensor], mode: str) -> Tensor:
    """The contexts [B, D] in float64, computed one sequence at a time."""
    out = torch.zeros(len(parts), D, dtype=torch.float64)
    for b, part in enumerate(parts):
        used = part.double()[: PROMPTS[b]] if mode.startswith("prompt") else part.double()
        if len(used):
            out[b] = used[-1] if mode.endswith("last") else used.mean(0)
    return out


def every_layout(parts: list[Tensor], mode: Any) -> dict[str, Tensor]:
    left, left_mask = padded(parts, "left")
    right, right_mask = padded(parts, "right")
    trailing = torch.full((2, D), NAN, dtype=parts[0].dtype)
    return {
        "left": pool_hidden(left, mask=left_mask, mode=mode, prompt_lengths=prompts_B),
        "right": pool_hidden(right, mask=right_mask.bool(), mode=mode, prompt_lengths=prompts_B),
        "lengths": pool_hidden(right, lengths=lengths_B.int(), mode=mode, prompt_lengths=prompts_B.int()),
        "packed": pool_hidden(torch.cat(parts), cu_seqlens=cu_seqlens.int(), mode=mode, prompt_lengths=prompts_B),
        "packed, more rows": pool_hidden(
            torch.cat([*parts, trailing]), cu_seqlens=cu_seqlens, mode=mode, prompt_lengths=prompts_B
        ),
    }


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_every_layout_gives_the_pooled_sequence(mode: PoolMode, dtype: torch.dtype) -> None:
    parts = sequences(dtype)
    expected = direct(parts, mode)
    for layout, pooled in every_layout(parts, mode).items():
        assert pooled.dtype == (torch.float64 if dtype == torch.float64 else torch.float32), layout
        tolerance = 1e-12 if dtype == torch.float64 else 3e-7  # sums are in float32, whatever the dtype
        torch.testing.assert_close(pooled.double(), expected, rtol=tolerance, atol=tolerance, msg=layout)
        assert (pooled[2] == 0).all(), layout


@pytest.mark.parametrize("mode", MODES)
def test_the_gradient_goes_to_the_pooled_tokens_alone(mode: PoolMode) -> None:
    parts = sequences()
    upstream = torch.randn(len(parts), D, dtype=torch.float64)
    (expected,) = torch.autograd.grad(
        (direct_of_leaf(leaf := torch.cat(parts).requires_grad_(), mode) * upstream).sum(), leaf
    )
    for side in ("left", "right"):
        hidden, mask = padded(parts, side)
        pooled = pool_hidden(hidden.requires_grad_(), mask=mask, mode=mode, prompt_lengths=prompts_B)
        (gradient,) = torch.autograd.grad((pooled * upstream).sum(), hidden)
        assert (gradient[mask == 0] == 0).all()  # where NaN stands
        torch.testing.assert_close(gradient[mask == 1], expected)


def direct_of_leaf(packed: Tensor, mode: str) -> Tensor:
    """The contexts of ``direct`` by differentiable operations."""
    rows = []
    for b, part in enumerate(packed.split(LENGTHS)):
        used = part[: PROMPTS[b]] if mode.startswith("prompt") else part
        rows.append(packed.new_zeros(D) if not len(used) else used[-1] if mode.endswith("last") else used.mean(0))
    return torch.stack(rows)


@pytest.mark.parametrize("mode", MODES)
def test_gradcheck(mode: PoolMode) -> None:
    hidden = torch.cat(sequences()).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: pool_hidden(x, cu_seqlens=cu_seqlens, mode=mode, prompt_lengths=prompts_B), (hidden,)
    )


def test_a_strided_view_pools_like_its_copy() -> None:
    hidden = torch.randn(D, 16).T
    for mode in MODES:
        strided, copied = (
            pool_hidden(x, cu_seqlens=cu_seqlens, mode=mode, prompt_lengths=prompts_B)
            for x in (hidden, hidden.contiguous())
        )
        assert torch.equal(strided, copied)


@pytest.mark.parametrize("mode", MODES)
def test_nothing_to_pool(mode: PoolMode) -> None:
    two, none = torch.zeros(2, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)
    for pooled in (
        pool_hidden(torch.zeros(0, D), cu_seqlens=torch.zeros(3).long(), mode=mode, prompt_lengths=two),
        pool_hidden(torch.zeros(2, 0, D), lengths=two, mode=mode, prompt_lengths=two),
        pool_hidden(torch.zeros(2, 0, D), mask=torch.zeros(2, 0), mode=mode, prompt_lengths=two),
    ):
        assert torch.equal(pooled, torch.zeros(2, D))
    for pooled in (
        pool_hidden(torch.zeros(0, D), cu_seqlens=torch.zeros(1).long(), mode=mode, prompt_lengths=none),
        pool_hidden(torch.zeros(0, 3, D), mask=torch.zeros(0, 3), mode=mode, prompt_lengths=none),
    ):
        assert pooled.shape == (0, D)


@pytest.mark.parametrize("mode", MODES)
def test_compiles_to_one_graph_and_runs_on_fake_tensors(mode: PoolMode) -> None:
    def packed(hidden: Tensor, bounds: Tensor, prompts: Tensor) -> Tensor:
        return pool_hidden(hidden, cu_seqlens=bounds, mode=mode, prompt_lengths=prompts)

    def masked(hidden: Tensor, mask: Tensor, prompts: Tensor) -> Tensor:
        return pool_hidden(hidden, mask=mask, mode=mode, prompt_lengths=prompts)

    def counted(hidden: Tensor, lengths: Tensor, prompts: Tensor) -> Tensor:
        return pool_hidden(hidden, lengths=lengths, mode=mode, prompt_lengths=prompts)

    hidden, mask = padded(sequences(torch.float32), "left")
    flat = torch.cat(sequences(torch.float32))
    assert_same_compiled(packed, flat.clone().requires_grad_(), cu_seqlens, prompts_B)
    assert_same_compiled(masked, hidden.clone().requires_grad_(), mask, prompts_B)
    assert_same_fake(packed, flat, cu_seqlens, prompts_B)
    assert_same_fake(masked, hidden, mask, prompts_B)
    assert_same_fake(counted, hidden, lengths_B, prompts_B)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"cu_seqlens": None}, ValueError, "mask, lengths, cu_seqlens: got none"),
        ({"mask": torch.ones(2, 3)}, ValueError, r"got \['mask', 'cu_seqlens'\]"),
        ({"hidden": torch.ones(5, 2, dtype=torch.int64)}, TypeError, "hidden: dtype torch.int64"),
        ({"hidden": torch.ones(5)}, ValueError, "cu_seqlens: shape"),
        ({"cu_seqlens": torch.tensor(3)}, ValueError, r"cu_seqlens: shape \(\)"),
        ({"cu_seqlens": torch.tensor([0.0, 5.0])}, TypeError, "cu_seqlens: dtype torch.float32"),
        ({"cu_seqlens": torch.tensor([0, 3, 1, 5]).to(torch.uint8)}, TypeError, "cu_seqlens: dtype torch.uint8"),
        ({"cu_seqlens": torch.tensor([0, 6])}, ValueError, "cu_seqlens: from 0 to 6"),
        ({"cu_seqlens": torch.tensor([-1, 5])}, ValueError, "cu_seqlens: from -1 to 5"),
        ({"cu_seqlens": torch.tensor([0, 3, 2, 5])}, ValueError, "cu_seqlens: from 0 to 5, expected non-decreasing"),
        ({"mode": "max"}, ValueError, "mode: 'max'"),
        ({"mode": "prompt_last"}, ValueError, "prompt_lengths: missing"),
        ({"mode": "prompt_mean", "prompt_lengths": torch.tensor([1])}, ValueError, r"prompt_lengths: shape \(1,\)"),
        ({"mode": "prompt_mean", "prompt_lengths": torch.tensor([1.0, 1.0])}, TypeError, "prompt_lengths: dtype"),
        ({"mode": "prompt_mean", "prompt_lengths": torch.tensor([1, -1])}, ValueError, "prompt_lengths: -1"),
        ({"backend": "cpp"}, ValueError, "backend: 'cpp'"),
    ],
)
def test_errors_name_the_argument(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {"hidden": torch.ones(5, 2), "cu_seqlens": torch.tensor([0, 2, 5]), **changes}
    with pytest.raises(error, match=message):
        pool_hidden(**arguments)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"hidden": torch.ones(6, 2)}, ValueError, "hidden: shape"),
        ({"mask": torch.ones(2, 4)}, ValueError, r"mask: shape \(2, 4\), expected \(2, 3\)"),
        ({"mask": torch.tensor([[1, 1, 0], [1, 0, 1]])}, ValueError, "mask: row 1 has gaps"),
        ({"mask": None, "lengths": torch.tensor([3])}, ValueError, r"lengths: shape \(1,\), expected \(2,\)"),
        ({"mask": None, "lengths": torch.tensor([3, 4])}, ValueError, "lengths: 4, expected 0 to L = 3"),
        ({"mask": None, "lengths": torch.tensor([-1, 3])}, ValueError, "lengths: -1"),
        ({"mask": None, "lengths": torch.tensor([True, True])}, TypeError, "lengths: dtype torch.bool"),
    ],
)
def test_errors_of_padded_layouts_name_the_argument(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    arguments: dict[str, Any] = {"hidden": torch.ones(2, 3, 2), "mask": torch.ones(2, 3), **changes}
    with pytest.raises(error, match=message):
        pool_hidden(**arguments)
