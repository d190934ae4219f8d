"""Pooling by the kernel against the mean and the last token in float64."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from maestro_fast.kernels import pool_hidden as kernel
from maestro_fast.ops import pool_hidden as op
from tests.kernels.helpers import DEVICE, DTYPES, INTERPRETED, assert_close, counted_launches, runs
from tests.kernels.test_policy_loss import Operations

EPSILON = 1e-6  # for one division; the kernel's sum is at most as long as the plain op's
MODES = ["last", "mean", "prompt_last", "prompt_mean"]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 16 tokens in steps of 4, and a search of 4 ways, take short batches along every path."""
    for name, value in (("CHUNK_TOKENS", 16), ("_TOKENS", 4), ("_COLUMNS", 32), ("_PIVOTS", 4), ("_AHEAD", 2)):
        monkeypatch.setattr(kernel, name, value)


def pooled(
    flat: Tensor, bounds: Tensor | None, limit_B: Tensor | None = None, *, mean: bool, width: int | None = None
) -> Tensor:
    arguments = [None if x is None else x.to(DEVICE) for x in (flat, bounds, limit_B)]
    ours, *others = runs(lambda: kernel.pool_hidden(*arguments, mean=mean, width=width), *arguments)  # type: ignore[arg-type]
    assert all(torch.equal(ours, again) for again in others)
    return ours


def truth(flat: Tensor, start_B: Tensor, length_B: Tensor, mean: bool) -> Tensor:
    rows = []
    for start, length in zip(start_B.tolist(), length_B.tolist(), strict=True):
        x = flat[start : start + length].double()
        rows.append(torch.zeros(flat.shape[1], dtype=torch.float64) if length == 0 else x.mean(0) if mean else x[-1])
    return torch.stack(rows)


