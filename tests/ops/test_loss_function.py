"""A user's own loss, from log-probs and from hidden states: against autograd in float64 and the options it imitates."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from maestro_fast.ops import (
    LossFunction,
    LossInputs,
    PolicyLoss,
    PolicyLossConfig,
    linear_policy_loss,
    loss_function,
    policy_loss,
)
from maestro_fast.ops.head import Chunk
from tests.ops.helpers import assert_as_accurate, assert_same_compiled, half_products_on_the_cpu
from tests.ops.linear_policy_loss_batch import (
    CHUNK,
    EVERYTHING,
    LENGTHS,
    Batch,
    gradients,
    random_batch,
    values_and_gradients,
    written_logprobs,
)
from tests.ops.test_token_logprobs import IGNORE_TRACING

TOKENS = sum(LENGTHS)
Found = tuple[Tensor, dict[str, Tensor]]


def live(inputs: LossInputs) -> Tensor:
    mask = inputs.token_mask
    return torch.ones_like(inputs.logprobs, dtype=torch.bool) if mask is None else mask != 0


def of_tokens(inputs: LossInputs) -> Tensor:
    """The advantage of each token."""
    counts = inputs.cu_seqlens.diff().to(inputs.advantages.device)
    return inputs.advantages.repeat_interleave(counts, output_size=len(inputs.logprobs))


def ratios(inputs: LossInputs) -> Tensor:
    old = inputs.logprobs.detach() if inputs.old_logprobs is None else inputs.old_logprobs
    return torch.where(live(inputs), inputs.logprobs - old, 0.0).exp()


def clipped(inputs: LossInputs) -> Found:
    """DAPO's loss as a user would write it."""
    ratio, advantages = ratios(inputs), of_tokens(inputs)
    loss = -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    tokens = live(inputs).sum()
    total = torch.where(live(inputs), loss, 0.0).sum()
    return total / inputs.normalizer, {"ratio": torch.where(live(inputs), ratio, 0.0).sum() / tokens}


@loss_function(row_wise=True)
def clipped_by_rows(inputs: LossInputs) -> Found:
    return clipped(inputs)


@loss_function(row_wise=True, entropies=True)
def with_entropies(inputs: LossInputs) -> Found:
    """DAPO's loss with a k3 KL and an entropy bonus."""
    loss, metrics = clipped(inputs)
    gap = torch.where(live(inputs), inputs.ref_logprobs - inputs.logprobs, 0.0)
    entropy = torch.where(live(inputs), inputs.entropies, 0.0).sum() / live(inputs).sum()
    kl = (gap.expm1() - gap).sum()
    return loss + 0.1 * kl / inputs.normalizer - 0.05 * entropy, metrics | {"kl": kl / live(inputs).sum()}


@loss_function(entropies=True)
def mixed(inputs: LossInputs) -> Found:
    """Every token's gradient depends on all other tokens: a squared mean, ratios of responses, weights by entropies."""
    ratio, mask = ratios(inputs), live(inputs)
    log_ratio = torch.where(mask, ratio.log(), 0.0)
    sums = torch.segment_reduce(log_ratio, "sum", offsets=inputs.cu_seqlens, axis=0, initial=0)
    entropies = torch.where(mask, inputs.entropies, 0.0)
    weight = entropies / entropies.sum()
    sequences = (sums.exp() * inputs.advantages).mean()
    return (weight * ratio * of_tokens(inputs)).sum() ** 2 - sequences, {"largest": ratio.max()}


LOSSES: dict[str, LossFunction] = {
    "unmarked": clipped,
    "row-wise": clipped_by_rows,
    "row-wise, with entropies": with_entropies,
    "of the whole batch": mixed,
}
SAME_AS = {
    "unmarked": PolicyLossConfig("dapo"),
    "row-wise": PolicyLossConfig("dapo"),
    "row-wise, with entropies": PolicyLossConfig("dapo", kl_coef=0.1, entropy_coef=0.05),
}


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("maestro_fast.ops.head.chunk_rows", lambda vocabulary, device: CHUNK)


