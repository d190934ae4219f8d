"""Tokens and responses in the padded layout: C++ against PyTorch, on masks of every kind."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from maestro_fast.ops import sum_tokens, token_mask
from maestro_fast.ops.backend import Backend

DTYPES = [torch.int64, torch.int32, torch.bool, torch.uint8, torch.float32, torch.int8, torch.bfloat16, torch.float16]


def masks() -> dict[str, Tensor]:
    """int64 masks; the widths are no multiples of a vector."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([0, 1, 5, 37, 36])
    prefixes = (torch.arange(37)[None] < lengths[:, None]).long()
    holes = prefixes.clone()
    holes[3, 10:20] = 0  # the turn of a tool
    holes[4, 0] = 0
    random = (torch.rand(64, 130, generator=generator) < 0.5).long()
    late = torch.zeros(2, 9, dtype=torch.int64)
    late[0, 8] = late[1, 1:3] = 1  # as many ones as a prefix would have, elsewhere
    return {
        "prefixes": prefixes,
        "holes": holes,
        "random": random,
        "late": late,
        "one_column": torch.tensor([[1], [0]]),
        "no_rows": torch.zeros(0, 4, dtype=torch.int64),
        "no_columns": torch.zeros(3, 0, dtype=torch.int64),
        "strided": random[::2, ::3],
        "large": (torch.arange(700)[None] < torch.randint(0, 701, (900, 1), generator=generator)).long(),
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", masks())
def test_cpp_is_the_reference(name: str, dtype: torch.dtype) -> None:
    """To the last bit: lengths, and values at the tokens."""
    mask = masks()[name].to(dtype)
    values = torch.randn(mask.shape[0], generator=torch.Generator().manual_seed(1))
    cpp, reference = token_mask(mask, backend="cpp"), token_mask(mask, backend="torch")
    assert cpp.lengths_B.dtype == reference.lengths_B.dtype == torch.int64
    assert torch.equal(cpp.lengths_B, mask.double().sum(1).long()) and torch.equal(reference.lengths_B, cpp.lengths_B)
    expected = values[:, None] * mask.float()
    for found in (cpp, reference):
        spread = found.spread(values)
        assert spread.dtype == torch.float32 and torch.equal(spread, expected)


def test_what_counts_as_first_tokens() -> None:
    """A row whose tokens are its first ones is not read again, so nothing else may pass for one."""
    for name, mask in masks().items():
        found = token_mask(mask.contiguous(), backend="cpp")
        assert found.prefix_B is not None
        first = torch.arange(mask.shape[1])[None] < mask.sum(1, keepdim=True)
        assert torch.equal(found.prefix_B, (mask == first).all(1)), name


@pytest.mark.parametrize("backend", ["cpp", "torch"])
def test_special_values_are_kept_and_nothing_leaks(backend: Backend) -> None:
    """An infinite or NaN advantage reaches its own tokens alone; torch multiplies, so there inf * 0 is NaN."""
    mask = masks()["holes"]
    values = torch.tensor([1.0, -0.0, 3.0, 1e-42, -1e38])
    assert torch.equal(token_mask(mask, backend=backend).spread(values), values[:, None] * mask)


def test_outputs_are_written_whole() -> None:
    """The memory that comes from the allocator holds anything."""
    mask = masks()["large"]
    for _ in range(3):
        poison = torch.full(mask.shape, float("nan"))
        del poison
        assert token_mask(mask, backend="cpp").spread(torch.ones(len(mask))).isfinite().all()


@pytest.mark.parametrize("used", [True, False])
@pytest.mark.parametrize("width", [1024, 1022])
def test_large_batches_are_written_past_the_caches(width: int, used: bool) -> None:
    """Memory that was used before is written in another way than fresh memory, four tokens at a time."""
    rows = 1200
    mask = (torch.arange(width)[None] < (torch.arange(rows) % (width + 1))[:, None]).long()
    mask[7::50, ::3] = 0  # holes
    values = torch.randn(rows, generator=torch.Generator().manual_seed(6))
    values[:4] = torch.tensor([float("nan"), float("inf"), -0.0, -float("inf")])
    expected = torch.where(mask == 1, values[:, None], 0.0)
    if used:
        poison = torch.full(mask.shape, float("nan"))
        del poison
    found = token_mask(mask, backend="cpp").spread(values)
    torch.testing.assert_close(found, expected, rtol=0.0, atol=0.0, equal_nan=True)


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_change_nothing(threads: int) -> None:
    mask = masks()["large"]
    values = torch.randn(mask.shape, generator=torch.Generator().manual_seed(2))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        found = token_mask(mask, backend="cpp")
        assert torch.equal(found.spread(values[:, 0].contiguous()), values[:, :1] * mask)
        sums = sum_tokens(values, backend="cpp")
    finally:
        torch.set_num_threads(before)
    assert torch.equal(sums, values.double().sum(1).float())


@pytest.mark.parametrize("shape", [(5, 0), (0, 5), (4, 1), (4, 15), (4, 16), (4, 17), (300, 1025)])
def test_sums_are_those_of_float64(shape: tuple[int, int]) -> None:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(3)) * 1e3
    exact = values.double().sum(1)
    assert torch.equal(sum_tokens(values, backend="cpp"), exact.float())
    torch.testing.assert_close(sum_tokens(values, backend="torch"), values.sum(1), rtol=0.0, atol=0.0)
    wide = torch.randn(6, 40, generator=torch.Generator().manual_seed(4))[:, ::3]
    torch.testing.assert_close(sum_tokens(wide), wide.sum(1))