def packed(lengths: list[int], size: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Hidden states [T, d] and bounds [B + 1]."""
    generator = torch.Generator().manual_seed(sum(lengths))
    flat = torch.randn(sum(lengths), size, generator=generator) * 3 + 2
    return flat.to(dtype), torch.tensor([0, *lengths]).cumsum(0)


LENGTHS = [[1], [3, 7], [15, 16, 17], [0, 33, 0, 0, 1, 48, 0], [70, 5, 32], [2] * 21]


# In the interpreter, which is slow, one batch is in 16 bits, too.
@pytest.mark.parametrize(
    ("lengths", "dtype"),
    [(x, dtype) for x in LENGTHS for dtype in DTYPES if not INTERPRETED or dtype is torch.float32 or x is LENGTHS[3]],
    ids=str,
)
@pytest.mark.parametrize("mean", [False, True])
def test_packed(lengths: list[int], mean: bool, dtype: torch.dtype) -> None:
    flat, bounds = packed(lengths, 40, dtype)
    ours = pooled(flat, bounds, mean=mean)
    assert ours.dtype == torch.float32
    assert_close(ours, truth(flat, bounds[:-1], bounds.diff(), mean), epsilon=EPSILON)


def test_rows_outside_the_bounds_are_not_read() -> None:
    """The int32 bounds begin and end within the states, so slots before the first sequence have no owner."""
    flat, bounds = packed([50, 20, 41, 9], 24)
    flat[:50] = flat[111:] = float("nan")
    for mean in (False, True):
        ours = pooled(flat, bounds[1:-1].int(), mean=mean)
        assert_close(ours, truth(flat, bounds[1:-2], bounds[1:-1].diff(), mean), epsilon=EPSILON)


@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("width", [7, 40])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_read_no_padding(side: str, width: int, mean: bool) -> None:
    length_B = torch.tensor([width, 1, 0, 5])
    start_B = torch.arange(4) * width + (width - length_B if side == "left" else 0)
    flat = torch.full((4 * width, 33), float("nan"))
    for start, length in zip(start_B.tolist(), length_B.tolist(), strict=True):
        flat[start : start + length] = torch.randn(length, 33, generator=torch.Generator().manual_seed(length))
    bounds = torch.cat([start_B, torch.tensor([4 * width])]) if side == "left" else None
    ours = pooled(flat, bounds, length_B, mean=mean, width=width)
    assert_close(ours, truth(flat, start_B, length_B, mean), epsilon=EPSILON)


@pytest.mark.parametrize("mean", [False, True])
def test_prompts_alone(mean: bool) -> None:
    """A prompt ends before its sequence does, so slots stay empty; none is longer than its sequence."""
    flat, bounds = packed([50, 20, 41], 24)
    limit_B = torch.tensor([18, 33, 0])
    expected = truth(flat, bounds[:-1], torch.tensor([18, 20, 0]), mean)
    assert_close(pooled(flat, bounds, limit_B, mean=mean), expected, epsilon=EPSILON)


def test_rows_with_a_stride() -> None:
    flat, bounds = packed([19, 4], 40)
    wide = torch.full((23, 64), float("nan"))
    wide[:, :40] = flat
    assert torch.equal(pooled(wide[:, :40], bounds, mean=True), pooled(flat, bounds, mean=True))


def test_a_sequence_does_not_depend_on_the_others() -> None:
    flat, bounds = packed([50, 37, 41], 24)
    whole = pooled(flat, bounds, mean=True)
    for i, (begin, end) in enumerate(pairwise([0, 50, 87, 128])):
        alone = pooled(flat[begin:end], torch.tensor([0, end - begin]), mean=True)
        assert torch.equal(alone[0], whole[i])


def test_every_chunk_has_a_slot_of_its_own() -> None:
    lengths = [1 + i % 3 for i in range(1100)]
    flat, bounds = packed(lengths, 2)
    if DEVICE == "cuda":
        assert_close(pooled(flat, bounds, mean=True), truth(flat, bounds[:-1], bounds.diff(), True), epsilon=EPSILON)
    slots = [int(s) // 16 + b + c for b, s in enumerate(bounds[:-1]) for c in range(-(-lengths[b] // 16))]
    assert len(set(slots)) == len(slots) and max(slots) < flat.shape[0] // 16 + len(lengths)


def test_nothing_to_pool() -> None:
    none, zeros = torch.zeros(1, dtype=torch.int64), torch.zeros(3, dtype=torch.int64)
    assert pooled(torch.zeros(0, 8), none, mean=True).shape == (0, 8)
    for where in ((zeros, None), (None, zeros[1:])):
        assert torch.equal(pooled(torch.zeros(0, 8), *where, mean=True, width=0).cpu(), torch.zeros(2, 8))


# --- the parts ---


@triton.jit
def _owners(bounds_ptr, out_ptr, width, B, PACKED: tl.constexpr, BB: tl.constexpr):
    slot = tl.program_id(0)
    tl.store(out_ptr + slot, kernel._owner(bounds_ptr, width, slot, B, PACKED, 16, BB))


@pytest.mark.parametrize("pivots", [4, 128] if INTERPRETED else [2, 4, 128])
@pytest.mark.parametrize("lengths", [[40], [0, 0, 0], [1] * 17, [33, 0, 5, 64, 0, 0, 2] * 2], ids=str)
def test_the_search_finds_the_last_sequence_that_begins_by_then(lengths: list[int], pivots: int) -> None:
    for first in (0, 100):
        bounds = torch.tensor([first, *lengths]).cumsum(0)
        slots = int(bounds[-1]) // 16 + len(lengths)
        firsts = [int(start) // 16 + b for b, start in enumerate(bounds[:-1])]
        out = torch.empty(slots, dtype=torch.int32, device=DEVICE)
        _owners[(slots,)](bounds.to(DEVICE), out, 0, len(lengths), PACKED=True, BB=pivots)
        assert out.tolist() == [sum(f <= slot for f in firsts) - 1 for slot in range(slots)]
    width, rows = 21, len(lengths)
    out = torch.empty(width * rows // 16 + rows, dtype=torch.int32, device=DEVICE)
    _owners[(len(out),)](None, out, width, rows, PACKED=False, BB=pivots)
    firsts = [b * width // 16 + b for b in range(rows)]
    assert out.tolist() == [sum(f <= slot for f in firsts) - 1 for slot in range(len(out))]


@triton.jit
def _segments(bounds_ptr, limit_ptr, start_ptr, length_ptr, B, HAS_LIMIT: tl.constexpr, BB: tl.constexpr):
    b = tl.arange(0, BB)
    start, length = kernel.segment(bounds_ptr, limit_ptr, b, b < B, HAS_LIMIT)
    tl.store(start_ptr + b, start)
    tl.store(length_ptr + b, length)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_segments_of_many_sequences_at_once(dtype: torch.dtype) -> None:
    bounds = torch.tensor([2, 5, 5, 11], dtype=dtype, device=DEVICE)
    limit_B = torch.tensor([9, 1, 4], dtype=dtype, device=DEVICE)
    for limit, expected in ((None, [3, 0, 6, 0]), (limit_B, [3, 0, 4, 0])):
        start, length = (torch.empty(4, dtype=torch.int64, device=DEVICE) for _ in range(2))
        _segments[(1,)](bounds, limit, start, length, 3, HAS_LIMIT=limit is not None, BB=4)
        assert start.tolist() == [2, 5, 5, 0] and length.tolist() == expected


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_segments_of_a_mask(dtype: torch.dtype) -> None:
    mask = torch.zeros(5, 2050)
    mask[0, 2000:] = mask[1, :7] = mask[3] = mask[4, -1] = 1  # row 0 is longer than one step of the kernel's loop
    for given in (mask, mask.T.contiguous().T):
        bounds, limit_B = kernel.mask_segments(given.to(dtype).to(DEVICE), None)
        assert bounds.tolist() == [2000, 2050, 2 * 2050 + 2050, 3 * 2050, 4 * 2050 + 2049, 5 * 2050]
        assert limit_B.tolist() == [50, 7, 0, 2050, 1]
    _, limit_B = kernel.mask_segments(mask.to(dtype).to(DEVICE), torch.tensor([3, 9, 1, 0, 1], device=DEVICE))
    assert limit_B.tolist() == [3, 7, 0, 0, 1]


# --- the op ---


def cases() -> Iterator[tuple[str, str, dict[str, Any]]]:
    length_B, prompt_B = torch.tensor([40, 1, 0, 23]), torch.tensor([18, 3, 2, 0])
    padded = torch.randn(4, 40, 8, generator=torch.Generator().manual_seed(0))
    position = torch.arange(40)
    for mode in MODES:
        prompts = {"prompt_lengths": prompt_B} if mode.startswith("prompt") else {}
        flat, bounds = packed([40, 1, 0, 23], 8)
        yield "packed", mode, {"hidden": flat, "cu_seqlens": bounds, **prompts}
        yield "packed, int32", mode, {"hidden": flat, "cu_seqlens": bounds.int(), **prompts}
        yield "lengths", mode, {"hidden": padded, "lengths": length_B, **prompts}
        yield "mask, right", mode, {"hidden": padded, "mask": position < length_B[:, None], **prompts}
        yield "mask, left", mode, {"hidden": padded, "mask": (position >= 40 - length_B[:, None]).long(), **prompts}


CASES = list(cases())


@pytest.mark.parametrize(("layout", "mode", "given"), CASES, ids=[f"{layout}, {mode}" for layout, mode, _ in CASES])
def test_layouts_and_modes_by_the_op(layout: str, mode: Any, given: dict[str, Any]) -> None:
    there = {name: x.to(DEVICE) for name, x in given.items()}
    expected = op(**{**given, "hidden": given["hidden"].double()}, mode=mode, backend="torch")
    ours = op(**there, mode=mode, backend="triton")
    assert_close(ours, expected, epsilon=EPSILON)

    compiled = torch.compile(lambda x: op(**{**there, "hidden": x}, mode=mode, backend="triton"), backend="aot_eager")
    if mode == "prompt_mean":  # the longest path
        torch._dynamo.reset()
        assert torch.equal(compiled(there["hidden"]), ours)


@pytest.mark.parametrize(("layout", "mode", "given"), CASES, ids=[f"{layout}, {mode}" for layout, mode, _ in CASES])
def test_launches(layout: str, mode: Any, given: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Last states take one launch and means two. A mask takes one more, and so do prompts beside lengths."""
    launches = counted_launches(monkeypatch, start=False)
    monkeypatch.setattr(sys.modules[op.__module__], "readable", lambda x: False)  # as on a device
    there = {name: x.to(DEVICE) for name, x in given.items()}
    with Operations() as counted:
        op(**there, mode=mode, backend="triton")
    expected = ["_mask_segments"] if layout.startswith("mask") else []
    assert launches == expected + (["_sums", "_combine"] if mode.endswith("mean") else ["_last"])
    more = ["minimum"] if layout == "lengths" and mode.startswith("prompt") else []
    assert [name for name in counted.calls if name != "empty"] == more
    assert counted.calls.count("empty") == 1 + mode.endswith("mean") + layout.startswith("mask")