def given(batch: Batch) -> dict[str, Any]:
    return {**batch.tokenwise, "normalizer": 100.0}


def ours(batch: Batch, loss: Any, head: dict[str, Any] | None = None, **options: Any) -> Any:
    """From hidden states."""
    return linear_policy_loss(
        batch.hidden, batch.lm_head, batch.targets, batch.advantages, batch.cu_seqlens,
        bias=batch.bias, config=loss, **(head or {}), **{**given(batch), **options},
    )  # fmt: skip


def composed(batch: Batch, loss: LossFunction, head: dict[str, Any] | None = None, **options: Any) -> Any:
    """From all logits, by autograd."""
    logprobs, entropies = written_logprobs(batch, **(head or {}))
    inputs = {**given(batch), **options, "entropies": entropies}
    return PolicyLoss(*loss(LossInputs(logprobs, batch.advantages, batch.cu_seqlens, **inputs)))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("on_policy", [False, True])
@pytest.mark.usefixtures("small_chunks")
def test_loss_metrics_and_gradients_are_those_of_autograd(name: str, masked: bool, on_policy: bool) -> None:
    batch = random_batch(masked=masked).to(torch.float64)
    options = {"old_logprobs": None} if on_policy else {}
    mine, wanted = (f(batch, LOSSES[name], EVERYTHING, **options) for f in (ours, composed))
    torch.testing.assert_close(mine.loss, wanted.loss, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(mine.metrics, wanted.metrics, rtol=1e-11, atol=1e-13)
    assert mine.metrics and not any(x.requires_grad for x in mine.metrics.values())
    for one, other in zip(gradients(mine, batch), gradients(wanted, batch), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-13)
        assert other.abs().max() > 1e-4


@pytest.mark.parametrize("name", SAME_AS)
@pytest.mark.usefixtures("small_chunks")
def test_options_written_as_a_function_give_what_the_options_give(name: str) -> None:
    batch = random_batch().to(torch.float64)
    mine, wanted = ours(batch, LOSSES[name]), ours(batch, SAME_AS[name])
    torch.testing.assert_close(mine.loss, wanted.loss, rtol=1e-11, atol=1e-13)
    for metric, value in mine.metrics.items():
        torch.testing.assert_close(value, wanted.metrics[metric], rtol=1e-11, atol=1e-13)
    for one, other in zip(gradients(mine, batch), gradients(wanted, batch), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("name", SAME_AS)
def test_from_log_probs_it_gives_what_the_options_give(name: str) -> None:
    batch = random_batch().to(torch.float64)
    generator = torch.Generator().manual_seed(5)
    logprobs = (batch.tokenwise["old_logprobs"] + 0.2).requires_grad_()
    entropies = torch.rand(TOKENS, dtype=torch.float64, generator=generator).requires_grad_()
    arguments: dict[str, Any] = {**given(batch), "entropies": entropies}
    mine, wanted = (
        policy_loss(logprobs, batch.advantages, batch.cu_seqlens, config=loss, **arguments)
        for loss in (LOSSES[name], SAME_AS[name])
    )
    torch.testing.assert_close(mine.loss, wanted.loss, rtol=1e-12, atol=1e-14)
    read = [logprobs] if "entropies" not in name else [logprobs, entropies]
    for one, other in zip(torch.autograd.grad(mine.loss, read), torch.autograd.grad(wanted.loss, read), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)
        assert other.abs().max() > 1e-6


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("chunk", [5, CHUNK, 2 * TOKENS])
def test_chunks_change_nothing(name: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = random_batch().to(torch.float64)
    expected = values_and_gradients(ours, batch, LOSSES[name])
    monkeypatch.setattr("maestro_fast.ops.head.chunk_rows", lambda vocabulary, device: chunk)
    for one, other in zip(values_and_gradients(ours, batch, LOSSES[name]), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-13)


# --- how often rows and function are worked ---


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How many rows went through which product of the head."""
    count: Counter[str] = Counter()

    def counted(name: str) -> Callable[..., Any]:
        original = getattr(Chunk, name)

        def method(chunk: Chunk, *args: Any) -> Any:
            count[name] += chunk.rows
            return original(chunk, *args)

        return method

    for name in ("logits", "dhidden", "add_dweight_"):
        monkeypatch.setattr(Chunk, name, counted(name))
    return count


@pytest.mark.usefixtures("small_chunks")
def test_a_row_wise_loss_takes_three_products_and_any_other_four(rows: Counter[str]) -> None:
    batch = random_batch(masked=False).to(torch.float32)
    for loss, sweeps in ((clipped_by_rows, 1), (clipped, 2)):
        rows.clear()
        gradients(ours(batch, loss), batch)
        assert rows == {"logits": sweeps * TOKENS, "dhidden": TOKENS, "add_dweight_": TOKENS}


def test_a_batch_of_one_chunk_takes_three_products(rows: Counter[str]) -> None:
    batch = random_batch(masked=False).to(torch.float32)
    gradients(ours(batch, mixed), batch)
    assert rows == {"logits": TOKENS, "dhidden": TOKENS, "add_dweight_": TOKENS}


@pytest.mark.usefixtures("small_chunks")
def test_masked_rows_skip_the_head(rows: Counter[str]) -> None:
    batch = random_batch().to(torch.float32)
    count = int((batch.tokenwise["token_mask"] != 0).sum())
    gradients(ours(batch, clipped_by_rows), batch)
    assert set(rows.values()) == {count}


@pytest.mark.usefixtures("small_chunks")
def test_a_loss_that_is_not_row_wise_is_called_once(rows: Counter[str]) -> None:
    """So that a function which draws random numbers has a loss and a gradient that belong together."""
    calls: list[LossInputs] = []

    def noisy(inputs: LossInputs) -> Found:
        calls.append(inputs)
        return (inputs.logprobs * torch.rand(TOKENS)).sum(), {}

    batch = random_batch(masked=False).to(torch.float32)
    gradients(ours(batch, noisy), batch)
    assert len(calls) == 1
    rows.clear()
    with torch.no_grad():
        assert not ours(batch, noisy).loss.requires_grad
    assert len(calls) == 2 and rows == {"logits": TOKENS}


@pytest.mark.usefixtures("small_chunks")
def test_what_the_function_gets() -> None:
    seen: list[LossInputs] = []

    def look(inputs: LossInputs) -> Found:
        seen.append(inputs)
        return inputs.logprobs.sum(), {}

    batch = random_batch().to(torch.float32)
    batch.targets[0] = -100
    found = ours(batch, look)
    inputs = seen[0]
    live_T = (batch.tokenwise["token_mask"] != 0) & (batch.targets != -100)
    assert torch.equal(inputs.token_mask, live_T) and inputs.token_mask.dtype is torch.bool
    assert inputs.entropies is None and inputs.normalizer == 100.0 and inputs.entropy_normalizer is None
    assert torch.equal(inputs.logprobs[live_T].detach(), found.logprobs[live_T])
    loss_function(entropies=True)(look)
    ours(batch, look)
    assert (seen[-1].entropies[live_T] > 0).all() and seen[-1].entropies.requires_grad


def test_the_mean_entropy_is_a_metric_of_any_loss() -> None:
    batch = random_batch().to(torch.float64)
    mine, wanted = (ours(batch, loss, mean_entropy=True).metrics["entropy"] for loss in (clipped, SAME_AS["unmarked"]))
    assert mine > 0 and torch.equal(mine, wanted)


# --- numbers ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.usefixtures("small_chunks")
def test_error_is_that_of_the_composition(name: str, dtype: torch.dtype) -> None:
    batch = random_batch(dtype=dtype)
    truth = values_and_gradients(composed, batch.to(torch.float64), LOSSES[name])
    plain = values_and_gradients(composed, batch.to(torch.float32), LOSSES[name])
    got = values_and_gradients(ours, batch.to(dtype), LOSSES[name])
    rounding = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    for i, (mine, theirs, wanted) in enumerate(zip(got, plain, truth, strict=True)):
        epsilon = (2e-6 if i < len(got) - 3 else rounding) * wanted.abs().max().item() + 1e-7
        assert_as_accurate(mine, theirs, wanted, epsilon=epsilon)


@pytest.mark.parametrize("name", ["row-wise", "of the whole batch"])
@pytest.mark.parametrize("size", [1.0, 1e9])
def test_a_float16_head_keeps_the_gradients_of_a_small_loss(
    name: str, size: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the loss is worth is known before the first product: its gradients are scaled by themselves."""
    half_products_on_the_cpu(monkeypatch)
    monkeypatch.setattr("maestro_fast.ops.head.chunk_rows", lambda vocabulary, device: CHUNK)

    @loss_function(row_wise=name == "row-wise", entropies=True)
    def small(inputs: LossInputs) -> Found:
        loss, metrics = LOSSES[name](inputs)
        return loss / size, metrics

    exact = random_batch(dtype=torch.float16)
    batch, truth = exact.to(torch.float16), exact.to(torch.float64)
    mine = torch.autograd.grad(ours(batch, small).loss * size, [x for x in batch.leaves if x is not None])
    wanted = gradients(composed(truth, LOSSES[name]), truth)
    for one, other in zip(mine, wanted, strict=True):
        assert (one.double() - other).abs().max() < 2**-9 * other.abs().max()


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.usefixtures("small_chunks")
def test_a_masked_row_may_hold_anything(name: str) -> None:
    clean = random_batch()
    dead = clean.tokenwise["token_mask"] == 0
    batch = replace(clean, hidden=torch.where(dead[:, None], float("nan"), clean.hidden))
    expected = values_and_gradients(ours, clean.to(torch.float32), LOSSES[name])
    result = values_and_gradients(ours, batch.to(torch.float32), LOSSES[name])
    assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))
    assert (result[-3][dead] == 0).all()


@pytest.mark.parametrize("offset", [-1e4, 1e4])
@pytest.mark.usefixtures("small_chunks")
def test_strongly_negative_and_positive_logits(offset: float) -> None:
    """A bias for all tokens alike moves every logit and no probability."""
    batch = random_batch(masked=False)
    batch = replace(batch, bias=torch.full((61,), offset, dtype=torch.float64))
    for loss in (clipped, with_entropies):
        truth = values_and_gradients(composed, batch.to(torch.float64), loss)
        plain = values_and_gradients(composed, batch.to(torch.float32), loss)
        got = values_and_gradients(ours, batch.to(torch.float32), loss)
        for mine, theirs, wanted in zip(got, plain, truth, strict=True):
            assert_as_accurate(mine, theirs, wanted, epsilon=1e-5 * max(1.0, wanted.abs().max().item()))


@pytest.mark.parametrize("lengths", [(1,), (3, 0), (7,)])
def test_a_few_tokens(lengths: tuple[int, ...]) -> None:
    batch = random_batch(lengths=lengths, masked=False).to(torch.float64)
    mine, wanted = (values_and_gradients(f, batch, mixed) for f in (ours, composed))
    for one, other in zip(mine, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-13)


@IGNORE_TRACING
@pytest.mark.parametrize("name", ["row-wise, with entropies", "of the whole batch"])
def test_compiles_to_one_graph(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The host knows nothing in a graph: to be bitwise the same, eager mode must not either."""
    monkeypatch.setattr("maestro_fast.ops.sweep.readable", lambda x: False)
    monkeypatch.setattr("maestro_fast.ops.head.chunk_rows", lambda vocabulary, device: 32)
    batch = random_batch().to(torch.float32)
    tokenwise = {name: x for name, x in batch.tokenwise.items() if x is not None}

    def op(hidden: Tensor, lm_head: Tensor, bias: Tensor, *rest: Tensor) -> list[Tensor]:
        targets, advantages, bounds, *others = rest
        loss, metrics, logprobs = linear_policy_loss(
            hidden, lm_head, targets, advantages, bounds, bias=bias, normalizer=50.0, config=LOSSES[name],
            **dict(zip(tokenwise, others, strict=True)),
        )  # fmt: skip
        return [loss, *metrics.values(), logprobs]

    arguments = (*batch.leaves, batch.targets, batch.advantages, batch.cu_seqlens, *tokenwise.values())
    assert_same_compiled(op, *arguments)


# --- what is refused ---


def returning(found: Any) -> LossFunction:
    def my_loss(inputs: LossInputs) -> Any:
        return found(inputs) if callable(found) else found

    return my_loss


EXPECTED = "expected a scalar loss and a dict of scalar metrics, all of them tensors"
WRONG = [
    (lambda x: x.logprobs.sum(), rf"my_loss returned a float32 tensor of shape \(\), {EXPECTED}"),
    (None, f"my_loss returned a NoneType, {EXPECTED}"),
    (lambda x: (x.logprobs, {}), rf"my_loss returned a loss that is a float32 tensor of shape \(5,\), {EXPECTED}"),
    ((1.0, {}), f"my_loss returned a loss that is a float, {EXPECTED}"),
    (lambda x: (x.logprobs.sum(), []), f"my_loss returned metrics that are a list, {EXPECTED}"),
    (lambda x: (x.logprobs.sum(), {"kl": 0.1}), f"my_loss returned a metric 'kl' that is a float, {EXPECTED}"),
    (
        lambda x: (x.logprobs.sum(), {"kl": x.logprobs}),
        rf"my_loss returned a metric 'kl' that is a float32 tensor of shape \(5,\), {EXPECTED}",
    ),
    (lambda x: (x.logprobs.sum(), {}, 1), f"my_loss returned a tuple of 3, {EXPECTED}"),
]


def call(loss: Any, **changes: Any) -> Any:
    arguments: dict[str, Any] = {
        "hidden": torch.ones(5, 4, requires_grad=True),
        "lm_head": torch.ones(7, 4),
        "targets": torch.zeros(5, dtype=torch.int64),
        "advantages": torch.full((2,), 2.0),
        "cu_seqlens": torch.tensor([0, 2, 5]),
        **changes,
    }
    return linear_policy_loss(**arguments, config=loss)


@pytest.mark.parametrize(("found", "message"), WRONG)
def test_errors_say_what_the_function_returned(found: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(returning(found))
    with pytest.raises(ValueError, match=message):
        policy_loss(torch.ones(5), torch.ones(2), torch.tensor([0, 2, 5]), config=returning(found))


def test_a_loss_without_a_graph_is_refused() -> None:
    def without(inputs: LossInputs) -> Found:
        return inputs.logprobs.detach().sum(), {}

    with pytest.raises(ValueError, match="without returned a loss without a graph, expected one that is computed from"):
        call(without)
    with torch.no_grad():
        assert call(without).loss.isfinite()


def test_other_errors_name_the_argument() -> None:
    logprobs, advantages, bounds = torch.ones(5), torch.ones(2), torch.tensor([0, 2, 5])
    with pytest.raises(ValueError, match="active: given with a loss function"):
        call(clipped, active=torch.ones(2, dtype=torch.bool))
    with pytest.raises(TypeError, match="config: got dict, expected a PolicyLossConfig or a function of LossInputs"):
        call({"normalization": "dapo"})
    with pytest.raises(ValueError, match="backend: 'triton' cannot serve a loss function, expected 'torch' or None"):
        policy_loss(logprobs, advantages, bounds, config=clipped, backend="triton")
    with pytest.raises(ValueError, match=r"entropies: missing, expected \[T\] for mixed, which is marked to read them"):
        policy_loss(logprobs, advantages, bounds, config=mixed)
    with pytest.raises(ValueError, match=r"old_logprobs: shape \(4,\), expected \(5,\)"):
        call(clipped, old_logprobs=torch.ones(4))
