"""Rows are taken out of hidden states, and their gradients added up, as float64 indexing does it, in the same bits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from maestro_fast.model.hidden_states import HiddenStates
from maestro_fast.model.rows import Sequences, rows_of
from maestro_fast.ops import pool_hidden

STEM = list(range(1, 21))
BATCH = Sequences(
    [STEM, STEM, [*STEM, 30], [40, 41], STEM, [40, 41]],
    [[50, 51, 52], [], [53], [54, 55], [50, 51, 52], [56]],
)


def random_states(layout_rows: int, dtype: torch.dtype = torch.float64, d: int = 5) -> Tensor:
    return torch.randn(layout_rows, d, generator=torch.Generator().manual_seed(0), dtype=dtype).requires_grad_()


@given(st.lists(st.integers(0, 7), min_size=1, max_size=20), st.booleans())
def test_the_gradient_of_a_row_is_the_sum_over_its_takers(tokens: list[int], placed: bool) -> None:
    place_T = torch.tensor([3, 1, 4, 1, 5, 0, 2, 6]) if placed else None  # Two tokens have row 1.
    states, expected = random_states(8), random_states(8)
    coefficients = torch.linspace(-1, 2, len(tokens) * 5, dtype=torch.float64).view(-1, 5)
    index = torch.tensor(tokens)

    taken = HiddenStates(states, place_T, BATCH).take(index)
    (taken * coefficients).sum().backward()
    theirs = expected[index if place_T is None else place_T[index]]
    (theirs * coefficients).sum().backward()

    assert torch.equal(taken, theirs)
    assert states.grad is not None and expected.grad is not None
    torch.testing.assert_close(states.grad, expected.grad, rtol=1e-14, atol=1e-15)


def test_its_gradient_passes_gradcheck() -> None:
    index = torch.tensor([2, 0, 2, 2, 5, 0])
    torch.autograd.gradcheck(lambda x: HiddenStates(x, None, BATCH).take(index).sin(), random_states(6))


@pytest.mark.parametrize("taken_as", [torch.float32, torch.bfloat16])
def test_the_sum_is_rounded_once(taken_as: torch.dtype) -> None:
    """In bf16 an addition one by one would lose the small gradients beside the large one."""
    states = random_states(3, torch.bfloat16)
    small = torch.full((257, 5), 2.0**-8)
    small[0] = 1.0
    HiddenStates(states, None, BATCH).take(torch.ones(257, dtype=torch.int64), taken_as).backward(small.to(taken_as))

    assert states.grad is not None and states.grad.dtype is torch.bfloat16
    assert states.grad[1].tolist() == [2.0] * 5 and not states.grad[[0, 2]].any()


def test_two_runs_with_several_threads_give_the_same_bits() -> None:
    """As many takers and columns as make PyTorch use its threads."""
    index = torch.randint(0, 40, (2000,), generator=torch.Generator().manual_seed(1))
    index = torch.cat([index, torch.arange(40, 300)])  # Some rows are taken once.
    gradient = torch.randn(len(index), 256, generator=torch.Generator().manual_seed(2))
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 4, 4, 4):
            torch.set_num_threads(count)
            states = random_states(400, torch.float32, 256)
            HiddenStates(states, None, BATCH).take(index).backward(gradient)
            found.append(states.grad)
    finally:
        torch.set_num_threads(threads)
    exact = torch.zeros(400, 256, dtype=torch.float64).index_add_(0, index, gradient.double())

    assert found[0] is not None
    assert all(other is not None and torch.equal(found[0], other) for other in found[1:])
    torch.testing.assert_close(found[0].double(), exact, rtol=1e-5, atol=1e-5)
    assert not found[0][300:].any()


@pytest.mark.parametrize("layout", ["padded", "packed", "shared"])
def test_what_is_read_off_the_rows_is_that_of_the_sequences(layout: str) -> None:
    """Each token's state is a function of its sequence up to it, as in a model."""
    rows = rows_of(BATCH, layout)  # type: ignore[arg-type]
    assert rows.place_T is not None
    per_sequence = [
        torch.stack([torch.tensor([float(sum(ids[: t + 1])), float(t)]) for t in range(len(ids))])
        for ids in BATCH.tokens
    ]
    packed = torch.cat(per_sequence)
    states = torch.full((rows.input_ids.numel(), 2), torch.nan)
    states[rows.place_T] = packed
    hidden = HiddenStates(states, rows.place_T, BATCH)
    taken, targets = hidden.completions(torch.float32)
    expected = [s[len(p) - 1 : -1] for s, p in zip(per_sequence, BATCH.prompt_ids, strict=True)]
    bounds = torch.tensor([0, *BATCH.lengths]).cumsum(0)
    prompts = torch.tensor([len(p) for p in BATCH.prompt_ids])

    assert torch.equal(hidden.packed(), packed)
    assert torch.equal(taken, torch.cat(expected))
    assert targets.tolist() == [t for c in BATCH.completion_ids for t in c]
    for mode in ("last", "mean", "prompt_last", "prompt_mean"):
        theirs = pool_hidden(packed, cu_seqlens=bounds, mode=mode, prompt_lengths=prompts)  # type: ignore[arg-type]
        torch.testing.assert_close(hidden.contexts(mode), theirs, rtol=1e-6, atol=1e-6)  # type: ignore[arg-type]
    assert hidden.contexts("prompt_mean").shape == (len(BATCH), 2)
