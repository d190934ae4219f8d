"""Every loss variant under every profile: against its peer, in value and gradient, and against finite differences."""

from __future__ import annotations

from itertools import combinations
from typing import get_args

import pytest
import torch
from torch import Tensor

from maestro_fast.ops import PROFILES
from maestro_fast.specs import Normalization, Objective, Ratio, SamplerCorrection
from tests.ops.parity import CELLS, PEERS, VARIANTS, batch_for, config_of, our_advantages, our_loss, run_cell
from tests.ops.parity_table import FILE, cells_of


@pytest.mark.parametrize(("variant", "profile"), CELLS)
def test_equals_the_peer(variant: str, profile: str) -> None:
    cell = run_cell(variant, profile)
    rtol = PEERS[profile].rtol
    assert cell.errors.value <= rtol and cell.errors.gradient <= rtol, cell.errors
    assert cell.peer.abs() > 1e-3 and cell.peer_gradient.abs().max() > 1e-3


@pytest.mark.parametrize(("variant", "profile"), CELLS)
def test_gradients_equal_finite_differences(variant: str, profile: str) -> None:
    """In float64, of the log-probs, the entropies and, through the advantages, the weights."""
    batch = batch_for(profile)
    inputs = {"logprobs": batch.logprobs, "entropies": batch.entropies, "weights": batch.weights}
    differentiated = ["logprobs", "weights"] + ["entropies"] * (VARIANTS[variant].entropy_coef > 0)
    if VARIANTS[variant].objective == "cispo":  # whose gradient is not that of its value, see below
        differentiated.remove("logprobs")

    def loss(*leaves: Tensor) -> Tensor:
        given = inputs | dict(zip(differentiated, leaves, strict=True))
        return our_loss(variant, profile, given["logprobs"], given["entropies"], given["weights"])

    leaves = tuple(inputs[name].clone().requires_grad_() for name in differentiated)
    assert all(x.abs().max() > 1e-4 for x in torch.autograd.grad(loss(*leaves), leaves))
    assert torch.autograd.gradcheck(loss, leaves, fast_mode=True, atol=1e-9, rtol=1e-5)


@pytest.mark.parametrize("profile", PROFILES)
def test_the_gradient_of_cispo_is_the_capped_ratio_times_the_advantage(profile: str) -> None:
    batch, config = batch_for(profile), config_of("cispo", profile)
    advantages_T = our_advantages("cispo", profile, batch.weights).repeat_interleave(batch.lengths_B)
    capped = (batch.logprobs - batch.old).exp().clamp(max=config.clip_max)
    expected = -capped * advantages_T / batch.step_tokens
    torch.testing.assert_close(run_cell("cispo", profile).our_gradient, expected, rtol=1e-12, atol=1e-15)


def test_every_profile_and_every_option_of_the_loss_has_cells() -> None:
    assert set(PEERS) == set(PROFILES)
    for name, options in (
        ("normalization", Normalization),
        ("objective", Objective),
        ("ratio", Ratio),
        ("sampler_correction", SamplerCorrection),
    ):
        assert {getattr(config, name) for config in VARIANTS.values()} == set(get_args(options)), name
    for name, default in (("kl_coef", 0.0), ("entropy_coef", 0.0), ("clip_max", None), ("clip_high", 0.2)):
        assert any(getattr(config, name) != default for config in VARIANTS.values()), name


def test_no_two_variants_have_the_same_gradient() -> None:
    """Then every option has an effect on these inputs: clips are reached, ratios capped, responses masked."""
    cells = {variant: run_cell(variant, "grpo").peer_gradient for variant in VARIANTS}
    for (one, first), (other, second) in combinations(cells.items(), 2):
        assert first.shape != second.shape or (first - second).abs().max() > 1e-4, (one, other)


def test_the_committed_table_has_these_cells() -> None:
    """Its digits are measured, and differ between machines."""
    assert cells_of(FILE.read_text()) == set(CELLS), "run python -m tests.ops.parity_table"
