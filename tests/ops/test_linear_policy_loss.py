"""The loss from hidden states against all logits and ``policy_loss`` in float64, for every variant and every head."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from maestro_fast.ops import policy_loss, token_logprobs
from maestro_fast.ops.head import chunk_rows
from tests.ops.helpers import assert_as_accurate
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
from tests.ops.test_token_logprobs import HEADS

CPU = torch.device("cpu")
TOKENS = sum(LENGTHS)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("maestro_fast.ops.head.chunk_rows", lambda vocabulary, device: CHUNK)


def assert_equal(batch: Batch, config: Any, head: dict[str, Any] | None = None, **options: Any) -> None:
    """To rounding in float64: loss, metrics, and the gradients of hidden, lm_head and bias."""
    batch = batch.to(torch.float64)
    ours, written = (f(config, head, **options) for f in (batch.ours, batch.composed))
    torch.testing.assert_close(ours.loss, written.loss, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(ours.metrics, written.metrics, rtol=1e-11, atol=1e-13)
    for mine, wanted in zip(gradients(ours, batch), gradients(written, batch), strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-10, atol=1e-13)


# --- every variant, every head ---


@pytest.mark.parametrize("variant", ALL_VARIANTS)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("on_policy", [False, True])
@pytest.mark.usefixtures("small_chunks")
def test_equals_the_composition(variant: str, masked: bool, on_policy: bool) -> None:
    batch = random_batch(masked=masked)
    assert_equal(batch, ALL_VARIANTS[variant], EVERYTHING, **({"old_logprobs": None} if on_policy else {}))


@pytest.mark.parametrize("variant", ALL_VARIANTS)
def test_equals_the_composition_in_one_chunk(variant: str) -> None:
    assert chunk_rows(61, CPU) > TOKENS
    assert_equal(random_batch(), ALL_VARIANTS[variant])


@pytest.mark.parametrize("variant", ALL_VARIANTS)
def test_the_inputs_reach_every_branch(variant: str) -> None:
    """So that no variant is tested on inputs on which it is the same as none."""
    batch = random_batch().to(torch.float64)
    options = batch.given(ALL_VARIANTS[variant], {})
    logprobs = token_logprobs(batch.hidden, batch.lm_head, batch.targets, bias=batch.bias, entropy="grad")
    metrics = policy_loss(
        logprobs.logprobs,
        batch.advantages,
        batch.cu_seqlens,
        entropies=logprobs.entropies,
        config=ALL_VARIANTS[variant],
        **options,
    ).metrics
    assert metrics["clip_high"] > 0 and (metrics["clip_low"] > 0 or ALL_VARIANTS[variant].objective == "cispo")


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("variant", ["dapo", "gspo, KL, entropy bonus"])
@pytest.mark.usefixtures("small_chunks")
def test_heads(head: str, variant: str) -> None:
    options = dict(HEADS[head])
    assert_equal(random_batch(bias=options.pop("bias", False)), ALL_VARIANTS[variant], options)


@pytest.mark.parametrize("normalization", ["grpo", "bnpo", "dapo", "dr_grpo"])
@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.usefixtures("small_chunks")
def test_a_normalizer_that_is_given(normalization: str, as_tensor: bool) -> None:
    normalizers = {"normalizer": 19.5, "entropy_normalizer": 7.5}
    if as_tensor:
        normalizers = {name: torch.tensor(x) for name, x in normalizers.items()}
    assert_equal(random_batch(), make(normalization, entropy_coef=0.1), **normalizers)


# --- accuracy in other dtypes ---

# Relative to the largest true element, beyond the error of the composition in float32 (for half precision too). The
# gradients leave in the dtype of the inputs, whose rounding is 2^-8 in bfloat16 and 2^-11 in float16.
EPSILONS = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}


@pytest.mark.parametrize("dtype", EPSILONS)
@pytest.mark.parametrize("variant", ["grpo", "gspo, KL, entropy bonus", "cispo", "sampler sequence_mask"])
@pytest.mark.usefixtures("small_chunks")
def test_error_is_that_of_the_composition(variant: str, dtype: torch.dtype) -> None:
    config = ALL_VARIANTS[variant]
    batch = random_batch(dtype=dtype)
    truth = values_and_gradients(Batch.composed, batch.to(torch.float64), config, EVERYTHING)
    plain = values_and_gradients(Batch.composed, batch.to(torch.float32), config, EVERYTHING)
    got = values_and_gradients(Batch.ours, batch.to(dtype), config, EVERYTHING)
    for i, (mine, theirs, wanted) in enumerate(zip(got, plain, truth, strict=True)):
        is_value = i < len(got) - 3
        assert mine.dtype == (torch.float32 if is_value else dtype)
        epsilon = (2e-6 if is_value else EPSILONS[dtype]) * wanted.abs().max().item() + 1e-7 * is_value
        assert_as_accurate(mine, theirs, wanted, epsilon=epsilon)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_vocabulary_of_qwen(dtype: torch.dtype) -> None:
    batch = random_batch(lengths=(2, 1), vocabulary=151_936, dtype=dtype, masked=False)
    config = make("grpo", entropy_coef=0.1)
    truth = values_and_gradients(Batch.composed, batch.to(torch.float64), config)
    plain = values_and_gradients(Batch.composed, batch.to(torch.float32), config)
    got = values_and_gradients(Batch.ours, batch.to(dtype), config)
    for mine, theirs, wanted in zip(got, plain, truth, strict=True):
        assert_as_accurate(mine, theirs, wanted, epsilon=EPSILONS[dtype] * max(wanted.abs().max().item(), 1e-3))


@pytest.mark.parametrize("offset", [-1e4, 1e4])
def test_strongly_negative_and_positive_logits(offset: float) -> None:
    """A bias for all tokens alike moves every logit and no probability."""
    batch = random_batch(masked=False)
    batch = replace(batch, bias=torch.full((61,), offset, dtype=torch.float64))
    config = make("bnpo", entropy_coef=0.1)
    truth = values_and_gradients(Batch.composed, batch.to(torch.float64), config)
    plain = values_and_gradients(Batch.composed, batch.to(torch.float32), config)
    got = values_and_gradients(Batch.ours, batch.to(torch.float32), config)
    for mine, theirs, wanted in zip(got, plain, truth, strict=True):
        assert_as_accurate(mine, theirs, wanted, epsilon=2e-6)


def test_peaked_rows() -> None:
    """Logits hundreds of nats apart: most of exp is 0, and the ratios of what is far off are 0 or infinite."""
    batch = random_batch(bias=False, masked=False)
    batch = replace(batch, hidden=batch.hidden * 60)
    assert_equal(batch, make("bnpo", entropy_coef=0.1), old_logprobs=None)
    far = token_logprobs(batch.hidden, batch.lm_head, batch.targets).logprobs
    assert far.min() < -300
    assert_equal(batch, make("bnpo", entropy_coef=0.1), old_logprobs=far + 0.2 * batch.tokenwise["old_logprobs"])


# --- what it is to be given little, or nothing ---


@pytest.mark.parametrize("lengths", [(), (0,), (0, 0), (1,), (3, 0), (7,)])
@pytest.mark.parametrize("variant", ["grpo", "gspo, KL, entropy bonus", "sampler sequence_mask"])
def test_a_few_tokens_and_none(lengths: tuple[int, ...], variant: str) -> None:
    assert_equal(random_batch(lengths=lengths, masked=False), ALL_VARIANTS[variant])


@pytest.mark.parametrize("variant", ["grpo", "gspo, KL, entropy bonus"])
@pytest.mark.usefixtures("small_chunks")
def test_all_masked(variant: str) -> None:
    batch = random_batch().to(torch.float64)
    result = batch.ours(ALL_VARIANTS[variant], token_mask=torch.zeros(TOKENS))
    assert result.loss == 0 and all((x == 0).all() for x in gradients(result, batch))


@pytest.mark.parametrize("variant", ["grpo", "gspo, KL, entropy bonus"])
@pytest.mark.usefixtures("small_chunks")
def test_a_masked_row_may_hold_anything(variant: str) -> None:
    clean = random_batch()
    dead = clean.tokenwise["token_mask"] == 0
    batch = replace(
        clean,
        hidden=torch.where(dead[:, None], float("nan"), clean.hidden),
        tokenwise={
            name: x if x is None or name == "token_mask" else torch.where(dead, float("nan"), x)
            for name, x in clean.tokenwise.items()
        },
    )
    expected = values_and_gradients(Batch.ours, clean.to(torch.float32), ALL_VARIANTS[variant])
    result = values_and_gradients(Batch.ours, batch.to(torch.float32), ALL_VARIANTS[variant])
    assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))
    assert (result[-3][dead] == 0).all()


@pytest.mark.usefixtures("small_chunks")
def test_a_target_to_ignore_is_a_masked_token() -> None:
    batch = random_batch().to(torch.float32)
    masked = batch.tokenwise["token_mask"] == 0
    ignoring = replace(batch, targets=torch.where(masked, -100, batch.targets))
    expected = values_and_gradients(Batch.ours, batch, make("grpo"))
    result = values_and_gradients(Batch.ours, ignoring, make("grpo"), token_mask=None)
    assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))


def test_gradients_are_made_for_what_wants_them() -> None:
    whole = random_batch().to(torch.float32)
    expected = dict(zip(("hidden", "lm_head", "bias"), gradients(whole.ours(make("grpo")), whole), strict=True))
    for wanted, value in expected.items():
        frozen = {name: getattr(whole, name).detach() for name in expected if name != wanted}
        batch = replace(whole, **frozen)
        assert torch.equal(gradients(batch.ours(make("grpo")), batch)[0], value)


def test_the_gradient_is_scaled_by_what_comes_in_and_may_be_asked_for_twice() -> None:
    batch = random_batch().to(torch.float32)
    result = batch.ours(make("grpo"))
    first = torch.autograd.grad(result.loss, batch.hidden, retain_graph=True)[0]
    four = torch.tensor(4.0, requires_grad=True)
    (again,) = torch.autograd.grad(four * result.loss, batch.hidden, create_graph=True)
    assert torch.equal(again, 4 * first) and not result.metrics["ratio"].requires_grad
    with pytest.raises(RuntimeError, match="once_differentiable"):
        again.sum().backward()


def test_the_gradient_of_a_small_loss_survives_float16() -> None:
    """A scaler multiplies the loss: what backward() returns must be in range, not what forward() keeps."""
    batch = random_batch(dtype=torch.float16)
    half, exact = batch.to(torch.float16), batch.to(torch.float32)
    result = 1e10 * half.ours(make("dapo"), normalizer=1e12).loss
    (got,) = torch.autograd.grad(result, half.hidden)
    (wanted,) = torch.autograd.grad(exact.ours(make("dapo"), normalizer=1e2).loss, exact.hidden)
    torch.testing.assert_close(got.float(), wanted, rtol=1e-3, atol=1e-6)


def test_the_mean_entropy() -> None:
    assert_equal(random_batch(), make("grpo"), EVERYTHING, mean_entropy=True)
    assert_equal(random_batch(masked=False), make("grpo", entropy_coef=0.1), mean_entropy=True)
