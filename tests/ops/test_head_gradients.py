"""16-bit gradients of logits: how they are scaled, and how many rows they have."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from maestro_fast.ops import PolicyLossConfig, linear_policy_loss
from maestro_fast.ops.head import Head, float16_unit, logit_rows
from maestro_fast.specs import HeadSpec
from tests.ops.helpers import half_products_on_the_cpu
from tests.ops.linear_policy_loss_batch import ALL_VARIANTS, CHUNK, gradients, random_batch, written_logprobs
from tests.ops.test_token_logprobs import composed, ours, random_inputs


@pytest.fixture(autouse=True)
def halves(monkeypatch: pytest.MonkeyPatch) -> None:
    half_products_on_the_cpu(monkeypatch)
    monkeypatch.setattr("maestro_fast.ops.head.chunk_rows", lambda vocabulary, device: CHUNK)


@pytest.mark.parametrize("chunk", [1024, 2048, 3072, 4096])
def test_logits_and_gradients_share_the_memory_of_a_chunk(chunk: int) -> None:
    """Whole products of 1,024 rows; one chunk at least."""
    rows = logit_rows(chunk, 1024)
    assert rows % 1024 == 0 and 1024 <= rows <= chunk
    assert rows * 4 + chunk * 2 <= max(chunk * 4, 1024 * 6)
    assert logit_rows(4096, 1024) == 2048


@pytest.mark.parametrize("temperature", [1.0, 0.3])
@pytest.mark.parametrize("slopes", [[3e-9, -5e-7, 0.0], [1.0], [-2.0], [1e4, 3.0], [0.0], []])
def test_the_unit_is_a_power_of_two(slopes: list[float], temperature: float) -> None:
    head = Head.of(torch.zeros(3, 2).half(), None, HeadSpec(1.0, None, temperature, -100, "none"), "torch")
    unit = float16_unit(head, torch.tensor(slopes), None).item()
    assert math.frexp(unit)[0] == 0.5
    largest = max(map(abs, slopes), default=0.0) / temperature
    assert largest == 0 or 64 <= largest * unit < 128
    assert (largest * unit) * 500 < torch.finfo(torch.float16).max


def relative_error(mine: Tensor, truth: Tensor) -> float:
    assert truth.abs().max() > 0
    return float((mine.double() - truth).abs().max() / truth.abs().max())


@pytest.mark.parametrize("tokens", [1.0, 1e6, 1e9])
@pytest.mark.parametrize("variant", ["dapo", "entropy bonus", "k3 KL", "gspo, KL, entropy bonus"])
def test_a_float16_head_keeps_the_share_of_a_token_in_the_loss(variant: str, tokens: float) -> None:
    """However small: whoever scales the loss up afterwards finds all digits of float16 (2^-11) in the sums."""
    exact, config = random_batch(dtype=torch.float16), ALL_VARIANTS[variant]
    divisor = {"normalizer": tokens, "entropy_normalizer": tokens}
    batch = exact.to(torch.float16)
    loss = batch.ours(config, **divisor).loss
    truth = exact.to(torch.float64)
    wanted = torch.autograd.grad(truth.composed(config, **divisor).loss * tokens, truth.leaves)
    for mine, true in zip(torch.autograd.grad(loss * tokens, batch.leaves), wanted, strict=True):
        assert mine.dtype == torch.float16 and relative_error(mine, true) < 2**-9


@pytest.mark.parametrize("size", [1.0, 1e-7])
def test_the_log_probs_of_a_float16_head_do_as_well(size: float) -> None:
    x = random_inputs(2 * CHUNK + 3, 61, bias=True, dtype=torch.float16)
    given, truth = x.to(torch.float16, leaves=True), x.to(torch.float64, leaves=True)
    got, wanted = ours(given, entropy="grad"), composed(truth)
    # the gradient of float32 values, so that size does not pass through float16
    mine = torch.autograd.grad([*got], given.leaves, [torch.full_like(y, size) for y in got])
    true = torch.autograd.grad([*wanted], truth.leaves, [torch.full_like(y, size) for y in wanted])
    step = 2.0**-24  # what float16 holds at least
    for one, other in zip(mine, true, strict=True):
        assert ((one.double() - other).abs() <= other.abs().max() * 2**-9 + step / 2).all()


@pytest.mark.parametrize("mode", ["token_mask", "token_truncate"])
def test_an_on_policy_loss_with_a_sampler_correction_is_foreseen(mode: Any) -> None:
    """The unit comes from ratios to the sampler, which would all be e^4 if the log-probs were taken to be 0: then no
    token would keep a slope with ``token_mask``."""
    config = PolicyLossConfig("dapo", sampler_correction=mode)
    batch = random_batch(dtype=torch.float16, masked=False, bias=False)
    batch = replace(batch, hidden=batch.hidden / 32)
    batch.tokenwise["sampling_logprobs"] = written_logprobs(batch)[0]
    half, truth = batch.to(torch.float16), batch.to(torch.float64)
    options = {"normalizer": 100.0, "old_logprobs": None}
    mine, wanted = gradients(half.ours(config, **options), half), gradients(truth.composed(config, **options), truth)
    for one, other in zip(mine, wanted, strict=True):
        assert relative_error(one, other) < 2**-9


def test_slopes_that_no_one_foresaw_give_infinities_and_no_wrong_numbers() -> None:
    """A ratio of e^10 where 1 was foreseen."""
    x = random_inputs(3, 61, dtype=torch.float16).to(torch.float16, leaves=True)
    old = ours(x).logprobs.detach() - 10
    given = x.hidden, x.lm_head, x.targets, -torch.ones(1), torch.tensor([0, 3])
    loss = linear_policy_loss(*given, old_logprobs=old, config=PolicyLossConfig("bnpo")).loss
    dhidden, dweight = torch.autograd.grad(loss * 1e-4, [x.hidden, x.lm_head])
    assert not dhidden.isfinite().all(-1).any() and not dweight.isfinite().all()


def test_what_an_ignored_row_is_sent_does_not_reach_the_others() -> None:
    x = random_inputs(5, 61, dtype=torch.float16).to(torch.float16, leaves=True)
    x.targets[2] = -100
    slopes = torch.tensor([1.0, 2.0, torch.nan, -1.0, 0.5])
    got = torch.autograd.grad(ours(x).logprobs, x.leaves, slopes)
    expected = torch.autograd.grad(ours(x).logprobs, x.leaves, slopes.nan_to_num(0.0))
    assert all(torch.equal(one, other) and one.isfinite().all() for one, other in zip(got, expected, strict=True))
