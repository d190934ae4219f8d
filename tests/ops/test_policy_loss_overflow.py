"""Where a ratio, a sampler's weight or k3 leaves the range of float32: the losses against exact arithmetic."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from maestro_fast.ops import LossInputs, PolicyLossConfig, policy_loss
from tests.ops.helpers import assert_as_accurate
from tests.ops.linear_policy_loss_batch import ALL_VARIANTS, CHUNK, Batch, random_batch, values_and_gradients
from tests.ops.overflow import (
    IMPOSSIBLE,
    VARIANTS,
    check_impossible,
    check_impossible_in_a_response,
    check_nan_is_seen,
    check_overflow,
)


def by_the_reference(inputs: LossInputs, config: PolicyLossConfig) -> tuple[Tensor, Tensor]:
    loss = policy_loss(**inputs._asdict(), config=config, backend="torch").loss
    return loss, torch.autograd.grad(loss, inputs.logprobs)[0]


@pytest.mark.parametrize("variant", VARIANTS)
def test_right_where_it_fits_and_never_nan(variant: str) -> None:
    check_overflow(by_the_reference, variant, count=400)


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_a_token_of_probability_zero(name: str) -> None:
    check_impossible(by_the_reference, name)


def test_a_token_of_probability_zero_in_a_response() -> None:
    check_impossible_in_a_response(by_the_reference)


def test_what_is_not_a_number_is_seen() -> None:
    check_nan_is_seen(by_the_reference)


# --- from hidden states ---


@pytest.mark.parametrize("on_policy", [False, True])
@pytest.mark.parametrize("variant", ALL_VARIANTS)
def test_from_hidden_states_far_from_the_other_policies(
    variant: str, on_policy: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every policy is up to 150 nats away. Where that would make the loss itself infinite, it is on the other side."""
    monkeypatch.setattr("maestro_fast.ops.head.chunk_rows", lambda vocabulary, device: CHUNK)
    batch, config = random_batch(masked=False), ALL_VARIANTS[variant]
    generator = torch.Generator().manual_seed(1)
    away = 150 * torch.rand(3, len(batch.targets), dtype=torch.float64, generator=generator)
    positive_T = (batch.advantages > 0).repeat_interleave(torch.tensor(batch.lengths))
    old, ref, sampling = (x for name, x in batch.tokenwise.items() if name != "token_mask")
    assert old is not None and ref is not None and sampling is not None
    far = {"old_logprobs": old + torch.where(positive_T, -away[0], away[0]), "sampling_logprobs": sampling - away[2]}
    far["ref_logprobs"] = ref - away[1]
    batch = replace(batch, tokenwise={**batch.tokenwise, **{name: x.float().double() for name, x in far.items()}})
    if config.kl_bias_correction and not on_policy:  # A ratio of e^150 times the KL is too large.
        batch.tokenwise["old_logprobs"] = old + away[0]
    options = {"old_logprobs": None} if on_policy else {}
    truth = values_and_gradients(Batch.composed, batch.to(torch.float64), config, **options)
    found = values_and_gradients(Batch.ours, batch.to(torch.float32), config, **options)
    for mine, wanted in [*zip(found[-3:], truth[-3:], strict=True), (found[0], truth[0])]:
        assert_as_accurate(mine, wanted, wanted, epsilon=2e-4 * wanted.abs().max().item() + 1e-30)
