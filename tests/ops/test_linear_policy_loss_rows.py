"""The loss from hidden states: what a row may depend on, and the memory that many rows may take."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from maestro_fast.ops import token_logprobs
from tests.ops.linear_policy_loss_batch import (
    ALL_VARIANTS,
    CHUNK,
    EVERYTHING,
    LENGTHS,
    Batch,
    gradients,
    random_batch,
    values_and_gradients,
)
from tests.ops.parity import make
from tests.training.live_memory import LiveMemory

TOKENS = sum(LENGTHS)

# --- independence of the rest of the batch ---


def batch_at(rows: int, *, width: int = 300, vocabulary: int = 1003, dtype: torch.dtype = torch.bfloat16) -> Batch:
    """The first responses, of one token each, of one and the same batch."""
    whole = random_batch(lengths=(1,) * 40, vocabulary=vocabulary, width=width, bias=False, masked=False, dtype=dtype)
    return replace(
        whole,
        hidden=whole.hidden[:rows],
        targets=whole.targets[:rows],
        advantages=whole.advantages[:rows],
        lengths=whole.lengths[:rows],
        tokenwise={name: None if x is None else x[:rows] for name, x in whole.tokenwise.items()},
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 3, 7])
def test_a_row_does_not_depend_on_its_batch(rows: int, dtype: torch.dtype) -> None:
    config, options = make("dapo", kl_coef=0.1, entropy_coef=0.1), {"entropy_normalizer": 40.0, "normalizer": 40.0}
    few, all_of_them = (batch_at(n, dtype=dtype).to(dtype) for n in (rows, 40))
    alone, among = (gradients(batch.ours(config, **options), batch)[0] for batch in (few, all_of_them))
    assert torch.equal(alone, among[:rows])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", ["grpo", "gspo", "cispo"])
@pytest.mark.parametrize("chunks", ["few rows", "many rows"])
def test_on_policy_every_ratio_is_exactly_one(
    variant: str, dtype: torch.dtype, chunks: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The log-probs are bitwise those of ``token_logprobs``, scored in another order and among other rows."""
    if chunks == "few rows":
        monkeypatch.setattr("maestro_fast.ops.head.chunk_rows", lambda vocabulary, device: CHUNK)
    batch = random_batch(width=300, vocabulary=1003).to(dtype)
    order = torch.randperm(TOKENS, generator=torch.Generator().manual_seed(1))
    hidden, targets = batch.hidden.detach()[order], batch.targets[order]
    scored = token_logprobs(
        torch.cat([hidden[:9] * 7, hidden]),
        batch.lm_head.detach(),
        torch.cat([targets[:9], targets]),
        bias=batch.bias,
        **EVERYTHING,
    ).logprobs[9:]
    old = torch.empty_like(scored)
    old[order] = scored
    metrics = batch.ours(ALL_VARIANTS[variant], EVERYTHING, old_logprobs=old.detach()).metrics
    assert metrics["ratio"] == 1 and metrics["clip_low"] == 0 and metrics["clip_high"] == 0
    nudged = torch.nextafter(old[0], torch.tensor(0.0))
    old[0] = nudged  # one ratio that is not 1 shows
    assert batch.ours(ALL_VARIANTS[variant], EVERYTHING, old_logprobs=old.detach() + 1e-3).metrics["ratio"] != 1


def test_two_runs_are_bitwise_equal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("maestro_fast.ops.head.chunk_rows", lambda vocabulary, device: CHUNK)
    batch = random_batch().to(torch.float32)
    first, second = (values_and_gradients(Batch.ours, batch, ALL_VARIANTS["gspo"]) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_autocast_changes_nothing() -> None:
    batch = random_batch().to(torch.float32)
    expected = values_and_gradients(Batch.ours, batch, make("grpo"))
    with torch.autocast("cpu", torch.bfloat16):
        result = values_and_gradients(Batch.ours, batch, make("grpo"))
    assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))


# --- memory ---


@pytest.mark.parametrize("kept", [False, True])
def test_the_gradient_of_the_head_is_copied_only_for_a_graph_that_is_kept(kept: bool) -> None:
    batch = random_batch(lengths=(5, 4), vocabulary=5000, width=8, masked=False).to(torch.float32)
    loss, head = batch.ours(make("dapo")).loss * 0.5, 4 * 5000 * 8
    expected = torch.autograd.grad(batch.ours(make("dapo")).loss * 0.5, batch.lm_head)[0]
    with LiveMemory() as memory:
        loss.backward(retain_graph=kept)
    assert (memory.peak > 1.5 * head) is kept  # The gradient itself is seen, too.
    assert batch.lm_head.grad is not None and torch.equal(batch.lm_head.grad, expected)
    if kept:
        loss.backward()
        assert torch.equal(batch.lm_head.grad, 2 * expected)


@pytest.mark.parametrize("variant", ["dapo", "gspo, KL, entropy bonus"])
def test_the_peak_does_not_grow_with_rows_times_vocabulary(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few chunks of logits, and what the gradients need: [T, d] and [V, d]."""
    monkeypatch.setattr("maestro_fast.ops.head.chunk_rows", lambda vocabulary, device: 128)

    def peak(chunks: int) -> tuple[int, int]:
        batch = random_batch(lengths=(100,) * chunks, vocabulary=5000, width=8, masked=False).to(torch.float32)
        with LiveMemory() as memory:
            gradients(batch.ours(ALL_VARIANTS[variant]), batch)
        return memory.peak, sum(100 * chunks * 4 * n for n in (8, 8, 20))  # states, their gradient, [T]-sized values

    (few, few_rows), (many, many_rows) = peak(2), peak(10)
    logits = 4 * 128 * 5000
    assert many - few <= many_rows - few_rows < logits
    assert few <= few_rows + 6 * logits + 4 * (4 * 5000 * 8)