def test_weights_in_a_mask_are_served_by_torch() -> None:
    mask = torch.tensor([[1.0, 0.5, 0.0], [1.0, 1.0, 0.0]])
    found = token_mask(mask)
    assert found.prefix_B is None and torch.equal(found.lengths_B, torch.tensor([1.5, 2.0]))
    assert torch.equal(found.spread(torch.tensor([2.0, 3.0])), torch.tensor([[2.0, 1.0, 0.0], [3.0, 3.0, 0.0]]))
    for other in (mask, torch.tensor([[2, 0]]), torch.tensor([[-1, 1]]), torch.tensor([[float("nan"), 0.0]])):
        with pytest.raises(ValueError, match="values other than 0 and 1"):
            token_mask(other, backend="cpp")


def test_gradients_and_float64_go_through_torch() -> None:
    mask = masks()["holes"]
    values = torch.randn(5, generator=torch.Generator().manual_seed(5)).requires_grad_()
    token_mask(mask).spread(values).sum().backward()
    assert values.grad is not None and torch.equal(values.grad, mask.sum(1).float())
    wide = values.detach().double()
    assert torch.equal(token_mask(mask).spread(wide), wide[:, None] * mask)


@pytest.mark.parametrize("backend", ["torch", "cpp"])
def test_a_value_that_is_not_finite_stays_at_its_tokens(backend: Backend) -> None:
    found = token_mask(torch.tensor([[1, 0], [1, 1]]), backend=backend).spread(
        torch.tensor([float("nan"), float("inf")])
    )
    assert found[0, 1] == 0 and found[0, 0].isnan() and found[1].isinf().all()


def test_wrong_arguments_are_named() -> None:
    mask = masks()["holes"]
    for wrong, message in (
        ([[1]], "mask: got list, expected a tensor"),
        (mask.to_sparse(), "mask: layout torch.sparse_coo, expected a dense tensor"),
        (mask.to(torch.complex64), "mask: dtype torch.complex64, expected bool"),
        (torch.tensor([[2**32, 1]]).to(torch.uint64), "mask: dtype torch.uint64, expected bool"),  # 2**32 is no 0
    ):
        with pytest.raises(TypeError, match=message):
            token_mask(wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="mask: on meta, expected a tensor that holds values"):
        token_mask(mask.float().to("meta"))
    with pytest.raises(TypeError, match="values: got list, expected a tensor"):
        token_mask(mask).spread([1.0] * 5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"values: layout torch\.sparse_coo, expected a dense tensor"):
        sum_tokens(mask.float().to_sparse())
    with pytest.raises(ValueError, match=r"mask: shape \(3,\), expected \[B, L\]"):
        token_mask(torch.ones(3))
    with pytest.raises(ValueError, match=r"values: shape \(4,\), expected \(5,\)"):
        token_mask(mask).spread(torch.ones(4))
    with pytest.raises(TypeError, match=r"values: dtype torch.int64"):
        token_mask(mask).spread(torch.ones(5, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"values: shape \(3,\), expected \[B, L\]"):
        sum_tokens(torch.ones(3))
    with pytest.raises(TypeError, match=r"values: dtype torch.bool"):
        sum_tokens(mask.bool())
    with pytest.raises(ValueError, match="'triton' does not serve token_mask"):
        token_mask(mask, backend="triton")
    with pytest.raises(ValueError, match="got float64"):
        sum_tokens(torch.ones(2, 2, dtype=torch.float64), backend="cpp")
