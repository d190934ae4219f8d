"""The sweep: in which order rows pass the head, which products they skip, and what that must not change."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from maestro_fast.ops import token_logprobs
from maestro_fast.ops.head import Chunk
from maestro_fast.ops.sweep import Known, Step, sweep_steps
from tests.ops.linear_policy_loss_batch import (
    ALL_VARIANTS,
    CHUNK,
    LENGTHS,
    Batch,
    gradients,
    random_batch,
    values_and_gradients,
)
from tests.ops.parity import make

TOKENS = sum(LENGTHS)
GEMMS = ("logits", "dhidden", "add_dweight_")


@dataclass
class Work:
    """How many rows went through each product of the head, without padding."""

    rows: Counter[str] = field(default_factory=Counter)
    product: int = 1  # rows of a product, which is filled up with zeros

    def of(self, run: Any) -> tuple[int, ...]:
        self.rows.clear()
        run()
        return tuple(self.rows[name] for name in GEMMS)


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> Work:
    """Small chunks, whose rows are counted."""
    work = Work()
    monkeypatch.setattr("maestro_fast.ops.head.chunk_rows", lambda vocabulary, device: CHUNK)
    monkeypatch.setattr("maestro_fast.ops.head.product_rows", lambda device: work.product)

    def counted(name: str) -> Any:
        original = getattr(Chunk, name)

        def method(self: Chunk, *args: Any) -> Any:
            assert self.rows <= CHUNK
            work.rows[name] += self.rows
            return original(self, *args)

        return method

    for name in GEMMS:
        monkeypatch.setattr(Chunk, name, counted(name))
    return work


# --- which rows go through which GEMM ---


def with_zeros(*, masked: bool = False) -> tuple[Batch, Tensor]:
    """A batch in which the advantages of some responses, one of them long, are 0, and which rows these are."""
    batch = random_batch(masked=masked)
    zero_B = torch.tensor([length in (4, 7, 37, 2) for length in LENGTHS])
    batch = replace(batch, advantages=torch.where(zero_B, 0.0, batch.advantages))
    return batch.to(torch.float32), zero_B.repeat_interleave(torch.tensor(LENGTHS))


def run(batch: Batch, variant: str, **options: Any) -> list[Tensor]:
    return values_and_gradients(Batch.ours, batch, ALL_VARIANTS[variant], **options)


VARIANTS = ["grpo", "dapo", "gspo", "cispo", "sampler token_mask", "two-sided clip"]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("masked", [False, True])
def test_rows_without_a_gradient_leave_its_gemms(variant: str, masked: bool, work: Work) -> None:
    batch, zero_T = with_zeros(masked=masked)
    live_T = batch.tokenwise["token_mask"] != 0 if masked else torch.ones(TOKENS, dtype=torch.bool)
    with_gradient = int((live_T & ~zero_T).sum())
    forward = int(live_T.sum())
    assert work.of(lambda: run(batch, variant)) == (forward, with_gradient, with_gradient)


@pytest.mark.parametrize("variant", ["k3 KL", "entropy bonus", "gspo, KL, entropy bonus"])
def test_rows_of_advantage_zero_keep_the_gradient_of_kl_and_entropy(variant: str, work: Work) -> None:
    batch, zero_T = with_zeros()
    long = max(LENGTHS) if "gspo" in variant else 0
    assert work.of(lambda: run(batch, variant)) == (TOKENS + long, TOKENS, TOKENS)
    assert (run(batch, variant)[-3][zero_T] != 0).any(-1).all()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("masked", [False, True])
def test_compaction_changes_nothing(variant: str, masked: bool, work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the host can read nothing, all rows take part in every product, as zeros: the results are the same."""
    batch, _ = with_zeros(masked=masked)
    compacted = run(batch, variant)
    monkeypatch.setattr("maestro_fast.ops.sweep.readable", lambda x: False)
    twice = 2 if variant == "gspo" else 1
    assert work.of(lambda: run(batch, variant)) == (twice * TOKENS, TOKENS, TOKENS)
    whole = run(batch, variant)
    for mine, wanted in zip(compacted[:-2], whole[:-2], strict=True):  # loss, metrics and dL/dhidden row by row
        assert torch.equal(mine, wanted)
    for mine, wanted in zip(compacted[-2:], whole[-2:], strict=True):  # sums over rows, in another order
        torch.testing.assert_close(mine, wanted, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("readable", [True, False])
def test_what_is_not_active_leaves_every_gemm_and_the_metrics(
    variant: str, readable: bool, work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch, zero_T = with_zeros(masked=True)
    expected = batch.ours(ALL_VARIANTS[variant])
    live_T = batch.tokenwise["token_mask"] != 0
    nowhere = replace(batch, hidden=torch.where(zero_T[:, None], float("nan"), batch.hidden).detach().requires_grad_())
    old = torch.where(zero_T, -500.0, batch.tokenwise["old_logprobs"])  # their ratio would overflow
    nowhere = replace(nowhere, tokenwise={**batch.tokenwise, "old_logprobs": old})
    given = {"active": batch.advantages != 0}
    if readable:
        with_gradient = int((live_T & ~zero_T).sum())
        found = work.of(lambda: gradients(nowhere.ours(ALL_VARIANTS[variant], **given), nowhere))
        assert found == (with_gradient,) * 3
    else:
        monkeypatch.setattr("maestro_fast.ops.sweep.readable", lambda x: False)
    result = nowhere.ours(ALL_VARIANTS[variant], mean_entropy=True, **given)
    torch.testing.assert_close(result.loss, expected.loss, rtol=1e-6, atol=0)
    for mine, wanted in zip(gradients(result, nowhere), gradients(expected, batch), strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-5, atol=1e-7)
    seen = live_T & ~zero_T
    only = batch.composed(ALL_VARIANTS[variant], mean_entropy=True, token_mask=seen.float()).metrics
    torch.testing.assert_close(result.metrics, only, rtol=1e-5, atol=1e-6)


def test_a_clipped_row_is_exactly_zero(work: Work) -> None:
    """Only the log-probs tell which rows are clipped, so these rows stay in the products, as zeros."""
    batch = random_batch(masked=False).to(torch.float32)
    logprobs = token_logprobs(batch.hidden, batch.lm_head, batch.targets, bias=batch.bias).logprobs.detach()
    ratio = (logprobs - batch.tokenwise["old_logprobs"]).exp()
    advantages_T = batch.advantages.repeat_interleave(torch.tensor(LENGTHS))
    clipped = torch.where(advantages_T > 0, ratio > 1.2, ratio < 0.8)
    dhidden = gradients(batch.ours(make("grpo")), batch)[0]
    assert torch.equal((dhidden == 0).all(-1), clipped) and 5 < clipped.sum() < TOKENS - 5


@pytest.mark.parametrize("variant", ["grpo", "gspo"])
def test_nothing_is_swept_for_a_gradient_that_nobody_wants(variant: str, work: Work) -> None:
    batch = random_batch(masked=False).to(torch.float32)
    expected = batch.ours(ALL_VARIANTS[variant])

    def without() -> None:
        with torch.no_grad():
            result = batch.ours(ALL_VARIANTS[variant])
        assert not result.loss.requires_grad and torch.equal(result.loss, expected.loss)

    assert work.of(without) == (TOKENS, 0, 0)
    frozen = replace(batch, lm_head=batch.lm_head.detach())
    count = TOKENS + (max(LENGTHS) if variant == "gspo" else 0)
    assert work.of(lambda: gradients(frozen.ours(ALL_VARIANTS[variant]), frozen)) == (count, TOKENS, 0)


# --- the order ---


def test_only_a_response_longer_than_a_chunk_is_swept_twice(work: Work) -> None:
    batch = random_batch(masked=False).to(torch.float32)
    assert work.of(lambda: run(batch, "gspo")) == (TOKENS + 37, TOKENS, TOKENS)
    # on-policy, the ratio of a sequence is 1 whatever the log-probs are
    assert work.of(lambda: run(batch, "gspo", old_logprobs=None)) == (TOKENS,) * 3
    # a sampler correction by sequences is known in advance, if old log-probs are
    assert work.of(lambda: run(batch, "sampler sequence_mask")) == (TOKENS,) * 3
    assert work.of(lambda: run(batch, "sampler sequence_mask", old_logprobs=None)) == (TOKENS + 37, TOKENS, TOKENS)


class Sizes(NamedTuple):
    chunk: int
    product_rows: int = 1


def rows_of(steps: list[Step], *, gradient: bool) -> list[list[int]]:
    position = torch.arange(1000)
    return [position[step.rows].tolist() for step in steps if step.gradient is gradient]


def test_steps() -> None:
    bounds = torch.tensor([0, 3, 3, 13, 15, 18])
    has_gradient_B = torch.tensor([True, True, True, False, True])
    worked_T = torch.ones(18, dtype=torch.bool)
    worked_T[4] = False
    known = Known(bounds, worked_T, has_gradient_B)

    steps = sweep_steps(18, Sizes(8), known, gradient=True, scope="token")
    assert rows_of(steps, gradient=False) == [[13, 14]]
    assert rows_of(steps, gradient=True) == [[0, 1, 2, 3, 5, 6, 7, 8], [9, 10, 11, 12, 15, 16, 17]]

    steps = sweep_steps(18, Sizes(8), known, gradient=True, scope="response")
    assert rows_of(steps, gradient=False) == [[13, 14, 3, 5, 6, 7, 8, 9], [10, 11, 12]]
    assert rows_of(steps, gradient=True) == [[0, 1, 2, 15, 16, 17], [3, 5, 6, 7, 8, 9, 10, 11], [12]]
    assert [step.gradient for step in steps] == sorted(step.gradient for step in steps)  # log-probs come first

    steps = sweep_steps(18, Sizes(8), known, gradient=False, scope="response")
    assert rows_of(steps, gradient=True) == []
    assert rows_of(steps, gradient=False) == [[0, 1, 2, 3, 5, 6, 7, 8], [*range(9, 17)], [17]]

    nothing = sweep_steps(18, Sizes(8), Known(), gradient=True, scope="response")
    assert rows_of(nothing, gradient=False) == rows_of(nothing, gradient=True)
    assert nothing[:3] == [(slice(0, 8), False), (slice(8, 16), False), (slice(16, 18), False)]


@pytest.mark.parametrize(
    ("without", "rows", "moved"),
    [(2, 3, 2), (10, 3, 2), (2, 8, 0), (3, 6, 0), (5, 3, 0), (4, 4, 4), (8, 3, 0), (0, 3, 0), (2, 0, 0)],
)
def test_rows_without_a_gradient_fill_up_a_product(without: int, rows: int, moved: int) -> None:
    """Those beyond whole products of 8 rows join the others where they fit in, at most 4 of them."""
    bounds = torch.tensor([0, without, without + rows])
    known = Known(bounds, torch.ones(without + rows, dtype=torch.bool), torch.tensor([False, True]))
    steps = sweep_steps(without + rows, Sizes(16, 8), known, gradient=True, scope="token")
    first, second = ([*chain(*rows_of(steps, gradient=gradient))] for gradient in (False, True))
    assert (first, second) == ([*range(without - moved)], [*range(without - moved, without + rows)])


def test_a_filled_up_product_changes_no_result(work: Work) -> None:
    batch, zero_T = with_zeros()
    apart = run(batch, "dapo")
    work.product = TOKENS + 2 * int(zero_T.sum())  # one product takes all rows
    assert work.of(lambda: run(batch, "dapo")) == (TOKENS,) * 3
    for mine, wanted in zip(run(batch, "dapo"), apart, strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-5, atol=1e-6)


def test_a_range_of_rows_is_not_gathered() -> None:
    """A view of the hidden states instead of a copy."""
    steps = sweep_steps(20, Sizes(8), Known(worked_T=torch.ones(20, dtype=torch.bool)), gradient=True, scope="token")
    assert [step.rows for step in steps] == [slice(0, 8), slice(8, 16), slice(16, 20)]
